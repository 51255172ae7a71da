"""The loop of phase 2, over whichever rows, with the sums that their condition number asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import RowsChangedError
from nlsq_dask.kernels.dense_loops import Product
from nlsq_dask.kernels.in_memory import NormalRowSums
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers import gauss_newton as gn
from nlsq_dask.solvers.point import Point, Settings
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Judge = Callable[[gn.State, gn.Trial, NormalEquations], gn.State]

MORE_ITERATIONS = 10  # times those over all rows, because they cost no reading
# How far, in normalized parameters, the sample may take what it does not determine.
_ANCHOR_LENGTH = 10.0
_FREE_LENGTHS = (1e6, np.inf)  # hardly held, and not at all
_PULLED = 1e-2  # of the residual: a step that is left where the pull is taken away
_CHANCE = 10.0  # times p / n: relative fall of the cost that tells nothing
_LESS_VARIANCE = 0.5  # than that by which the pull was chosen: then it was much too strong
_NO_FURTHER = {Status.USER_STOP, Status.ITERATION_LIMIT, Status.SLOW_PROGRESS}
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
    reduce_anew: Callable[[Vector], NormalEquations] | None = None,
    remember: Callable[[gn.State, gn.Trial | None], None] = lambda state, trial: None,
    trial: gn.Trial | None = None,
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
    reduce_anew : callable, optional
        Sums at given parameters, over the rows that are left if ``reduce`` has said that these are
        no longer the same.
    remember : callable
        Told of every new state, and of the trial whose sums are wanted next, if there is one.
    trial : Trial, optional
        That was proposed from ``state`` already.
    """
    while True:
        if trial is None:
            if reduce_by_qr is not None and gn.loses_digits(state):
                state = gn.resumed(state, reduce_by_qr(state.point.params))
            if state.stop is not None:
                return state
            trial = propose(state)
            state = gn.take_last_step(state, trial)
            if state.stop is not None:
                remember(state, None)
                return state
            remember(state, trial)
        try:
            state = judge(state, trial, reduce(state, trial))
        except RowsChangedError:
            assert reduce_anew is not None
            state = gn.resumed(state, reduce_anew(state.point.params))
        trial = None
        remember(state, trial)


@dataclass(frozen=True)
class SampleSolver:
    """Solves the fit over rows in memory.

    Attributes
    ----------
    settings : Settings
        Of float64 arithmetic.
    config : HybridStreamingConfig
    """

    settings: Settings
    config: HybridStreamingConfig

    @classmethod
    def of(cls, settings: Settings, config: HybridStreamingConfig) -> Self:
        """Make one from the settings for all rows."""
        settings = replace(
            settings,
            epsilon=float(np.finfo(np.float64).eps),
            max_iterations=MORE_ITERATIONS * settings.max_iterations,
            patience=MORE_ITERATIONS * settings.patience,
        )
        return cls(settings, config)

    def solve(
        self,
        sums: NormalRowSums,
        start: Vector,
        judge: Judge = gn.judge,
        anchor_length: float = _ANCHOR_LENGTH,
    ) -> gn.State:
        """Converge from a start; ``sums`` are left as the solution's condition number asks for.

        The rows may say nothing of some parameters (a peak that they missed). A weak pull towards
        the start keeps those in place, and moves the others by far less than their errors.
        """
        sums.make(first_product(self.config))
        if not sums(start).is_finite:
            return gn.start(start, sums(start), self.settings)
        pull = _Pull(start, _variance(sums(start)), anchor_length * self.settings.sizes)

        def reduce(params: Vector) -> NormalEquations:
            return pull.added_to(sums(params), params)

        def reduce_by_qr(params: Vector) -> NormalEquations:
            sums.make(Product.TRIANGLE)
            return reduce(params)

        params = start
        while True:
            state = solve(
                gn.start(params, reduce(params), self.settings),
                gn.propose,
                lambda state, trial: reduce(trial.params),
                reduce_by_qr if self.config.gauss_newton_solver == "auto" else None,
                judge,
            )
            assert state.solution is not None
            params = state.solution
            if state.stop in _NO_FURTHER or not pull.relaxed(_variance(sums(params))):
                break
        if not state.point.is_ill_conditioned:
            sums.make(first_product(self.config))
        return state

    def best_start(
        self, sums: NormalRowSums, starts: list[Vector], judge: Judge = gn.judge
    ) -> Vector:
        """Return where the best of some starts leads to, the first of those that are equally good.

        A warm-up may end in a valley that Gauss-Newton would not have entered from the start, and
        the other way round. A few rows are enough to tell. Where the pull towards the start has
        mattered, the start may be off by orders of magnitude, and it is tried without.
        """
        tol = max(self.settings.tol, _RACE_TOL)
        rough = replace(self, settings=replace(self.settings, tol=tol))
        best, least = rough._race(sums, starts, _ANCHOR_LENGTH, judge)
        n_used, n_params = max(sums(best).n_used, 1), len(best)
        if np.isfinite(least) and Point.of(best, sums(best), self.settings).measure > _PULLED:
            races = (rough._race(sums, starts, length, judge) for length in _FREE_LENGTHS)
            other, cost = min(races, key=lambda race: race[1])
            if cost * (1.0 + _CHANCE * n_params / n_used) < least:
                return other
        return best

    def _race(
        self, sums: NormalRowSums, starts: list[Vector], anchor_length: float, judge: Judge
    ) -> tuple[Vector, float]:
        ends, costs = [], []
        for start in starts:
            solution = self.solve(sums, start, judge, anchor_length).solution
            end = start if solution is None else solution
            found = sums(end)
            ends.append(end)
            costs.append(found.cost if found.is_finite else np.inf)
        best = min(costs) * (1.0 + _SAME_COST)
        return next(pair for pair in zip(ends, costs, strict=True) if pair[1] <= best)


@dataclass
class _Pull:
    """A penalty that keeps parameters near a start, as a prior of some width would.

    With the variance at a bad start it is so strong that it makes minima, so it is relaxed where a
    solve with it has ended.
    """

    start: Vector
    variance: float
    widths: Vector

    def added_to(self, sums: NormalEquations, params: Vector) -> NormalEquations:
        roots = np.sqrt(self.variance) / self.widths
        return sums.with_rows(np.diag(roots), roots * (params - self.start))

    def relaxed(self, variance: float) -> bool:
        """Return whether it has become weaker, because the variance is much less than before."""
        if not variance < _LESS_VARIANCE * self.variance:
            return False
        self.variance = variance
        return True
