"""``plan_subsets``: nested subsets of the blocks, on which a fit approaches its solution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Index = tuple[int, ...]

# With fewer rows, the largest subset leaves the fit too far from the solution for one pass over
# all rows to suffice; with fewer blocks, it would be a large part of the data.
_MIN_ROWS, _MIN_BLOCKS = 5_000_000, 8
# Shares of the blocks. The error that remains after one pass decreases with the number of rows, so
# small data need a larger share.
_FIRST, _LAST, _LAST_OF_SMALL = 1 / 64, 1 / 8, 3 / 16
_SMALL_ROWS = 2**24
_MIN_SIZE = 3  # blocks
_GROWTH = 2  # minimum ratio of the sizes of the first subset and of the sample, in blocks


def plan_subsets(
    block_rows: NDArray[np.int64], sample: Sequence[Index], seed: int, in_memory: bool
) -> tuple[frozenset[int], ...]:
    """Return nested subsets of the blocks, by flat index, from the smallest to the largest.

    They contain the blocks of the sample; the other blocks are spread over each dimension of the
    grid by a Halton sequence. There are none if the data are in memory or small.

    Parameters
    ----------
    block_rows : ndarray of int
        Rows of each block, in the shape of the grid.
    sample : sequence of tuple of int
        Positions in the grid of the blocks from which the sample was drawn.
    seed : int
    in_memory : bool
        Whether the data are in memory.
    """
    n_filled = int(np.count_nonzero(block_rows))
    n_rows = int(block_rows.sum())
    if in_memory or n_rows < _MIN_ROWS or n_filled < _MIN_BLOCKS:
        return ()
    last = _LAST if n_rows >= _SMALL_ROWS else _LAST_OF_SMALL
    sizes = [max(math.ceil(last * n_filled - 0.5), len(sample), _MIN_SIZE)]
    if (first := math.ceil(_FIRST * n_filled)) >= _GROWTH * len(sample):
        sizes.insert(0, first)
    order = _spread(block_rows, sample, sizes[-1], seed)
    return tuple(frozenset(order[:size]) for size in sizes)


def _spread(
    block_rows: NDArray[np.int64], first: Sequence[Index], count: int, seed: int
) -> list[int]:
    """Return the flat indices of ``count`` blocks with rows, beginning with the given ones."""
    from scipy.stats import qmc  # takes a third of a second to import, and small data need none

    grid = block_rows.shape
    points = qmc.Halton(d=len(grid), rng=np.random.default_rng(seed)).random(count)
    cells = np.ravel_multi_index(tuple((points * grid).astype(np.int64).T), grid)
    filled = np.flatnonzero(block_rows)
    others = np.random.default_rng(seed).permutation(filled)
    is_filled = block_rows.ravel() > 0
    started = [int(np.ravel_multi_index(block, grid)) for block in first]
    # Random blocks replace cells that coincide or hold no rows.
    candidates = dict.fromkeys([*started, *cells[is_filled[cells]].tolist(), *others.tolist()])
    return list(candidates)[:count]
