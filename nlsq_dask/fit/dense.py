"""``DenseFit``: solution and covariance (phases 2 and 3) of a fit, with p-by-p matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.events import SampleSolved
from nlsq_dask.fit.full_fit import FitContext, FullFit
from nlsq_dask.fit.iterations import StoppedByCallbackError
from nlsq_dask.fit.outcome import Outcome
from nlsq_dask.fit.passes import Reduced
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.sample_solver import SAME_COST, SampleSolver
from nlsq_dask.fit.settings import gauss_newton_settings, sample_settings
from nlsq_dask.fit.subsets import SubsetFit
from nlsq_dask.kernels.dense_kernel import DenseReduction, dense_kernel, with_accumulation
from nlsq_dask.kernels.dense_terms import Accumulation
from nlsq_dask.kernels.in_memory import DenseObjective
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.model.jacobian import with_other_mode
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers.affine import affine_minimum
from nlsq_dask.solvers.covariance import Covariance, covariance, sandwich
from nlsq_dask.solvers.gauss_newton import (
    GaussNewton,
    Proposal,
    State,
    init_state,
    take_last_step,
)
from nlsq_dask.solvers.newton import find_minimum
from nlsq_dask.solvers.one_step import Mirror, one_step
from nlsq_dask.solvers.surrogate import forecast
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Sample = SampleProblem[DenseObjective]

_UNSURE = {
    Status.STALLED,
    Status.STUCK,
    Status.SLOW_PROGRESS,
}  # a minimum may be there nevertheless
_ASIDE = 1e-2  # distance from bounds at which the cost beside them is compared, in typical sizes


@dataclass(frozen=True)
class _SampleSolution:
    """Solution on the sample, and how later sums are computed: J^T J, or QR if ill-conditioned."""

    params: Vector
    iterations: int
    accumulation: Accumulation
    has_other_mode: bool = False  # whether the mode of differentiation was switched for it


class DenseFit(FullFit[State, NormalEquations]):
    """Phases 2 and 3 with ``GaussNewton``: the solution, and the covariance matrix."""

    state_type = State

    def __init__(self, context: FitContext) -> None:
        super().__init__(context)
        config = self.problem.config
        self._n_fitted = 1  # rows for which the first iterate over all rows is the solution
        self._other_model: Model | None = None  # with the mode of differentiation not in use
        self._trace_kernels()
        self._settings = gauss_newton_settings(self.problem)
        is_qr = config.gauss_newton_solver == "qr"
        self._first_accumulation = Accumulation.TRIANGLE if is_qr else Accumulation.GRAM
        self._is_auto = config.gauss_newton_solver == "auto"
        settings = sample_settings(self._settings)
        self._sample_solver = SampleSolver(
            GaussNewton(settings, self._first_accumulation, self._is_auto)
        )

    def _trace_kernels(self) -> None:
        context, problem = self.context, self.problem
        trace = partial(dense_kernel, batch_rows=context.batch_rows, loss=problem.loss)
        kernel = trace(
            problem.model, platforms=context.platforms, longest_block=context.longest_block
        )
        self._gram = replace(kernel, uses_all_devices=problem.config.enable_multi_device)
        self._kernels = {Accumulation.GRAM: self._gram}
        self._sample_kernel = trace(problem.exact_model)

    def _switch_mode(self) -> bool:
        """Use the other mode of differentiation from now on; return whether there is one."""
        other, before = self._other_model or with_other_mode(self.problem.model), self._gram
        if other is None:
            return False
        self._other_model = self.problem.model
        self.problem = replace(self.problem, model=other)
        self._trace_kernels()
        reduction = replace(self._reduction(before), mode=self._reduction(self._gram).mode)
        self._gram = replace(self._gram, reduction=reduction, y_reference=before.y_reference)
        self._kernels = {Accumulation.GRAM: self._gram}
        return True

    @staticmethod
    def _reduction(kernel: Kernel[NormalEquations]) -> DenseReduction:
        reduction = kernel.reduction
        assert isinstance(reduction, DenseReduction)
        return reduction

    def kernel(self, request: Request) -> Kernel[NormalEquations]:
        """Return the kernel that computes the requested sums over all rows."""
        accumulation = request.accumulation
        if accumulation not in self._kernels:
            kernel = with_accumulation(self._gram, accumulation, self.problem.model)
            self._kernels[accumulation] = kernel
        return self._kernels[accumulation]

    def make_objective(self, rows: Rows, y_reference: float) -> DenseObjective:
        """Return the function from parameters to ``NormalEquations`` over rows in memory.

        ``y_reference``, a value near the mean of y, is subtracted from y before the moments of y
        are summed, to avoid cancellation.
        """
        model, kernel = self.problem.exact_model, self._sample_kernel
        if (dtype := rows.y.dtype.str) != np.dtype(model.layout.y_dtype).str:
            model = replace(model, layout=replace(model.layout, y_dtype=dtype))
            kernel = dense_kernel(model, self.context.batch_rows, loss=self.problem.loss)
        kernel = replace(kernel, y_reference=y_reference)
        return DenseObjective(model, kernel, rows, self.problem.penalty)

    def _solve_on_sample(
        self, sample: Sample, starts: list[Vector], details: dict[str, Any]
    ) -> Vector:
        if not sample.is_informative:
            return starts[0]
        solve = partial(self._compute_sample_solution, sample, starts)
        solution = self.context.journal.step("solution of the sample", _SampleSolution, solve)
        self.context.iterations.latest = solution.params
        if solution.has_other_mode:
            self._switch_mode()
            sample.renew(self.problem)
        sample.objective.use(solution.accumulation)
        details["sample_iterations"] = solution.iterations
        return solution.params

    def _compute_sample_solution(self, sample: Sample, starts: list[Vector]) -> _SampleSolution:
        """Solve on the sample, and in the other mode of differentiation if derivatives lacked.

        A branch of ``jnp.where`` that is not taken may be not finite at some of the trial points
        only, which then seem to be forbidden.
        """
        solution = self._solve_in_mode(sample, starts)
        if not sample.lacked_derivatives:
            return solution
        cost = sample.objective(solution.params).cost
        if not self._switch_mode():
            return solution
        sample.renew(self.problem)
        other = self._solve_in_mode(sample, starts)
        is_better = sample.objective(other.params).cost * (1.0 + SAME_COST) < cost
        self._switch_mode()
        sample.renew(self.problem)
        return replace(other, has_other_mode=True) if is_better else solution

    def _solve_in_mode(self, sample: Sample, starts: list[Vector]) -> _SampleSolution:
        solver, report = self._sample_solver, self._build_report("sample", are_iterations=False)
        p0, settings = self.problem.parameters.start, solver.solver.settings
        start = affine_minimum(sample.objective_few, p0, settings)
        if start is None:
            start = solver.best_start(sample.objective_few, starts, report)
        state = solver.solve(sample.objective, start, self._build_report("sample"))
        accumulation = sample.objective.accumulation
        if state.stop is Status.NON_FINITE_START:
            return _SampleSolution(start, state.iteration, accumulation)
        assert state.solution is not None
        if state.stop is Status.USER_STOP:
            raise StoppedByCallbackError(state.solution)
        self.context.emit(SampleSolved(state.iteration, state.sums.mean_square))
        return _SampleSolution(state.solution, state.iteration, accumulation)

    def _prepare(self, sample: Sample, start: Vector) -> None:
        reduction = self._reduction(self._gram)
        if self.problem.is_exact:
            self._first_accumulation = sample.objective.accumulation
        else:
            reduction = replace(reduction, factors=sample.objective.factors(start))
        self._gram = replace(self._gram, reduction=reduction, y_reference=sample.y_reference)
        self._kernels = {Accumulation.GRAM: self._gram}

    def _first_request(self, params: Vector) -> Request:
        return Request(params, accumulation=self._first_accumulation, is_fresh=True)

    def _make_solver(self, sample: Sample, sums: NormalEquations) -> GaussNewton:
        return GaussNewton(
            self._settings,
            self._first_accumulation,
            may_factorize=self._is_auto and self.problem.is_exact,
            forecast=partial(self._forecast, sample),
        )

    def _forecast(self, sample: Sample, state: State) -> Proposal | None:
        """Propose a point with the sample; after the first pass, perhaps one for a last step."""
        iterate, is_first = state.iterate, not (state.earlier or state.rejected)
        is_partial = 0 < sample.n_used < iterate.sums.n_used
        if is_first and is_partial and self.problem.may_end_after_one_pass:
            pairs = sample.mirrored(iterate.moved(iterate.full_step))
            last = one_step(state, Mirror(next(pairs), pairs), self._n_fitted)
            if last is not None and take_last_step(state, last).stop is not None:
                return last
        return forecast(state, sample.objective)

    @property
    def _forecast_rows(self) -> int:
        """Number of rows that the first pass over all rows returns as a sample."""
        is_larger = self.problem.may_end_after_one_pass
        return self.problem.forecast_rows if is_larger else self.problem.sample_rows

    @property
    def _expects_one_pass(self) -> bool:
        """Whether the first pass over all rows is probably the last one."""
        has_used_subsets = self._n_fitted > self.problem.sample_rows
        return has_used_subsets and self.problem.config.cov_type == "nonrobust"

    def _approach(self, sample: Sample, start: Vector) -> Vector:
        """Return a point close to the solution, from passes over subsets of the blocks.

        QR factorizations are computed where forecasts, and with them the estimated error of a last
        step, are inaccurate: subsets would not save a pass.
        """
        is_gram = self._first_accumulation is Accumulation.GRAM
        self._n_fitted = max(sample.n_used, 1)
        if not (self.problem.may_end_after_one_pass and is_gram and sample.is_informative):
            return start
        subset_fit = SubsetFit(self.context, self.kernel, self._settings, self._other_start)
        start, self._n_fitted = subset_fit.approach(sample, start)
        return start

    def _better_start(
        self,
        sample: Sample,
        start: Vector,
        first: Reduced[NormalEquations],
        starts: list[Vector],
        chance: float,
    ) -> tuple[Vector, Reduced[NormalEquations]]:
        """Return the better of ``start`` and the solution on the new sample, with the pass there.

        ``first`` is the pass at ``start``. No pass is run at the solution if, on the sample, the
        cost does not decrease by more than the factor ``chance``.
        """
        new_start = self._other_start(sample, start, first.sums, chance)
        if new_start is None:
            return start, first
        known = self._first_request(start)
        request = replace(known, params=new_start, is_fresh=False)
        kernel = self.kernel(request)
        new_pass, first = self.context.passes.run_beside(kernel, request, known, first)
        if new_pass.sums.is_finite and not (
            first.sums.is_finite and first.sums.cost <= new_pass.sums.cost
        ):
            return new_start, new_pass
        return start, first

    def _other_start(
        self,
        sample: Sample,
        start: Vector,
        sums: NormalEquations,
        chance: float,
    ) -> Vector | None:
        """Return the solution on a new sample, or None if it is not better than ``start``.

        ``sums`` are those at ``start`` over all rows, or over those of a subset of the blocks.
        """
        new_starts = self.context.start_finder.find(sample, {})
        new_start = self._solve_on_sample(sample, new_starts, {})
        state = init_state(start, sums, self._settings)
        proposal = None if state.stop is not None else forecast(state, sample.objective)
        old_sums = sample.objective(start if proposal is None else proposal.params)
        new_sums = sample.objective(new_start)
        if not new_sums.is_finite:
            new_start = self.problem.parameters.start
            new_sums = sample.objective(new_start)
        if not new_sums.is_finite or (
            old_sums.is_finite and new_sums.cost * chance >= old_sums.cost
        ):
            return None
        return new_start

    def _confirm(self, state: State) -> tuple[State, NDArray[np.bool_] | None]:
        """Return the state, as converged if only rounding or second derivatives hide a minimum.

        If the model is insensitive to parameters, the array is True for these.
        """
        sample = self._sample
        if state.stop is Status.NO_SENSITIVITY:
            reason = state.iterate.converged()
            if reason is not None and sample is not None and self._is_at_bounds(state, sample):
                state = replace(state, stop=reason)
            return state, state.iterate.is_insensitive
        if state.stop not in _UNSURE or sample is None or not sample.is_informative:
            return state, None
        if state.stop is Status.STALLED and self._is_resolved(state, sample):
            return replace(state, stop=state.iterate.verdict(Status.FLOOR)), None
        if not sample.is_complete or state.iterate.is_insensitive.any():
            return state, None
        minimum = find_minimum(sample.objective, state.iterate.params, self._settings)
        return (state if minimum is None else self._moved(state, minimum)), None

    def _is_resolved(self, state: State, sample: Sample) -> bool:
        """Return whether rounding errors explain the cost that another step would remove."""
        iterate = state.iterate
        # Far away, where the model no longer depends on its parameters, anything is rounding, but
        # the cost is not.
        remaining = iterate.sums.cost if iterate.svd.is_null.any() else iterate.reduction
        resolution = sample.resolution(iterate.params, self._settings.epsilon)
        return bool(remaining <= 0.5 * iterate.sums.n_used * resolution < np.inf)

    def _is_at_bounds(self, state: State, sample: Sample) -> bool:
        """Return whether bounds alone make a minimum of a point with insensitive parameters.

        This is so if the cost increases from the bounds inward, along each of these parameters and
        along all of them, and solves from there lead to no smaller cost. The sample must have all
        rows.
        """
        iterate, s, solver = state.iterate, self._settings, self._sample_solver
        params, which = iterate.params, iterate.is_insensitive
        inward = np.where(params <= s.low, 1.0, np.where(params >= s.high, -1.0, 0.0)) * which
        if not (sample.is_complete and inward[which].all()) or iterate.is_in_a_valley:
            return False
        inward *= _ASIDE * np.maximum(np.abs(params), s.sizes)
        cost, noise, objective = iterate.sums.cost, iterate.cost_noise, sample.objective
        for step in (*np.diag(inward)[which], inward):
            start = np.clip(params + step, s.low, s.high)
            if not objective(start).cost > cost + noise:
                return False
            end = solver.solve(objective, start, self._build_report("sample", False)).solution
            if end is None or not objective(end).cost >= cost - noise:
                return False
        return True

    def _moved(self, state: State, minimum: Vector) -> State:
        """Return the state, ended as converged at a minimum near it, with a pass there."""
        solver = self._solver
        assert solver is not None
        restarted = solver.restart(state, minimum)
        sums = self._evaluate(solver.ask(restarted))
        if sums is None or not sums.is_finite:
            return state
        self._blocks = self._new_blocks
        return solver.end(solver.tell(restarted, sums), Status.REDUCTION)

    def _describe(self, state: State) -> dict[str, Any]:
        solver = {"solver": "normal" if state.sums.triangle is None else "qr"}
        return solver if state.last_error is None else solver | {"last_error": state.last_error}

    def _complete(self, outcome: Outcome, state: State) -> Outcome:
        """Return the outcome with cost and J^T J at the solution, and its estimated error."""
        return replace(outcome, sums=state.sums_at_solution, step_error=state.last_error)

    def covariance(self, details: dict[str, Any], may_pass: bool = True) -> Covariance | None:
        """Return the covariance matrix at the solution; add entries for the history to ``details``.

        None if the sums over all rows are not finite there, or if a pass is needed and ``may_pass``
        is False.
        """
        state, cov_type = self._state, self.problem.config.cov_type
        if state is None or not state.sums.is_finite:
            return None
        is_classical = cov_type == "nonrobust"
        if not (is_classical or may_pass):
            return None
        sums, epsilon = state.sums_at_solution, self._settings.epsilon
        details["cov_type"] = cov_type
        absolute_sigma = self.problem.absolute_sigma
        result = covariance(sums, state.params, absolute_sigma, epsilon, is_scaled=is_classical)
        if not is_classical and np.isfinite(result.root).all():
            result = sandwich(result, self._scores(state), sums.n_used, cov_type)
        details["condition_number"] = result.condition_number
        return result

    def _scores(self, state: State) -> NDArray[np.float64]:
        """Return a p-by-p matrix S with ``S^T S = sum r_i^2 J_i^T J_i`` over all rows.

        One pass computes it; the sandwich covariance follows from S.
        """
        assert state.solution is not None
        request = Request(state.solution, accumulation=Accumulation.SCORES)
        sums = self.context.passes.run(self.kernel(request), request, is_penalized=False).sums
        assert sums.triangle is not None
        return sums.triangle[:, : len(state.solution)]
