"""``ColumnReader``: the points of a tile in memory, points first and pixels last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.engine.retries import ReadError, ReadFailedError, SkippedBlock
from nlsq_dask.engine.source_graph import GroupReader, ReadBlock
from nlsq_dask.errors import BlockReadError
from nlsq_dask.maps.problem.tiles import Index, Tile, TileGrid
from nlsq_dask.solvers.lanes.records import Lanes

Array = NDArray[Any]

_SKIP = (
    "pass HybridStreamingConfig(min_success_rate=...) below 1, so that these pixels get the status "
    "'not_read'"
)
_MASK_BYTES = 2  # per point, of arrays that tell where y is finite


class NotReadError(Exception):
    """A block of a tile cannot be read, and the policy is to continue without the tile."""

    def __init__(self, block: SkippedBlock) -> None:
        super().__init__(block.sentence)
        self.block = block


@dataclass(frozen=True)
class TileData:
    """Points and maps of some pixels of a tile."""

    lanes: Lanes
    maps: tuple[Array, ...]  # of start values, bounds and fixed values, each of shape (m,)
    n_bad: int  # points with NaN or infinity in y, x or sigma that are not masked


@dataclass(frozen=True)
class ArrayKind:
    """Dimensions of y along which an array varies."""

    varies: tuple[bool, ...]  # along each axis of y, fitted axes first
    over_points: bool
    over_pixels: bool
    n_more: int  # number of axes after those of y: 1 for an x with columns
    itemsize: int

    @classmethod
    def of(cls, array: da.Array, y: da.Array, order: Index, n_fitted: int) -> ArrayKind:
        """Return it for axes of y in this order, the fitted ones first."""
        varies = tuple(array is y or 1 < y.shape[axis] == array.shape[axis] for axis in order)
        over_points, over_pixels = any(varies[:n_fitted]), any(varies[n_fitted:])
        return cls(varies, over_points, over_pixels, array.ndim - y.ndim, array.itemsize)

    def flat(self, array: Array, points: Index, pixels: Index) -> Array:
        """Return an array of shape (n, m) if it varies over pixels, else (n,) or (n, k)."""
        n_points = math.prod(points)
        if not self.over_pixels:
            columns = array.shape[array.ndim - self.n_more :] if self.n_more else ()
            whole = array.reshape((*array.shape[: len(points)], *columns))
            return np.broadcast_to(whole, (*points, *columns)).reshape(n_points, *columns)
        if self.over_points:
            is_whole = array.shape == (*points, *pixels)  # y is, and may be written to
            whole = array if is_whole else np.broadcast_to(array, (*points, *pixels))
            return whole.reshape(n_points, -1)
        one = np.broadcast_to(array, (*(1 for _ in points), *pixels)).reshape(1, -1)
        return np.broadcast_to(one, (n_points, one.shape[1]))


@dataclass(frozen=True)
class ColumnReader:
    """Puts the blocks of a tile together."""

    order: Index  # axes of y, fitted ones first
    n_fitted: int
    kinds: tuple[ArrayKind, ...]  # of the arrays: y, x, maps, sigma and mask, those that there are
    n_x: int
    n_maps: int
    has_sigma: bool
    dtype: str  # of the model, to which integers are converted

    @classmethod
    def of(cls, blocks: RowBlocks, grid: TileGrid, dtype: str) -> ColumnReader:
        """Return the reader for these arrays."""
        order, n_fitted = (*grid.fitted, *grid.map_axes), len(grid.fitted)
        kinds = (ArrayKind.of(array, blocks.y, order, n_fitted) for array in blocks.arrays)
        n_maps, has_sigma = len(blocks.layout.map_names), blocks.sigma is not None
        n_x = len(blocks.x) - n_maps
        return cls(order, n_fitted, tuple(kinds), n_x, n_maps, has_sigma, dtype)

    @property
    def x_varies(self) -> tuple[bool, ...]:
        """Which x arrays vary over the map."""
        return tuple(kind.over_pixels for kind in self.kinds[1 : 1 + self.n_x])

    @property
    def sigma_varies(self) -> bool | None:
        """Whether sigma varies over the map; None without sigma."""
        return self.kinds[1 + self.n_x + self.n_maps].over_pixels if self.has_sigma else None

    def point_bytes(self, n_points: int) -> int:
        """Return the bytes of the points of a pixel, with masks."""
        sizes = [kind.itemsize for kind in self.kinds if kind.over_pixels and kind.over_points]
        return n_points * (sum(sizes) + _MASK_BYTES)

    def __call__(
        self,
        reader: GroupReader,
        inputs: Sequence[Any],
        tile: Tile,
        index: NDArray[np.int64] | None,
    ) -> TileData:
        """Return the data of the pixels at a sorted index, or of all pixels if it is None.

        Raises
        ------
        NotReadError
            If one of the blocks cannot be read.
        """
        points, pixels = self._shape(tile)
        numbers = np.arange(math.prod(pixels)).reshape(pixels)
        chosen = pixels if index is None else (len(index),)
        whole: list[Array] = []
        for read in _read(reader, inputs, tile):
            if read.block is None:
                assert read.read_error is not None
                raise NotReadError(_skipped_block(reader, tile, read.read_error))
            arrays = [array for array in read.block.arrays if array is not None]
            blocks = [
                array.transpose(*self.order, *range(len(self.order), array.ndim))
                for array in arrays
            ]
            if not whole:
                whole = [
                    _empty(block, kind, points, chosen)
                    for block, kind in zip(blocks, self.kinds, strict=True)
                ]
            where = tuple(tile.slices[read.index][axis] for axis in self.order)
            own = numbers[where[self.n_fitted :]]
            for array, block, kind in zip(whole, blocks, self.kinds, strict=True):
                if index is None or not kind.over_pixels:
                    array[_place(kind, where)] = block
                else:
                    _insert_some(array, block, _place(kind, where)[: len(points)], own, index)
        return self._data(whole, points, chosen)

    def _shape(self, tile: Tile) -> tuple[Index, Index]:
        """Return the sizes of a tile along fitted axes, and along the axes of the map."""
        shape = tuple(tile.shape[axis] for axis in self.order)
        return shape[: self.n_fitted], shape[self.n_fitted :]

    def _data(self, whole: Sequence[Array], points: Index, pixels: Index) -> TileData:
        kinds = self.kinds
        pairs = zip(whole, kinds, strict=True)
        flat = [kind.flat(array, points, pixels) for array, kind in pairs]
        end_x = 1 + self.n_x
        end_maps = end_x + self.n_maps
        y, x, maps, rest = flat[0], flat[1:end_x], flat[end_x:end_maps], flat[end_maps:]
        sigma = rest.pop(0) if self.has_sigma else None
        if y.dtype.kind != "f":
            y = y.astype(self.dtype)
        is_bad = ~np.isfinite(y)
        checked = [*zip(x, kinds[1:end_x], strict=True)]
        checked += [] if sigma is None else [(sigma, kinds[end_maps])]
        for array, kind in checked:
            if array.dtype.kind == "f":
                is_bad |= ~_all_finite(array, kind, y.shape)
        for mask in rest:
            is_masked = mask if mask.ndim == 2 else np.broadcast_to(mask[:, None], y.shape)
            is_bad &= ~is_masked
            y[is_masked] = np.nan
        n_bad = int(np.count_nonzero(is_bad))
        if n_bad:
            y[is_bad] = np.nan
        at_pixels = tuple(np.broadcast_to(array[0], y.shape[1:]) for array in maps)
        return TileData(Lanes(y, tuple(x), sigma, self.x_varies), at_pixels, n_bad)


def _read(reader: GroupReader, inputs: Sequence[Any], tile: Tile) -> Iterator[ReadBlock]:
    """Yield the blocks of a tile; raise a BlockReadError for one that cannot be read."""
    try:
        yield from reader.read(inputs)
    except ReadFailedError as failed:
        bad = _skipped_block(reader, tile, failed.read_error)
        raise BlockReadError(
            f"{bad.sentence}. {bad.remedy(_SKIP)}",
            bad.array,
            bad.block,
            bad.chunk,
        ) from failed.cause


def _skipped_block(reader: GroupReader, tile: Tile, read_error: ReadError) -> SkippedBlock:
    """Return the facts for a message on the block of a tile that needs what could not be read."""
    index, names = reader.needing(read_error.key)
    where = zip(tile.slices[index], tile.origin, strict=True)
    return SkippedBlock(
        block=tuple(map(int, np.unravel_index(index, reader.grid))),
        grid=reader.grid,
        rows=math.prod(s.stop - s.start for s in tile.slices[index]),
        slices=tuple((s.start + first, s.stop + first) for s, first in where),
        array=" and ".join(names),
        chunk=read_error.chunk,
        error=read_error.error,
        attempts=read_error.attempts,
        kind=read_error.kind,
        outage_seconds=read_error.outage_seconds,
    )


def _empty(block: Array, kind: ArrayKind, points: Index, pixels: Index) -> Array:
    """Return an empty array for all blocks, of size 1 along axes on which it does not vary."""
    sizes = [n if own else 1 for n, own in zip(points, kind.varies, strict=False)]
    if len(pixels) == len(kind.varies) - len(points):
        over = kind.varies[len(points) :]
        sizes += [n if own else 1 for n, own in zip(pixels, over, strict=True)]
    else:  # pixels at an index
        sizes += pixels if kind.over_pixels else [1] * (len(kind.varies) - len(points))
    return np.empty([*sizes, *block.shape[len(kind.varies) :]], block.dtype)


def _place(kind: ArrayKind, where: tuple[slice, ...]) -> tuple[slice, ...]:
    pairs = zip(where, kind.varies, strict=True)
    return tuple(own if varies else slice(None) for own, varies in pairs)


def _insert_some(
    array: Array,
    block: Array,
    points: tuple[slice, ...],
    own: NDArray[np.int64],
    index: NDArray[np.int64],
) -> None:
    """Insert the pixels of a block, whose numbers are ``own``, that are at an index."""
    n_fitted = len(points)
    whole = np.broadcast_to(block, (*block.shape[:n_fitted], *own.shape))
    at = np.searchsorted(index, own.reshape(-1))
    is_there = (at < len(index)) & (index[np.minimum(at, len(index) - 1)] == own.reshape(-1))
    array[(*points, at[is_there])] = whole.reshape(*block.shape[:n_fitted], -1)[..., is_there]


def _all_finite(array: Array, kind: ArrayKind, shape: Index) -> Array:
    """Return where x or sigma is finite, broadcast to points and pixels."""
    is_finite: Array = np.isfinite(array)
    if kind.n_more:
        is_finite = np.asarray(is_finite.all(axis=1))
    return is_finite if is_finite.ndim == 2 else np.broadcast_to(is_finite[:, None], shape)
