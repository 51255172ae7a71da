"""Tiles: the pixels that one task fits, with all points along the fitted dimensions.

Tiles follow from shape and chunks of y alone, so that results do not depend on workers, threads or
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from dask.array.core import normalize_chunks

from nlsq_dask.data.alignment import RowBlocks

Index = tuple[int, ...]
Slices = tuple[slice, ...]

# A task costs a scheduler about a millisecond, a tile has a start of its own, and its last fits
# leave lanes idle. So neighboring columns of chunks share a tile until it has so many pixels, and
# so many points or an eighth of all. Arrays in memory are split into such tiles.
_MIN_PIXELS = 1024
_MIN_POINTS = 2**20
_MIN_TILES = 8  # so that threads share the work on small maps


@dataclass(frozen=True)
class Tile:
    """Some pixels of the map, with the blocks that hold their points."""

    index: Index  # position in the grid of tiles
    shape: Index  # along the dimensions of y
    origin: Index  # of its first element in y
    slices: dict[int, Slices]  # by flat index of a block: where it lies in the tile


@dataclass(frozen=True)
class TileGrid:
    """Division of the map into tiles."""

    chunks: tuple[tuple[int, ...], ...]  # of y
    fitted: Index  # axes of y along which fits run
    # Along each dimension of y, the first block of each tile, and the number of blocks at the end.
    edges: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, blocks: RowBlocks, fitted: Index) -> TileGrid:
        """Return the tiles: columns of blocks along the fitted axes, small ones merged."""
        chunks = blocks.y.chunks
        n_points = math.prod(blocks.y.shape[axis] for axis in fitted)
        n_pixels = math.prod(n for axis, n in enumerate(blocks.y.shape) if axis not in fitted)
        needed = _fewest_pixels(n_points, n_pixels)
        pixels = math.prod(max(c) for axis, c in enumerate(chunks) if axis not in fitted)
        edges = []
        for axis in reversed(range(len(chunks))):
            n_blocks = len(chunks[axis])
            width = n_blocks
            if axis not in fitted:
                width = min(max(needed // max(pixels, 1), 1), n_blocks)
                pixels *= width
            edges.append((*range(0, n_blocks, width), n_blocks))
        return cls(chunks, fitted, tuple(reversed(edges)))

    @property
    def map_axes(self) -> Index:
        """Axes of y that are not fitted."""
        return tuple(axis for axis in range(len(self.chunks)) if axis not in self.fitted)

    @property
    def shape(self) -> Index:
        """Number of tiles along each axis of the map."""
        return tuple(len(self.edges[axis]) - 1 for axis in self.map_axes)

    @property
    def map_chunks(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the tiles along each axis of the map."""
        return tuple(
            tuple(sum(self.chunks[axis][a:b]) for a, b in pairwise(self.edges[axis]))
            for axis in self.map_axes
        )

    @property
    def n_points(self) -> int:
        """Number of points of a fit."""
        return math.prod(sum(self.chunks[axis]) for axis in self.fitted)

    @property
    def n_pixels(self) -> int:
        """Number of fits."""
        return math.prod(sum(self.chunks[axis]) for axis in self.map_axes)

    @property
    def largest(self) -> int:
        """Number of pixels of the largest tile."""
        return math.prod(map(max, self.map_chunks))

    @property
    def can_be_split(self) -> bool:
        """Whether smaller chunks would make more tiles."""
        return self.n_pixels > 2 * _fewest_pixels(self.n_points, self.n_pixels)

    def __iter__(self) -> Iterator[Tile]:
        return map(self._tile, np.ndindex(self.shape))

    def blocks_of(self, tile: Tile) -> list[Index]:
        """Return the positions of the blocks of a tile, in C order of the grid of blocks."""
        grid = tuple(map(len, self.chunks))
        return [tuple(map(int, np.unravel_index(i, grid))) for i in tile.slices]

    def _tile(self, index: Index) -> Tile:
        numbers = dict(zip(self.map_axes, index, strict=True))
        spans, starts = [], []
        for axis, sizes in enumerate(self.chunks):
            first = self.edges[axis][numbers.get(axis, 0)]
            end = self.edges[axis][numbers.get(axis, 0) + 1]
            spans.append(_slices(first, sizes[first:end]))
            starts.append(sum(sizes[:first]))
        grid = tuple(map(len, self.chunks))
        slices = {
            int(np.ravel_multi_index([i for i, _ in block], grid)): tuple(s for _, s in block)
            for block in product(*spans)
        }
        shape = tuple(span[-1][1].stop for span in spans)
        return Tile(index, shape, tuple(starts), slices)


def _fewest_pixels(n_points: int, n_pixels: int) -> int:
    """Return the number of pixels up to which columns of chunks share a tile."""
    wanted = min(-(-_MIN_POINTS // max(n_points, 1)), -(-n_pixels // _MIN_TILES))
    return max(_MIN_PIXELS, wanted)


def _slices(first: int, sizes: Sequence[int]) -> list[tuple[int, slice]]:
    """Return the number of each block along an axis, and where it lies in the tile."""
    stops = np.cumsum(sizes).tolist()
    starts = [0, *stops[:-1]]
    return [(first + i, slice(a, b)) for i, (a, b) in enumerate(zip(starts, stops, strict=True))]


def memory_chunks(shape: Index, fitted: Index, dtype: np.dtype[np.generic]) -> tuple[Index, ...]:
    """Return the chunks into which y in memory is split: all points, and some pixels."""
    n_points = math.prod(shape[axis] for axis in fitted)
    n_pixels = math.prod(n for axis, n in enumerate(shape) if axis not in fitted)
    limit = _fewest_pixels(n_points, n_pixels) * max(n_points, 1) * dtype.itemsize
    sizes = tuple(-1 if axis in fitted else "auto" for axis in range(len(shape)))
    chunks: tuple[Index, ...] = normalize_chunks(sizes, shape, limit=limit, dtype=dtype)
    return chunks
