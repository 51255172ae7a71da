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
from nlsq_dask.fit.loop import Report, iterate
from nlsq_dask.fit.passes import Reduced
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.settings import gauss_newton_settings, sample_settings
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
from nlsq_dask.solvers.gauss_newton import GaussNewton, State, init_state
from nlsq_dask.solvers.iterate import Iterate
from nlsq_dask.solvers.newton import find_minimum
from nlsq_dask.solvers.surrogate import forecast
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Sample = SampleProblem[DenseObjective]

# Width of the anchor penalty in normalized parameters; limits non-identifiable ones.
_ANCHOR_LENGTH = 10.0
_WEAK_LENGTHS = (1e6, np.inf)  # a weak penalty, and none
_MAX_DECREMENT = 1e-2  # relative decrement without the penalty at which it matters
_CHANCE = 10.0  # times p / n: insignificant relative reduction of the cost
_LESS_VARIANCE = 0.5  # ratio of variances at which the penalty is relaxed
_FINAL = {Status.USER_STOP, Status.ITERATION_LIMIT, Status.SLOW_PROGRESS, Status.STUCK}
_UNSURE = {
    Status.STALLED,
    Status.STUCK,
    Status.SLOW_PROGRESS,
}  # a minimum may be there nevertheless
_RACE_TOL, _RACE_PATIENCE = 1e-3, 150  # tolerance and patience for comparing starts
_ASIDE = 1e-2  # distance from bounds at which the cost beside them is compared, in typical sizes
_SAME_COST = 1e-4  # relative difference within which costs are equal


@dataclass(frozen=True)
class _SampleSolution:
    """Solution on the sample, and how later sums are computed: J^T J, or QR if ill-conditioned."""

    params: Vector
    iterations: int
    accumulation: Accumulation
    has_other_mode: bool = False  # whether the mode of differentiation was switched for it


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
        best = min(costs) * (1.0 + _SAME_COST)
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


class DenseFit(FullFit[State, NormalEquations]):
    """Phases 2 and 3 with ``GaussNewton``: the solution, and the covariance matrix."""

    state_type = State

    def __init__(self, context: FitContext) -> None:
        super().__init__(context)
        config = self.problem.config
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
        kernel = replace(self._sample_kernel, y_reference=y_reference)
        return DenseObjective(self.problem.exact_model, kernel, rows, self.problem.penalty)

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
        is_better = sample.objective(other.params).cost * (1.0 + _SAME_COST) < cost
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
        """Return the better of ``start`` and the solution on the new sample, with the pass there.

        ``first`` is the pass at ``start``. No pass is run at the solution if, on the sample, the
        cost does not decrease by more than the factor ``chance``.
        """
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
        known = self._first_request(start)
        request = replace(known, params=new_start, is_fresh=False)
        kernel = self.kernel(request)
        new_pass, first = self.context.passes.run_beside(kernel, request, known, first)
        if new_pass.sums.is_finite and not (
            first.sums.is_finite and first.sums.cost <= new_pass.sums.cost
        ):
            return new_start, new_pass
        return start, first

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
        return {"solver": "normal" if state.sums.triangle is None else "qr"}

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
