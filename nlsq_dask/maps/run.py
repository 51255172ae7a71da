"""``run_map``: fit all pixels now, tile by tile, and report to observers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask._text import join_first
from nlsq_dask.engine.execution import execute_each, is_inside_task
from nlsq_dask.engine.retries import SkippedBlock
from nlsq_dask.engine.source_graph import GroupReader
from nlsq_dask.engine.workers import Workers
from nlsq_dask.errors import BlockReadError, PixelFitError, warn_caller
from nlsq_dask.events import (
    BlocksSkipped,
    MapDrawn,
    MapEnded,
    MapStarted,
    Observer,
    TileFinished,
)
from nlsq_dask.fit.interruption import FitInterruptedError, Interruption
from nlsq_dask.maps.arguments import MapProblem
from nlsq_dask.maps.columns import NotReadError
from nlsq_dask.maps.dataset import as_dataset, map_dims
from nlsq_dask.maps.graph import build_graph, trace_tile_task
from nlsq_dask.maps.outputs import counted, failure_text
from nlsq_dask.maps.picture import Cells, Picture, PictureGrid
from nlsq_dask.maps.tile_task import TileTask
from nlsq_dask.maps.tiles import Tile
from nlsq_dask.observers.build import open_observers, report_abort, send
from nlsq_dask.observers.telemetry import get_defense_telemetry
from nlsq_dask.solvers.lanes import LaneStatus
from nlsq_dask.status import Status

Array = NDArray[Any]

_DRAW_INTERVAL = 0.5  # seconds between pictures of the map
_MAX_LISTED = 3
_CAUSES = {Status.WALLTIME: "max_walltime was reached", Status.TERMINATED: "SIGTERM was received"}


class Gate:
    """Lets tasks of this process begin; once closed, none begins and those that run are awaited.

    A copy in another process stays open: its scheduler cancels tasks itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_running = 0
        self._is_open = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, ()

    @contextmanager
    def passing(self) -> Iterator[bool]:
        """Count a task while it runs; yield whether it may."""
        with self._changed:
            is_open = self._is_open
            self._n_running += is_open
        try:
            yield is_open
        finally:
            with self._changed:
                self._n_running -= is_open
                self._changed.notify_all()

    def close(self) -> None:
        """Let no further task begin, and wait for the running ones."""
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: not self._n_running)


@dataclass(frozen=True)
class TileReport:
    """What the task of a tile returns to the process that called ``fit_each``."""

    counts: dict[LaneStatus, int]  # pixels by status
    cells: Cells
    arrays: dict[str, Array] | None  # of the result; None if they are in the store
    not_read: SkippedBlock | None = None


@dataclass(frozen=True)
class ReportingTask:
    """Function of the tasks: fits a tile, and writes the result to the store if there is one."""

    task: TileTask
    picture: PictureGrid
    drawn: int  # number of the parameter that the picture shows
    gate: Gate

    def __call__(self, own: tuple[GroupReader, Tile], *inputs: Any) -> TileReport | None:
        """Return the report on a tile; None if the computation has ended meanwhile."""
        with self.gate.passing() as is_open:
            return self._fit(own, inputs) if is_open else None

    def _fit(self, own: tuple[GroupReader, Tile], inputs: tuple[Any, ...]) -> TileReport:
        tile, not_read = own[1], None
        try:
            arrays = self.task.fit(own, inputs)
        except NotReadError as error:
            not_read = error.block
            arrays = self.task.outputs.failed(self.task.pixels(tile), LaneStatus.NOT_READ)
        status = arrays["status"]
        origin = tuple(tile.origin[axis] for axis in self.task.outputs.map_axes)
        cells = self.picture.cells(origin, status, arrays["popt"][..., self.drawn])
        return TileReport(counted(status), cells, arrays, not_read)


def run_map(problem: MapProblem, observers: Iterable[Observer]) -> xr.Dataset:
    """Return the Dataset of a fit for every pixel, computed."""
    config = problem.config
    interruption = Interruption(config.max_walltime)
    if is_inside_task():  # many such calls would report at once
        config = replace(config, verbose=0, dashboard=False)
    with ExitStack() as stack:
        opened, _ = open_observers(stack, config, observers)
        emit = partial(send, [get_defense_telemetry(), *opened])
        stack.enter_context(report_abort(emit))
        if config.stop_on_sigterm:
            stack.enter_context(interruption.heeding_sigterm())
        run = _Run(problem, emit, interruption)
        run.fit()
    return run.result()


class _Run:
    """The fits of all tiles, and what has become of them so far."""

    def __init__(self, problem: MapProblem, emit: Observer, interruption: Interruption) -> None:
        self._problem, self._emit, self._interruption = problem, emit, interruption
        self._began = time.monotonic()
        shape = tuple(map(sum, problem.grid.map_chunks))
        self._grid = PictureGrid.of(shape)
        self._picture = Picture(self._grid)
        self._drawn_at = self._began
        self._totals: Counter[LaneStatus] = Counter()
        self._n_tiles = 0
        self._not_read: list[SkippedBlock] = []
        outputs = problem.outputs
        self._arrays = outputs.failed(shape, LaneStatus.NOT_FITTED)
        self._stopped_by: Status | None = None
        self._started = MapStarted(
            model=problem.model.name,
            n_points=problem.grid.n_points,
            shape=shape,
            grid=problem.grid.shape,
            dims=map_dims(problem),
            param_names=problem.parameters.names,
            notes=tuple(problem.blocks.date_notices()),
        )

    def fit(self) -> None:
        """Fit all tiles."""
        problem = self._problem
        as_dataset(problem, {})  # an error about names comes before the fits
        tiles, gate = list(problem.grid), Gate()
        task = ReportingTask(trace_tile_task(problem, raises=False), self._grid, self._drawn, gate)
        graph, keys = build_graph(problem, task, tiles)
        by_key = dict(zip(keys, tiles, strict=True))
        self._emit(self._started)
        try:
            self._interruption.check()
            execute_each(
                graph,
                keys,
                Workers.active(),
                lambda key, report: self._take(by_key[key], report),
                self._interruption.check,
            )
        except FitInterruptedError as error:
            if self._n_tiles < self._started.n_tiles:
                self._stopped_by = error.reason
        finally:
            gate.close()
        self._draw()
        self._emit(self._ended())

    @property
    def _drawn(self) -> int:
        """Number of the parameter that the picture shows: the first that is not fixed."""
        free = self._problem.parameters.transform.is_free
        return int(np.argmax(free))

    def _take(self, tile: Tile, report: TileReport | None) -> None:
        if report is None:
            return
        self._n_tiles += 1
        self._totals.update(report.counts)
        self._picture.add(report.cells)
        if report.not_read is not None:
            self._skip(tile, report.not_read)
        for name, array in (report.arrays or {}).items():
            self._arrays[name][self._where(tile)] = array
        self._emit(
            TileFinished(
                index=tile.index,
                counts=_by_name(report.counts),
                tiles=self._n_tiles,
                n_tiles=self._started.n_tiles,
                pixels=self._totals.total(),
                n_pixels=self._started.n_pixels,
                fitted=self._totals.total(),
                totals=_by_name(self._totals),
                seconds=time.monotonic() - self._began,
            )
        )
        if time.monotonic() - self._drawn_at >= _DRAW_INTERVAL:
            self._draw()

    def _where(self, tile: Tile) -> tuple[slice, ...]:
        """Return where a tile lies in the map."""
        return tuple(
            slice(tile.origin[axis], tile.origin[axis] + tile.shape[axis])
            for axis in self._problem.grid.map_axes
        )

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        grid, dims = self._grid, self._started.dims
        self._emit(
            MapDrawn(
                parameter=self._started.param_names[self._drawn],
                dims=tuple(dims[axis] for axis in grid.axes),
                size=tuple(grid.shape[axis] for axis in grid.axes),
                step=grid.step,
                over=tuple(
                    dim
                    for axis, dim in enumerate(dims)
                    if axis not in grid.axes and grid.shape[axis] > 1
                ),
                status=self._picture.status,
                values=self._picture.values,
            )
        )

    def _skip(self, tile: Tile, block: SkippedBlock) -> None:
        self._not_read.append(block)
        n_pixels = self._totals[LaneStatus.NOT_READ]
        self._emit(BlocksSkipped((block.sentence,), n_pixels * self._problem.grid.n_points))
        n_all, least = self._started.n_pixels, self._problem.config.min_success_rate
        n_read = n_all - n_pixels
        if n_read and n_read >= least * n_all:
            return
        listed = join_first([b.sentence for b in self._not_read], _MAX_LISTED, "; ", "blocks")
        raise BlockReadError(
            f"At most {n_read:,} of {n_all:,} pixels can be read, less than "
            f"min_success_rate={least:g}. {listed}. Repair or replace the stored data, or lower "
            f"min_success_rate.",
            block.array,
            block.block,
            block.chunk,
        )

    def _ended(self) -> MapEnded:
        return MapEnded(
            is_complete=self._stopped_by is None,
            pixels=self._totals.total(),
            n_pixels=self._started.n_pixels,
            fitted=self._totals.total(),
            totals=_by_name(self._totals),
            seconds=time.monotonic() - self._began,
            message="" if self._stopped_by is None else _CAUSES[self._stopped_by],
        )

    def _warn(self) -> None:
        if self._stopped_by is not None:
            n_done, n_all = self._totals.total(), self._started.n_pixels
            warn_caller(
                f"fit_each stopped because {_CAUSES[self._stopped_by]}: {n_done:,} of {n_all:,} "
                f"pixels are fitted, the others have the status not_fitted. Pass store=, with "
                f"which the same call fits the others."
            )

    def result(self) -> xr.Dataset:
        """Return the Dataset; warn if not all pixels were fitted.

        Raises
        ------
        PixelFitError
            If fits failed and failed fits are errors.
        """
        self._warn()
        if self._problem.errors == "raise" and (text := failure_text(self._totals)):
            raise PixelFitError(
                f"{text}. Use errors='flag' (in curvefit, errors='ignore') to keep the others."
            )
        return as_dataset(self._problem, self._arrays)


def _by_name(counts: Counter[LaneStatus] | dict[LaneStatus, int]) -> dict[str, int]:
    """Return counts by the name of the status, the highest status first."""
    return {status.name.lower(): counts[status] for status in sorted(counts, reverse=True)}
