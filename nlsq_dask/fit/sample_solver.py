"""``SampleSolver``: Gauss-Newton on a sample of rows in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.fit.loop import Report, iterate
from nlsq_dask.kernels.in_memory import DenseObjective
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.gauss_newton import GaussNewton, State
from nlsq_dask.solvers.iterate import Iterate
from nlsq_dask.status import Status

Vector = NDArray[np.float64]

# Width of the anchor penalty in normalized parameters; limits non-identifiable ones.
_ANCHOR_LENGTH = 10.0
_WEAK_LENGTHS = (1e6, np.inf)  # a weak penalty, and none
_MAX_DECREMENT = 1e-2  # relative decrement without the penalty at which it matters
_CHANCE = 10.0  # times p / n: insignificant relative reduction of the cost
_LESS_VARIANCE = 0.5  # ratio of variances at which the penalty is relaxed
_FINAL = {Status.USER_STOP, Status.ITERATION_LIMIT, Status.SLOW_PROGRESS, Status.STUCK}
_RACE_TOL, _RACE_PATIENCE = 1e-3, 150  # tolerance and patience for comparing starts
SAME_COST = 1e-4  # relative difference within which costs are equal


@dataclass(frozen=True)
class SampleSolver:
    """Gauss-Newton on a sample of rows in memory."""

    solver: GaussNewton  # with the epsilon of float64

    def solve(
        self,
        sums: DenseObjective,
        start: Vector,
        report: Report,
        anchor_length: float = _ANCHOR_LENGTH,
    ) -> State:
        """Minimize from ``start`` and return the final state.

        Parameters that the sample does not determine, such as those of a peak that it misses, are
        kept near the start by a weak penalty, which moves others by far less than their errors. It
        acts like a Gaussian prior with standard deviation ``anchor_length``, in normalized
        parameters. If the problem is ill-conditioned, ``sums`` uses QR factorizations from then on.
        """
        solver, accumulation = self.solver, self.solver.accumulation
        sums.use(accumulation)
        if not sums(start).is_finite:
            return solver.init(start, sums(start))
        anchor = _AnchorPenalty(
            start, sums(start).mean_square, anchor_length * solver.settings.sizes
        )

        def evaluate(request: Request) -> NormalEquations:
            sums.use(request.accumulation)
            return anchor.add_to(sums(request.params), request.params)

        params = start
        while True:
            initial = solver.init(params, evaluate(Request(params, accumulation=accumulation)))
            state = iterate(solver, initial, evaluate, report)
            assert state.solution is not None
            params, accumulation = state.solution, state.accumulation
            solver = replace(solver, accumulation=accumulation)
            if state.stop in _FINAL or not anchor.relax(sums(params).mean_square):
                break
        if not state.iterate.is_ill_conditioned:
            sums.use(self.solver.accumulation)
        return state

    def best_start(self, sums: DenseObjective, starts: list[Vector], report: Report) -> Vector:
        """Minimize from each start and return the best end point, the first of equally good ones.

        Starts are the end point of L-BFGS and p0, because either may lead into a poor minimum. If
        the penalty of ``solve`` matters at the solution, it may hold parameters back that are off
        by orders of magnitude; weaker penalties are then tried, too.
        """
        settings = self.solver.settings
        coarse = replace(settings, tol=max(settings.tol, _RACE_TOL), patience=_RACE_PATIENCE)
        rough = SampleSolver(replace(self.solver, settings=coarse))
        best, least = rough._race(sums, starts, _ANCHOR_LENGTH, report)
        n_used, n_params = max(sums(best).n_used, 1), len(best)
        if (
            np.isfinite(least)
            and Iterate.of(best, sums(best), settings).relative_decrement > _MAX_DECREMENT
        ):
            races = (rough._race(sums, starts, length, report) for length in _WEAK_LENGTHS)
            other, cost = min(races, key=lambda race: race[1])
            if cost * (1.0 + _CHANCE * n_params / n_used) < least:
                return other
        return best

    def _race(
        self, sums: DenseObjective, starts: list[Vector], anchor_length: float, report: Report
    ) -> tuple[Vector, float]:
        ends, costs = [], []
        for start in starts:
            solution = self.solve(sums, start, report, anchor_length).solution
            end = start if solution is None else solution
            end_sums = sums(end)
            ends.append(end)
            costs.append(end_sums.cost if end_sums.is_finite else np.inf)
        best = min(costs) * (1.0 + SAME_COST)
        return next(pair for pair in zip(ends, costs, strict=True) if pair[1] <= best)


@dataclass
class _AnchorPenalty:
    """Penalty that keeps parameters near a start, like a Gaussian prior.

    The squared distance from the start is weighted by ``variance``, the residual variance, over the
    squared ``widths`` of the prior. At a bad start the variance is so large that the penalty would
    create minima, so that it is lowered after each solve.
    """

    start: Vector
    variance: float
    widths: Vector

    def add_to(self, sums: NormalEquations, params: Vector) -> NormalEquations:
        roots = np.sqrt(self.variance) / self.widths
        return sums.with_rows(np.diag(roots), roots * (params - self.start))

    def relax(self, variance: float) -> bool:
        """Weaken the penalty if ``variance`` is much smaller than before; return whether it was."""
        if not variance < _LESS_VARIANCE * self.variance:
            return False
        self.variance = variance
        return True
