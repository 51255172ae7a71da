"""``iterate``: the loop of phase 2 for any solver; ``SampleSolver``: dense fits of the sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.kernels.dense_loops import Accumulation
from nlsq_dask.kernels.in_memory import DenseObjective
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations, Sums
from nlsq_dask.solvers.gauss_newton import GaussNewton, State
from nlsq_dask.solvers.iterate import Iterate, Settings
from nlsq_dask.solvers.solver import Solver, SolverState
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
S = TypeVar("S", bound=Sums)
T = TypeVar("T", bound=SolverState[Any])

# Called with request, sums, and the states before and after; returns whether to stop.
Report = Callable[[Request, Sums, SolverState[Sums], SolverState[Sums]], bool]

SAMPLE_ITERATIONS_FACTOR = 10  # relative to all rows; iterations on the sample read no data
# Width of the anchor penalty in normalized parameters; limits non-identifiable ones.
_ANCHOR_LENGTH = 10.0
_WEAK_LENGTHS = (1e6, np.inf)  # a weak penalty, and none
_MAX_DECREMENT = 1e-2  # relative decrement without the penalty at which it matters
_CHANCE = 10.0  # times p / n: insignificant relative reduction of the cost
_LESS_VARIANCE = 0.5  # ratio of variances at which the penalty is relaxed
_FINAL = {Status.USER_STOP, Status.ITERATION_LIMIT, Status.SLOW_PROGRESS}
_RACE_TOL = 1e-3  # tolerance for comparing starts
_SAME_COST = 1e-4  # relative difference within which costs are equal


def _variance(sums: NormalEquations) -> float:
    return 2.0 * sums.cost / max(sums.n_used, 1)


def first_accumulation(config: HybridStreamingConfig) -> Accumulation:
    """Return the initial accumulation."""
    return Accumulation.TRIANGLE if config.gauss_newton_solver == "qr" else Accumulation.GRAM


def iterate(
    solver: Solver[T, S],
    state: T,
    evaluate: Callable[[Request], S | None],
    report: Report,
    remember: Callable[[T], None] = lambda state: None,
) -> T:
    """Iterate ask and tell until the state has a stop status.

    Parameters
    ----------
    solver : Solver
    state : SolverState
    evaluate : callable
        Returns the sums for a request; None if the set of rows has changed.
    report : callable
    remember : callable
        Receives each new state.
    """
    while state.stop is None:
        request = solver.ask(state)
        sums = evaluate(request)
        if sums is None:
            state = solver.restart(state, state.params)
        else:
            before, state = state, solver.tell(state, sums)
            if report(request, sums, before, state):
                state = solver.end(state, Status.USER_STOP)
        remember(state)
    return state


@dataclass(frozen=True)
class SampleSolver:
    """Fits rows in memory with dense matrices."""

    settings: Settings  # with the epsilon of float64
    config: HybridStreamingConfig

    @classmethod
    def of(cls, settings: Settings, config: HybridStreamingConfig) -> Self:
        """Return a solver from the settings for all rows."""
        settings = replace(
            settings,
            epsilon=float(np.finfo(np.float64).eps),
            max_iterations=SAMPLE_ITERATIONS_FACTOR * settings.max_iterations,
            patience=SAMPLE_ITERATIONS_FACTOR * settings.patience,
        )
        return cls(settings, config)

    def solve(
        self,
        sums: DenseObjective,
        start: Vector,
        report: Report,
        anchor_length: float = _ANCHOR_LENGTH,
    ) -> State:
        """Return the final state; ``sums`` keep the accumulation that the solution requires.

        Some parameters may be non-identifiable on the sample (a peak that it misses). A weak
        penalty keeps them near the start; it moves the others by far less than their errors.
        """
        accumulation = first_accumulation(self.config)
        solver = GaussNewton(self.settings, accumulation, self.config.gauss_newton_solver == "auto")
        sums.use(accumulation)
        if not sums(start).is_finite:
            return solver.init(start, sums(start))
        anchor = _AnchorPenalty(start, _variance(sums(start)), anchor_length * self.settings.sizes)

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
            if state.stop in _FINAL or not anchor.relax(_variance(sums(params))):
                break
        if not state.iterate.is_ill_conditioned:
            sums.use(first_accumulation(self.config))
        return state

    def best_start(self, sums: DenseObjective, starts: list[Vector], report: Report) -> Vector:
        """Return the end point of the best start, the first of equally good ones.

        A warm-up may end in a valley that Gauss-Newton avoids, and vice versa; a few rows suffice
        to compare. If the anchor penalty matters at the solution, the start may be wrong by orders
        of magnitude; weaker penalties are then tried.
        """
        tol = max(self.settings.tol, _RACE_TOL)
        rough = replace(self, settings=replace(self.settings, tol=tol))
        best, least = rough._race(sums, starts, _ANCHOR_LENGTH, report)
        n_used, n_params = max(sums(best).n_used, 1), len(best)
        if (
            np.isfinite(least)
            and Iterate.of(best, sums(best), self.settings).relative_decrement > _MAX_DECREMENT
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
        best = min(costs) * (1.0 + _SAME_COST)
        return next(pair for pair in zip(ends, costs, strict=True) if pair[1] <= best)


@dataclass
class _AnchorPenalty:
    """Penalty that keeps parameters near a start, like a Gaussian prior.

    With the variance at a bad start it is so strong that it creates minima, so it is relaxed after
    each solve.
    """

    start: Vector
    variance: float
    widths: Vector

    def add_to(self, sums: NormalEquations, params: Vector) -> NormalEquations:
        roots = np.sqrt(self.variance) / self.widths
        return sums.with_rows(np.diag(roots), roots * (params - self.start))

    def relax(self, variance: float) -> bool:
        """Relax the penalty if the variance is much smaller; return whether it changed."""
        if not variance < _LESS_VARIANCE * self.variance:
            return False
        self.variance = variance
        return True
