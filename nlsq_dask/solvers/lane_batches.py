"""``LaneBatches``: lanes are solved in batches, those that remain active together in new ones.

A lane that needs many iterations then does not make others wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.program import Program
from nlsq_dask.solvers.lane_program import Shapes, pack, unpack
from nlsq_dask.solvers.lane_steps import ACTIVE, State, initial_state
from nlsq_dask.solvers.lanes import Lanes

Array = NDArray[Any]
Index = NDArray[np.int64]
# Takes indices of lanes, their states, and their tied parameters with derivatives or None.
Store = Callable[[Index, State, list[Array] | None], None]

_ACTIVE_SHARE = 0.4  # of a block's lanes; with fewer active ones it waits to be refilled


class LaneBatches:
    """Lanes to be solved, in batches with one call of the program each.

    Parameters
    ----------
    program : Program
        That of ``solve_blocks``.
    shapes : Shapes
    lanes : Lanes
    start, low, high : ndarray, each of shape (p, m)
    """

    def __init__(
        self,
        program: Program,
        shapes: Shapes,
        lanes: Lanes,
        start: Array,
        low: Array,
        high: Array,
    ) -> None:
        self._program, self._shapes = program, shapes
        self._lanes, self._low, self._high, self._start = lanes, low, high, start
        blocks, block, n = shapes.n_blocks, shapes.block, shapes.n_points
        self._y = np.full((blocks, n, block), np.nan, shapes.dtype)
        self._x = tuple(
            np.zeros((blocks, n, block), shapes.dtype)
            if varies
            else _padded(leaf.astype(shapes.dtype), n)
            for leaf, varies in zip(lanes.x, shapes.x_varies, strict=True)
        )
        self._sigma: Array | None = None
        if shapes.sigma == "varies":
            self._sigma = np.ones((blocks, n, block), shapes.dtype)
        elif shapes.sigma == "shared" and lanes.sigma is not None:
            self._sigma = _padded(lanes.sigma.astype(shapes.dtype).reshape(-1, 1), n)
        self._packed = np.zeros((blocks, sum(shapes.row_counts), block))

    def solve(self, index: Index, store: Store) -> None:
        """Solve the lanes at ``index``, and pass their final states to ``store``."""
        size = self._shapes.n_lanes
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
            is_last = not fresh and not len(waiting) and len(batch) <= self._shapes.block
            packed, tied = self._call(batch, packed, 0.0 if is_last else _ACTIVE_SHARE)
            state = unpack(packed, self._shapes)[0]
            is_active = state.status == ACTIVE
            done = np.flatnonzero(~is_active)
            ended = State(*(field[..., done] for field in state))
            store(batch[done], ended, tied and [array[..., done] for array in tied])
            waiting = np.concatenate([waiting, batch[is_active]])
            states = np.concatenate([states, packed[:, is_active]], axis=1)

    def _initial(self, index: Index) -> Array:
        start, low, high = (array[:, index] for array in (self._start, self._low, self._high))
        packed: Array = pack(np, initial_state(start, self._shapes.n_sums), low, high)
        return packed

    def _call(self, index: Index, packed: Array, share: float) -> tuple[Array, list[Array] | None]:
        """Run the program on these lanes, spread evenly over as few blocks as possible."""
        shapes = self._shapes
        n_blocks = -(-len(index) // shapes.block)
        edges = [len(index) * b // n_blocks for b in range(n_blocks + 1)]
        for b, (begin, end) in enumerate(pairwise(edges)):
            lanes, count = index[begin:end], end - begin
            _fill(self._y[b], self._lanes.y, lanes)
            for buffer, leaf, varies in zip(self._x, self._lanes.x, shapes.x_varies, strict=True):
                if varies:
                    _fill(buffer[b], leaf, lanes)
            if shapes.sigma == "varies" and self._sigma is not None:
                _fill(self._sigma[b], self._lanes.sigma, lanes)
            self._packed[b, :, :count] = packed[:, begin:end]
            self._packed[b, :, count:] = 0.0  # of status 0, not active
        limit = int(share * (edges[1] - edges[0]))
        data = self._y, self._x, self._sigma
        result, tied = self._program(np.int64(n_blocks), np.int64(limit), data, self._packed)
        join = partial(_joined, edges=edges)
        return join(result), None if tied is None else [join(array) for array in tied]


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
