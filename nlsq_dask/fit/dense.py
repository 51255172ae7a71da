"""``DenseFit``: Gauss-Newton in a trust region and the covariance, with dense matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.events import SampleSolved
from nlsq_dask.fit.full_fit import FitContext, FullFit
from nlsq_dask.fit.iterations import StoppedByCallbackError
from nlsq_dask.fit.loop import SampleSolver, first_accumulation
from nlsq_dask.fit.passes import Reduced
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.settings import gauss_newton_settings
from nlsq_dask.kernels.dense_kernel import DenseReduction, dense_kernel, with_accumulation
from nlsq_dask.kernels.dense_loops import Accumulation
from nlsq_dask.kernels.in_memory import DenseObjective
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers.covariance import Covariance, covariance, sandwich
from nlsq_dask.solvers.gauss_newton import GaussNewton, State, init_state
from nlsq_dask.solvers.surrogate import forecast
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Sample = SampleProblem[DenseObjective]


@dataclass(frozen=True)
class _SampleSolution:
    """Solution on the sample, and the accumulation that its condition number requires."""

    params: Vector
    iterations: int
    accumulation: Accumulation


class DenseFit(FullFit[State, NormalEquations]):
    """Phases 2 and 3 of a fit whose steps are solved with dense matrices."""

    state_type = State

    def __init__(self, context: FitContext) -> None:
        super().__init__(context)
        problem = self.problem
        config = problem.config
        trace = partial(dense_kernel, batch_rows=context.batch_rows)
        kernel = trace(problem.model, platforms=context.platforms, loss=problem.loss)
        self._gram = replace(kernel, uses_all_devices=config.enable_multi_device)
        self._kernels = {Accumulation.GRAM: self._gram}
        self._sample_kernel = trace(problem.exact_model, loss=problem.loss)
        self._settings = gauss_newton_settings(problem)
        self._sample_solver = SampleSolver.of(self._settings, config)
        self._first_accumulation = first_accumulation(config)

    def kernel(self, request: Request) -> Kernel[NormalEquations]:
        """Return the kernel for a request over all rows."""
        accumulation = request.accumulation
        if accumulation not in self._kernels:
            kernel = with_accumulation(self._gram, accumulation, self.problem.model)
            self._kernels[accumulation] = kernel
        return self._kernels[accumulation]

    def make_objective(self, rows: Rows, y_reference: float) -> DenseObjective:
        """Return the objective over rows in memory."""
        kernel = replace(self._sample_kernel, y_reference=y_reference)
        return DenseObjective(self.problem.exact_model, kernel, rows, self.problem.penalty)

    def _solve_on_sample(
        self, sample: Sample, starts: list[Vector], details: dict[str, Any]
    ) -> Vector:
        if not sample.is_informative:
            return starts[0]
        solve = partial(self._compute_sample_solution, sample, starts)
        solution = self.context.journal.step("solution of the sample", _SampleSolution, solve)
        sample.objective.use(solution.accumulation)
        details["sample_iterations"] = solution.iterations
        return solution.params

    def _compute_sample_solution(self, sample: Sample, starts: list[Vector]) -> _SampleSolution:
        solver, report = self._sample_solver, self._build_report("sample", are_iterations=False)
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
        reduction = self._gram.reduction
        assert isinstance(reduction, DenseReduction)
        if self.problem.is_exact:
            self._first_accumulation = sample.objective.accumulation
        else:
            reduction = replace(reduction, factors=sample.objective.factors(start))
        self._gram = replace(self._gram, reduction=reduction, y_reference=sample.y_reference)
        self._kernels = {Accumulation.GRAM: self._gram}

    def _first_request(self, params: Vector) -> Request:
        return Request(params, accumulation=self._first_accumulation, is_fresh=True)

    def _make_solver(self, sample: Sample, sums: NormalEquations) -> GaussNewton:
        is_auto = self.problem.config.gauss_newton_solver == "auto"
        return GaussNewton(
            self._settings,
            self._first_accumulation,
            may_factorize=is_auto and self.problem.is_exact,
            forecast=lambda state: forecast(state, sample.objective),
        )

    def _better_start(
        self,
        sample: Sample,
        start: Vector,
        first: Reduced[NormalEquations],
        starts: list[Vector],
        chance: float,
    ) -> tuple[Vector, Reduced[NormalEquations]]:
        """Solve on the new sample from new starts; a pass decides if the solution looks better."""
        new_starts = self.context.start_finder.find(sample, {})
        new_start = self._solve_on_sample(sample, new_starts, {})
        state = init_state(start, first.sums, self._settings)
        proposal = None if state.stop is not None else forecast(state, sample.objective)
        old_sums = sample.objective(start if proposal is None else proposal.params)
        new_sums = sample.objective(new_start)
        if not new_sums.is_finite:
            new_start = self.problem.parameters.start
            new_sums = sample.objective(new_start)
        if not new_sums.is_finite or (
            old_sums.is_finite and new_sums.cost * chance >= old_sums.cost
        ):
            return start, first
        kernel = self.kernel(self._first_request(new_start))
        new_pass, first = self.context.passes.run_beside(kernel, new_start, start, first)
        if new_pass.sums.is_finite and not (
            first.sums.is_finite and first.sums.cost <= new_pass.sums.cost
        ):
            return new_start, new_pass
        return start, first

    def _describe(self, state: State) -> dict[str, Any]:
        return {"solver": "qr" if state.accumulation.is_factorized else "normal"}

    def covariance(self, details: dict[str, Any], may_pass: bool = True) -> Covariance | None:
        """Return the covariance at the solution, or None.

        None if sums are not finite, or if a pass is needed and ``may_pass`` is False.
        """
        state, cov_type = self._state, self.problem.config.cov_type
        if state is None or not state.sums.is_finite:
            return None
        is_classical = cov_type == "nonrobust"
        if not (is_classical or may_pass):
            return None
        sums, epsilon = state.sums_at_solution, self._settings.epsilon
        details["cov_type"] = cov_type
        absolute_sigma = self.problem.absolute_sigma or not is_classical
        result = covariance(sums, absolute_sigma, epsilon)
        if not is_classical and np.isfinite(result.root).all():
            result = sandwich(result, self._scores(state), sums.n_used, cov_type)
        details["condition_number"] = result.condition_number
        return result

    def _scores(self, state: State) -> NDArray[np.float64]:
        """Return a square root of ``sum r^2 J^T J`` over all rows, (p, p), without the penalty."""
        assert state.solution is not None
        request = Request(state.solution, accumulation=Accumulation.SCORES)
        sums = self.context.passes.run(self.kernel(request), request, is_penalized=False).sums
        assert sums.triangle is not None
        return sums.triangle[:, : len(state.solution)]
