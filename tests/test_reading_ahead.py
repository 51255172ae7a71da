"""What is read ahead where a store answers late, and what is worth keeping."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from dask._task_spec import Task
from distributed import Client
from zarr.storage import LocalStore

import nlsq_dask as nd
from nlsq_dask.data.alignment import align
from nlsq_dask.engine import read_costs
from nlsq_dask.engine.block_group import BlockGroup
from nlsq_dask.engine.cache_budget import CacheBudget
from nlsq_dask.engine.prefetch import PrefetchLimits
from nlsq_dask.engine.read_costs import ReadCosts
from nlsq_dask.engine.retries import ReadPolicy
from nlsq_dask.engine.source_graph import GroupReader, SourceGraph
from nlsq_dask.rows.rows import Layout
from tests.late_store import LateStore, requests, reset
from tests.problems import NO_WARMUP, decay_data, exponential

N, CHUNK = 60_000, 1_500
START = [1.0, 1.0, 0.1]
SECONDS = 0.02  # per request
MOST = 8  # blocks that are read ahead per thread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("late")
    for name, values in zip("xy", decay_data(N), strict=True):
        zarr.create_array(folder / name, data=values, chunks=CHUNK)
    return folder


def fit(folder: Path, seconds: float, **options: Any) -> nd.FitResult:
    stores = (LateStore(LocalStore(folder / name), seconds) for name in "xy")
    x, y = (zarr.open_array(store, mode="r") for store in stores)
    config = nd.HybridStreamingConfig(verbose=0, sample_rows=3_000, **NO_WARMUP, **options)
    return nd.AdaptiveHybridStreamingOptimizer(config).fit(exponential, x, y, START)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_more_blocks_are_read_at_a_time_where_reading_waits(
    folder: Path, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Groups of a few blocks, so that most of what is read ahead is of other tasks.
    monkeypatch.setattr("nlsq_dask.engine.reduction_tree._MIN_GROUP_BLOCKS", 2)
    with dask.config.set(scheduler="threads", num_workers=n_threads):
        expected = fit(folder, 0.0, cache=0)
        reset()
        result = fit(folder, SECONDS, cache=0)
    # Each thread computes one block, and reads one ahead in any case; a block is two requests.
    peak, count = requests()
    assert 4 * n_threads < peak <= 2 * (MOST + 2) * n_threads
    assert count <= 2 * result.rows_read / CHUNK + 10  # with metadata; no chunk is read in vain
    np.testing.assert_array_equal(result.x, expected.x)
    np.testing.assert_array_equal(result.pcov, expected.pcov)
    assert (result.n_passes, result.rows_read) == (expected.n_passes, expected.rows_read)
    assert not [thread for thread in threading.enumerate() if "nlsq" in thread.name]


def test_workers_read_the_blocks_of_their_next_tasks(
    folder: Path, process_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nlsq_dask.engine.reduction_tree._MIN_GROUP_BLOCKS", 2)
    with dask.config.set(scheduler="threads"):
        expected = fit(folder, 0.0, cache=0)
    process_client.run(reset)
    with process_client.as_current(), dask.config.set(scheduler="dask.distributed"):
        result = fit(folder, SECONDS, cache=0)
    (peak, count), (other_peak, other_count) = process_client.run(requests).values()
    assert max(peak, other_peak) > 4
    # Tasks may move to another worker after their blocks were requested.
    assert count + other_count <= 1.5 * 2 * result.rows_read / CHUNK
    np.testing.assert_array_equal(result.x, expected.x)
    assert result.rows_read == expected.rows_read


def test_blocks_that_are_read_ahead_are_planned_for(folder: Path) -> None:
    x, y = (zarr.open_array(folder / name, mode="r") for name in "xy")
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0, cache=0))
    peaks = []
    for arrays in ((x, y), (x[:], y[:])):
        with dask.config.set(scheduler="threads", num_workers=2):
            peaks.append(optimizer.plan(exponential, *arrays, START).peak_memory)
    # One group of all blocks, hence one task at a time. Encoded and decoded bytes of a block in
    # use, of the next one, and of those read ahead.
    assert peaks[0] - peaks[1] == 2 * 16 * CHUNK * (2 + MOST)


@pytest.mark.parametrize("scheduler", ["threads", "processes"], indirect=True)
def test_named_coordinates_do_not_forbid_to_keep(scheduler: str, tmp_path: Path) -> None:
    time, lat, lon = np.linspace(0, 4, 1_200), np.linspace(-1, 1, 20), np.linspace(0, 1, 10)
    height = np.random.default_rng(0).normal(size=(20, 10))
    values = 2.0 * np.exp(-0.7 * time[:, None, None]) + 0.3 * lat[:, None] + lon * height
    values += 0.1 * np.random.default_rng(1).normal(size=values.shape)
    dims = ("time", "lat", "lon")
    coordinates = {"time": time, "lat": lat, "lon": lon, "height": (dims[1:], height)}
    record = xr.DataArray(values, coordinates, dims, name="record")
    chunks = {"time": 100, "lat": 10, "lon": 10}
    record.chunk(chunks).to_zarr(tmp_path / "record", consolidated=False)
    lazy = xr.open_zarr(tmp_path / "record", consolidated=False).record

    def model(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        time, lat, lon, height = x
        return a * jnp.exp(-b * time) + c * lat + d * lon * height

    config = nd.HybridStreamingConfig(verbose=0, sample_rows=2_000, **NO_WARMUP)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(model, (*dims, "height"), lazy, [1.0, 1.0, 0.1, 0.5])
    assert result.success
    assert result.rows_cached >= 0.9 * (result.n_passes - 1) * record.size > 0


def test_only_functions_that_are_known_run_beside_the_task(folder: Path) -> None:
    """Those of the caller may compute Dask arrays, as a worker allows in the thread of a task."""
    x = da.from_zarr(folder / "x")
    known = x, 1e-3 * x + 2, x[100:].astype("f4"), da.log(x + 1), da.where(x > 1, x, 0.0)
    others = (
        x.map_blocks(np.sin),
        da.map_blocks(lambda b: b, x),
        x.map_blocks(np.vectorize(abs, otypes=[float])),
    )
    for y, is_known in [*((y, True) for y in known), *((y, y is others[0]) for y in others)]:
        blocks = align(y, y)
        ((reader,), _) = SourceGraph(blocks).readers([list(np.ndindex(blocks.grid))])
        assert [len(reader.reads(i)) for i in range(2)] == [int(is_known)] * 2
        assert not reader.is_remote


class Clock:
    """The processor time of the process and of its threads, as it is set."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("seconds", "pays"), [(0.01, False), (0.03, True)])
def test_what_is_kept_must_cost_more_to_read(
    seconds: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that was not in use takes 8 ms per 16 MiB."""
    clock = Clock()
    monkeypatch.setattr(read_costs.time, "process_time", clock)
    monkeypatch.setattr(read_costs, "_write_new_memory", lambda: 0.001)
    costs = ReadCosts()
    costs.begin()
    for n_blocks in range(10):
        assert costs.pays == (pays or n_blocks < 3)
        clock.seconds += seconds + 0.5  # of which most is spent with sums
        costs.add_kernel(0.5)
        costs.add_block(2**24)
    costs.end()


class OneTask:
    """What a ``BlockGroup`` asks of a kernel: no GPU."""

    gpus: tuple[Any, ...] = ()


def read_group(skipped: Iterator[frozenset[int]]) -> tuple[list[list[int]], list[int]]:
    """Return which blocks of one group were used, and how often one was read, pass by pass."""
    reads: list[int] = []

    def read(i: int) -> np.ndarray:
        reads.append(i)
        return np.full(10, float(i))

    keys = [("y", i) for i in range(3)]
    steps = {key: Task(key, read, key[1]) for key in keys}
    blocks = tuple((i, [key, key], [(10,), (10,)]) for i, key in enumerate(keys))
    layout = Layout(None, ((),), ("f8",), "f8", None, False)
    reader = GroupReader(layout, blocks, steps, (), ReadPolicy(), (3,))
    budget, limits = CacheBudget("of a test", 10**6), PrefetchLimits("of a test", 1, 0, 0)
    group = BlockGroup(reader, 480, budget, True, False, 0, limits)
    used, n_reads = [], []
    for each in skipped:
        kernel: Any = OneTask()
        used.append(list(group.map_blocks(lambda i, rows, read: i, (), each, kernel)))
        n_reads.append(len(reads))
    return used, n_reads


def test_a_group_of_which_a_part_was_read_is_not_taken_for_all_of_it() -> None:
    used, n_reads = read_group(map(frozenset, ([1], [1], [1, 2], [], [], [0])))
    assert used == [[0, 2], [0, 2], [0], [0, 1, 2], [0, 1, 2], [1, 2]]
    assert n_reads == [2, 2, 2, 5, 5, 5]
