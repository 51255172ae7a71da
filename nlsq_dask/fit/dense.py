"""Phases 2 and 3 with matrices: Gauss-Newton in a trust region, and the covariance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.events import ALL_ROWS, SampleSolved
from nlsq_dask.fit.context import FitContext, Solved, may_go_on
from nlsq_dask.fit.iterations import StoppedByCallbackError
from nlsq_dask.fit.loop import SampleSolver, first_product, solve
from nlsq_dask.fit.passes import RowsInUse
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.kernels.dense_kernel import NormalEquationsKernel
from nlsq_dask.kernels.dense_loops import Product
from nlsq_dask.kernels.in_memory import NormalRowSums
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers import gauss_newton as gn
from nlsq_dask.solvers.covariance import Covariance, covariance, sandwich
from nlsq_dask.solvers.point import Settings
from nlsq_dask.solvers.surrogate import forecast
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Sample = SampleProblem[NormalRowSums]

_PATIENCE = 15  # passes over all rows without progress


@dataclass(frozen=True)
class _OnSample:
    """What the sample's solve has found, and which sums it needed in the end."""

    params: Vector
    iterations: int
    product: Product


@dataclass(frozen=True)
class _Ahead:
    """The state of the solve over all rows.

    With the trial whose sums are wanted next, and the rows that its sums are over.
    """

    state: gn.State
    trial: gn.Trial | None
    rows: RowsInUse


class DenseFit:
    """Phases 2 and 3 of a fit whose step is solved with matrices of its parameters.

    Parameters
    ----------
    context : FitContext

    Attributes
    ----------
    context : FitContext
    """

    def __init__(self, context: FitContext) -> None:
        self.context = context
        config, parameters = context.config, context.parameters
        trace = partial(NormalEquationsKernel.trace, piece_rows=context.piece_rows)
        kernel = trace(context.model, platforms=context.platforms, loss=context.loss)
        self._kernel = replace(kernel, uses_all_devices=config.enable_multi_device)
        self._sample_kernel = trace(context.exact_model, loss=context.loss)
        self._settings = Settings(
            low=parameters.low,
            high=parameters.high,
            tol=config.gauss_newton_tol,
            max_iterations=config.gauss_newton_max_iterations,
            patience=_PATIENCE,
            sizes=context.normalizer.scales,
            regularization=config.regularization_factor,
            initial_radius=config.trust_region_initial,
            epsilon=float(np.finfo(context.model.dtype).eps),
            recovers=config.validate_numerics,
        )
        self._sample_solver = SampleSolver.of(self._settings, config)
        self._state: gn.State | None = None

    @property
    def kernel(self) -> NormalEquationsKernel:
        """The kernel for all rows."""
        return self._kernel

    def sum_rows(self, rows: Rows, y_reference: float) -> NormalRowSums:
        """Return the sums over rows in memory."""
        kernel = replace(self._sample_kernel, y_reference=y_reference)
        return NormalRowSums(self.context.exact_model, kernel, rows, self.context.penalty)

    def solve(self, sample: Sample, starts: list[Vector], details: dict[str, Any]) -> Solved:
        """Converge on the sample, then over all rows."""
        start = self._solve_on_sample(sample, starts, details)
        state = self._begun(sample, start)
        return self._solve_on_all_rows(state, sample, details)

    def solve_again(self, sample: Sample, details: dict[str, Any]) -> Solved:
        """Go on from the solution, because there are fewer rows now than it was found with."""
        state = self._state
        assert state is not None
        assert state.solution is not None
        sums = self.context.passes.reduce_anew(self._kernel, state.solution)
        begun = gn.resumed(state, sums, state.solution)
        if state.stop is Status.USER_STOP:
            begun = replace(begun, stop=state.stop, solution=state.solution)
        return self._solve_on_all_rows(begun, sample, details)

    def _solve_on_sample(
        self, sample: Sample, starts: list[Vector], details: dict[str, Any]
    ) -> Vector:
        """Converge on the sample; return its solution, or the best start if it has none."""
        if not sample.is_informative:
            return starts[0]

        def find() -> _OnSample:
            return self._find_on_sample(sample, starts)

        found = self.context.journal.step("solution of the sample", _OnSample, find)
        sample.reduce.make(found.product)
        details["sample_iterations"] = found.iterations
        return found.params

    def _find_on_sample(self, sample: Sample, starts: list[Vector]) -> _OnSample:
        solver = self._sample_solver
        watched = partial(self._watched, stage="sample")
        start = solver.best_start(sample.reduce_few, starts, watched)
        state = solver.solve(sample.reduce, start, partial(self._judged, stage="sample"))
        product = sample.reduce.kernel.product
        if state.stop is Status.NON_FINITE_START:
            return _OnSample(start, state.iteration, product)
        assert state.solution is not None
        if state.stop is Status.USER_STOP:
            raise StoppedByCallbackError(state.solution)
        self.context.emit(SampleSolved(state.iteration, state.point.sums.mean_square))
        return _OnSample(state.solution, state.iteration, product)

    def _begun(self, sample: Sample, start: Vector) -> gn.State:
        """Choose the kernel for all rows, and make the first pass."""
        is_exact = self.context.is_exact
        factors = self._kernel.factors if is_exact else sample.reduce.factors(start)
        kernel = replace(self._kernel, y_reference=sample.y_reference, factors=factors)
        product = sample.reduce.kernel.product if is_exact else first_product(self.context.config)
        self._kernel = kernel.making(product, self.context.model)
        return gn.start(*self._first_pass(sample, start), self._settings)

    def _solve_on_all_rows(
        self, state: gn.State, sample: Sample, details: dict[str, Any]
    ) -> Solved:
        """Converge over all rows, a pass a trial; the sample, renewed, forecasts the trials."""
        passes = self.context.passes
        may_change = self.context.config.gauss_newton_solver == "auto" and self.context.is_exact

        def reduce(state: gn.State, trial: gn.Trial) -> NormalEquations:
            return passes.reduce(self._kernel, trial.params, gn.candidates(state, trial))

        def reduce_anew(params: Vector) -> NormalEquations:
            return passes.reduce_anew(self._kernel, params)

        def reduce_by_qr(params: Vector) -> NormalEquations:
            self._kernel = self._kernel.making(Product.TRIANGLE, self.context.model)
            return reduce_anew(params)

        journal = self.context.journal
        with journal.loop("all rows"):
            ahead, trial = journal.noted(_Ahead), None
            if ahead is not None:
                passes.rows_in_use = ahead.rows
                state, trial = self._gone_on_with(ahead.state), ahead.trial
            state = solve(
                state,
                lambda state: forecast(state, sample.reduce) or gn.propose(state),
                reduce,
                reduce_by_qr if may_change else None,
                partial(self._judged, stage=ALL_ROWS),
                reduce_anew,
                self._remember,
                trial,
            )
        self._state = state
        assert state.stop is not None
        assert state.solution is not None
        details |= {
            "iterations": state.iteration,
            "passes": passes.n_passes,
            "reason": state.stop.name.lower(),
            "solver": "qr" if self._kernel.product.is_factorized else "normal",
        }
        point = state.point
        return Solved(state.solution, state.stop, point.sums, point.params, state.iteration)

    def _remember(self, state: gn.State, trial: gn.Trial | None) -> None:
        self._state = state
        self.context.journal.note(_Ahead(state, trial, self.context.passes.rows_in_use))

    def _gone_on_with(self, state: gn.State) -> gn.State:
        """Go on with a state that may have been made by another process, for less iterations."""
        if state.point.sums.triangle is not None:
            self._kernel = self._kernel.making(Product.TRIANGLE, self.context.model)
        state = replace(state, point=replace(state.point, settings=self._settings))
        if may_go_on(state.stop, state.iteration, self._settings.max_iterations):
            return replace(state, stop=None, solution=None)
        return state

    def so_far(self, stop: Status) -> Solved | None:
        """Return the accepted point of the solve over all rows, as its end; None before it."""
        if self._state is None or not self._state.point.sums.is_finite:
            return None
        point = self._state.point
        self._state = replace(self._state, stop=stop, solution=point.params, carried_jtj=None)
        return Solved(point.params, stop, point.sums, point.params, self._state.iteration)

    def _first_pass(self, sample: Sample, start: Vector) -> tuple[Vector, NormalEquations]:
        """Return a start for all rows with its sums: the sample's solution, or a better one.

        The rows that the pass brings back are from all blocks. Where the first sample was not like
        them, because all rows fit its solution worse than it did by more than chance explains, the
        fit starts once more on the new one; that costs a pass if it leads to a better point.
        """
        most, chance = sample.most_expected(start), sample.chance
        sums, rows = self.context.passes.first(
            self._kernel, start, self.context.sample_rows, self.context.config.random_seed
        )
        if rows is not None:
            sample.exchange(rows)
        if sums.is_finite and not sums.variance(0) > most:
            return start, sums
        again = self._solve_on_sample(sample, self.context.start_finder.find(sample, {}), {})
        state = gn.start(start, sums, self._settings)
        ahead = None if state.stop is not None else forecast(state, sample.reduce)
        reached = sample.reduce(start if ahead is None else ahead.params)
        there = sample.reduce(again)
        if not there.is_finite:
            again = self.context.parameters.start
            there = sample.reduce(again)
        if not there.is_finite or (reached.is_finite and there.cost * chance >= reached.cost):
            return start, sums
        other, sums = self.context.passes.reduce_beside(self._kernel, again, (start, sums))
        if other.is_finite and not (sums.is_finite and sums.cost <= other.cost):
            return again, other
        return start, sums

    def covariance(self, details: dict[str, Any], may_pass: bool = True) -> Covariance | None:
        """Return the covariance at the solution, or None where nothing is finite.

        Also None where it takes a pass which may not be made.
        """
        state = self._state
        if state is None or not state.point.sums.is_finite:
            return None
        if self.context.config.cov_type != "nonrobust" and not may_pass:
            return None
        sums, epsilon = state.sums_at_solution, self._settings.epsilon
        cov_type = self.context.config.cov_type
        details["cov_type"] = cov_type
        is_classical = cov_type == "nonrobust"
        absolute_sigma = self.context.absolute_sigma or not is_classical
        found = covariance(sums, absolute_sigma, epsilon)
        if not is_classical and np.isfinite(found.root).all():
            assert state.solution is not None
            kernel = self._kernel.making(Product.SCORES, self.context.model)
            scores = self.context.passes.scores(kernel, state.solution)
            found = sandwich(found, scores, sums.n_used, cov_type)
        details["condition_number"] = found.condition_number
        return found

    def errors(self, details: dict[str, Any]) -> None:
        """Say that the standard errors are those of the covariance."""

    def _watched(
        self, state: gn.State, trial: gn.Trial, sums: NormalEquations, stage: str
    ) -> gn.State:
        """Judge a trial and report it if it is not finite."""
        if not sums.is_finite:
            self.context.iterations.report_non_finite(stage, trial.params, sums.n_nonfinite)
        return gn.judge(state, trial, sums)

    def _judged(
        self, state: gn.State, trial: gn.Trial, sums: NormalEquations, stage: str
    ) -> gn.State:
        """Judge a trial and report it; the callback may end the solve."""
        scales = self.context.normalizer.scales
        step_norm = float(np.linalg.norm((trial.params - state.point.params) / scales))
        state = self._watched(state, trial, sums, stage)
        point = state.point
        if self.context.iterations.report(
            stage,
            point.params,
            point.sums.mean_square,
            point.sums.relative_slope(scales),
            step_norm,
            state.radius,
            accepted=point.params is trial.params,
        ):
            state = replace(state, stop=Status.USER_STOP, solution=point.params)
        return state
