"""``MatrixFreeFit``: solution and standard errors (phases 2 and 3) without p-by-p matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning

from nlsq_dask.errors import warn_caller
from nlsq_dask.events import SampleSolved
from nlsq_dask.fit.full_fit import FitContext, FullFit
from nlsq_dask.fit.iterations import StoppedByCallbackError
from nlsq_dask.fit.loop import iterate
from nlsq_dask.fit.passes import Reduced
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.settings import CG_SAMPLE_FACTOR, newton_cg_settings
from nlsq_dask.kernels.gradient_kernel import gradient_kernel
from nlsq_dask.kernels.in_memory import GradientObjective
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import GradientSums
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers import newton_cg as cg
from nlsq_dask.solvers.conjugate_gradients import NULL_EIGENVALUE, solve_many
from nlsq_dask.solvers.preconditioners import (
    DiagonalPreconditioner,
    SamplePreconditioner,
    fill_zeros,
)
from nlsq_dask.solvers.probing import batch_size, inverse_diagonal, null_direction, probe_batches
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Sample = SampleProblem[GradientObjective]

_SAMPLE_TOL = 1e-4  # the sampling error is much larger
_SAMPLE_DAMPING = 1e-2  # of the first step, because the start may be far away
_MIN_SHARE = 1e-2  # of the largest component of a null direction


@dataclass(frozen=True)
class _SampleSolution:
    """Solution on the sample, as saved in a checkpoint."""

    params: Vector
    iterations: int
    n_products: int  # products J^T J v


class _RowsChangedError(Exception):
    """Blocks were skipped in a pass, so that its sums cannot be combined with earlier ones."""


class MatrixFreeFit(FullFit[cg.CgState, GradientSums]):
    """Solution with ``NewtonCg`` (phase 2), stochastic estimates of standard errors (phase 3)."""

    state_type = cg.CgState

    def __init__(self, context: FitContext) -> None:
        super().__init__(context)
        problem = self.problem
        self._kernel = self._trace_for_passes()
        exact = problem.exact_model
        self._sample_kernels = self._trace(exact), self._trace(exact, is_diagonal=True)
        self._settings = newton_cg_settings(problem)
        self._non_identifiable: NDArray[np.bool_] | None = None

    def _trace(self, model: Model, **options: Any) -> Kernel[GradientSums]:
        batch_rows, loss = self.context.batch_rows, self.problem.loss
        kernel = gradient_kernel(model, batch_rows, loss=loss, **options)
        return replace(kernel, uses_all_devices=self.problem.config.enable_multi_device)

    def _trace_for_passes(self, **options: Any) -> Kernel[GradientSums]:
        """Trace the kernel for the platforms of the workers, instead of that of this process."""
        context = self.context
        sizes = {"platforms": context.platforms, "longest_block": context.longest_block}
        return self._trace(self.problem.model, **sizes, **options)

    def kernel(self, request: Request) -> Kernel[GradientSums]:
        """Return the kernel that computes the requested sums over all rows."""
        return self._kernel

    def make_objective(self, rows: Rows, y_reference: float) -> GradientObjective:
        """Return the function from parameters to ``GradientSums`` over rows in memory.

        ``y_reference``, a value near the mean of y, is subtracted from y before the moments of y
        are summed, to avoid cancellation.
        """
        kernel, diagonal = (replace(k, y_reference=y_reference) for k in self._sample_kernels)
        return GradientObjective(kernel, diagonal, rows, self.problem.penalty)

    def _prepare(self, sample: Sample, start: Vector) -> None:
        self._kernel = replace(self._kernel, y_reference=sample.y_reference)

    def _make_solver(self, sample: Sample, sums: GradientSums) -> cg.NewtonCg:
        precondition = self._memoize(partial(self._by_sample, sample, sums.n_used))
        return cg.NewtonCg(self._settings, precondition)

    def _better_start(
        self,
        sample: Sample,
        start: Vector,
        first: Reduced[GradientSums],
        starts: list[Vector],
        chance: float,
    ) -> tuple[Vector, Reduced[GradientSums]]:
        """Return the better of ``start`` and the solution on the new sample, with the pass there.

        ``first`` is the pass at ``start``. If the model is finite at neither point, passes are run
        at ``starts`` until it is finite at one of them.
        """
        if first.sums.is_finite and not sample.is_informative:
            return start, first
        ends = [self._solve_on_sample(sample, [one], {}) for one in (start, *starts)]
        costs = [sample.objective(end).cost for end in ends]
        best = ends[int(np.argmin(np.where(np.isfinite(costs), costs, np.inf)))]
        for candidate in (best, *starts):
            new_pass, first = self.context.passes.run_beside(
                self._kernel, Request(candidate), Request(start), first
            )
            if new_pass.sums.is_finite and not (
                first.sums.is_finite and first.sums.cost <= new_pass.sums.cost
            ):
                start, first = candidate, new_pass
            if first.sums.is_finite:
                break
        return start, first

    def _describe(self, state: cg.CgState) -> dict[str, Any]:
        return {"products": state.n_products, "solver": "conjugate gradients"}

    def _confirm(self, state: cg.CgState) -> tuple[cg.CgState, NDArray[np.bool_] | None]:
        """Check whether the data determine all parameters, and return the checked state.

        Conjugate gradients converge even if they do not. The array is True for parameters that the
        data do not determine; it is None if none were found.
        """
        assert state.stop is not None
        self._non_identifiable, n_skipped = None, self.context.passes.n_skipped
        if state.stop.is_success:
            state = self._with_sensitivity(state)
            if state.stop is Status.NO_SENSITIVITY:
                self._non_identifiable = ~state.sensitive
                return state, self._non_identifiable
            if self.context.passes.n_skipped == n_skipped:
                self._non_identifiable = self._without_effect(state)
        return state, self._non_identifiable

    def _with_sensitivity(self, state: cg.CgState) -> cg.CgState:
        """Check by a pass whether the model depends on the parameters with zero gradient.

        A gradient may be zero because the residuals are. If the model does not depend on one of the
        parameters, the status of the state becomes a failure.
        """
        assert state.solution is not None
        if state.sensitive.all():
            return state
        signs = np.random.default_rng(self.problem.config.random_seed).choice(
            [-1.0, 1.0], len(state.params)
        )
        sums = self._product(state.solution, signs * self.problem.normalizer.scales)
        sensitive = state.sensitive | (sums.products[0] != 0.0)
        stop = state.stop if sensitive.all() else Status.NO_SENSITIVITY
        return replace(state, sensitive=sensitive, stop=stop)

    def _product(self, params: Vector, direction: Vector) -> GradientSums:
        """Return the sums of a pass that computes ``J^T J v`` for one direction v."""
        request = Request(params, directions=direction[None], is_trial=False)
        return self.context.passes.run(self._kernel, request).sums

    def _without_effect(self, state: cg.CgState) -> NDArray[np.bool_] | None:
        """Return which parameters can change together without effect; None if none were found.

        The search runs on the sample, which has at least the null directions of all rows, and one
        pass confirms its result. It may fail if the sample has further null directions, or if it
        needs too many iterations.
        """
        params, sample = state.solution, self._sample
        if state.stop is Status.NO_SENSITIVITY or params is None or sample is None:
            return None
        config = self.problem.config
        diagonal = fill_zeros(sample.objective.diagonal(params), self.problem.normalizer.scales)
        direction = null_direction(
            partial(sample.objective.product, params),
            diagonal,
            CG_SAMPLE_FACTOR * config.cg_max_iterations,
            config.random_seed,
        )
        if direction is None:
            return None
        sums = self._product(params, direction)
        weight = sums.n_used / max(sample.n_used, 1)
        shares = np.abs(direction) * np.sqrt(diagonal)
        if not abs(float(direction @ sums.products[0])) <= NULL_EIGENVALUE * weight * float(
            shares @ shares
        ):
            return None
        return np.asarray(shares > _MIN_SHARE * shares.max())

    @staticmethod
    def _memoize(make: cg.MakePreconditioner) -> cg.MakePreconditioner:
        """Return ``make`` with a cache of its last result."""
        last: list[tuple[Vector, cg.Preconditioner]] = []

        def memoized(params: Vector) -> cg.Preconditioner:
            if not last or last[0][0] is not params:
                last[:] = [(params, make(params))]
            return last[0][1]

        return memoized

    def _solve_on_sample(
        self, sample: Sample, starts: list[Vector], details: dict[str, Any]
    ) -> Vector:
        finite = [start for start in starts if sample.objective(start).is_finite]
        if not finite or not sample.is_informative:
            return starts[0]
        solve = partial(self._compute_sample_solution, sample, finite)
        solution = self.context.journal.step("solution of the sample", _SampleSolution, solve)
        self.context.iterations.latest = solution.params
        details["sample_iterations"] = solution.iterations
        details["sample_products"] = solution.n_products
        return solution.params

    def _compute_sample_solution(self, sample: Sample, finite: list[Vector]) -> _SampleSolution:
        sums = sample.objective
        start = min(finite, key=lambda start: sums(start).cost)
        settings = replace(
            self._settings,
            tol=max(self._settings.tol, _SAMPLE_TOL),
            max_iterations=CG_SAMPLE_FACTOR * self._settings.max_iterations,
            epsilon=float(np.finfo(np.float64).eps),
        )
        damping = _SAMPLE_DAMPING / self.problem.config.trust_region_initial**2
        precondition = self._memoize(partial(self._by_diagonal, sample))
        solver = cg.NewtonCg(settings, precondition, damping)
        initial = solver.init(start, sums(start))
        state = iterate(solver, initial, sums.reduce, self._build_report("sample"))
        assert state.solution is not None
        if state.stop is Status.USER_STOP:
            raise StoppedByCallbackError(state.solution)
        self.context.emit(SampleSolved(state.iteration, state.sums.mean_square))
        return _SampleSolution(state.solution, state.iteration, state.n_products)

    def _by_diagonal(self, sample: Sample, params: Vector) -> cg.Preconditioner:
        scales = self.problem.normalizer.scales
        return DiagonalPreconditioner(fill_zeros(sample.objective.diagonal(params), scales))

    def _by_sample(self, sample: Sample, n_rows: int, params: Vector) -> cg.Preconditioner:
        """Return a preconditioner for all ``n_rows`` rows: J^T J of the sample, scaled to them."""
        diagonal = fill_zeros(sample.objective.diagonal(params), self.problem.normalizer.scales)
        n_used = max(sample.n_used, 1)
        return SamplePreconditioner(
            partial(sample.objective.product, params),
            diagonal,
            weight=n_rows / n_used,
            diagonal_share=min(1.0, len(params) / n_used),
        )

    def covariance(self, details: dict[str, Any], may_pass: bool = True) -> None:
        """Return None, because a covariance would be a p-by-p matrix."""
        details["skipped"] = (
            "no covariance was computed, because it would be a p-by-p matrix of all parameters; "
            "cg_error_probes estimates standard errors"
        )

    def errors(self, details: dict[str, Any]) -> Vector | None:
        """Return estimates of the standard errors, or None if ``cg_error_probes`` is 0.

        All of them are infinite if the data do not determine all parameters.
        """
        state, sample = self._state, self._sample
        if self._non_identifiable is not None:
            return np.full(len(self._non_identifiable), np.inf)
        n_probes = self.problem.config.cg_error_probes
        if not n_probes or state is None or sample is None or not state.sums.is_finite:
            return None
        n_params, sums = len(state.params), state.sums
        n_probes = details["probes"] = min(n_probes, n_params)
        probes = probe_batches(n_probes, n_params, self.problem.config.random_seed)
        try:
            variances = inverse_diagonal(self._probe_solver(sample, state, n_probes), probes)
        except _RowsChangedError:  # the fit is solved again
            return None
        if not (state.sensitive.all() and np.isfinite(variances).all()):
            warn_caller(
                "Standard errors of the parameters could not be estimated: some parameters are "
                "non-identifiable, or cg_max_iterations is too small.",
                OptimizeWarning,
            )
            return np.full(n_params, np.inf)
        scale = 1.0 if self.problem.absolute_sigma else sums.variance(n_params)
        return np.asarray(np.sqrt(variances * scale))

    def _probe_solver(
        self, sample: Sample, state: cg.CgState, n_probes: int
    ) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        """Return a function that solves ``J^T J u = v`` over all rows for several vectors v.

        The vectors v are the rows of its argument, a batch of the ``n_probes`` random vectors, and
        the solutions u are the rows of its result.
        """
        context, params = self.context, state.solution
        assert params is not None
        batch_probes = batch_size(n_probes, len(params))
        kernel = replace(
            self._trace_for_passes(n_directions=batch_probes),
            y_reference=self._kernel.y_reference,
        )
        precondition = self._by_sample(sample, state.sums.n_used, params)
        max_iterations = self.problem.config.cg_max_iterations
        n_skipped = context.passes.n_skipped

        def products(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
            padded = np.pad(vectors, ((0, batch_probes - len(vectors)), (0, 0)))
            request = Request(params, directions=padded, is_trial=False)
            products = context.passes.run(kernel, request).sums.products
            if context.passes.n_skipped > n_skipped:
                raise _RowsChangedError  # so that the journal does not record the step
            return products[: len(vectors)]

        def solve(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
            # A journal step, so that the passes of a batch can be discarded after it.
            make = partial(solve_many, products, vectors, precondition, max_iterations)
            return context.journal.step("probes", NDArray[np.float64], make)

        return solve
