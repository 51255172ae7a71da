"""``Picture``: a reduced picture of a map that fills while its tiles finish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.data.shapes import longest_axes

MAX_CELLS = 100  # along each side
_EMPTY = 127  # status of a cell without a complete tile; higher than any other


@dataclass(frozen=True)
class Cells:
    """Contribution of a tile to the cells of a picture."""

    where: tuple[slice, ...]  # in the picture
    lowest: NDArray[np.int8]  # status
    sums: NDArray[np.float64]  # of a parameter, over the pixels that converged
    counts: NDArray[np.int64]  # of these pixels


@dataclass(frozen=True)
class PictureGrid:
    """Division of a map into cells along its one or two longest dimensions."""

    shape: tuple[int, ...]  # of the map
    axes: tuple[int, ...]  # that the picture has
    step: tuple[int, ...]  # number of pixels of a cell along each of them

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> PictureGrid:
        """Return the cells of a map of this shape."""
        axes = longest_axes(shape)
        step = tuple(max(-(shape[axis] // -MAX_CELLS), 1) for axis in axes)
        return cls(shape, axes, step)

    @property
    def n_cells(self) -> tuple[int, ...]:
        """Number of cells along each dimension of the picture."""
        return tuple(
            -(self.shape[axis] // -step) for axis, step in zip(self.axes, self.step, strict=True)
        )

    def cells(self, origin: tuple[int, ...], status: NDArray[np.int8], values: Any) -> Cells:
        """Return the cells of a tile, given its first pixel, statuses, and values of a parameter.

        ``status`` and ``values`` have the dimensions of the map.
        """
        is_solved = (status > 0) & np.isfinite(values)
        dropped = tuple(axis for axis in range(status.ndim) if axis not in self.axes)
        lowest = status.min(axis=dropped)
        sums = np.where(is_solved, values, 0.0).sum(axis=dropped, dtype=np.float64)
        counts = is_solved.sum(axis=dropped)
        where = []
        for i, (axis, step) in enumerate(zip(self.axes, self.step, strict=True)):
            first, size = origin[axis], status.shape[axis]
            cells = (first + np.arange(size)) // step
            starts = np.flatnonzero(np.diff(cells, prepend=cells[0] - 1))
            lowest = np.minimum.reduceat(lowest, starts, axis=i)
            sums = np.add.reduceat(sums, starts, axis=i)
            counts = np.add.reduceat(counts, starts, axis=i)
            where.append(slice(int(cells[0]), int(cells[-1]) + 1))
        return Cells(tuple(where), lowest, sums, counts)


class Picture:
    """The picture, to which the cells of tiles are added in any order."""

    def __init__(self, grid: PictureGrid) -> None:
        self._lowest = np.full(grid.n_cells, _EMPTY, np.int8)
        self._sums = np.zeros(grid.n_cells)
        self._counts = np.zeros(grid.n_cells, np.int64)

    def add(self, cells: Cells) -> None:
        """Add the cells of a tile."""
        lowest = self._lowest[cells.where]
        np.minimum(lowest, cells.lowest, out=lowest)
        self._sums[cells.where] += cells.sums
        self._counts[cells.where] += cells.counts

    @property
    def status(self) -> NDArray[np.int8]:
        """The lowest status of the pixels of each cell; -128 where no tile is complete."""
        return np.where(self._lowest == _EMPTY, np.int8(-128), self._lowest)

    @property
    def values(self) -> NDArray[np.float32]:
        """The mean of the parameter in each cell; NaN where no pixel has converged."""
        means = self._sums / np.where(self._counts > 0, self._counts, np.nan)
        return means.astype(np.float32)
