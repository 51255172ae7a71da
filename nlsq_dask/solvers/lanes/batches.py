"""``LaneBatches``: lanes are solved in batches, those that remain active together in new ones.

A lane that needs many iterations then does not make others wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.program import Program
from nlsq_dask.solvers.lanes.program import Shapes, pack, unpack
from nlsq_dask.solvers.lanes.records import Lanes
from nlsq_dask.solvers.lanes.steps import ACTIVE, State, initial_state

Array = NDArray[Any]
Index = NDArray[np.int64]
# Takes indices of lanes, their states, and their tied parameters with derivatives or None.
Store = Callable[[Index, State, list[Array] | None], None]

_ACTIVE_SHARE = 0.4  # of a block's lanes; with fewer active ones it waits to be refilled


class LaneBuffers:
    """Buffers for the data of the lanes that take part in a call of a program.

    Parameters
    ----------
    shapes : Shapes
        Those of the program.
    lanes : Lanes
        All lanes, from which those of a call are copied.
    """

    def __init__(self, shapes: Shapes, lanes: Lanes) -> None:
        self._shapes, self._lanes = shapes, lanes
        n, dtype = shapes.n_points, shapes.dtype
        shape = shapes.n_blocks, n, shapes.block
        self._y = np.full(shape, np.nan, dtype)
        self._x = tuple(
            np.zeros(shape, dtype) if varies else _padded(leaf.astype(dtype), n)
            for leaf, varies in zip(lanes.x, shapes.x_varies, strict=True)
        )
        self._sigma: Array | None = None
        if shapes.sigma == "varies":
            self._sigma = np.ones(shape, dtype)
        elif shapes.sigma == "shared" and lanes.sigma is not None:
            self._sigma = _padded(lanes.sigma.astype(dtype).reshape(-1, 1), n)

    def call(
        self, program: Callable[..., Any], index: Index, rows: Array
    ) -> tuple[Array, list[Array] | None]:
        """Run ``program(n_blocks, data, rows)`` and return its results for the lanes at ``index``.

        ``rows``, shape (r, len(index)), are further rows of these lanes, which are spread evenly
        over as few blocks as possible.
        """
        shapes = self._shapes
        n_blocks = -(-len(index) // shapes.block)
        edges = [len(index) * b // n_blocks for b in range(n_blocks + 1)]
        blocks = np.zeros((shapes.n_blocks, len(rows), shapes.block))
        for b, (begin, end) in enumerate(pairwise(edges)):
            lanes = index[begin:end]
            blocks[b, :, : len(lanes)] = rows[:, begin:end]
            _fill(self._y[b], self._lanes.y, lanes)
            for buffer, leaf, varies in zip(self._x, self._lanes.x, shapes.x_varies, strict=True):
                if varies:
                    _fill(buffer[b], leaf, lanes)
            if shapes.sigma == "varies" and self._sigma is not None:
                _fill(self._sigma[b], self._lanes.sigma, lanes)
        results, tied = program(np.int64(n_blocks), (self._y, self._x, self._sigma), blocks)
        join = partial(_joined, edges=edges)
        return join(results), None if tied is None else [join(array) for array in tied]


@dataclass(frozen=True)
class LaneBatches:
    """Lanes to be solved, in batches with one call of the program each."""

    program: Program  # that of ``solve_blocks``
    shapes: Shapes
    start: Array  # (p, m)
    low: Array  # (p, m)
    high: Array  # (p, m)

    def solve(self, lanes: Lanes, index: Index, store: Store) -> None:
        """Solve the lanes at ``index``, and pass their final states to ``store``."""
        size, buffers = self.shapes.n_lanes, LaneBuffers(self.shapes, lanes)
        fresh = [index[begin : begin + size] for begin in range(0, len(index), size)]
        waiting = index[:0]
        states = self._initial(waiting)
        while fresh or len(waiting):
            if fresh and len(waiting) < size:
                batch = fresh.pop()
                packed = self._initial(batch)
            else:
                batch, waiting = waiting[:size], waiting[size:]
                packed, states = states[:, :size], states[:, size:]
            is_last = not fresh and not len(waiting) and len(batch) <= self.shapes.block
            # A block of a full call, or all lanes of one block.
            per_block = min(len(batch), self.shapes.block)
            limit = 0 if is_last else int(_ACTIVE_SHARE * per_block)
            program = partial(self.program, np.int64(limit))
            packed, tied = buffers.call(program, batch, packed)
            is_active = unpack(packed, self.shapes)[0].status == ACTIVE
            done = np.flatnonzero(~is_active)
            ended = unpack(packed.take(done, axis=1), self.shapes)[0]
            store(batch[done], ended, tied and [array[..., done] for array in tied])
            waiting = np.concatenate([waiting, batch[is_active]])
            states = np.concatenate([states, packed[:, is_active]], axis=1)

    def _initial(self, index: Index) -> Array:
        start, low, high = (array[:, index] for array in (self.start, self.low, self.high))
        packed: Array = pack(np, initial_state(start, self.shapes.n_sums), low, high)
        return packed


def _fill(buffer: Array, source: Any, lanes: Index) -> None:
    """Copy lanes of ``source``, shape (n, m), to the first rows and columns of a buffer."""
    if not len(lanes):
        return
    first, last = int(lanes[0]), int(lanes[-1])
    is_run = np.array_equal(lanes, np.arange(first, last + 1))
    chosen = source[:, first : last + 1] if is_run else source[:, lanes]
    with np.errstate(over="ignore"):  # such lanes are not among these, or fail
        buffer[: len(source), : len(lanes)] = chosen


def _joined(blocks: Any, edges: list[int]) -> Array:
    """Return the lanes of the blocks side by side, without padding."""
    arrays = zip(np.asarray(blocks), np.diff(edges), strict=False)
    return np.concatenate([array[..., :count] for array, count in arrays], axis=-1)


def _padded(array: Array, n_points: int) -> Array:
    """Return an array of points with its last row repeated."""
    return np.concatenate([array, np.repeat(array[-1:], n_points - len(array), axis=0)])
