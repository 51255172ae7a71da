"""Multistart: successive halving finds the right one of many minima, and reads nothing for it."""

from __future__ import annotations

import functools
import warnings
from itertools import pairwise
from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.optimize import OptimizeWarning

import nlsq_dask as nd
from nlsq_dask import HybridStreamingConfig as Config
from nlsq_dask.fit.settings import multistart_settings
from nlsq_dask.warmup.multistart import draw_box, draw_starts
from tests import problems
from tests.many_minima import PROBLEMS, ManyMinima, wave

BY_NAME = {problem.name: problem for problem in PROBLEMS}
EACH = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
SLOW = pytest.mark.slow
ONE_FAST = pytest.mark.parametrize(
    "problem",
    [pytest.param(p, id=p.name, marks=[SLOW] if i else []) for i, p in enumerate(PROBLEMS)],
)


def is_global(problem: ManyMinima, result: nd.FitResult) -> bool:
    """Return whether a fit has found the minimum next to the truth."""
    best = problem.best
    found = result.success and result.cost <= best.cost * (1 + 1e-6)
    if found:
        assert (np.abs(result.popt - best.popt) <= 0.01 * best.perr).all()
        assert (np.abs(result.popt - problem.truth) <= 5 * result.perr).all()
    return bool(found)


def multistart(problem: ManyMinima, seed: int) -> nd.FitResult:
    return problem.fit(enable_multistart=True, n_starts=problem.n_starts, random_seed=seed)


# --- many minima


@ONE_FAST
def test_multistart_finds_what_a_single_start_does_not(problem: ManyMinima) -> None:
    assert problem.best.success
    with warnings.catch_warnings():  # where it ends, the data may not determine everything
        warnings.simplefilter("ignore", category=OptimizeWarning)
        single = problem.fit()
    assert single.cost > 1.5 * problem.best.cost
    assert is_global(problem, multistart(problem, 0))


@pytest.mark.slow
@EACH
def test_multistart_hardly_depends_on_the_seed(problem: ManyMinima) -> None:
    assert sum(is_global(problem, multistart(problem, seed)) for seed in range(20)) >= 19


def test_multistart_reads_no_more_than_a_fit_from_a_good_start() -> None:
    problem = BY_NAME["frequency of a wave"]
    x = np.random.default_rng(3).uniform(0, 10, 200_000)
    noise = problem.noise * np.random.default_rng(4).standard_normal(len(x))
    with jax.enable_x64(True):
        y = np.asarray(problem.model(jnp.asarray(x), *problem.truth)) + noise
    arrays = da.from_array(x, chunks=10_000), da.from_array(y, chunks=10_000)

    fit_to = functools.partial(
        problems.fit, problem.model, *arrays, bounds=problem.bounds, sample_rows=20_000, cache=0
    )
    good = fit_to(p0=problem.truth)
    found = fit_to(p0=problem.start, enable_multistart=True, n_starts=problem.n_starts)
    np.testing.assert_allclose(found.popt, good.popt, rtol=1e-6)
    assert found.n_passes <= good.n_passes + 1
    assert found.rows_read <= good.rows_read
    assert found.phase_history[1]["sample"] == good.phase_history[1]["sample"]


# --- what the options do

X = np.random.default_rng(7).uniform(0, 10, 3_000)
Y = 1.5 * np.sin(4.2 * X) + 0.7 * np.cos(4.2 * X) + 0.3
Y += 0.5 * np.random.default_rng(8).standard_normal(len(X))
START = [1.0, 0.0, 2.0, 0.0]
BOUNDS = ([-3, -3, 0.5, -3], [3, 3, 8, 3])


fit = functools.partial(
    problems.fit,
    model=wave,
    x=X,
    y=Y,
    p0=START,
    bounds=BOUNDS,
    enable_multistart=True,
    n_starts=12,
)


def held(result: nd.FitResult) -> dict[str, Any]:
    found: dict[str, Any] = result.diagnostics["multistart"]
    return found


def test_diagnostics_describe_successive_halving() -> None:
    result = fit()
    found, history = held(result), result.phase_history[1]
    assert found["candidates"].shape == (12, 4)
    np.testing.assert_array_equal(found["candidates"][0], START)
    low, high = map(np.array, BOUNDS)
    assert ((low < found["candidates"]) & (found["candidates"] < high)).all()
    assert [r["rows"] for r in found["rounds"]] == [1600, 3000, 3000]
    assert [len(r["survivors"]) for r in found["rounds"]] == [6, 3, 2]
    playing = np.arange(12)
    for one in found["rounds"]:
        assert np.isfinite(one["losses"][playing]).all()
        assert np.isnan(np.delete(one["losses"], playing)).all()
        ranked = np.sort(one["losses"][playing])[: len(one["survivors"])]
        np.testing.assert_array_equal(one["losses"][one["survivors"]], ranked)
        playing = np.sort(one["survivors"])
    assert found["winner"] == found["rounds"][-1]["survivors"][0]
    assert history["multistart"] == {
        "candidates": 12,
        "rows": [1600, 3000, 3000],
        "survivors": [6, 3, 2],
        "winner": found["winner"],
    }
    assert history["start"] == "winner"
    assert found["warm_up_of_p0"]["start"] == "p0"
    np.testing.assert_allclose(result.popt, fit(p0=found["candidates"][0]).popt, rtol=1e-8)


def test_it_is_off_by_default_and_one_start_is_no_more_than_p0() -> None:
    single = fit(enable_multistart=False)
    assert "multistart" not in single.diagnostics
    one = fit(n_starts=1)
    assert held(one)["candidates"].tolist() == [START]
    assert "warm_up_of_p0" not in held(one)
    assert one.cost <= single.cost * (1 + 1e-8)


def test_rounds_fraction_and_batches() -> None:
    found = held(fit(elimination_rounds=2, elimination_fraction=0.8, batches_per_round=20))
    assert [r["rows"] for r in found["rounds"]] == [640, 1280]
    assert [len(r["survivors"]) for r in found["rounds"]] == [3, 1]


def test_the_seed_decides_everything() -> None:
    one, again, other = fit(random_seed=5), fit(random_seed=5), fit(random_seed=6)
    np.testing.assert_array_equal(one.popt, again.popt)
    for a, b in zip(held(one)["rounds"], held(again)["rounds"], strict=True):
        np.testing.assert_array_equal(a["losses"], b["losses"])
    assert (held(one)["candidates"][1:] != held(other)["candidates"][1:]).all()


def drawn(start: Any = START, bounds: Any = BOUNDS, **options: Any) -> np.ndarray:
    start, low, high = (np.array(v, dtype=float) for v in (start, *bounds))
    return draw_starts(start, low, high, multistart_settings(Config(**options)))


def test_samplers_cover_the_box_in_different_ways() -> None:
    all_drawn = [
        drawn(multistart_sampler=sampler, n_starts=18, scale_factor=2.0)
        for sampler in ("lhs", "sobol", "halton")
    ]
    for points in all_drawn:
        assert points.shape == (18, 4)
        share = (points[1:] - BOUNDS[0]) / np.subtract(BOUNDS[1], BOUNDS[0])
        counts = [np.histogram(column, 4, (0, 1))[0] for column in share.T]
        assert np.min(counts) >= 2
    assert not any((a[1:] == b[1:]).any() for a, b in pairwise(all_drawn))
    assert drawn(multistart_sampler="sobol", n_starts=1).tolist() == [START]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # p0 = 2 in [0, 10]; 0 in (-inf, inf); -3 in (-4, inf); 5 on its bound in [5, 7]
        ({}, [(0, 7), (-1, 1), (-4, 0), (5, 6)]),
        ({"scale_factor": 0.1}, [(1.5, 2.5), (-0.1, 0.1), (-3.3, -2.7), (5, 5.1)]),
        ({"scale_factor": 10.0}, [(0, 10), (-10, 10), (-4, 27), (5, 7)]),
        ({"center_on_p0": False}, [(0, 10), (-1, 1), (-4, 0), (5, 7)]),
        (
            {"center_on_p0": False, "scale_factor": 0.1},
            [(4.5, 5.5), (-0.1, 0.1), (-3.3, -2.7), (5.9, 6.1)],
        ),
    ],
    ids=str,
)
def test_the_box(options: dict[str, Any], expected: Any) -> None:
    inf = np.inf
    start, low, high = np.array([[2, 0, -3, 5], [0, -inf, -4, 5], [10, inf, inf, 7.0]])
    lowest, highest = draw_box(start, low, high, multistart_settings(Config(**options)))
    np.testing.assert_allclose(np.transpose([lowest, highest]), expected)
    points = draw_starts(start, low, high, multistart_settings(Config(**options)))[1:]
    assert ((lowest < points) & (points < highest)).all()


def test_the_middle_of_bounds_that_are_not_there() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(
        Config(enable_multistart=True, center_on_p0=False, verbose=0)
    )
    for call in (optimizer.fit, optimizer.plan):
        with pytest.raises(ValueError, match=r"center_on_p0=False .* no parameter has two finite"):
            call(wave, X, Y, START, ([0, -np.inf, 0, -np.inf], np.inf))


# --- what kinds of fits there are


def rho(loss: str, z: Any) -> Any:
    if loss == "huber":
        return np.where(z <= 1, z, 2 * z**0.5 - 1)
    return np.log1p(z) if loss == "cauchy" else z


@pytest.mark.parametrize(
    "loss", [pytest.param("linear", marks=SLOW), "huber", pytest.param("cauchy", marks=SLOW)]
)
def test_losses_are_those_of_the_fit(loss: str) -> None:
    sigma = np.random.default_rng(9).uniform(0.3, 1.0, len(X))
    y = Y.copy()
    y[::7] += 20 * (loss != "linear")
    y[::11] = np.nan
    data = {"sigma": sigma, "nan_policy": "omit", "loss": loss, "f_scale": 1.5}
    result = fit(y=y, batches_per_round=100, **data)
    found = held(result)
    a, b, omega, c = found["start"]
    residual = (a * np.sin(omega * X) + b * np.cos(omega * X) + c - y) / sigma
    usable = np.isfinite(y)
    expected = np.mean(1.5**2 * rho(loss, (residual[usable] / 1.5) ** 2))
    last = found["rounds"][-1]
    assert last["rows"] == usable.sum()
    assert last["losses"][found["winner"]] == pytest.approx(expected, rel=1e-9)
    assert result.success
    assert result.popt[2] == pytest.approx(4.2, abs=0.05)


@SLOW
def test_p0_on_a_bound_and_no_bounds() -> None:
    at_bound = fit(p0=[1.0, 0.0, 0.5, 0.0], scale_factor=2.0, n_starts=20)
    free = fit(bounds=None, scale_factor=3.0, n_starts=30)
    assert held(at_bound)["candidates"][:, 2].min() == 0.5
    for result in (at_bound, free):
        assert result.popt[2] == pytest.approx(4.2, abs=0.05)


def test_a_solution_on_a_bound() -> None:
    bounds = ([-3, -3, 0.5, 0.5], [3, 3, 8, 3])
    result = fit(p0=[1.0, 0.0, 2.0, 1.0], bounds=bounds)
    assert result.success
    assert result.popt[3] == 0.5
    assert result.popt[2] == pytest.approx(4.2, abs=0.05)


@SLOW
def test_starts_where_the_model_is_not_finite_leave() -> None:
    def root(x: Any, a: Any, b: Any) -> Any:
        return a * jnp.sqrt(x + b)

    y = 2 * np.sqrt(X + 1) + 0.01 * np.random.default_rng(0).standard_normal(len(X))
    result = problems.fit(root, X, y, [1.0, -1.0], enable_multistart=True, scale_factor=4.0)
    found = held(result)
    first = found["rounds"][0]
    assert np.isinf(first["losses"][0])  # p0 among them
    assert np.isfinite(first["losses"][first["survivors"]]).all()
    np.testing.assert_allclose(result.popt, [2, 1], atol=0.01)


@jax.custom_vjp
def reverse_only(b: Any) -> Any:
    return jnp.sin(b)


reverse_only.defvjp(lambda b: (jnp.sin(b), b), lambda b, g: (g * jnp.cos(b),))


def loops(x: Any, a: Any, b: Any) -> Any:
    product = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * b), (0, x))[1]
    return a * jnp.sin(product)


@SLOW
def test_models_with_one_kind_of_derivative() -> None:
    options = {"enable_multistart": True, "max_warmup_iterations": 0}
    x = X[:500] / 2
    for model, truth in ((lambda x, a, b: a * reverse_only(b * x), 3.0), (loops, 3.0**0.5)):
        y = 2 * np.sin(3 * x)
        result = problems.fit(model, x, y, [1.0, 1.5], ([0, 0.1], [5, 4]), **options)
        np.testing.assert_allclose(result.popt, [2, truth], rtol=1e-6)


def test_a_sample_that_is_too_small() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=OptimizeWarning)
        result = fit(sample_rows=2)
    assert result.phase_history[1]["skipped"] == held(result)["skipped"]
    assert "too few" in held(result)["skipped"]


# --- watching


def test_rounds_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    fit(verbose=1)
    out = capsys.readouterr().out
    for part in (
        "round 1 on 1,600 rows",
        "round 3",
        "remaining starts: 2",
        "from winner",
        "from p0",
    ):
        assert part in out


def test_the_callback_can_stop_both_warm_ups() -> None:
    counts: list[int] = []

    def callback(params: Any, loss: float, iteration: int) -> None:
        counts.append(iteration)
        if iteration == last:
            raise StopIteration

    for last in (1, 10**9):
        counts.clear()
        result = fit(callback=callback, callback_frequency=1)
        assert counts == list(range(1, len(counts) + 1))
        assert result.success == (last > 1)
        assert ("callback" in result.message) == (last == 1)
