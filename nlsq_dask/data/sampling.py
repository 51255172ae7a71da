"""Which blocks and rows make the sample: seeded, spread over the data set, bounded in both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

# Reading is what sampling costs: so many blocks at most, and rows either of this number, which are
# read in no time, or of this fraction of the data set; of a larger one where the fraction would not
# reach for two blocks.
_MAX_BLOCKS = 16
_CHEAP_ROWS = 2**20
_FRACTION, _MAX_FRACTION = 0.1, 0.2


@dataclass(frozen=True)
class SamplePlan:
    """Blocks to read and how many rows to take from each.

    Attributes
    ----------
    blocks : tuple of tuple of int
        Positions in the grid.
    counts : tuple of int
    seed : int
    """

    blocks: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    seed: int

    def rows_of(self, i: int, n_rows: int) -> NDArray[np.int64]:
        """Return the positions of the rows to take from block ``i``: one in each equal stratum."""
        return _stratified(n_rows, self.counts[i], np.random.default_rng([self.seed, i]))


def _stratified(n_rows: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return so many positions, if there are as many rows: one in each equal stratum."""
    if count >= n_rows:
        return np.arange(n_rows)
    edges = np.arange(count + 1) * n_rows // max(count, 1)
    return random.integers(edges[:-1], edges[1:])


def subsample(n_rows: int, fraction: float, seed: int, block: int) -> NDArray[np.int64]:
    """Return the positions of a fraction of a block's rows, spread over it.

    The number is rounded at random, so that the fraction is met over many small blocks.
    """
    if not fraction:
        return np.arange(0)
    random = np.random.default_rng([seed, block])
    return _stratified(n_rows, int(n_rows * fraction + random.random()), random)


def plan_sample(
    block_rows: NDArray[np.int64], sample_rows: int, seed: int, in_memory: bool
) -> SamplePlan:
    """Choose blocks by a Latin hypercube over the grid, so that each dimension is covered.

    Parameters
    ----------
    block_rows : ndarray of int
        Rows of every block, in the shape of the grid.
    sample_rows : int
        Rows wanted; a data set that is not larger is taken whole.
    seed : int
    in_memory : bool
        Whether blocks cost nothing to read, so that all may be used.
    """
    filled = [index for index in np.ndindex(block_rows.shape) if block_rows[index]]
    if int(block_rows.sum()) <= sample_rows:
        counts = [int(block_rows[index]) for index in filled]
        return SamplePlan(tuple(filled), tuple(counts), seed)
    n_rows = int(block_rows.sum())
    n_blocks = _MAX_BLOCKS
    if not in_memory:
        fraction = _FRACTION if len(filled) * _FRACTION >= 2 else _MAX_FRACTION
        readable = max(fraction * n_rows, _CHEAP_ROWS)
        n_blocks = min(n_blocks, math.floor(readable * len(filled) / n_rows))
    # A block that no row would be taken from is not read.
    n_blocks = max(1, min(len(filled), n_blocks, sample_rows))
    random = np.random.default_rng(seed)
    points = qmc.LatinHypercube(d=block_rows.ndim, rng=random).random(n_blocks)
    cells = [tuple(map(int, cell)) for cell in points * np.array(block_rows.shape)]
    # Cells that coincide or hold no rows are made up for by blocks taken at random.
    others = [filled[i] for i in random.permutation(len(filled))]
    candidates = dict.fromkeys([cell for cell in cells if block_rows[cell]] + others)
    chosen = sorted(list(candidates)[:n_blocks])
    each, rest = divmod(sample_rows, len(chosen))
    counts = [each + (i < rest) for i in range(len(chosen))]
    return SamplePlan(tuple(chosen), tuple(counts), seed)
