"""Random choice of the blocks and rows of the sample, spread over the whole data set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sampling costs reading: at most _MAX_BLOCKS blocks, and at most the larger of _CHEAP_ROWS rows and
# a fraction of the data set, the larger fraction if the smaller one gives less than two blocks.
_MAX_BLOCKS = 16
_CHEAP_ROWS = 2**20
_FRACTION, _MAX_FRACTION = 0.1, 0.2


@dataclass(frozen=True)
class SamplePlan:
    """Blocks to read for the sample, and the number of rows to take from each block."""

    blocks: tuple[tuple[int, ...], ...]  # positions in the grid of all blocks
    counts: tuple[int, ...]  # rows to take from each block
    seed: int  # of the choice of rows

    def rows_of(self, i: int, n_rows: int) -> NDArray[np.int64]:
        """Return the indices of the rows to take from ``blocks[i]``, which has ``n_rows`` rows."""
        return _stratified(n_rows, self.counts[i], np.random.default_rng([self.seed, i]))


def _stratified(n_rows: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return ``count`` random positions, one in each of as many equal intervals.

    All positions are returned if there are no more than ``count`` rows.
    """
    if count >= n_rows:
        return np.arange(n_rows)
    edges = np.arange(count + 1) * n_rows // max(count, 1)
    return random.integers(edges[:-1], edges[1:])


def subsample(n_rows: int, fraction: float, seed: int, block: int) -> NDArray[np.int64]:
    """Return random positions of a fraction of the rows of a block, spread over the block.

    The number of positions is rounded up or down at random, so that the fraction is right on
    average even if blocks are small. ``block`` is the number of the block; together with ``seed``,
    it determines the positions.
    """
    if not fraction:
        return np.arange(0)
    random = np.random.default_rng([seed, block])
    return _stratified(n_rows, int(n_rows * fraction + random.random()), random)


def plan_sample(
    block_rows: NDArray[np.int64], sample_rows: int, seed: int, in_memory: bool
) -> SamplePlan:
    """Choose the blocks of the sample, spread along each dimension by a Latin hypercube.

    Parameters
    ----------
    block_rows : ndarray of int
        Rows of each block, in the shape of the grid.
    sample_rows : int
        Requested number of rows; a smaller data set is sampled completely.
    seed : int
    in_memory : bool
        Whether the data are in memory. Reading costs nothing then, so more blocks may be used.
    """
    filled = [index for index in np.ndindex(block_rows.shape) if block_rows[index]]
    n_rows = int(block_rows.sum())
    if n_rows <= sample_rows:
        return SamplePlan(tuple(filled), tuple(int(block_rows[index]) for index in filled), seed)
    from scipy.stats import qmc  # takes a third of a second to import, and small data need none

    n_blocks = _MAX_BLOCKS
    if not in_memory:
        fraction = _FRACTION if len(filled) * _FRACTION >= 2 else _MAX_FRACTION
        readable = max(fraction * n_rows, _CHEAP_ROWS)
        n_blocks = min(n_blocks, math.floor(readable * len(filled) / n_rows))
    # Each block contributes at least one row.
    n_blocks = max(1, min(len(filled), n_blocks, sample_rows))
    random = np.random.default_rng(seed)
    points = qmc.LatinHypercube(d=block_rows.ndim, rng=random).random(n_blocks)
    cells = [tuple(map(int, cell)) for cell in points * np.array(block_rows.shape)]
    # Random blocks replace cells that coincide or hold no rows.
    others = [filled[i] for i in random.permutation(len(filled))]
    candidates = dict.fromkeys([cell for cell in cells if block_rows[cell]] + others)
    chosen = sorted(list(candidates)[:n_blocks])
    each, rest = divmod(sample_rows, len(chosen))
    counts = [each + (i < rest) for i in range(len(chosen))]
    return SamplePlan(tuple(chosen), tuple(counts), seed)
