"""Fits for every pixel with a store: killed, resumed, refused, and opened by others."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client

import nlsq_dask as nd
from nlsq_dask.events import Event, MapEnded, MapResumed, MapStarted, TileFinished
from nlsq_dask.fit import interruption
from nlsq_dask.maps.problem import tiles
from nlsq_dask.maps.stores.store import MapStore
from tests import surviving_map
from tests.clocks import patch_retries
from tests.surviving_map import N_TILES, decay, fit


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_MIN_PIXELS", 120)
    monkeypatch.setattr(tiles, "_MIN_POINTS", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "cube.zarr"
    surviving_map.write_data(path)
    return path


@pytest.fixture(scope="module")
def whole(data: Path) -> xr.Dataset:
    """The fits that nobody interrupts, without a store."""
    with pytest.MonkeyPatch.context() as patch:
        small_tiles.__wrapped__(patch)  # type: ignore[attr-defined]
        lazy = fit(data, None)
    computed: xr.Dataset = lazy.compute(scheduler="threads")
    return computed


def names(seen: list[Event]) -> Counter[str]:
    return Counter(type(event).__name__ for event in seen)


def blocks_read(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def test_a_store_is_the_result(
    scheduler: str, data: Path, whole: xr.Dataset, tmp_path: Path
) -> None:
    seen: list[Event] = []
    result = fit(data, tmp_path / "maps.zarr", observers=[seen.append])
    assert result.popt.chunks == ((3,) * 4, (40,) * 3, (2,))
    xr.testing.assert_identical(result.compute(), whole)
    xr.testing.assert_identical(result, fit(data, tmp_path / "maps.zarr"))
    opened = xr.open_zarr(tmp_path / "maps.zarr")
    xr.testing.assert_equal(opened.load(), whole)
    assert opened.status.dtype == np.int8
    assert names(seen)["TileFinished"] == N_TILES
    assert isinstance(seen[0], MapStarted)
    assert seen[0].store == str(tmp_path / "maps.zarr")


def start(data: Path, store: Path, log: Path) -> subprocess.Popen[str]:
    """Start to fit in a process, and return when it is about to begin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.surviving_map", data, store, log],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def n_written(store: Path) -> int:
    return len(list((store / "status" / "c").glob("*/*"))) if store.exists() else 0


def test_a_killed_process_is_continued(data: Path, whole: xr.Dataset, tmp_path: Path) -> None:
    store, log = tmp_path / "maps.zarr", tmp_path / "log"
    process = start(data, store, log)
    while n_written(store) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    n_left = N_TILES - n_written(store)
    assert n_left > 0
    cut = xr.open_zarr(store)
    assert (cut.status == -7).sum() >= n_left * 120
    log.unlink()
    seen: list[Event] = []
    result = fit(data, store, str(log), observers=[seen.append])
    xr.testing.assert_identical(result.compute(), whole)
    resumed = next(event for event in seen if isinstance(event, MapResumed))
    assert (resumed.tiles, resumed.n_damaged) == (N_TILES - n_left, 0)
    assert resumed.totals["converged"] >= 120 * resumed.tiles - 1
    assert names(seen)["TileFinished"] == n_left
    last = seen[-1]
    assert isinstance(last, MapEnded)
    assert (last.fitted, last.pixels) == (n_left * 120, N_TILES * 120)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(data: Path, whole: xr.Dataset, tmp_path: Path) -> None:
    rng = random.Random(0)
    store, log = tmp_path / "maps.zarr", tmp_path / "log"
    process = start(data, tmp_path / "uninterrupted.zarr", log)
    began = time.monotonic()
    process.communicate()
    seconds = time.monotonic() - began
    n_kills = n_runs = 0
    while n_kills < 20:
        n_runs += 1
        process = start(data, store, log)
        try:
            process.wait(timeout=rng.uniform(0.05, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            n_kills += 1
        process.communicate()
        if process.returncode == 0:  # begin again
            xr.testing.assert_identical(fit(data, store).compute(), whole)
            store.rename(tmp_path / f"done-{n_runs}")
    xr.testing.assert_identical(fit(data, store).compute(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_that_are_killed(
    seed: int, data: Path, whole: xr.Dataset, tmp_path: Path, process_client: Client
) -> None:
    pids = list(process_client.run(os.getpid).values())
    timer = threading.Timer(0.5 + seed, lambda: os.kill(pids[seed % 2], signal.SIGKILL))
    with process_client.as_current(), dask.config.set(scheduler="dask.distributed"):
        timer.start()
        result = fit(data, tmp_path / "maps.zarr", seconds=0.2)
    timer.join()
    xr.testing.assert_identical(result.compute(), whole)
    process_client.wait_for_workers(2)


def test_max_walltime_in_the_middle(data: Path, whole: xr.Dataset, tmp_path: Path) -> None:
    clock = time.monotonic

    def expire(event: Event) -> None:
        if isinstance(event, TileFinished) and event.tiles == 3:
            patch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: clock() + 1e4))

    limit = {"max_walltime": 1e3}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="The same call fits the others") as warned,
    ):
        cut = fit(data, tmp_path / "maps.zarr", observers=[expire], options=limit)
    assert f": {N_TILES * 120 - int((cut.status == -7).sum()):,} of" in str(warned[0].message)
    cut = cut.load()
    n_left = int((cut.status == -7).sum())
    assert 0 < n_left <= (N_TILES - 3) * 120
    xr.testing.assert_equal(cut.where(cut.status != -7), whole.where(cut.status != -7))
    result = fit(data, tmp_path / "maps.zarr")  # without the limit
    xr.testing.assert_identical(result.compute(), whole)


def test_an_interruption_leaves_a_note(data: Path, whole: xr.Dataset, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, TileFinished) and event.tiles == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as info:
        fit(data, tmp_path / "maps.zarr", observers=[interrupt])
    (note,) = info.value.__notes__
    assert note.endswith("maps.zarr. The same call fits the others.")
    assert not (tmp_path / "maps.zarr.lock").exists()
    xr.testing.assert_identical(fit(data, tmp_path / "maps.zarr").compute(), whole)


def test_damaged_tiles_are_fitted_again(data: Path, whole: xr.Dataset, tmp_path: Path) -> None:
    store, log = tmp_path / "maps.zarr", tmp_path / "log"
    fit(data, store)
    damaged = store / "popt" / "c" / "1" / "2" / "0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (store / "chi2" / "c" / "3" / "0").unlink()
    seen: list[Event] = []
    result = fit(data, store, str(log), observers=[seen.append])
    assert next(event.n_damaged for event in seen if isinstance(event, MapResumed)) == 2
    assert {e.index for e in seen if isinstance(e, TileFinished)} == {(1, 2), (3, 0)}
    for block in ("(0, 1, 2)", "(1, 1, 2)", "(0, 3, 0)", "(1, 3, 0)"):
        assert blocks_read(log)[block] >= 1
    xr.testing.assert_identical(result.compute(), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change": lambda y: y + 1}, "values of y_data in block"),
        ({"change": lambda y: y.isel(row=slice(3, None))}, "data y_data was"),
        ({"change": lambda y: y.assign_coords(row=np.arange(12))}, "data coordinate row"),
        ({"model": lambda t, a, b: a + b * t}, "the model computes a different function"),
        ({"p0": {"a": 1.5}}, "argument p0 was"),
        ({"bounds": {"a": (0, 9)}}, "argument lower bounds was"),
        ({"loss": "huber"}, "argument loss was 'linear' and is 'huber'"),
        ({"covariance": "full"}, "argument covariance was 'errors' and is 'full'"),
        ({"options": {"precision": "float32"}}, "option precision was 'auto' and is 'float32'"),
    ],
)
def test_a_store_of_another_fit_is_refused(
    change: dict[str, Any], message: str, data: Path, stored: Path
) -> None:
    before = (stored / "zarr.json").read_bytes()
    with pytest.raises(
        nd.CheckpointError, match=f"The store .* is of a different fit: .*{message}"
    ):
        fit(data, stored, **change)
    assert (stored / "zarr.json").read_bytes() == before


@pytest.fixture(scope="module")
def stored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that is complete."""
    path = tmp_path_factory.mktemp("stored") / "maps.zarr"
    with pytest.MonkeyPatch.context() as patch:
        small_tiles.__wrapped__(patch)  # type: ignore[attr-defined]
        fit(data, path)
    return path


def test_two_writers_at_once_are_refused(data: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(event: Event) -> None:
        if isinstance(event, TileFinished) and event.tiles == 1:
            with pytest.raises(nd.CheckpointError) as info:
                fit(data, tmp_path / "maps.zarr")
            refused.append(str(info.value))

    fit(data, tmp_path / "maps.zarr", observers=[second])
    assert "is being written by another fit (process " in refused[0]


def test_other_data_at_the_path_are_kept(data: Path, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "other.zarr", shape=(3,), dtype=float)
    with pytest.raises(nd.CheckpointError, match="that nlsq_dask has not written"):
        fit(data, tmp_path / "other.zarr")
    for wrong in (3, ""):
        with pytest.raises(
            TypeError, match=f"store must be a path or a URL, or None; got {wrong!r}"
        ):
            fit(data, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"store='unknown://a/b' cannot be used: "):
        fit(data, "unknown://a/b")  # type: ignore[arg-type]


def test_unreadable_chunks_are_tried_again_by_the_next_call(
    data: Path, whole: xr.Dataset, tmp_path: Path
) -> None:
    def unreadable(y: xr.DataArray) -> xr.DataArray:
        return y.copy(data=y.data.map_blocks(fails_at_one_block, dtype=float))

    seen: list[Event] = []
    skips = {"min_success_rate": 0.5, "max_retries_per_batch": 0}
    store = tmp_path / "maps.zarr"
    bad.write_text("(1, 2, 1)")
    cut = fit(data, store, observers=[seen.append], change=unreadable, options=skips).load()
    assert (cut.status[6:9, 40:80] == -6).all()
    assert (cut.status == -6).sum() == 120
    assert names(seen)["BlocksSkipped"] == 1
    bad.write_text("(0, 2, 1) (0, 0, 0) (0, 0, 1) (0, 0, 2) (0, 1, 0) (0, 1, 1) (0, 1, 2)")
    with pytest.raises(nd.BlockReadError, match=r"less than min_success_rate=0\.99\. y_data could"):
        fit(data, store, change=unreadable, options={**skips, "min_success_rate": 0.99})
    bad.write_text("")
    seen.clear()
    result = fit(data, store, observers=[seen.append], change=unreadable, options=skips)
    assert names(seen)["TileFinished"] == 1
    xr.testing.assert_identical(result.compute(), whole)


bad = Path(os.environ.get("PYTEST_TMPDIR", "/tmp")) / f"nlsq-bad-blocks-{os.getpid()}"


def fails_at_one_block(block: np.ndarray, block_info: Any = None) -> np.ndarray:
    if block_info and str(block_info[0]["chunk-location"]) in bad.read_text():
        raise OSError("the disk is broken")
    return block


def test_writes_are_repeated(
    data: Path, whole: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed = MapStore.write, []

    def fail_once(self: MapStore, tile: Any, arrays: Any) -> None:
        if not failed and len(self.finished()) >= 4:
            failed.append(tile)
            raise OSError("no route to host")
        write(self, tile, arrays)

    monkeypatch.setattr(MapStore, "write", fail_once)
    with dask.config.set(scheduler="threads"):
        result = fit(data, tmp_path / "maps.zarr")
        assert failed
        xr.testing.assert_identical(result.compute(), whole)
        failed.clear()
        with pytest.raises(OSError, match="no route to host") as info:
            fit(data, tmp_path / "2.zarr", options={"enable_fault_tolerance": False})
    assert "Finished tiles are in" in info.value.__notes__[0]


def test_an_outage_of_the_store_is_waited_out(
    data: Path, whole: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it interrupts: beginning, listing, writing, verifying and opening."""
    patch_retries(monkeypatch)
    calls: Counter[str] = Counter()

    def fail_at_first(name: str) -> None:
        function = getattr(MapStore, name)

        def failing(*args: Any) -> Any:
            calls[name] += 1
            if calls[name] <= 4:
                raise ConnectionError("gone")
            return function(*args)

        monkeypatch.setattr(MapStore, name, failing)

    for name in ("create_or_open", "finished", "write", "read", "open"):
        fail_at_first(name)
    with dask.config.set(scheduler="synchronous"):
        for _ in range(2):
            result = fit(data, tmp_path / "maps.zarr", options={"max_retries_per_batch": 0})
    assert min(calls.values()) > 4
    xr.testing.assert_identical(result.compute(), whole)
    calls.clear()
    with pytest.raises(
        nd.CheckpointError, match=r"store='.*maps.zarr' cannot .*Error: gone\. Pass"
    ):
        fit(data, tmp_path / "maps.zarr", options={"retry_seconds": 0})


def test_arrays_in_memory(stored: Path, data: Path, whole: xr.Dataset, tmp_path: Path) -> None:
    cube = xr.open_zarr(data, consolidated=False).signal.load()
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
    url = f"file://{tmp_path}/maps.zarr"
    result = optimizer.fit_each(decay, "t", cube, dims="t", store=url)
    assert result.popt.chunks is not None
    np.testing.assert_array_equal(result.status, whole.status)
    assert float((np.abs(result.popt - whole.popt) / whole.perr).max()) < 1e-5
    with pytest.raises(nd.CheckpointError, match="data y_data was"):
        optimizer.fit_each(decay, "t", cube + 1, dims="t", store=url)


def test_failed_fits_can_raise_at_the_end(data: Path, tmp_path: Path) -> None:
    options = {"gauss_newton_max_iterations": 1}
    with pytest.raises(nd.PixelFitError, match=r"fits failed .*All fits are in .*maps\.zarr"):
        fit(data, tmp_path / "maps.zarr", p0=[9, 9], errors="raise", options=options)
    kept = fit(data, tmp_path / "maps.zarr", p0=[9, 9], options=options)
    assert (kept.status == 0).any()


def test_a_map_of_one_tile_cannot_be_continued(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_MIN_PIXELS", 100)

    def whole_frames(y: xr.DataArray) -> xr.DataArray:
        return y.chunk(t=5, row=-1, col=-1)

    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    cube = whole_frames(xr.open_zarr(data, consolidated=False).signal)
    (problem,) = optimizer.plan(decay, "t", cube, dims="t").problems
    assert problem.startswith("the map is a single tile, because the chunks of y_data span it")
    with pytest.warns(nd.DataWarning, match="The map is a single tile"):
        fit(data, tmp_path / "maps.zarr", change=whole_frames)


def test_walltime_while_a_store_is_verified(data: Path, stored: Path) -> None:
    clock, finished = time.monotonic, MapStore.finished

    def expire(store: MapStore) -> Any:
        patch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: clock() + 1e4))
        return finished(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MapStore, "finished", expire)
        with pytest.warns(UserWarning, match="while it verified the tiles in the store"):
            result = fit(data, stored, options={"max_walltime": 1e3})
    assert (result.status != -7).all()
    with pytest.warns(UserWarning, match="before the store was opened"):
        result = fit(data, stored, options={"max_walltime": 1e-9})
    assert (result.status == -7).all()


def test_chunks_of_very_different_sizes_are_refused_before_anything_is_read(
    data: Path, tmp_path: Path
) -> None:
    def months(y: xr.DataArray) -> xr.DataArray:
        return y.chunk(col=(31, 28, 31, 30))

    expected = r"have sizes from 28 to 31 along 'col', .* such as \.chunk\(\{'col': 31\}\)"
    with pytest.raises(nd.DataError, match=expected):
        fit(data, tmp_path / "maps.zarr", str(tmp_path / "log"), change=months)
    assert not list(tmp_path.iterdir())
