"""``TileReport``: what the tasks of tiles return to the process that called ``fit_each``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.engine.retries import SkippedBlock, write_with_retries
from nlsq_dask.engine.source_graph import GroupReader
from nlsq_dask.maps.problem.tiles import Tile
from nlsq_dask.maps.stores.store import MapStore
from nlsq_dask.maps.tasks.columns import NotReadError
from nlsq_dask.maps.tasks.outputs import counted
from nlsq_dask.maps.tasks.picture import Cells, PictureGrid
from nlsq_dask.maps.tasks.tile_task import TileTask
from nlsq_dask.solvers.lanes.records import LaneStatus

Array = NDArray[Any]


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
    """What is known of a tile that is done."""

    counts: dict[LaneStatus, int]  # pixels by status
    cells: Cells
    arrays: dict[str, Array] | None = None  # of the result; None if they are in the store
    not_read: SkippedBlock | None = None


@dataclass(frozen=True)
class Reporter:
    """Makes the report on a tile from its arrays."""

    picture: PictureGrid
    drawn: int  # number of the parameter that the picture shows
    map_axes: tuple[int, ...]  # axes of y that are not fitted

    def counts_and_cells(
        self, tile: Tile, arrays: dict[str, Array]
    ) -> tuple[dict[LaneStatus, int], Cells]:
        """Return the number of pixels by status, and what the tile adds to the picture."""
        status, origin = arrays["status"], tuple(tile.origin[axis] for axis in self.map_axes)
        values = arrays["popt"][..., self.drawn]
        return counted(status), self.picture.cells(origin, status, values)


@dataclass(frozen=True)
class ReportingTask:
    """Function of the tasks: fits a tile, and writes the result to the store if there is one."""

    task: TileTask
    reporter: Reporter
    store: MapStore | None
    n_retries: int  # of writes
    gate: Gate = field(default_factory=Gate)

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
        counts, cells = self.reporter.counts_and_cells(tile, arrays)
        if self.store is None:
            return TileReport(counts, cells, arrays, not_read)
        write_with_retries(partial(self.store.write, tile.index, arrays), self.n_retries)
        return TileReport(counts, cells, None, not_read)


@dataclass(frozen=True)
class VerifyingTask:
    """Function of the tasks that check the tiles in a store."""

    store: MapStore
    reporter: Reporter

    def __call__(self, tile: Tile) -> TileReport | None:
        """Return the report on a tile; None if it has to be fitted again."""
        arrays = self.store.read(tile.index)
        if arrays is None or np.any(arrays["status"] == LaneStatus.NOT_FITTED):
            return None
        return TileReport(*self.reporter.counts_and_cells(tile, arrays))
