"""``LaneRefinement``: Gauss-Newton with QR, for the lanes in which J^T J loses too many digits.

These lanes are few, so that the small matrices are solved in NumPy. A lane is refined from a point
that the normal equations call a solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.lane_sums import LaneFactors
from nlsq_dask.model.program import Program
from nlsq_dask.solvers.lanes.batches import Index, LaneBuffers
from nlsq_dask.solvers.lanes.errors import inverse_triangle
from nlsq_dask.solvers.lanes.program import Shapes, unpack_factors
from nlsq_dask.solvers.lanes.records import Lanes, rounding_chi2

Array = NDArray[np.float64]
_MAX_ROUNDS = 30
_CLOSE = 1e-6  # standard errors from the solution


class Refined(NamedTuple):
    """Lanes after the refinement."""

    params: Array  # (p, m)
    rounding: Array  # (m,), see ``rounding_chi2``
    errors: Array  # (m,), length of the next full step in standard errors
    factors: LaneFactors  # at ``params``, of all parameters that are not fixed
    inverse: Array  # of R, (p, p, m)
    is_singular: NDArray[np.bool_]  # (m,)
    tied: list[Array] | None  # see ``LaneResults.store``

    @property
    def is_exact(self) -> NDArray[np.bool_]:
        """Whether the residuals of a lane are rounding errors, (m,)."""
        return np.asarray(self.factors.chi2 <= self.rounding)


@dataclass(frozen=True)
class LaneRefinement:
    """Factorizes and refines lanes."""

    program: Program  # that of ``factor_blocks``
    shapes: Shapes
    lanes: Lanes
    low: Array  # (p, m)
    high: Array  # (p, m)

    def solve(self, index: Index, params: Array, is_refined: NDArray[np.bool_]) -> Refined:
        """Return the factors of the lanes at ``index``, and of some the refined parameters.

        Parameters
        ----------
        index : ndarray of int, shape (c,)
        params : ndarray, shape (p, c)
        is_refined : ndarray of bool, shape (c,)
            Which lanes to refine.
        """
        low, high = self.low[:, index], self.high[:, index]
        free = low < high
        n_used = np.isfinite(self.lanes.y[:, index]).sum(axis=0)
        root = np.sqrt(np.maximum(n_used - free.sum(axis=0), 1))
        factors, tied = self._factors(index, params, free)
        at = np.flatnonzero(is_refined)
        moved, errors = params.copy(), np.full(len(index), np.inf)
        moved[:, at], errors[at] = self._iterate(
            index[at], params[:, at], low[:, at], high[:, at], root[at]
        )
        if (moved != params).any():
            factors, tied = self._factors(index, moved, free)
        inverse, is_singular = self._inverse(factors, free)
        rounding = rounding_chi2(self.lanes.signal(index), n_used, self.shapes.dtype)
        return Refined(moved, rounding, errors, factors, inverse, is_singular, tied)

    def _iterate(
        self, index: Index, params: Array, low: Array, high: Array, root: Array
    ) -> tuple[Array, Array]:
        """Return parameters after full steps, each shortened until it is an improvement."""
        epsilon = float(np.finfo(self.shapes.dtype).eps)
        cost, errors = np.full(len(index), np.inf), np.full(len(index), np.inf)
        step, factor = np.zeros_like(params), np.ones(len(index))
        trial = params
        active = np.arange(len(index))
        for _ in range(_MAX_ROUNDS):
            if not len(active):
                break
            bounds = low[:, active], high[:, active]
            new_step, new_errors, new_cost = self._full_step(
                index[active], trial[:, active], *bounds, root[active]
            )
            noise = 4 * epsilon * new_cost
            is_closer = (new_cost <= cost[active] + noise) & (new_errors < errors[active])
            accepts = (new_cost + noise < cost[active]) | is_closer | np.isinf(cost[active])
            params, trial = params.copy(), trial.copy()
            taken = active[accepts]
            params[:, taken] = trial[:, taken]
            step[:, taken] = new_step[:, accepts]
            errors[taken], cost[taken] = new_errors[accepts], new_cost[accepts]
            factor[active] = np.where(accepts, 1.0, 0.25 * factor[active])
            active = active[(errors[active] > _CLOSE) & (factor[active] > 1e-6)]
            trial[:, active] = np.clip(
                params[:, active] + factor[active] * step[:, active],
                low[:, active],
                high[:, active],
            )
            trial = trial.astype(self.shapes.dtype).astype(np.float64)
        return np.clip(params + np.where(errors <= 1.0, step, 0.0), low, high), errors

    def _full_step(
        self, index: Index, params: Array, low: Array, high: Array, root: Array
    ) -> tuple[Array, Array, Array]:
        """Return the full step, its length in standard errors, and the cost.

        The step is zero in singular lanes.
        """
        p, free = len(params), low < high
        factors, _ = self._factors(index, params, free)
        triangle, target = factors.triangle[:p, :p], factors.triangle[:p, p]
        gradient = np.einsum("ijm,im->jm", triangle, target)
        is_held = ((params <= low) & (gradient >= 0)) | ((params >= high) & (gradient <= 0))
        if (is_held & free).any():
            free = free & ~is_held
            factors, _ = self._factors(index, params, free)
            target = factors.triangle[:p, p]
        inverse, is_singular = self._inverse(factors, free)
        target = np.where(free & ~is_singular, target, 0.0)
        step = -np.einsum("ijm,jm->im", inverse, target)
        square = (target**2).sum(axis=0)
        norm = np.sqrt(2 * factors.cost)
        errors = np.sqrt(square) / np.where(norm > 0, norm, 1.0) * root
        return step, errors, factors.cost

    def _inverse(
        self, factors: LaneFactors, free: NDArray[np.bool_]
    ) -> tuple[Array, NDArray[np.bool_]]:
        p = len(free)
        rounding = 4.0 * p * float(np.finfo(self.shapes.dtype).eps)
        return inverse_triangle(factors.triangle[:p, :p], free, rounding)

    def _factors(
        self, index: Index, params: Array, free: NDArray[np.bool_]
    ) -> tuple[LaneFactors, list[Array] | None]:
        buffers, size = LaneBuffers(self.shapes, self.lanes), self.shapes.n_lanes
        rows = np.concatenate([params, free])
        starts = range(0, len(index), size)
        calls = [
            buffers.call(self.program, index[i : i + size], rows[:, i : i + size]) for i in starts
        ]
        packed = np.concatenate([result for result, _ in calls], axis=1)
        tied = [part for _, part in calls if part is not None]
        joined = [np.concatenate(arrays, axis=-1) for arrays in zip(*tied, strict=True)]
        return unpack_factors(packed, len(params)), joined or None
