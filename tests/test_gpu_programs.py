"""The programs, copies and limits of a GPU, on the CPU: the same code with another device."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask.data.sources import from_files
from nlsq_dask.engine import block_group, cache_budget, dataset, reduction_tree, tasks
from nlsq_dask.engine.cache_budget import cached_bytes
from nlsq_dask.kernels import device_program
from nlsq_dask.kernels import kernel as kernel_module
from nlsq_dask.kernels.dense_kernel import dense_kernel
from nlsq_dask.kernels.dense_terms import Accumulation
from nlsq_dask.kernels.device_program import DeviceProgram, device_batch_rows
from nlsq_dask.kernels.gradient_kernel import gradient_kernel
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.request import Request
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.rows import device_memory, device_rows
from nlsq_dask.rows.device_rows import PlacedRows, to_device
from nlsq_dask.rows.rows import Layout, Rows
from tests import problems

N_ROWS = 12_000
MOST = 5_000
RNG = np.random.default_rng(3)
X = RNG.uniform(0.1, 4.0, N_ROWS)
Y = np.exp(-X) + 0.1 * RNG.normal(size=N_ROWS)
SIGMA = RNG.uniform(0.5, 2.0, N_ROWS)
MASK = RNG.random(N_ROWS) < 0.1
LAYOUT = Layout(None, ((),), ("f8",), "f8", "f8", True)
CONFIG = nd.HybridStreamingConfig(verbose=0)
FULL = "RESOURCE_EXHAUSTED: Out of memory"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process treat its CPU as a GPU, with batches of few rows."""
    monkeypatch.setattr(kernel_module, "_HOST_PLATFORMS", set())
    monkeypatch.setattr(device_program, "_MAX_ROWS", MOST)
    monkeypatch.setattr(device_rows, "_TRANSFER_BYTES", 10_000)
    monkeypatch.setattr(reduction_tree, "_MIN_GROUP_ROWS", 1)
    monkeypatch.setattr(from_files, "_BLOCK_ENTRIES", 2**14)


def rows_with_gaps() -> Rows:
    y = Y.copy()
    y[::97] = np.nan
    x = X.copy()
    x[5::1001] = np.inf
    sigma = SIGMA.copy()
    sigma[7::997] = -1.0
    return Rows(y, (x,), sigma, MASK)


def model_of(n_params: int, dtype: str = "float64") -> Model:
    def function(x: Any, *p: Any) -> Any:
        total = p[-1] if n_params % 2 else 0.0
        for i in range(n_params // 2):
            total = total + p[2 * i] * jnp.exp(-p[2 * i + 1] * x)
        return total

    return Model(function, n_params, LAYOUT, dtype)


def assert_same(gpu: Any, cpu: Any, rtol: float) -> None:
    for name in ("n_used", "n_masked", "n_bad", "n_bad_sigma", "n_nonfinite"):
        assert getattr(gpu, name) == getattr(cpu, name), name
    with_matrix = hasattr(cpu, "jtj")
    scales = np.sqrt(np.diag(cpu.jtj)) if with_matrix else np.abs(cpu.products[0]) ** 0.5
    size = np.abs(cpu.jtr).max() / scales.max()
    assert np.abs((gpu.jtr - cpu.jtr) / scales).max() < rtol * size
    for name in ("cost", "chi2", "largest", "weight", "y_sum", "y_square"):
        assert getattr(gpu, name) == pytest.approx(getattr(cpu, name), rel=rtol), name
    np.testing.assert_allclose(gpu.candidate_costs, cpu.candidate_costs, rtol=rtol)
    if with_matrix:
        assert np.abs((gpu.jtj - cpu.jtj) / np.outer(scales, scales)).max() < rtol
    else:
        np.testing.assert_allclose(gpu.products, cpu.products, rtol=rtol)


def both(trace: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel[Any], Kernel[Any]]:
    """Return the kernel with the programs of a GPU, and that with those of a CPU."""
    gpu = trace()
    with monkeypatch.context() as patch:
        patch.setattr(kernel_module, "_HOST_PLATFORMS", {"cpu"})
        cpu = trace()
    assert gpu.gpus
    assert not cpu.gpus
    return gpu, cpu


@pytest.mark.parametrize(
    ("n_params", "accumulation", "loss"),
    [
        (3, Accumulation.GRAM, "linear"),
        pytest.param(8, Accumulation.GRAM, "huber", marks=pytest.mark.slow),
        (3, Accumulation.TRIANGLE, "linear"),
        (8, Accumulation.ROOT, "huber"),
        pytest.param(3, Accumulation.SCORES, "linear", marks=pytest.mark.slow),
        (3, Accumulation.SCORES, "huber"),
    ],
)
def test_sums_of_batches_are_those_of_strips(
    n_params: int,
    accumulation: Accumulation,
    loss: str,
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows in memory and rows on the device, in three batches of which the last is padded."""

    def trace() -> Kernel[Any]:
        options = {"loss": Loss(loss, 0.3), "accumulation": accumulation}
        return dense_kernel(model_of(n_params), 4096, longest_block=N_ROWS, **options)

    on_gpu, on_cpu = both(trace, monkeypatch)
    rows, params = rows_with_gaps(), np.linspace(0.5, 1.5, n_params)
    request = Request(params, candidates=np.stack([params * 1.1, params * 0.9]))
    expected = on_cpu(rows, request)
    placed = on_gpu.placed(rows)
    assert placed is not None
    assert [len(batch.arrays[0]) for batch in placed.batches] == [4_000] * 3
    assert placed.nbytes == on_gpu.placed_bytes(rows) + 3 * 8
    for source in (rows, placed):
        assert_same(on_gpu(source, request), expected, 1e-12)
    later = on_gpu(placed, Request(params), wants_moments=False)
    assert later.weight == 0.0
    assert later.cost == pytest.approx(expected.cost, rel=1e-13)


@pytest.mark.parametrize(
    ("n_params", "mode"),
    [
        (3, Mode.FORWARD),
        pytest.param(3, Mode.REVERSE, marks=pytest.mark.slow),
        pytest.param(8, Mode.FORWARD, marks=pytest.mark.slow),
        (8, Mode.REVERSE),
    ],
)
def test_float32_is_summed_in_float64(
    n_params: int, mode: Mode, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(n_params, "float32")
    on_gpu, on_cpu = both(
        lambda: dense_kernel(model, 4096, mode, longest_block=N_ROWS), monkeypatch
    )
    request = Request(np.linspace(0.5, 1.5, n_params))
    assert_same(on_gpu(rows_with_gaps(), request), on_cpu(rows_with_gaps(), request), 3e-6)


@pytest.mark.parametrize("loss", [pytest.param("linear", marks=pytest.mark.slow), "cauchy"])
def test_products_for_conjugate_gradients(
    loss: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace() -> Kernel[Any]:
        options: dict[str, Any] = {"loss": Loss(loss, 0.3), "n_directions": 2}
        return gradient_kernel(model_of(8), 4096, longest_block=N_ROWS, **options)

    on_gpu, on_cpu = both(trace, monkeypatch)
    request = Request(np.linspace(0.5, 1.5, 8), directions=RNG.normal(size=(2, 8)))
    assert_same(on_gpu(rows_with_gaps(), request), on_cpu(rows_with_gaps(), request), 1e-11)


def test_coordinates_are_broadcast_on_the_device(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y of shape (30, 40, 10) with a coordinate per axis, and an x of two columns."""
    layout = Layout(("t", "u", "v"), ((), (), (2,)), ("f8", "f4", "i4"), "f8", None, False)

    def function(x: Any, a: Any, b: Any) -> Any:
        return a * jnp.exp(-b * x["t"]) * x["u"] + x["v"][:, 0] * b - x["v"][:, 1]

    model = Model(function, 2, layout, "float64")
    on_gpu, on_cpu = both(lambda: dense_kernel(model, 4096, longest_block=N_ROWS), monkeypatch)
    t, u = np.linspace(0, 3, 30)[:, None, None], np.arange(40, dtype="f4")[None, :, None]
    v = RNG.integers(0, 9, (1, 40, 10, 2)).astype("i4")
    rows = Rows(RNG.normal(size=(30, 40, 10)), (t, u, v))
    request = Request(np.array([1.2, 0.3]))
    assert_same(on_gpu(rows, request), on_cpu(rows, request), 1e-12)


def test_no_rows_have_sums_of_zero(gpu: None) -> None:
    kernel = dense_kernel(model_of(3), 4096, longest_block=N_ROWS)
    empty = np.empty(0)
    sums = kernel(Rows(empty, (empty,), empty, empty.astype(bool)), Request(np.ones(3)))
    assert (sums.n_used, sums.cost, sums.jtj.sum()) == (0, 0.0, 0.0)


@pytest.mark.parametrize("n_rows", [1, 7, 4_095, 4_097, 10_001])
def test_copies_in_parts_are_complete(n_rows: int, gpu: None) -> None:
    array = RNG.normal(size=(n_rows, 3))
    with x64():
        copy = to_device(array, jax.devices("cpu")[0])
        np.testing.assert_array_equal(np.asarray(copy), array)


@pytest.mark.parametrize(
    ("longest_block", "row_bytes", "n_rows"),
    [(1, 64, 1), (5_000_000, 64, 5_000_000), (2**25, 64, 2**24), (2**24 + 1, 64, 2**23 + 1)],
)
def test_batches_are_equal_parts_of_a_block(
    longest_block: int, row_bytes: int, n_rows: int
) -> None:
    assert device_batch_rows(longest_block, row_bytes) == n_rows


def test_batches_are_shorter_for_many_parameters() -> None:
    assert device_batch_rows(2**24, 8 * 503) == 2**19
    assert device_batch_rows(2**24, 2**31) == 1


# --- whole fits


CHUNK, N_FITTED = 20_000, 160_000


def data(in_memory: bool) -> tuple[Any, Any]:
    x = np.random.default_rng(0).uniform(0, 5, N_FITTED)
    y = 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * np.random.default_rng(1).normal(size=len(x))
    if in_memory:
        return x, y
    lazy = (da.from_array(array, chunks=CHUNK) for array in (x, y))
    x, y = (array.map_blocks(np.copy) for array in lazy)  # read in each pass
    return x, y


def decay(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


def fit(in_memory: bool = False, **options: Any) -> nd.FitResult:
    config = nd.HybridStreamingConfig(verbose=0, **problems.NO_WARMUP, **options)
    x, y = data(in_memory)
    return nd.AdaptiveHybridStreamingOptimizer(config).fit(decay, x, y, [2.0, 0.5, 0.3])


@pytest.fixture(scope="module")
def on_cpu() -> nd.FitResult:
    return fit()


def assert_agrees(result: nd.FitResult, expected: nd.FitResult, tolerance: float = 1e-5) -> None:
    assert result.success
    assert np.abs((result.popt - expected.popt) / expected.perr).max() < tolerance
    np.testing.assert_allclose(result.perr, expected.perr, rtol=1e-6)
    gc.collect()
    assert cached_bytes() == 0  # nothing is left on the device


@pytest.mark.parametrize(
    ("options", "in_memory"),
    [
        ({}, False),
        ({}, True),
        ({"gauss_newton_solver": "qr"}, False),
        ({"cov_type": "HC1"}, True),
        ({"enable_multi_device": True}, False),
        pytest.param({"gauss_newton_solver": "qr"}, True, marks=pytest.mark.slow),
        pytest.param({"cov_type": "HC1"}, False, marks=pytest.mark.slow),
        pytest.param({"enable_multi_device": True}, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fits_agree_and_keep_their_rows_on_the_device(
    options: dict[str, Any], in_memory: bool, gpu: None, on_cpu: nd.FitResult
) -> None:
    result = fit(in_memory, **options)
    expected = on_cpu if "cov_type" not in options else None
    if expected is None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel_module, "_HOST_PLATFORMS", {"cpu"})
            expected = fit(in_memory, **options)
    assert_agrees(result, expected)
    assert result.rows_cached == (result.n_passes - 1) * N_FITTED
    assert np.isfinite(result.block_statistics["chi2"]).all()


def test_conjugate_gradients_agree(gpu: None, on_cpu: nd.FitResult) -> None:
    result = fit(cg_param_threshold=2)
    assert np.abs((result.popt - on_cpu.popt) / on_cpu.perr).max() < 1e-3
    assert result.rows_cached > 0


def test_a_fit_without_cache_keeps_nothing_on_the_device(gpu: None, on_cpu: nd.FitResult) -> None:
    result = fit(cache=0)
    assert_agrees(result, on_cpu)
    assert result.rows_cached == 0


def test_a_cache_of_some_bytes_holds_for_the_device(gpu: None, on_cpu: nd.FitResult) -> None:
    result = fit(cache=3 * CHUNK * 16 + 100)
    assert_agrees(result, on_cpu)
    most = 3 * CHUNK * (result.n_passes - 1)  # there, and as many in the memory of the process
    assert most <= result.rows_cached <= 2 * most


def test_what_does_not_fit_the_device_is_copied_in_each_pass(
    gpu: None, on_cpu: nd.FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with room for some blocks, and a process without a cache of its own."""
    monkeypatch.setattr(cache_budget, "free_device_bytes", lambda devices: 1_000_000)
    result = fit(True)
    assert_agrees(result, on_cpu)
    assert 0 < result.rows_cached < (result.n_passes - 1) * N_FITTED


def test_arrays_that_dask_holds_stay_on_the_device(gpu: None, on_cpu: nd.FitResult) -> None:
    arrays = (da.from_array(array, chunks=CHUNK) for array in data(True))
    result = problems.fit(decay, *arrays, [2.0, 0.5, 0.3], **problems.NO_WARMUP)
    assert_agrees(result, on_cpu)
    assert result.rows_cached == (result.n_passes - 1) * N_FITTED


def test_rows_are_sampled_again_after_they_were_kept(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass is repeated in the other mode of differentiation, with another sample."""
    sampled: list[int] = []

    def counted(group: Any, kernel: Any, request: Any, *inputs: Any) -> Any:
        result = tasks.reduce_group(group, kernel, request, *inputs)
        if request.sample_share:
            sampled.append(0 if result.rows is None else len(result.rows))
        return result

    def guarded(x: Any, b: Any, c: Any) -> Any:
        return jnp.where(x > 0, jnp.sqrt(b * x), 0.0) + jnp.sin(c * x)

    monkeypatch.setattr(dataset, "reduce_group", counted)
    x, y = data(True)
    x[77_777] = 0.0
    y = np.sqrt(2 * x) + np.sin(1.3 * x) + 0.05 * np.random.default_rng(1).normal(size=len(x))
    x, y = (da.from_array(array, chunks=CHUNK).map_blocks(np.copy) for array in (x, y))
    result = problems.fit(guarded, x, y, [1.9, 1.25], **problems.NO_WARMUP)
    assert result.success
    assert len(sampled) == 2 * N_FITTED // CHUNK
    assert min(sampled) > 0


DEVICES = """
import collections, sys
import jax, jax.numpy as jnp, numpy as np
import nlsq_dask as nd
from nlsq_dask.data.sources import from_files
from nlsq_dask.kernels import kernel, device_program

def main():
    kernel._HOST_PLATFORMS = set()
    from_files._BLOCK_ENTRIES = 2**14
    used, run = collections.Counter(), device_program._Numbers.run

    def counted(self, programs, batch):
        used[str(next(iter(batch.n_rows.devices())))] += 1
        return run(self, programs, batch)

    device_program._Numbers.run = counted
    x = np.random.default_rng(0).uniform(0, 5, 160_000)
    y = 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * np.random.default_rng(1).normal(size=len(x))
    config = nd.HybridStreamingConfig(verbose=0, enable_multi_device=True, max_warmup_iterations=0)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(lambda x, a, b, c: a * jnp.exp(-b * x) + c, x, y, [2.0, 0.5, 0.3])
    print(result.success, len(used), min(used.values()), result.n_passes)

main()
"""


def test_several_devices_share_blocks_of_one_batch() -> None:
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", DEVICES]
    done = subprocess.run(command, capture_output=True, text=True, env=flags, timeout=200)
    assert done.returncode == 0, done.stderr
    success, n_devices, fewest, n_passes = done.stdout.split()
    assert (success, n_devices) == ("True", "2")
    assert int(fewest) == int(n_passes) * 5  # half of the blocks


def test_short_blocks_are_not_padded_to_the_longest(gpu: None) -> None:
    kernel = dense_kernel(model_of(3), 4096, longest_block=N_ROWS)
    few = slice(0, 100)
    rows = Rows(Y[few], (X[few],), SIGMA[few], MASK[few])
    placed = kernel.placed(rows)
    assert placed is not None
    assert [len(batch.arrays[0]) for batch in placed.batches] == [250]
    assert kernel(placed, Request(np.ones(3))).n_used + MASK[few].sum() == 100


def test_many_directions_take_no_more_memory(gpu: None) -> None:
    """Their products are computed some at a time; see also the products above, for two."""

    def temporary(n_directions: int) -> int:
        options = {"longest_block": N_ROWS, "n_directions": n_directions}
        kernel = gradient_kernel(model_of(8), 4096, **options)
        program = kernel.programs["cpu"]._programs[0].sums
        with x64():
            return int(program._compile().memory_analysis().temp_size_in_bytes)

    assert temporary(64) < 2 * temporary(8)


def test_more_directions_than_are_computed_at_a_time(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace() -> Kernel[Any]:
        return gradient_kernel(model_of(8), 4096, longest_block=N_ROWS, n_directions=11)

    on_gpu, on_cpu = both(trace, monkeypatch)
    request = Request(np.linspace(0.5, 1.5, 8), directions=RNG.normal(size=(11, 8)))
    assert_same(on_gpu(rows_with_gaps(), request), on_cpu(rows_with_gaps(), request), 1e-11)


def test_errors_of_a_copy_give_its_memory_back(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(DeviceProgram, "placed", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fit(True)
    assert cached_bytes() == 0


def test_nothing_is_left_after_an_error(gpu: None) -> None:
    def enough(*args: Any) -> None:
        raise RuntimeError("enough")

    x, y = data(False)
    config = nd.HybridStreamingConfig(verbose=0, callback_frequency=1, **problems.NO_WARMUP)
    with pytest.raises(RuntimeError, match="enough"):
        nd.AdaptiveHybridStreamingOptimizer(config).fit(
            decay, x, y, [2.0, 0.5, 0.3], callback=enough
        )
    gc.collect()
    assert cached_bytes() == 0


# --- a full device


class Device:
    """A device whose JAX has taken 30 bytes, uses 10 of them, and may use 90."""

    local_hardware_id = 0

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 90, "bytes_in_use": 10, "pool_bytes": 30}


@pytest.mark.parametrize(("driver", "free"), [(200, 80), (25, 45), (0, 20)])
def test_memory_that_other_programs_use_is_not_free(
    driver: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "_free_by_driver", lambda device: driver)
    assert device_memory._free_bytes(Device()) == free  # type: ignore[arg-type]


def test_without_a_driver_the_limit_of_jax_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(device_memory.ctypes, "CDLL", missing)
    assert device_memory._free_bytes(Device()) == 80  # type: ignore[arg-type]


def out_of_memory_in(
    monkeypatch: pytest.MonkeyPatch, most_rows: int, on_placed: bool = False
) -> list[int]:
    """Let programs for more rows than ``most_rows`` run out of memory; return the lengths tried."""
    tried: list[int] = []
    run = device_program._Numbers.run

    def limited(self: Any, programs: Any, batch: Any) -> Any:
        tried.append(programs.n_rows)
        if programs.n_rows > most_rows:
            raise jax.errors.JaxRuntimeError(FULL)
        return run(self, programs, batch)

    monkeypatch.setattr(device_program._Numbers, "run", limited)
    return tried


def test_batches_get_shorter_when_memory_runs_out(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = dense_kernel(model_of(3), 4096, longest_block=N_ROWS)
    rows, request = rows_with_gaps(), Request(np.array([1.0, 0.8, 0.1]))
    expected = kernel(rows, request)
    tried = out_of_memory_in(monkeypatch, 1_000)
    sums = kernel(rows, request)
    assert sums.cost == pytest.approx(expected.cost, rel=1e-13)
    assert tried == [4_000] + [250] * 48
    kernel(rows, request)
    assert tried[49:] == [250] * 48  # it stays with the length that fits
    placed = kernel.placed(rows)
    assert placed is not None
    assert len(placed.batches) == 48


def test_kept_rows_leave_a_device_that_has_become_too_full(
    gpu: None, on_cpu: nd.FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes the memory after the first pass: rows are copied again, in less."""
    placed, run = set[int](), device_program._Numbers.run

    def limited(self: Any, programs: Any, batch: Any) -> Any:
        if self._moments is None and programs.n_rows > 1_000:  # from the second pass on
            placed.add(programs.n_rows)
            raise jax.errors.JaxRuntimeError(FULL)
        return run(self, programs, batch)

    monkeypatch.setattr(device_program._Numbers, "run", limited)
    result = fit(True)
    assert_agrees(result, on_cpu)
    assert placed
    assert not block_group._placed


def test_rows_that_find_no_room_are_streamed(
    gpu: None, on_cpu: nd.FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceProgram, "placed", lambda self, source, devices: None)
    result = fit(True)
    assert_agrees(result, on_cpu)
    assert result.rows_cached == 0


def test_a_full_device_gives_an_error_that_says_what_to_do(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_in(monkeypatch, 0)
    with pytest.raises(nd.DeviceMemoryError, match="JAX_PLATFORMS=cpu"):
        fit(True)
    gc.collect()
    assert cached_bytes() == 0


def test_other_errors_of_a_device_are_not_hidden(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Iterator[Any]:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(device_program, "device_batches", broken)
    kernel = dense_kernel(model_of(3), 4096, longest_block=N_ROWS)
    for call in (
        lambda: kernel(rows_with_gaps(), Request(np.ones(3))),
        lambda: kernel.placed(rows_with_gaps()),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            call()


def test_programs_travel_without_what_a_process_learned(gpu: None) -> None:
    import pickle

    kernel = dense_kernel(model_of(3), 4096, longest_block=N_ROWS)
    again = pickle.loads(pickle.dumps(kernel))
    rows, request = rows_with_gaps(), Request(np.array([1.0, 0.8, 0.1]))
    assert again(rows, request).cost == kernel(rows, request).cost
    assert isinstance(kernel.placed(rows), PlacedRows)
