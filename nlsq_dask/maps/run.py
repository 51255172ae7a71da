"""``run_map``: fit all pixels now, tile by tile, and report to observers."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nlsq_dask._text import join_first, sentence
from nlsq_dask.engine.error_kinds import ErrorKind, classify, describe
from nlsq_dask.engine.execution import is_inside_task
from nlsq_dask.engine.independent_tasks import execute_each
from nlsq_dask.engine.retries import ReadPolicy, SkippedBlock, call_with_retries
from nlsq_dask.engine.tile_graph import calls
from nlsq_dask.engine.workers import Workers
from nlsq_dask.errors import (
    BlockReadError,
    CheckpointError,
    DataWarning,
    PixelFitError,
    warn_caller,
)
from nlsq_dask.events import (
    BlocksSkipped,
    MapDrawn,
    MapEnded,
    MapResumed,
    MapStarted,
    Observer,
    TileFinished,
)
from nlsq_dask.fit.interruption import FitInterruptedError, Interruption
from nlsq_dask.maps.problem.arguments import MapProblem
from nlsq_dask.maps.problem.plan import SINGLE_TILE, check_memory
from nlsq_dask.maps.problem.tiles import Tile
from nlsq_dask.maps.results.dataset import as_dataset, map_dims
from nlsq_dask.maps.results.statuses import successes_first
from nlsq_dask.maps.stores.identity import map_fingerprint
from nlsq_dask.maps.stores.lease import Lease
from nlsq_dask.maps.stores.store import MapStore
from nlsq_dask.maps.tasks.graph import build_graph, trace_tile_task
from nlsq_dask.maps.tasks.outputs import failure_text
from nlsq_dask.maps.tasks.picture import Picture, PictureGrid
from nlsq_dask.maps.tasks.reports import Reporter, ReportingTask, TileReport, VerifyingTask
from nlsq_dask.observers.build import open_observers, report_abort, send
from nlsq_dask.observers.telemetry import get_defense_telemetry
from nlsq_dask.solvers.lanes.records import LaneStatus
from nlsq_dask.status import Status

_DRAW_INTERVAL = 0.5  # seconds between pictures of the map
_MAX_LISTED = 3
_STORE_ERRORS = (ErrorKind.OUTAGE, ErrorKind.DENIED)
_CAUSES = {Status.WALLTIME: "max_walltime was reached", Status.TERMINATED: "SIGTERM was received"}


def run_map(problem: MapProblem, observers: Iterable[Observer]) -> xr.Dataset:
    """Return the Dataset of a fit for every pixel: computed, or with a store, the opened store."""
    config = problem.config
    interruption = Interruption(config.max_walltime)
    if is_inside_task():  # many such calls would report at once
        config = replace(config, verbose=0, dashboard=False)
    with ExitStack() as stack:
        opened, _ = open_observers(stack, config, observers)
        emit = partial(send, [get_defense_telemetry(), *opened])
        stack.enter_context(report_abort(emit, is_map=True))
        if config.stop_on_sigterm:
            stack.enter_context(interruption.heeding_sigterm())
        run = _Run(problem, emit, interruption.check)
        run.begin()
        if problem.store is None:
            run.fit()
            return run.result(as_dataset(problem, run.arrays))
        template = _template(problem)
        policy = ReadPolicy.of(config)
        try:
            fingerprint = map_fingerprint(problem, template.coords, interruption.check, emit)
        except FitInterruptedError as error:
            run.end(error.reason)
            warn_caller(
                f"fit_each stopped because {_CAUSES[error.reason]}, before the store was opened. "
                f"The same call fits the pixels."
            )
            return template
        with _naming(problem.store):
            lease = stack.enter_context(Lease(problem.store))
            chunks = problem.grid.map_chunks
            arguments = problem.store, chunks, template, fingerprint
            store = call_with_retries(partial(MapStore.create_or_open, *arguments), policy)

        if problem.is_single_tile:
            warn_caller(sentence(SINGLE_TILE), DataWarning)

        def check() -> None:
            interruption.check()
            lease.check()

        try:
            run.fit(store, check)
        except BaseException as error:
            if run.n_tiles:
                error.add_note(
                    f"Finished tiles are in {store.path}. The same call fits the others."
                )
            raise
    return run.result(call_with_retries(store.open, policy))


@contextmanager
def _naming(store: str) -> Iterator[None]:
    """Context in which a store that cannot be read or written is a CheckpointError."""
    try:
        yield
    except Exception as error:
        # Libraries of object stores raise errors of any class.
        is_of_store = isinstance(error, OSError) or classify(error) in _STORE_ERRORS
        if not is_of_store or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"store={store!r} cannot be read or written: {describe(error)}. Pass a path or URL to "
            f"which this process and all workers can write, with the credentials that it needs."
        ) from error


def _template(problem: MapProblem) -> xr.Dataset:
    """Return a Dataset like the result, in which no pixel is fitted; it takes little memory."""
    shape = tuple(map(sum, problem.grid.map_chunks))
    ones = (1,) * len(shape)
    arrays = {
        name: np.broadcast_to(array, (*shape, *array.shape[len(shape) :]))
        for name, array in problem.outputs.failed(ones, LaneStatus.NOT_FITTED).items()
    }
    return as_dataset(problem, arrays)


class _Run:
    """The fits of all tiles, and what has become of them so far."""

    def __init__(self, problem: MapProblem, emit: Observer, check: Callable[[], None]) -> None:
        self._problem, self._emit = problem, emit
        self._store: MapStore | None = None
        self._policy = ReadPolicy.of(problem.config)
        self._check_end = check  # raises if the fits must end
        self._began = self._fits_began = time.monotonic()
        grid, names = problem.grid, problem.parameters.names
        self._started = MapStarted(
            model=problem.model.name,
            n_points=grid.n_points,
            shape=tuple(map(sum, grid.map_chunks)),
            grid=grid.shape,
            dims=map_dims(problem),
            param_names=names,
            store=problem.store,
            notes=tuple(problem.blocks.date_notices()),
        )
        free = problem.parameters.transform.is_free
        self._reporter = Reporter(
            PictureGrid.of(self._started.shape), int(np.argmax(free)), grid.map_axes
        )
        self._picture = Picture(self._reporter.picture)
        self._drawn_at = self._began
        self._n_drawn = 0  # tiles in the last picture
        self._totals: Counter[LaneStatus] = Counter()  # pixels by status
        self._n_earlier = 0  # pixels of an earlier run
        self.n_tiles = 0
        self._not_read: list[SkippedBlock] = []
        self._stopped_by: Status | None = None
        self._is_verifying = False  # whether the tiles in the store are being read
        self.arrays = {}
        if problem.store is None:
            self.arrays = problem.outputs.failed(self._started.shape, LaneStatus.NOT_FITTED)

    def begin(self) -> None:
        """Report that the fits begin."""
        as_dataset(self._problem, {})  # an error about names comes before the fits
        self._emit(self._started)

    def end(self, reason: Status | None) -> None:
        """Report that the fits ended, early if there is a reason."""
        self._stopped_by = reason
        self._emit(self._ended())

    def fit(self, store: MapStore | None = None, check: Callable[[], None] | None = None) -> None:
        """Fit all tiles that are not in the store; ``check`` raises if the fits must end."""
        problem, self._store = self._problem, store
        self._check_end = check or self._check_end
        try:
            tiles = list(problem.grid)
            if store is not None:
                tiles = self._missing(tiles, store)
            if tiles:
                self._fit(tiles)
        except FitInterruptedError as error:
            if self.n_tiles < self._started.n_tiles:
                self._stopped_by = error.reason
        if store is not None and self._stopped_by is None:
            n_seen = len(call_with_retries(store.finished, self._policy))
            _check_visible(store, n_seen, self._started.n_tiles)
        self._draw()
        self.end(self._stopped_by)

    def _fit(self, tiles: Sequence[Tile]) -> None:
        problem = self._problem
        task = ReportingTask(
            trace_tile_task(problem, raises=False),
            self._reporter,
            self._store,
            self._policy,
        )

        def take(tile: Tile, report: TileReport | None) -> None:
            task.gate.take(tile.index)
            if report is not None:
                self._take(tile, report)

        self._fits_began = time.monotonic()
        try:
            self._check()
            self._execute(tiles, partial(build_graph, problem, task), take)
        except FitInterruptedError:
            by_index = {tile.index: tile for tile in tiles}
            for index, report in task.gate.close().items():  # of tiles that were running
                take(by_index[index], report)
            raise
        finally:
            task.gate.close()

    def _execute(
        self,
        tiles: Sequence[Tile],
        make_graph: Callable[[list[Tile], Any], tuple[dict[Any, Any], list[Any]]],
        take: Callable[[Tile, TileReport | None], None],
    ) -> None:
        """Compute a task per tile; ``make_graph`` takes the remaining tiles, and a client."""
        remaining = {tile.index: tile for tile in tiles}
        by_key: dict[Any, Tile] = {}

        def make_tasks(client: Any) -> tuple[dict[Any, Any], list[Any]]:
            if client is not None:
                check_memory(self._problem, Workers.active())
            graph, keys = make_graph(list(remaining.values()), client)
            by_key.update(zip(keys, remaining.values(), strict=True))
            return graph, keys

        def finished(key: Any, report: TileReport | None) -> None:
            tile = by_key[key]
            del remaining[tile.index]
            take(tile, report)

        execute_each(make_tasks, finished, self._check, self._emit)

    def _missing(self, tiles: Sequence[Tile], store: MapStore) -> list[Tile]:
        """Return the tiles that are not in the store; those that are there are verified."""
        written = call_with_retries(store.finished, self._policy)
        present = [tile for tile in tiles if tile.index in written]
        if not present:
            return list(tiles)
        missing = [tile for tile in tiles if tile.index not in written]
        n_damaged = 0

        def take(tile: Tile, report: TileReport | None) -> None:
            nonlocal n_damaged
            n_damaged += report is None
            if report is None or report.counts.keys() == {LaneStatus.NOT_READ}:
                missing.append(tile)
            else:
                self.n_tiles += 1
                self._totals.update(report.counts)
                self._picture.add(report.cells)

        verify = VerifyingTask(store, self._reporter, self._policy)

        def make_graph(tiles: list[Tile], client: Any) -> tuple[dict[Any, Any], list[Any]]:
            token = uuid.uuid4().hex
            keys = [(f"nlsq-verify-{token}", *tile.index) for tile in tiles]
            return calls(verify, keys, tiles, token), keys

        self._is_verifying = True
        self._execute(present, make_graph, take)
        self._is_verifying = False
        self._n_earlier = self._totals.total()
        self._emit(
            MapResumed(
                tiles=self.n_tiles,
                n_tiles=self._started.n_tiles,
                pixels=self._n_earlier,
                n_pixels=self._started.n_pixels,
                totals=_by_name(self._totals),
                n_damaged=n_damaged,
            )
        )
        self._draw()
        return sorted(missing, key=lambda tile: tile.index)

    def _take(self, tile: Tile, report: TileReport) -> None:
        self.n_tiles += 1
        self._totals.update(report.counts)
        self._picture.add(report.cells)
        for name, array in (report.arrays or {}).items():
            where = tuple(
                slice(tile.origin[axis], tile.origin[axis] + tile.shape[axis])
                for axis in self._reporter.map_axes
            )
            self.arrays[name][where] = array
        if report.arrays:
            report.arrays.clear()  # local schedulers keep reports until the end
        if report.not_read is not None:
            self._skip(report.not_read)
        self._emit(
            TileFinished(
                index=tile.index,
                counts=_by_name(report.counts),
                tiles=self.n_tiles,
                n_tiles=self._started.n_tiles,
                pixels=self._totals.total(),
                n_pixels=self._started.n_pixels,
                fitted=self._totals.total() - self._n_earlier,
                totals=_by_name(self._totals),
                seconds=time.monotonic() - self._fits_began,
            )
        )

    def _check(self) -> None:
        """Draw the map if it is time to, and raise if the fits must end."""
        is_time = time.monotonic() - self._drawn_at >= _DRAW_INTERVAL
        if is_time and self.n_tiles > self._n_drawn:
            self._draw()
        self._check_end()

    def _draw(self) -> None:
        self._drawn_at, self._n_drawn = time.monotonic(), self.n_tiles
        grid, dims = self._reporter.picture, self._started.dims
        others = [axis for axis in range(len(dims)) if axis not in grid.axes]
        self._emit(
            MapDrawn(
                parameter=self._started.param_names[self._reporter.drawn],
                dims=tuple(dims[axis] for axis in grid.axes),
                size=tuple(grid.shape[axis] for axis in grid.axes),
                step=grid.step,
                over=tuple(dims[axis] for axis in others if grid.shape[axis] > 1),
                status=self._picture.status,
                values=self._picture.values,
            )
        )

    def _skip(self, block: SkippedBlock) -> None:
        """Report a tile that could not be read; raise if there are too many."""
        self._not_read.append(block)
        n_pixels = self._totals[LaneStatus.NOT_READ]
        self._emit(BlocksSkipped((block.sentence,), n_pixels * self._started.n_points))
        n_all, least = self._started.n_pixels, self._problem.config.min_success_rate
        n_read = n_all - n_pixels
        if n_read and n_read >= least * n_all:
            return
        listed = join_first([b.sentence for b in self._not_read], _MAX_LISTED, "; ", "blocks")
        raise BlockReadError(
            f"At most {n_read:,} of {n_all:,} pixels can be read, less than "
            f"min_success_rate={least:g}. {listed}. {block.remedy('lower min_success_rate')}",
            block.array,
            block.block,
            block.chunk,
        )

    def _ended(self) -> MapEnded:
        return MapEnded(
            is_complete=self._stopped_by is None,
            pixels=self._totals.total(),
            n_pixels=self._started.n_pixels,
            fitted=self._totals.total() - self._n_earlier,
            totals=_by_name(self._totals),
            seconds=time.monotonic() - self._began,
            message="" if self._stopped_by is None else _CAUSES[self._stopped_by],
        )

    def result(self, dataset: xr.Dataset) -> xr.Dataset:
        """Return the Dataset; warn if not all pixels were fitted.

        Raises
        ------
        PixelFitError
            If fits failed and failed fits are errors.
        """
        if self._stopped_by is not None:
            warn_caller(self._early_end(_CAUSES[self._stopped_by]))
        self._warn_of_dates()
        if self._problem.errors == "raise" and (text := failure_text(self._totals)):
            kept = f"All fits are in {self._store.path}. " if self._store else ""
            raise PixelFitError(
                f"{text}. {kept}Use errors='flag' (in curvefit, errors='ignore') to return all."
            )
        return dataset

    def _early_end(self, cause: str) -> str:
        if self._is_verifying:
            return (
                f"fit_each stopped because {cause}, while it verified the tiles in the store. The "
                f"same call continues."
            )
        remedy = "The same call" if self._store else "Pass store=, with which the same call"
        return (
            f"fit_each stopped because {cause}: {self._totals.total():,} of "
            f"{self._started.n_pixels:,} pixels are fitted, the others have the status not_fitted. "
            f"{remedy} fits the others."
        )

    def _warn_of_dates(self) -> None:
        """Warn if most fits have no good solution, and x holds dates."""
        totals = self._totals
        n_fits = totals.total() - totals[LaneStatus.NO_DATA] - totals[LaneStatus.NOT_READ]
        n_solved = totals[LaneStatus.CONVERGED] + totals[LaneStatus.AT_BOUND]
        if (hint := self._problem.blocks.date_hint) and 2 * n_solved < n_fits:
            warn_caller(
                f"{n_fits - n_solved:,} of {n_fits:,} fits failed or are singular.{hint}",
                DataWarning,
            )


def _check_visible(store: MapStore, n_seen: int, n_tiles: int) -> None:
    """Raise a CheckpointError if tiles that workers have written are not seen here."""
    if n_seen < n_tiles:
        raise CheckpointError(
            f"Only {n_seen:,} of {n_tiles:,} tiles are in {store.path} as this process sees it, "
            f"although workers have written all of them. Pass a path on a file system that all "
            f"machines of the cluster share, or a URL."
        )


def _by_name(counts: Mapping[LaneStatus, int]) -> dict[str, int]:
    """Return counts by the name of the status, in the order of ``status_table``."""
    return {status.name.lower(): counts[status] for status in sorted(counts, key=successes_first)}
