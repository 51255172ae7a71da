"""The loop of phase 2, over whichever rows, with the sums that their condition number asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.core import gauss_newton as gn
from nlsq_dask.core.block_loops import Product
from nlsq_dask.core.point import Settings
from nlsq_dask.core.row_sums import RowSums
from nlsq_dask.core.sums import NormalEquations
from nlsq_dask.stopping import StopReason

Vector = NDArray[np.float64]
Judge = Callable[[gn.State, gn.Trial, NormalEquations], gn.State]

# How far, in normalized parameters, the sample may take what it does not determine.
_ANCHOR_LENGTH = 10.0
_LESS_VARIANCE = 0.5  # than that by which the pull was chosen: then it was much too strong
_NO_FURTHER = {StopReason.USER_STOP, StopReason.ITERATION_LIMIT}
_RACE_TOL = 1e-3  # close enough to know which of several starts is the best
_SAME_COST = 1e-4  # relative difference, within which two ends are equally good


def _variance(sums: NormalEquations) -> float:
    return 2.0 * sums.cost / max(sums.n_used, 1)


def first_product(config: HybridStreamingConfig) -> Product:
    """Return the sums to begin with."""
    return Product.TRIANGLE if config.gauss_newton_solver == "qr" else Product.GRAM


def solve(
    state: gn.State,
    propose: Callable[[gn.State], gn.Trial],
    reduce: Callable[[gn.State, gn.Trial], NormalEquations],
    reduce_by_qr: Callable[[Vector], NormalEquations] | None,
    judge: Judge,
) -> gn.State:
    """Iterate until the state says to stop.

    Parameters
    ----------
    state : State
    propose : callable
        Returns the next trial.
    reduce : callable
        Sums at the trial.
    reduce_by_qr : callable or None
        Sums at given parameters by QR factorizations, which ``reduce`` makes from then on. Called
        where J^T J loses too many digits; None if that is not wanted.
    judge : callable
        ``gauss_newton.judge``, or one that reports, too.
    """
    while True:
        if reduce_by_qr is not None and gn.loses_digits(state):
            state = gn.resumed(state, reduce_by_qr(state.point.params))
        if state.stop is not None:
            return state
        trial = propose(state)
        state = gn.take_last_step(state, trial)
        if state.stop is None:
            state = judge(state, trial, reduce(state, trial))


@dataclass(frozen=True)
class SampleSolver:
    """Solves the fit over rows in memory.

    Attributes
    ----------
    settings : Settings
        Of float64 arithmetic.
    scales : ndarray, shape (p,)
        Of the normalization.
    config : HybridStreamingConfig
    """

    settings: Settings
    scales: Vector
    config: HybridStreamingConfig

    def solve(self, sums: RowSums, start: Vector, judge: Judge = gn.judge) -> gn.State:
        """Converge from a start; ``sums`` are left as the solution's condition number asks for.

        The rows may say nothing of some parameters (a peak that they missed). A weak pull towards
        the start keeps those in place, and moves the others by far less than their errors.
        """
        sums.make(first_product(self.config))
        if not sums(start).is_finite:
            return gn.start(start, sums(start), self.settings)
        variance, params = _variance(sums(start)), start
        while True:
            state = self._solve_anchored(sums, params, start, variance, judge)
            assert state.solution is not None
            params = state.solution
            before, variance = variance, _variance(sums(params))
            # With the variance at a bad start the pull is so strong that it makes minima.
            if state.stop in _NO_FURTHER or not variance < _LESS_VARIANCE * before:
                break
        if not state.point.is_ill_conditioned:
            sums.make(first_product(self.config))
        return state

    def _solve_anchored(
        self, sums: RowSums, params: Vector, anchor: Vector, variance: float, judge: Judge
    ) -> gn.State:
        weights = variance / (_ANCHOR_LENGTH * self.scales) ** 2

        def reduce(params: Vector) -> NormalEquations:
            return sums(params).anchored(weights, params - anchor)

        def reduce_by_qr(params: Vector) -> NormalEquations:
            sums.make(Product.TRIANGLE)
            return reduce(params)

        return solve(
            gn.start(params, reduce(params), self.settings),
            gn.propose,
            lambda state, trial: reduce(trial.params),
            reduce_by_qr if self.config.gauss_newton_solver == "auto" else None,
            judge,
        )

    def best_start(self, sums: RowSums, starts: list[Vector]) -> Vector:
        """Return where the best of some starts leads to, the first of those that are equally good.

        A warm-up may end in a valley that Gauss-Newton would not have entered from the start, and
        the other way round. A few rows are enough to tell.
        """
        ends, costs = [], []
        tol = max(self.settings.tol, _RACE_TOL)
        rough = replace(self, settings=replace(self.settings, tol=tol))
        for start in starts:
            state = rough.solve(sums, start)
            end = start if state.solution is None else state.solution
            cost = sums(end).cost
            ends.append(end)
            costs.append(cost if np.isfinite(cost) else np.inf)
        best = min(costs) * (1.0 + _SAME_COST)
        return next(end for end, cost in zip(ends, costs, strict=True) if cost <= best)
