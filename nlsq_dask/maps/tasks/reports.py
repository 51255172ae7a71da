"""``TileReport``: result of the task of a tile, for the process that called ``fit_each``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.engine.independent_tasks import Gate
from nlsq_dask.engine.retries import ReadPolicy, SkippedBlock, call_with_retries
from nlsq_dask.engine.source_graph import GroupReader
from nlsq_dask.maps.problem.tiles import Tile
from nlsq_dask.maps.stores.store import MapStore
from nlsq_dask.maps.tasks.columns import NotReadError
from nlsq_dask.maps.tasks.outputs import counted
from nlsq_dask.maps.tasks.picture import Cells, PictureGrid
from nlsq_dask.maps.tasks.tile_task import TileTask
from nlsq_dask.solvers.lanes.records import LaneStatus

Array = NDArray[Any]


@dataclass(frozen=True)
class TileReport:
    """Counts, picture and arrays of a finished tile."""

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
    policy: ReadPolicy  # for writes, too
    gate: Gate = field(default_factory=Gate)

    def __call__(self, own: tuple[GroupReader, Tile], *inputs: Any) -> TileReport | None:
        """Return the report on a tile; None if the computation has ended meanwhile."""
        return self.gate.run(own[1].index, lambda: self._fit(own, inputs))

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
        call_with_retries(partial(self.store.write, tile.index, arrays), self.policy)
        return TileReport(counts, cells, None, not_read)


@dataclass(frozen=True)
class VerifyingTask:
    """Function of the tasks that check the tiles in a store."""

    store: MapStore
    reporter: Reporter
    policy: ReadPolicy

    def __call__(self, tile: Tile) -> TileReport | None:
        """Return the report on a tile; None if it has to be fitted again."""
        arrays = call_with_retries(partial(self.store.read, tile.index), self.policy)
        if arrays is None or np.any(arrays["status"] == LaneStatus.NOT_FITTED):
            return None
        return TileReport(*self.reporter.counts_and_cells(tile, arrays))
