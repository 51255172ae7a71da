"""Cache, memory and devices, as they can be observed from outside; ``plan``."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, LocalCluster

import nlsq_dask as nd
from nlsq_dask.engine import dataset
from nlsq_dask.engine.cache_budget import cached_bytes
from nlsq_dask.engine.execution import PartialResults
from nlsq_dask.kernels.dense_terms import Accumulation

N_ROWS = 10 * 2**18  # of 16 bytes, in 10 groups
CHUNK = 2**18
START = [5.0, 3.0, 1.0]
Config = nd.HybridStreamingConfig


def model(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


def data() -> tuple[da.Array, da.Array]:
    rng = da.random.default_rng(3)
    x = rng.uniform(0, 5, N_ROWS, chunks=CHUNK)
    return x, 2.5 * da.exp(-1.3 * x) + 0.5 + 0.05 * rng.normal(size=N_ROWS, chunks=CHUNK)


def fit(callback: Any = None, **options: Any) -> nd.FitResult:
    config = Config(**{"verbose": 0, "callback_frequency": 1, **options})
    x, y = data()
    return nd.AdaptiveHybridStreamingOptimizer(config).fit(model, x, y, START, callback=callback)


@pytest.fixture(scope="module")
def exact() -> nd.FitResult:
    return fit(cache=0)


class Watch:
    """A callback that remembers the most bytes that were kept."""

    def __init__(self, most: int = 10**9) -> None:
        self.peak = 0
        self._most = most
        self._calls = 0

    def __call__(self, params: Any, loss: float, iteration: int) -> None:
        self.peak = max(self.peak, cached_bytes())
        self._calls += 1
        if self.peak and self._calls >= self._most:
            raise RuntimeError("enough")


@pytest.mark.parametrize("n_groups", [0, 1, 4, 10])
def test_the_budget_is_honoured_and_given_back(n_groups: int, exact: nd.FitResult) -> None:
    watch = Watch()
    result = fit(watch, cache=n_groups * 16 * CHUNK + 100)
    assert watch.peak == n_groups * 16 * CHUNK
    assert result.rows_cached == (result.n_passes - 1) * n_groups * CHUNK
    np.testing.assert_array_equal(result.x, exact.x)
    np.testing.assert_array_equal(result.pcov, exact.pcov)
    gc.collect()
    assert cached_bytes() == 0


def test_what_a_pass_covers_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of groups it would take a while at each pass."""
    covered: list[np.ndarray] = []

    def recorded(sizes: np.ndarray, *known: Any) -> PartialResults:
        if len(sizes) > 1:  # a pass, not the sample
            covered.append(sizes)
        return PartialResults(sizes, *known)

    monkeypatch.setattr(dataset, "PartialResults", recorded)
    result = fit()
    assert len(covered) == result.n_passes > 1
    np.testing.assert_array_equal(covered[0], [[1, CHUNK, 16 * CHUNK]] * 10)
    assert all(sizes is covered[0] for sizes in covered)


def test_given_back_after_an_error() -> None:
    watch = Watch(most=1)
    with pytest.raises(RuntimeError, match="enough"):
        fit(watch)
    assert watch.peak == 16 * N_ROWS
    gc.collect()
    assert cached_bytes() == 0


def test_arrays_in_memory_are_not_kept_twice() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 5, 400_000)
    y = 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * rng.normal(size=len(x))
    watch = Watch()
    config = Config(verbose=0, callback_frequency=1)
    result = nd.AdaptiveHybridStreamingOptimizer(config).fit(model, x, y, START, callback=watch)
    assert result.success
    assert (watch.peak, result.rows_cached) == (0, 0)


@pytest.mark.parametrize("n_groups", [10, 4])
def test_what_several_groups_share_is_read_until_all_of_them_are_kept(
    n_groups: int, exact: nd.FitResult
) -> None:
    """A chunk of x that is cut for two groups, and the mean of y, which all groups need."""
    x, y = data()
    reads: list[int] = []

    def counted(block: np.ndarray) -> np.ndarray:
        reads.append(len(block))
        return block

    x = x.rechunk(2 * CHUNK).map_blocks(counted, dtype=float, meta=np.empty(0))
    y = (y - y.mean()) + y.mean()
    config = Config(verbose=0, cache=n_groups * 16 * CHUNK)
    result = nd.AdaptiveHybridStreamingOptimizer(config).fit(model, x, y, START)
    assert result.success
    assert result.n_passes >= 2
    assert result.rows_cached == (result.n_passes - 1) * n_groups * CHUNK
    if n_groups == 10:
        sampled = result.rows_read - N_ROWS
        assert sum(reads) <= N_ROWS + 2 * sampled
    else:  # the groups that are not kept need chunks of x
        assert sum(reads) > N_ROWS + 2 * CHUNK
    np.testing.assert_allclose(result.x, exact.x, rtol=1e-9)


def test_what_is_made_from_another_array_reads_it_once() -> None:
    reads: list[int] = []

    def counted(block: np.ndarray) -> np.ndarray:
        reads.append(len(block))
        return block

    x, y = (array.rechunk(CHUNK) for array in data())
    y = y.map_blocks(counted, dtype=float, meta=np.empty(0))
    config = Config(verbose=0, cache=0)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(model, x, y, START, sigma=0.1 * abs(y))
    assert result.success
    # Threads may have read a block ahead that nobody asked for in the end.
    assert sum(reads) <= 1.2 * result.rows_read


def test_cache_on_a_cluster(process_client: Client, exact: nd.FitResult) -> None:
    on_workers: list[int] = []

    def callback(params: Any, loss: float, iteration: int) -> None:
        on_workers.append(sum(process_client.run(cached_bytes).values()))

    with process_client.as_current(), dask.config.set(scheduler="dask.distributed"):
        result = fit(callback, cache=8 * 16 * CHUNK)
    assert 0 < max(on_workers) <= 8 * 16 * CHUNK
    assert result.rows_cached > 0
    assert result.rows_read + result.rows_cached == exact.rows_read
    np.testing.assert_array_equal(result.x, exact.x)
    # The scheduler tells the workers what to forget; a busy machine takes a moment for that.
    for _ in range(100):
        process_client.run(gc.collect)
        left = sum(process_client.run(cached_bytes).values())
        if not left:
            break
        time.sleep(0.1)
    assert left == 0


@pytest.fixture
def small_client() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            memory_limit="800MB",
            processes=True,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_blocks_too_large_for_a_worker(small_client: Client) -> None:
    x = da.zeros(50_000_000, chunks=25_000_000)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(Config(verbose=0))
    with pytest.raises(nd.DataError, match=r"80% of its .*smaller chunks.* with more memory\.$"):
        optimizer.fit(model, x, x, START)
    plan = optimizer.plan(model, x, x, START)
    assert any("smaller chunks" in problem for problem in plan.problems)
    assert plan.peak_memory > plan.memory_limit
    assert not any(problem.endswith(".") for problem in plan.problems)  # they are put in a list
    # The same rows in smaller chunks are no problem, and leave room for a cache.
    x = x.rechunk(1_000_000)
    plan = optimizer.plan(model, x, x, START)
    assert not plan.problems
    assert plan.peak_memory < plan.memory_limit
    assert 0 < plan.cache_per_worker <= 0.2 * plan.memory_limit


def test_plan_reads_nothing() -> None:
    def read(block_info: Any = None) -> Any:
        raise AssertionError("read")

    x = da.map_blocks(read, chunks=((1_000_000,) * 500,), dtype="f8")
    y = da.map_blocks(read, chunks=((500_000,) * 1000,), dtype="f8")
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    plan = optimizer.plan(model, x, y, START)
    assert (plan.n_rows, plan.n_blocks, plan.grid) == (500_000_000, 1000, (1000,))
    assert plan.bytes_per_pass == 8_000_000_000
    assert plan.n_tasks == 1000 + 63 + 4 + 1
    assert plan.sample_rows_read == 16 * 500_000
    assert plan.realigned == ("x_data: 500 blocks become 1000 blocks",)
    assert plan.jacobian == "forward"
    assert not plan.problems
    for part in ("500,000,000", "1,000 (1000)", "x_data: 500 blocks", "forward mode"):
        assert part in str(plan)
    assert "<table>" in plan._repr_html_()
    assert optimizer.current_phase == 0


def test_plan_raises_what_a_fit_would() -> None:
    x = da.zeros(100, chunks=10)
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    with pytest.raises(nd.DataError, match="do not match"):
        optimizer.plan(model, x, x[:50], START)
    with pytest.raises(nd.ModelError, match="one value per row"):
        optimizer.plan(lambda x, a: a, x, x, [1.0])
    with pytest.raises(ValueError, match="p0"):
        optimizer.plan(model, x, x, [1.0])


def test_plan_names_very_small_blocks() -> None:
    x = da.zeros(2_000_000, chunks=1_000)
    plan = nd.AdaptiveHybridStreamingOptimizer().plan(model, x, x, START)
    assert any("requesting them" in problem for problem in plan.problems)
    assert plan.n_tasks < 40


DEVICES = """
import sys
import jax, numpy as np, jax.numpy as jnp
import nlsq_dask as nd
from nlsq_dask.model.program import compile_count

x = np.random.default_rng(0).uniform(0, 5, 300_000)
y = 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * np.random.default_rng(1).normal(size=len(x))
found = []
for several in (False, True):
    before = compile_count()
    config = nd.HybridStreamingConfig(enable_multi_device=several, chunk_size=16_384, verbose=0,
                                      max_warmup_iterations=0, gauss_newton_solver=sys.argv[1])
    result = nd.AdaptiveHybridStreamingOptimizer(config).fit(
        lambda x, a, b, c: a * jnp.exp(-b * x) + c, x, y, [5.0, 3.0, 1.0], loss=sys.argv[2])
    assert result.success, result.message
    found.append((result, compile_count() - before))
(one, _), (all_, compiled) = found
np.testing.assert_allclose(all_.x, one.x, rtol=1e-9)
np.testing.assert_allclose(all_.pcov, one.pcov, rtol=1e-6)
print(len(jax.devices()), compiled)
"""


@pytest.mark.parametrize(
    ("solver", "loss"),
    [
        pytest.param("normal", "linear", marks=pytest.mark.slow),
        pytest.param("qr", "linear", marks=pytest.mark.slow),
        ("qr", "huber"),
    ],
)
def test_several_devices_share_the_work(solver: str, loss: str) -> None:
    """XLA shows one CPU as four devices; each compiles the kernel and gets some of the pieces."""
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, solver, loss],
        capture_output=True,
        text=True,
        env=flags,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "3"]  # the first device had compiled it already


@pytest.mark.parametrize("accumulation", list(Accumulation))
def test_the_kernel_can_be_lowered_for_a_gpu(accumulation: Accumulation) -> None:
    from nlsq_dask.kernels.dense_kernel import dense_kernel
    from nlsq_dask.model.model import Model
    from nlsq_dask.rows.rows import Layout

    layout = Layout(None, ((),), ("f8",), "f8", None, False)
    kernel = dense_kernel(
        Model(model, 3, layout, "float64"),
        2**18,
        platforms=("cpu", "cuda"),
        accumulation=accumulation,
    )
    assert set(kernel.programs) == {"cpu", "cuda"}
    assert kernel.programs["cpu"].fingerprint != kernel.programs["cuda"].fingerprint


@pytest.mark.parametrize("is_diagonal", [False, True])
def test_gradients_can_be_lowered_for_a_gpu(is_diagonal: bool) -> None:
    from nlsq_dask.kernels.gradient_kernel import gradient_kernel
    from nlsq_dask.model.model import Model
    from nlsq_dask.rows.rows import Layout

    layout = Layout(None, ((),), ("f8",), "f8", None, False)
    kernel = gradient_kernel(
        Model(model, 3, layout, "float64"), 2**18, ("cpu", "cuda"), is_diagonal=is_diagonal
    )
    assert set(kernel.programs) == {"cpu", "cuda"}
    assert kernel.programs["cpu"].fingerprint != kernel.programs["cuda"].fingerprint


@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_read_one_block_ahead_and_no_more(n_threads: int) -> None:
    """Whatever order Dask runs the groups in, memory does not grow with their number."""
    x = da.random.default_rng(0).uniform(0, 5, 60 * CHUNK, chunks=CHUNK)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def read(x: np.ndarray) -> np.ndarray:
        nonlocal most
        array = 2.5 * np.exp(-1.3 * x) + 0.5
        alive.append(weakref.ref(array))
        most = max(most, sum(ref() is not None for ref in alive))
        return array

    y = x.map_blocks(read, dtype="f8", meta=np.empty(0))
    with dask.config.set(scheduler="threads", num_workers=n_threads):
        config = Config(verbose=0, cache=0)
        result = nd.AdaptiveHybridStreamingOptimizer(config).fit(model, x, y, START)
    assert result.success
    # Each thread has the block that it computes; one more is there or coming for each.
    assert n_threads < most <= 2 * n_threads + 1
    assert not [thread for thread in threading.enumerate() if "nlsq" in thread.name]
