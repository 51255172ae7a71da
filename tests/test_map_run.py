"""A fit for every pixel while it runs: tiles one by one, events, and early ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from dask._task_spec import Task
from distributed.client import FutureCancelledError

import nlsq_dask as nd
from nlsq_dask import HybridStreamingConfig as Config
from nlsq_dask.engine.independent_tasks import execute_each
from nlsq_dask.events import (
    Event,
    FitAborted,
    MapDrawn,
    MapEnded,
    MapStarted,
    TileFinished,
    WaitingForWorkers,
)
from nlsq_dask.fit import interruption
from nlsq_dask.maps.problem import arguments, tiles
from nlsq_dask.maps.tasks import graph
from nlsq_dask.maps.tasks.picture import Picture, PictureGrid
from tests.clusters import cluster, later, once

T = np.linspace(0.0, 3.0, 20)
N_TILES = 6


def decay(t: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-b * t)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiles have 2 rows."""
    monkeypatch.setattr(tiles, "_MIN_PIXELS", 1)
    monkeypatch.setattr(tiles, "_MIN_POINTS", 1)
    monkeypatch.setattr(arguments, "memory_chunks", lambda *_: ((20,), (2,) * N_TILES, (10,)))


@pytest.fixture(scope="module")
def cube() -> xr.DataArray:
    """A map of 12 x 10 pixels, of which three have no data."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1.5, 2.5, (12, 10)), rng.uniform(0.8, 1.2, (12, 10))
    y = a * np.exp(-b * T[:, None, None]) + 0.05 * rng.standard_normal((20, 12, 10))
    y[:, 5, :3] = np.nan
    return xr.DataArray(y, {"t": T}, dims=("t", "row", "col"))


def fit_each(y: Any, observers: Any = (), config: Config | None = None, **more: Any) -> xr.Dataset:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(
        Config(verbose=0) if config is None else config, observers=observers
    )
    ds: xr.Dataset = optimizer.fit_each(decay, "t", y, {"a": 2.0, "b": 1.0}, dims="t", **more)
    return ds


@pytest.fixture(scope="module")
def fitted(cube: xr.DataArray) -> xr.Dataset:
    """The fits, computed as a lazy Dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_MIN_PIXELS", 1)
        patch.setattr(tiles, "_MIN_POINTS", 1)
        lazy = fit_each(cube.chunk(row=2, col=10))
    computed: xr.Dataset = lazy.compute(scheduler="threads")
    return computed


def test_each_tile_is_reported(scheduler: str, cube: xr.DataArray, fitted: xr.Dataset) -> None:
    seen: list[Event] = []
    result = fit_each(cube, [seen.append])
    xr.testing.assert_identical(result, fitted)
    started, *others, ended = seen
    assert isinstance(started, MapStarted)
    assert (started.n_pixels, started.n_points, started.n_tiles) == (120, 20, N_TILES)
    assert (started.dims, started.param_names) == (("row", "col"), ("a", "b"))
    done = [event for event in others if isinstance(event, TileFinished)]
    assert sorted(event.index for event in done) == [(i, 0) for i in range(N_TILES)]
    assert [event.tiles for event in done] == list(range(1, N_TILES + 1))
    total: Counter[str] = Counter()
    for event in done:
        total.update(event.counts)
        assert event.totals == total
        assert event.pixels == event.fitted == 20 * event.tiles
    assert total == {"converged": 117, "no_data": 3}
    assert isinstance(others[-1], MapDrawn)
    np.testing.assert_array_equal(others[-1].status, result.status)
    np.testing.assert_allclose(others[-1].values, result.popt.sel(param="a"), rtol=1e-6)
    assert isinstance(ended, MapEnded)
    assert ended.is_complete
    assert ended.totals == total


def at_first_tile(act: Callable[[], Any]) -> Callable[[Event], None]:
    """Return an observer that acts when the first tile is done."""

    def observe(event: Event) -> None:
        if isinstance(event, TileFinished) and event.tiles == 1:
            act()

    return observe


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
@pytest.mark.parametrize("reason", ["max_walltime was reached", "SIGTERM was received"])
def test_an_early_end_keeps_the_tiles_that_are_done(
    scheduler: str, reason: str, cube: xr.DataArray, fitted: xr.Dataset
) -> None:
    is_limit = reason.startswith("max_walltime")
    config = Config(
        verbose=0, max_walltime=60.0 if is_limit else None, stop_on_sigterm=not is_limit
    )
    clock = time.monotonic

    def act() -> None:
        if is_limit:
            patch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: clock() + 100.0))
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    seen: list[Event] = []
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set(scheduler=scheduler),
        pytest.warns(UserWarning, match=f"fit_each stopped because {reason}: .* of 120 pixels"),
    ):
        result = fit_each(cube, [seen.append, at_first_tile(act)], config)
    assert signal.getsignal(signal.SIGTERM) is before
    is_done = result.status != -7
    assert 20 <= is_done.sum() < 120
    xr.testing.assert_identical(result.popt.where(is_done), fitted.popt.where(is_done))
    assert np.isnan(result.popt.where(~is_done)).all()
    assert isinstance(seen[-1], MapEnded)
    assert not seen[-1].is_complete
    assert sum(seen[-1].totals.values()) == seen[-1].pixels == is_done.sum()


def test_a_limit_that_passes_with_the_last_tile_is_no_early_end(cube: xr.DataArray) -> None:
    clock = time.monotonic

    def observe(event: Event) -> None:
        if isinstance(event, TileFinished) and event.tiles == event.n_tiles:
            patch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: clock() + 100.0))

    with pytest.MonkeyPatch.context() as patch:
        result = fit_each(cube, [observe], Config(verbose=0, max_walltime=60.0))
    assert (result.status != -7).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_reported_and_passed_on(
    error: type[BaseException], cube: xr.DataArray
) -> None:
    seen: list[Event] = []

    def interrupt() -> None:
        raise error

    with dask.config.set(scheduler="threads"), pytest.raises(error):
        fit_each(cube, [seen.append, at_first_tile(interrupt)])
    assert isinstance(seen[-1], FitAborted)
    assert sum(isinstance(event, TileFinished) for event in seen) == 1


def test_fits_within_tasks_are_silent(
    cube: xr.DataArray, fitted: xr.Dataset, capfd: pytest.CaptureFixture[str], process_client: Any
) -> None:
    with process_client.as_current(), dask.config.set(scheduler="dask.distributed"):
        inside = dask.delayed(fit_each)(cube, config=Config(verbose=2)).compute()
    xr.testing.assert_allclose(inside, fitted)
    assert not capfd.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("max_walltime", 5.0), ("log_file", "fits.jsonl")])
def test_options_without_effect_on_lazy_results(
    option: str, value: Any, cube: xr.DataArray
) -> None:
    with pytest.raises(ValueError, match=f"{option} has no effect on a lazy result"):
        fit_each(cube.chunk(row=2), config=Config(**{option: value}))


def test_results_of_a_scheduler_without_callbacks() -> None:
    def get(tasks: Any, keys: Any, **options: Any) -> list[Any]:
        assert not options
        return [tasks[key] for key in keys]

    taken: list[tuple[str, int]] = []
    checked: list[int] = []
    with dask.config.set(scheduler=get):
        execute_each(
            lambda client: ({"a": 1, "b": 2}, ["a", "b"]),
            lambda key, value: taken.append((key, value)),
            lambda: checked.append(len(taken)),
        )
    assert taken == [("a", 1), ("b", 2)]
    assert checked == [1, 2]


def test_tasks_are_made_again_if_workers_are_lost(process_client: Any) -> None:
    attempts: list[list[int]] = []
    taken: list[int] = []

    def make_tasks(client: Any) -> Any:
        left = [i for i in range(4) if i not in taken]
        attempts.append(left)
        return {i: Task(i, abs, -i) for i in left}, left

    def take(key: int, value: int) -> None:
        taken.append(value)
        if len(taken) == 2:
            raise FutureCancelledError("task", "lost dependencies")

    with process_client.as_current(), dask.config.set(scheduler="dask.distributed"):
        execute_each(make_tasks, take, lambda: None)
        assert sorted(taken) == [0, 1, 2, 3]
        assert [len(left) for left in attempts] == [4, 2]

        def lose(key: int, value: int) -> None:
            raise FutureCancelledError("task", "lost dependencies")

        taken.clear()
        with pytest.raises(nd.ClusterLostError, match="lost in each of 4 attempts"):
            execute_each(make_tasks, lose, lambda: None)


def test_a_cluster_without_workers(
    cube: xr.DataArray, fitted: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_MAX_GRAPH_BYTES", 0)  # data are sent to the workers
    seen: list[Event] = []

    def leave() -> None:
        local.scale(0)
        threading.Timer(1.0, lambda: local.scale(1)).start()

    with cluster(0) as (local, client):
        with later(1.6, lambda: local.scale(1)):
            result = fit_each(cube, [seen.append, once(TileFinished, leave)])
        xr.testing.assert_identical(result, fitted)
        assert any(isinstance(event, WaitingForWorkers) for event in seen)
        local.scale(0)
        while client.scheduler_info()["workers"]:
            time.sleep(0.05)
        config = Config(verbose=0, max_walltime=0.5)
        with pytest.warns(UserWarning, match="max_walltime was reached: 0 of 120 pixels"):
            assert (fit_each(cube, config=config).status == -7).all()
        # A few blocks are read before the store is opened.
        with pytest.warns(UserWarning, match="max_walltime was reached, before the store was op"):
            result = fit_each(cube.chunk(row=2), config=config, store=tmp_path / "store")
        assert (result.status == -7).all()
        assert np.isnan(result.popt).all()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(7,), (250, 130), (3, 1, 205), (1, 1)])
def test_the_picture_of_tiles_is_that_of_the_map(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    status = rng.integers(-5, 4, shape).astype(np.int8)
    values = np.where(rng.random(shape) < 0.1, np.nan, rng.random(shape))
    grid = PictureGrid.of(shape)
    whole, parts = Picture(grid), Picture(grid)
    assert (whole.status == -128).all()
    whole.add(grid.cells((0,) * len(shape), status, values))
    edges = [sorted({0, n // 3, n // 2, n}) for n in shape]
    for index in np.ndindex(*(len(e) - 1 for e in edges)):
        spans = [slice(e[i], e[i + 1]) for e, i in zip(edges, index, strict=True)]
        origin = tuple(span.start for span in spans)
        parts.add(grid.cells(origin, status[tuple(spans)], values[tuple(spans)]))
    np.testing.assert_array_equal(whole.status, parts.status)
    np.testing.assert_allclose(whole.values, parts.values, rtol=1e-6)
    if shape == (250, 130):
        assert grid.n_cells == (84, 65)
        solved = (status[:3, :2] > 0) & np.isfinite(values[:3, :2])
        np.testing.assert_allclose(whole.values[0, 0], values[:3, :2][solved].mean(), rtol=1e-6)
        assert whole.status[0, 0] == status[:3, :2].min()


def test_most_fits_that_fail_with_dates_are_a_warning(cube: xr.DataArray) -> None:
    dated = cube.assign_coords(t=np.datetime64("2020-01-01", "ns") + T.astype("m8[D]"))
    with pytest.warns(nd.DataWarning, match=r"of 117 fits failed or are singular\. .* an origin"):
        fit_each(dated)
