"""Fits that read the data little more than once: subsets of the blocks, and the step after them.

Subsets are used from 5 million rows on; here, from 200,000, which takes another tolerance: with
fewer rows, a step is less exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from dask.distributed import Client, LocalCluster
from scipy.signal import lfilter

import nlsq_dask as nd
from nlsq_dask.data import sampling, subsets
from nlsq_dask.data.sampling import plan_sample
from nlsq_dask.data.subsets import plan_subsets
from nlsq_dask.engine import reduction_tree
from nlsq_dask.errors import BlockReadError, NonFiniteDataError
from nlsq_dask.events import BlocksFinished, Event, PassFinished, SubsetFinished
from nlsq_dask.solvers import gauss_newton
from tests.problems import fit as quiet_fit
from tests.problems import scipy_fit

N, CHUNK = 400_000, 5_000
N_BLOCKS = N // CHUNK
READ = 8 * CHUNK, 15 * CHUNK  # rows of the sample and of the subset
START = [5.0, 2.6, 1.0]
OPTIONS: dict[str, Any] = {"cache": 0, "gauss_newton_tol": 5e-8, "max_warmup_iterations": 0}
ERROR = 1e-3  # standard errors that this tolerance allows


def exponential(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsets, "_MIN_ROWS", 200_000)
    monkeypatch.setattr(sampling, "_CHEAP_ROWS", 0)


def data(seed: int = 4, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 5, N)
    return x, 2.5 * np.exp(-1.3 * x) + 0.5 + noise * rng.standard_normal(N)


Store = Callable[..., tuple[zarr.Array, ...]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    def write(*arrays: np.ndarray) -> tuple[zarr.Array, ...]:
        return tuple(
            zarr.create_array(
                tmp_path / f"{i}", data=a, chunks=(CHUNK,), compressors=None, overwrite=True
            )
            for i, a in enumerate(arrays)
        )

    return write


def fit(x: Any, y: Any, start: Any = START, **options: Any) -> nd.FitResult:
    return quiet_fit(exponential, x, y, start, **{**OPTIONS, **options})


def distance(result: nd.FitResult, popt: np.ndarray) -> float:
    return float(np.abs((result.x - popt) / result.perr).max())


# --- which blocks


def test_subsets_are_nested_spread_and_contain_the_sample() -> None:
    rows = np.full((40, 50), 100_000)
    sample = [(3, 4), (20, 20), (39, 49)]
    first, last = plan_subsets(rows, sample, seed=1, in_memory=False)
    assert (len(first), len(last)) == (32, 250)  # 1/64 and 1/8 of 2,000
    assert {int(np.ravel_multi_index(block, rows.shape)) for block in sample} <= first < last
    for axis in range(2):  # like the rows of a Latin square, and not by chance alone
        positions = np.unravel_index(list(last), rows.shape)[axis]
        counts = np.histogram(positions, bins=10, range=(0, rows.shape[axis]))[0]
        assert counts.min() >= 20
    again = plan_subsets(rows, sample, seed=1, in_memory=False)
    assert again == (first, last) != plan_subsets(rows, sample, seed=2, in_memory=False)


def test_blocks_without_rows_are_not_in_a_subset() -> None:
    rows = np.where(np.arange(64) % 2, 500_000, 0)
    (blocks,) = plan_subsets(rows, [(1,)], seed=0, in_memory=False)
    assert len(blocks) == 6  # 3/16 of 32
    assert all(rows[i] for i in blocks)


@pytest.mark.parametrize(
    ("n_rows", "n_blocks", "in_memory"),
    [(10**9, 100, True), (10**5, 100, False), (10**9, 7, False)],
)
def test_small_data_and_data_in_memory_have_no_subsets(
    n_rows: int, n_blocks: int, in_memory: bool
) -> None:
    rows = np.full(n_blocks, n_rows // n_blocks)
    assert plan_subsets(rows, [(0,)], seed=0, in_memory=in_memory) == ()


# --- the solution


def test_one_pass_is_enough(store: Store) -> None:
    x, y = data()
    events: list[Event] = []
    result = fit(*store(x, y), observers=[events.append])
    popt, pcov = scipy_fit(exponential, x, y, [2.0, 1.0, 0.0])
    assert result.success
    assert result.n_passes == 1
    error = result.diagnostics["last_step_error"]
    assert 0.0 < error <= ERROR
    assert f"{error:.1g} standard errors" in result.message
    assert distance(result, popt) <= 4 * error
    # Cost and covariance are those of the solution, not of the pass before it.
    chi2 = float(np.sum((2.5 - 2.5 + exponential_np(x, popt) - y) ** 2))
    assert abs(result.chi2 - chi2) < 1e-2 * result.sigma_sq
    assert result.cost == pytest.approx(0.5 * result.chi2, rel=1e-14)
    assert np.abs(result.perr / np.sqrt(np.diag(pcov)) - 1).max() < 1e-5
    (subset,) = [event for event in events if isinstance(event, SubsetFinished)]
    passes = [event for event in events if isinstance(event, PassFinished)]
    assert (subset.blocks, subset.rows, len(passes)) == (15, READ[1], 1)
    assert result.rows_read == sum(READ) + N
    assert subset.loss == pytest.approx(0.01**2, rel=0.05)
    shown = {e.subset: e.n_blocks for e in events if isinstance(e, BlocksFinished)}
    assert shown == {1: 15, 0: N_BLOCKS}


def exponential_np(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.asarray(p[0] * np.exp(-p[1] * x) + p[2])


def test_the_switch_and_a_strict_tolerance_take_a_second_pass(store: Store) -> None:
    arrays = store(*data())
    one, off = fit(*arrays), fit(*arrays, enable_one_pass=False)
    strict = fit(*arrays, gauss_newton_tol=1e-10)
    assert (one.n_passes, off.n_passes, strict.n_passes) == (1, 2, 2)
    assert off.rows_read == READ[0] + 2 * N
    assert off.diagnostics["last_step_error"] is None
    assert distance(one, off.x) <= ERROR
    assert distance(strict, off.x) <= 1e-6


@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_a_model_that_does_not_describe_the_data(store: Store, loss: str) -> None:
    """The second derivatives count; heavy tails with a robust loss."""
    x, y = data()
    y = y + 0.01 * np.sin(7 * x)
    if loss != "linear":
        y = y + 0.01 * np.random.default_rng(1).standard_t(1.5, N)
    arrays = store(x, y)
    one = quiet_fit(exponential, *arrays, START, loss=loss, f_scale=0.02, **OPTIONS)
    two = quiet_fit(
        exponential, *arrays, START, loss=loss, f_scale=0.02, **OPTIONS, enable_one_pass=False
    )
    assert one.success
    assert two.success
    assert distance(one, two.x) <= 5 * ERROR
    np.testing.assert_allclose(one.perr, two.perr, rtol=3e-5)
    assert abs(one.cost - two.cost) < 0.02 * two.sigma_sq


def test_a_feature_that_all_subsets_miss(store: Store) -> None:
    """The peak is in one block, which neither sample nor subset contains."""
    x = np.linspace(0, 100, N, endpoint=False)
    rng = np.random.default_rng(1)
    missed = next(i for i in range(N_BLOCKS) if i not in subset_of(4_000))
    center = (missed + 0.4) / N_BLOCKS * 100
    y = 0.3 + 0.02 * x + 4.0 * np.exp(-0.5 * ((x - center) / 0.1) ** 2) + 0.1 * rng.normal(size=N)

    def model(x: Any, a: Any, b: Any, height: Any, at: Any) -> Any:
        return a + b * x + height * jnp.exp(-0.5 * ((x - at) / 0.1) ** 2)

    start = [0.0, 0.0, 1.0, center - 0.05]
    options = {**OPTIONS, "sample_rows": 4_000}
    arrays = store(x, y)
    one = quiet_fit(model, *arrays, start, **options)
    popt, _ = scipy_fit(model, x, y, start)
    assert one.success
    assert distance(one, popt) <= ERROR
    assert one.n_passes > 1


def subset_of(sample_rows: int) -> frozenset[int]:
    """Return the subset of the blocks in a fit with this number of rows in the sample."""
    block_rows = np.full(N_BLOCKS, CHUNK)
    sample = plan_sample(block_rows, sample_rows, 0, False).blocks
    (blocks,) = plan_subsets(block_rows, sample, 0, False)
    return blocks


@pytest.mark.parametrize("kind", ["drift", "one bad block"])
def test_blocks_that_differ(store: Store, kind: str) -> None:
    x, y = data()
    block = np.arange(N) // CHUNK
    y = y + (0.0001 * block if kind == "drift" else np.where(block == 13, 1.0, 0.0))
    arrays = store(x, y)
    one, two = fit(*arrays), fit(*arrays, enable_one_pass=False)
    assert one.success
    assert two.success
    assert distance(one, two.x) <= ERROR


def test_the_estimated_error_is_that_of_many_data_sets(store: Store) -> None:
    ratios = []
    for seed in range(6):
        x, y = data(seed)
        result = fit(*store(x, y))
        popt, _ = scipy_fit(exponential, x, y, result.x)
        if result.n_passes == 1:
            ratios.append(distance(result, popt) / result.diagnostics["last_step_error"])
    assert len(ratios) >= 4
    assert max(ratios) < 4.0
    assert np.median(ratios) < 1.5


@pytest.mark.parametrize("kind", ["outliers", "correlated"])
def test_noise_that_a_sample_does_not_show(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The estimated error counts rare outliers, and the correlation of neighbors."""
    monkeypatch.setattr(gauss_newton, "_ERROR_PER_TOL", np.inf)
    monkeypatch.setattr(gauss_newton, "_MAX_ONE_STEP_ERROR", np.inf)
    monkeypatch.setattr(gauss_newton, "_COVARIANCE_PER_TOL", np.inf)
    monkeypatch.setattr(gauss_newton, "_MAX_COVARIANCE_ERROR", np.inf)
    x, y = data(noise=0.02)
    rng = np.random.default_rng(1)
    if kind == "outliers":
        y[rng.integers(0, N, 20)] += 100.0 * rng.choice([-1, 1], 20)
    else:
        x = np.sort(x)
        decay = np.exp(-1 / 300)
        noise = lfilter([np.sqrt(1 - decay**2)], [1, -decay], rng.standard_normal(N))
        y = exponential_np(x, np.array([2.5, 1.3, 0.5])) + 0.02 * noise
    result = fit(*store(x, y), sample_rows=4_000)
    popt, _ = scipy_fit(exponential, x, y, result.x)
    assert result.n_passes == 1
    assert distance(result, popt) < 2 * result.diagnostics["last_step_error"]


def test_skewed_residuals_with_a_robust_loss(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """J^T J depends on the signs of the residuals."""
    monkeypatch.setattr(gauss_newton, "_ERROR_PER_TOL", np.inf)
    monkeypatch.setattr(gauss_newton, "_MAX_ONE_STEP_ERROR", np.inf)
    monkeypatch.setattr(gauss_newton, "_COVARIANCE_PER_TOL", np.inf)
    monkeypatch.setattr(gauss_newton, "_MAX_COVARIANCE_ERROR", np.inf)
    x, y = data(noise=0.0)
    y += 0.03 * np.random.default_rng(1).exponential(size=N)
    arrays = store(x, y)
    robust: dict[str, Any] = {"loss": "soft_l1", "f_scale": 0.02}
    one = fit(*arrays, **robust)
    two = fit(*arrays, **robust, enable_one_pass=False)
    assert (one.n_passes, two.n_passes) == (1, 2)
    assert distance(one, two.x) < 2 * one.diagnostics["last_step_error"]


# --- invalid rows and blocks


def test_a_nan_in_a_subset_is_counted_in_all_rows(store: Store) -> None:
    x, y = data()
    y[::1000] = np.nan
    with pytest.raises(NonFiniteDataError, match=r"400 of 400,000 rows hold NaN"):
        fit(*store(x, y))
    result = fit(*store(x, y), nan_policy="omit")
    assert result.n_omitted == 400
    assert result.n_passes == 1


def test_unreadable_blocks_of_a_subset(store: Store, tmp_path: Path) -> None:
    x, y = data()
    arrays = store(x, y)
    sample = plan_sample(np.full(N_BLOCKS, CHUNK), 2**16, 0, False).blocks
    bad = min(subset_of(2**16) - {block for (block,) in sample})
    (tmp_path / "1" / "c" / str(bad)).write_bytes(b"damaged")
    with pytest.raises(BlockReadError):
        fit(*arrays)
    with pytest.warns(nd.DataWarning, match="5,000 of 400,000 rows"):
        result = fit(*arrays, min_success_rate=0.9)
    keep = np.arange(N) // CHUNK != bad
    popt, _ = scipy_fit(exponential, x[keep], y[keep], [2.0, 1.0, 0.0])
    assert result.success
    assert distance(result, popt) <= ERROR


# --- schedulers, cache, resuming


@pytest.fixture(scope="module")
def processes() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def same(one: nd.FitResult, other: nd.FitResult) -> bool:
    names = "x", "pcov", "cost", "grad", "rows_read", "message"
    return all(np.array_equal(one[name], other[name]) for name in names)


def test_the_same_bits_everywhere(store: Store, processes: Client) -> None:
    arrays = store(*data())
    with dask.config.set(scheduler="synchronous"):
        expected = fit(*arrays)
    with dask.config.set(scheduler="threads", num_workers=3):
        assert same(fit(*arrays), expected)
    with processes.as_current():
        assert same(fit(*arrays), expected)


@pytest.mark.parametrize("is_group", [True, False])
def test_a_subset_in_the_cache(
    store: Store, processes: Client, monkeypatch: pytest.MonkeyPatch, is_group: bool
) -> None:
    """Blocks are read in groups; what is cached of a part of a group is not the group."""
    if is_group:
        monkeypatch.setattr(reduction_tree, "_MIN_GROUP_ROWS", 1)
        monkeypatch.setattr(reduction_tree, "_MIN_GROUP_BLOCKS", 1)
    arrays = store(*data())
    with processes.as_current():
        expected, kept = fit(*arrays), fit(*arrays, cache=10**9)
    assert np.array_equal(kept.x, expected.x)
    assert kept.n_points == N
    # A cluster may run a task on a worker that does not hold its block.
    assert (0 < kept.rows_cached <= READ[1]) if is_group else not kept.rows_cached
    assert kept.rows_read == expected.rows_read - kept.rows_cached


@pytest.mark.parametrize("at", ["subset", "within the subset", "pass", "within the pass"])
def test_a_fit_resumes_at_every_subset(store: Store, tmp_path: Path, at: str) -> None:
    arrays, folder = store(*data()), str(tmp_path / "checkpoints")
    expected = fit(*arrays)

    def kill(event: Event) -> None:
        match event:
            case SubsetFinished():
                hit = at == "subset"
            case PassFinished():
                hit = at == "pass"
            case BlocksFinished() if event.blocks > 2:
                hit = at == ("within the subset" if event.subset else "within the pass")
            case _:
                hit = False
        if hit:
            raise KeyboardInterrupt

    options = {"checkpoint_dir": folder, "checkpoint_interval": 1e-9}
    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(KeyboardInterrupt):
            fit(*arrays, **options, observers=[kill])
        resumed = fit(*arrays, **options, resume_from_checkpoint=True)
    assert same(resumed, expected)
    if at == "pass":
        assert resumed.n_passes == 1


def test_the_time_limit_in_the_pass_after_a_subset(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters are those that the subset has improved."""
    arrays = store(*data())
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("nlsq_dask.fit.interruption.time", clock)
    passes: list[PassFinished] = []

    def watch(event: Event) -> None:
        match event:
            case PassFinished():
                passes.append(event)
            case BlocksFinished() if not event.subset:
                clock.now = 2.0

    fit(*arrays, observers=[watch])
    clock.now = 0.0
    stopped = fit(*arrays, max_walltime=1.0, observers=[watch])
    (whole,) = passes
    assert stopped.status < 0
    assert stopped.rows_read == sum(READ)
    np.testing.assert_array_equal(stopped.x, whole.params)


def test_the_plan_states_what_is_read(store: Store) -> None:
    config = nd.HybridStreamingConfig(**OPTIONS, verbose=0)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    x, y = store(*data())
    plan = optimizer.plan(exponential, x, y, START)
    assert plan.subset_rows_read == (READ[1],)
    assert plan.expected_reads == (sum(READ) + N) / N
    assert f"Expected reads            {plan.expected_reads:.2f} x all rows" in str(plan)
    assert fit(x, y).rows_read == plan.sample_rows_read + READ[1] + N
    for option in ({"enable_one_pass": False}, {"gauss_newton_solver": "qr"}):
        other = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(**option, verbose=0))
        assert other.plan(exponential, x, y, START).subset_rows_read == ()
