"""How often the data are read: forecasts, last steps, and what the sample may not decide."""

from __future__ import annotations

from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

import nlsq_dask as nd
from nlsq_dask.events import SampleSolved
from nlsq_dask.observers.progress import Progress
from tests.problems import PROBLEMS, Problem, scipy_fit

Config = nd.HybridStreamingConfig


def fit(model: Any, x: Any, y: Any, start: Any, **options: Any) -> nd.FitResult:
    config = Config(**{"verbose": 0, "cache": 0, **options})
    return nd.AdaptiveHybridStreamingOptimizer(config).fit(model, x, y, start)


def exponential(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


def test_two_passes_and_a_last_step_are_exact() -> None:
    n = 600_000
    rng = np.random.default_rng(4)
    x = rng.uniform(0, 5, n)
    y = exponential_data(x, rng)
    result = fit(
        exponential,
        da.from_array(x, chunks=50_000),
        da.from_array(y, chunks=50_000),
        [5.0, 3.0, 1.0],
    )
    popt, pcov = scipy_fit(exponential, x, y, [2.0, 1.0, 0.0])
    perr = np.sqrt(np.diag(pcov))
    assert result.n_passes == 2
    assert result.diagnostics["last_step_without_pass"]
    assert (np.abs(result.x - popt) <= 1e-8 * np.abs(popt) + 1e-6 * perr).all()
    assert (np.abs(result.pcov - pcov) <= 1e-6 * np.outer(perr, perr)).all()


def exponential_data(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * rng.standard_normal(len(x))


def test_a_feature_in_one_chunk_that_the_sample_missed() -> None:
    """The peak is in 1 of 200 chunks; the first sample takes 16 of them."""
    n, chunk = 400_000, 2_000
    rng = np.random.default_rng(1)
    x = np.linspace(0, 100, n, endpoint=False)
    y = 0.3 + 0.02 * x + 4.0 * np.exp(-0.5 * ((x - 33.27) / 0.1) ** 2) + 0.1 * rng.normal(size=n)

    def model(x: Any, a: Any, b: Any, height: Any, centre: Any) -> Any:
        return a + b * x + height * jnp.exp(-0.5 * ((x - centre) / 0.1) ** 2)

    arrays = [da.from_array(array, chunks=chunk) for array in (x, y)]
    start = [0.0, 0.0, 1.0, 33.2]
    result = fit(model, *arrays, start, sample_rows=4_000)
    popt, pcov = scipy_fit(model, x, y, start)
    perr = np.sqrt(np.diag(pcov))
    assert result.success
    assert (np.abs(result.x - popt) <= 1e-8 * np.abs(popt) + 1e-5 * perr).all()
    assert result.n_passes > 2


@pytest.fixture(scope="module")
def ordered() -> tuple[np.ndarray, ...]:
    """Return x, y, and SciPy's answer."""
    rng = np.random.default_rng(4)
    x = np.sort(rng.uniform(0, 5, 400_000))  # a chunk shows a small part of the curve
    y = exponential_data(x, rng)
    return x, y, *scipy_fit(exponential, x, y, [2.0, 1.0, 0.0])


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_does_not_depend_on_the_sample(
    seed: int, ordered: tuple[np.ndarray, ...]
) -> None:
    x, y, popt, pcov = ordered
    arrays = [da.from_array(array, chunks=10_000) for array in (x, y)]
    result = fit(
        exponential, *arrays, [5.0, 3.0, 1.0], random_seed=seed, sample_rows=4_200 + 900 * seed
    )
    assert result.success
    assert (np.abs(result.x - popt) <= 1e-8 * np.abs(popt) + 1e-6 * np.sqrt(np.diag(pcov))).all()


def test_large_structured_residuals_need_few_passes() -> None:
    """Gauss-Newton alone converges linearly here, by a factor of 2 a pass."""
    n = 300_000
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 3, n)
    y = np.exp(0.9 * x) + 8.0 * np.sin(3.0 * x) + 0.1 * rng.normal(size=n)
    arrays = [da.from_array(array, chunks=10_000) for array in (x, y)]
    result = fit(lambda x, a, b: a * jnp.exp(b * x), *arrays, [0.5, 0.5], sample_rows=20_000)
    popt, pcov = scipy_fit(lambda x, a, b: a * jnp.exp(b * x), x, y, [1.0, 0.9])
    assert result.success
    assert result.n_passes <= 6
    assert (np.abs(result.x - popt) <= 1e-5 * np.sqrt(np.diag(pcov))).all()


def test_forecasts_that_do_not_help_are_given_up() -> None:
    """A row that outweighs all others is in no sample."""
    n = 400_000
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 3, n)
    y = np.exp(0.9 * x) + 0.1 * rng.normal(size=n)
    y[n // 3] = -3e5
    arrays = [da.from_array(array, chunks=20_000) for array in (x, y)]
    found = [
        fit(lambda x, a, b: a * jnp.exp(b * x), *arrays, [0.5, 0.5], random_seed=seed)
        for seed in range(2)
    ]
    assert all(result.success and result.n_passes <= 20 for result in found)
    np.testing.assert_allclose(found[0].x, found[1].x, rtol=1e-6)


def test_counts_are_what_was_read(tmp_path: Any) -> None:
    n, chunk = 3_000_000, 100_000
    rng = np.random.default_rng(4)
    x, y = (
        zarr.create_array(tmp_path / name, shape=(n,), chunks=(chunk,), dtype="f8") for name in "xy"
    )
    x[:] = rng.uniform(0, 5, n)
    y[:] = exponential_data(x[:], rng)
    result = fit(exponential, x, y, [5.0, 3.0, 1.0])
    sampled = result.diagnostics["sample"]["blocks"] * chunk
    assert result.rows_read == result.n_passes * n + sampled
    assert result.bytes_read == 16 * result.rows_read
    assert result.rows_cached == 0
    kept = fit(exponential, x, y, [5.0, 3.0, 1.0], cache="auto")
    assert kept.rows_read == n + sampled
    assert kept.rows_cached == (kept.n_passes - 1) * n
    np.testing.assert_array_equal(kept.x, result.x)


STANDARD = [problem for problem in PROBLEMS if problem.n_variables == 1]


@pytest.mark.slow
@pytest.mark.parametrize("is_ordered", [False, True], ids=["mixed", "ordered"])
@pytest.mark.parametrize("problem", STANDARD, ids=lambda p: p.name)
def test_rows_read_of_ten_million(problem: Problem, is_ordered: bool, tmp_path: Any) -> None:
    """With x ordered over the chunks, two of them, which are the sample, say little of the rest."""
    n, chunk = 10_000_000, 1_000_000
    x, y = (
        zarr.create_array(tmp_path / name, shape=(n,), chunks=(chunk,), dtype="f8") for name in "xy"
    )
    for start in range(0, n, chunk):
        rng = np.random.default_rng(start)
        values = rng.uniform(*problem.x_range, chunk)
        if is_ordered:
            low, high = problem.x_range
            values = low + (high - low) * (start + np.sort(rng.random(chunk)) * chunk) / n
        with jax.enable_x64(True):
            clean = np.asarray(problem.model(jnp.asarray(values), *problem.truth))
        x[start : start + chunk] = values
        y[start : start + chunk] = clean + problem.noise * rng.standard_normal(chunk)
    start_at = [2.0 * value for value in problem.truth]
    if problem.name == "damped sine":  # twice the frequency leads to another minimum
        start_at[2] = 1.05 * problem.truth[2]
    result = fit(problem.model, x, y, start_at)
    assert result.success
    assert result.rows_read <= (3.2 if is_ordered else 2.3) * n


@pytest.mark.parametrize("threshold", [50, 500])
def test_the_sample_is_solved_once_where_many_parameters_were_fitted_to_it(
    threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fits its solution better than all rows do by (1 + p / n) / (1 - p / n), and not worse."""
    solved: list[SampleSolved] = []
    monkeypatch.setattr(
        Progress, "__call__", lambda _, e: solved.extend([e] * isinstance(e, SampleSolved))
    )
    n, n_params = 40_000, 100
    rng = np.random.default_rng(8)
    x, truth = rng.integers(0, n_params, n), rng.normal(size=n_params)
    y = truth[x] + 0.1 * rng.standard_normal(n)
    options = {"sample_rows": 500, "cg_param_threshold": threshold, "max_warmup_iterations": 0}
    nd.AdaptiveHybridStreamingOptimizer(Config(verbose=1, **options)).fit(
        lambda x, *p: jnp.stack(p)[x.astype(int)], x, y, np.ones(n_params)
    )
    assert len(solved) == 1
