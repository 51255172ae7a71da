"""Phase 2 for many parameters: Gauss-Newton by conjugate gradients, and errors by probing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning

from nlsq_dask.errors import RowsChangedError, warn_caller
from nlsq_dask.events import ALL_ROWS, SampleSolved
from nlsq_dask.fit.context import FitContext, Solved, may_go_on
from nlsq_dask.fit.iterations import StoppedByCallbackError
from nlsq_dask.fit.loop import MORE_ITERATIONS
from nlsq_dask.fit.passes import RowsInUse
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.kernels.gradient_kernel import GradientKernel
from nlsq_dask.kernels.in_memory import GradientRowSums
from nlsq_dask.kernels.sums import GradientSums
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers import newton_cg as cg
from nlsq_dask.solvers.conjugate_gradients import LOST, solved_together
from nlsq_dask.solvers.preconditioners import DiagonalPreconditioner, SamplePreconditioner, filled
from nlsq_dask.solvers.probing import batch_size, inverse_diagonal, lost_direction, probe_batches
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Sample = SampleProblem[GradientRowSums]

_SAMPLE_TOL = 1e-4  # the sample's own error is larger by far
_SAMPLE_DAMPING = 1e-2  # of the first step, which may start far away
_TAKES_PART = 1e-2  # of the largest share in a direction that is lost


@dataclass(frozen=True)
class _OnSample:
    """What the sample's solve has found."""

    params: Vector
    iterations: int
    n_products: int


@dataclass(frozen=True)
class _Ahead:
    """The state of the solve over all rows, and the rows that they are."""

    state: cg.CgState
    rows: RowsInUse


class GradientFit:
    """Phases 2 and 3 of a fit of so many parameters that nothing may be a matrix of them.

    Parameters
    ----------
    context : FitContext

    Attributes
    ----------
    context : FitContext
    """

    def __init__(self, context: FitContext) -> None:
        self.context = context
        self._kernel = self._traced(context.model, platforms=context.platforms)
        exact = context.exact_model
        self._sample_kernels = self._traced(exact), self._traced(exact, is_diagonal=True)
        self._settings = cg.CgSettings.of(context.config, context.model.dtype)
        self._state: cg.CgState | None = None
        self._sample: Sample | None = None
        self._undetermined: NDArray[np.bool_] | None = None

    def _traced(self, model: Model, **options: Any) -> GradientKernel:
        context = self.context
        kernel = GradientKernel.trace(model, context.piece_rows, loss=context.loss, **options)
        return replace(kernel, uses_all_devices=context.config.enable_multi_device)

    @property
    def kernel(self) -> GradientKernel:
        """The kernel for all rows."""
        return self._kernel

    def sum_rows(self, rows: Rows, y_reference: float) -> GradientRowSums:
        """Return the sums over rows in memory."""
        kernel, diagonal = (replace(k, y_reference=y_reference) for k in self._sample_kernels)
        return GradientRowSums(kernel, diagonal, rows, self.context.penalty)

    def solve(self, sample: Sample, starts: list[Vector], details: dict[str, Any]) -> Solved:
        """Converge on the sample, then over all rows."""
        self._sample = sample
        start = self._solve_on_sample(sample, starts, details)
        self._kernel = replace(self._kernel, y_reference=sample.y_reference)
        start, sums = self._first_pass(sample, start, starts)
        precondition = self._remembering(partial(self._by_sample, sample, sums.n_used))
        state = cg.begin(start, sums, self._settings, precondition)
        return self._solve_on_all_rows(state, precondition, details)

    def solve_again(self, sample: Sample, details: dict[str, Any]) -> Solved:
        """Go on from the solution, because there are fewer rows now than it was found with."""
        state = self._state
        assert state is not None
        assert state.solution is not None
        sums = self._reduce_anew(state.solution)
        precondition = self._remembering(partial(self._by_sample, sample, sums.n_used))
        begun = cg.resumed(state, sums, precondition, state.solution)
        if state.stop is Status.USER_STOP:
            begun = replace(begun, stop=state.stop, solution=state.solution)
        return self._solve_on_all_rows(begun, precondition, details)

    def _solve_on_all_rows(
        self, state: cg.CgState, precondition: cg.MakePreconditioner, details: dict[str, Any]
    ) -> Solved:
        """Converge over all rows, a pass an iteration."""

        def reduce(ask: cg.Ask) -> GradientSums:
            return self._reduce(ask.params, ask.candidates, ask.direction)

        journal, passes = self.context.journal, self.context.passes
        with journal.loop("all rows"):
            ahead = journal.noted(_Ahead)
            if ahead is None:
                self._remember(state)
            else:
                passes.rows_in_use = ahead.rows
                self._state = state = self._gone_on_with(ahead.state)
            state = self._iterated(state, reduce, precondition, ALL_ROWS, self._remember)
            while state.stop is not None and state.stop.is_success:
                try:
                    state = self._with_sensitivity(state)
                    self._undetermined = self._without_effect(state)
                    break
                except RowsChangedError:
                    assert state.solution is not None
                    sums = self._reduce_anew(state.solution)
                    state = cg.resumed(state, sums, precondition, state.solution)
                    state = self._iterated(state, reduce, precondition, ALL_ROWS, self._remember)
        assert state.stop is not None
        assert state.solution is not None
        self._state = state
        details |= {
            "iterations": state.iteration,
            "products": state.n_products,
            "passes": self.context.passes.n_passes,
            "reason": state.stop.name.lower(),
            "solver": "conjugate gradients",
        }
        return Solved(
            state.solution,
            state.stop,
            state.sums,
            state.params,
            state.iteration,
            self._undetermined,
        )

    def _remember(self, state: cg.CgState) -> None:
        self._state = state
        self.context.journal.note(_Ahead(state, self.context.passes.rows_in_use))

    def _gone_on_with(self, state: cg.CgState) -> cg.CgState:
        """Go on with a state that may have been made by another process, for less iterations."""
        state = replace(state, settings=self._settings)
        if may_go_on(state.stop, state.iteration, self._settings.max_iterations):
            return replace(state, stop=None, solution=None)
        return state

    def so_far(self, stop: Status) -> Solved | None:
        """Return the accepted point of the solve over all rows, as its end; None before it."""
        state = self._state
        if state is None or not state.sums.is_finite:
            return None
        self._state = replace(state, stop=stop, solution=state.params)
        return Solved(state.params, stop, state.sums, state.params, state.iteration)

    def _reduce(
        self, params: Vector, candidates: NDArray[np.float64] | None, direction: Vector | None
    ) -> GradientSums:
        directions = None if direction is None else direction[None]
        return self.context.passes.reduce(self._kernel, params, candidates, directions)

    def _reduce_anew(self, params: Vector) -> GradientSums:
        return self.context.passes.reduce_anew(self._kernel, params)

    def _first_pass(
        self, sample: Sample, start: Vector, starts: list[Vector]
    ) -> tuple[Vector, GradientSums]:
        """Return a start for all rows with its sums: the sample's solution, or a better one.

        The rows that the pass brings back are from all blocks. Where the first sample was not like
        them, because all rows fit its solution worse than chance explains, the new one is solved as
        well; where nothing is finite at either solution, the starts themselves are tried.
        """
        fit, most = self.context, sample.most_expected(start)
        seed = fit.config.random_seed
        sums, rows = fit.passes.first(self._kernel, start, fit.sample_rows, seed)
        if rows is not None:
            sample.exchange(rows)
        if sums.is_finite and not (sample.is_informative and sums.variance(0) > most):
            return start, sums
        ends = [self._solve_on_sample(sample, [one], {}) for one in (start, *starts)]
        costs = [sample.reduce(end).cost for end in ends]
        best = ends[int(np.argmin(np.where(np.isfinite(costs), costs, np.inf)))]
        for other in (best, *starts):
            there, sums = fit.passes.reduce_beside(self._kernel, other, (start, sums))
            if there.is_finite and not (sums.is_finite and sums.cost <= there.cost):
                start, sums = other, there
            if sums.is_finite:
                break
        return start, sums

    def _with_sensitivity(self, state: cg.CgState) -> cg.CgState:
        """Say whether the model reacts to all parameters, by one more pass.

        Where residuals are zero gradients are, too, and say nothing of it.
        """
        assert state.solution is not None
        if state.touched.all():
            return state
        signs = np.random.default_rng(self.context.config.random_seed).choice(
            [-1.0, 1.0], len(state.params)
        )
        sums = self._reduce(state.solution, None, signs * self.context.normalizer.scales)
        touched = state.touched | (sums.products[0] != 0.0)
        stop = state.stop if touched.all() else Status.NO_SENSITIVITY
        return replace(state, touched=touched, stop=stop)

    def _without_effect(self, state: cg.CgState) -> NDArray[np.bool_] | None:
        """Return which parameters take part in a direction that no row sees, if there is one.

        It is looked for on the sample, where that costs no reading: what all rows do not see, some
        of them do not, either. One more pass must confirm what is found. Where the sample leaves
        out what other rows see, or would take more iterations, nothing is known.
        """
        params, sample = state.solution, self._sample
        if state.stop is Status.NO_SENSITIVITY or params is None or sample is None:
            return None
        config = self.context.config
        diagonal = filled(sample.reduce.diagonal(params), self.context.normalizer.scales)
        direction = lost_direction(
            partial(sample.reduce.product, params),
            diagonal,
            MORE_ITERATIONS * config.cg_max_iterations,
            config.random_seed,
        )
        if direction is None:
            return None
        sums = self._reduce(params, None, direction)
        weight = sums.n_used / max(sample.n_used, 1)
        shares = np.abs(direction) * np.sqrt(diagonal)
        if not abs(float(direction @ sums.products[0])) <= LOST * weight * float(shares @ shares):
            return None
        return np.asarray(shares > _TAKES_PART * shares.max())

    @staticmethod
    def _remembering(make: cg.MakePreconditioner) -> cg.MakePreconditioner:
        """Return what makes a preconditioner anew only where the parameters are others."""
        last: list[tuple[Vector, cg.Preconditioner]] = []

        def remembered(params: Vector) -> cg.Preconditioner:
            if not last or last[0][0] is not params:
                last[:] = [(params, make(params))]
            return last[0][1]

        return remembered

    def _solve_on_sample(
        self, sample: Sample, starts: list[Vector], details: dict[str, Any]
    ) -> Vector:
        """Return the sample's solution, or the best start if it has none."""
        sums = sample.reduce
        finite = [start for start in starts if sums(start).is_finite]
        if not finite or not sample.is_informative:
            return starts[0]

        def find() -> _OnSample:
            return self._find_on_sample(sample, finite)

        found = self.context.journal.step("solution of the sample", _OnSample, find)
        details |= {"sample_iterations": found.iterations, "sample_products": found.n_products}
        return found.params

    def _find_on_sample(self, sample: Sample, finite: list[Vector]) -> _OnSample:
        sums = sample.reduce
        start = min(finite, key=lambda start: sums(start).cost)
        settings = replace(
            self._settings,
            tol=max(self._settings.tol, _SAMPLE_TOL),
            max_iterations=MORE_ITERATIONS * self._settings.max_iterations,
            epsilon=float(np.finfo(np.float64).eps),
        )

        def reduce(ask: cg.Ask) -> GradientSums:
            if ask.is_trial and not len(ask.candidates):
                return sums(ask.params)
            return sums.at(ask.params, ask.candidates, ask.direction)

        precondition = self._remembering(partial(self._by_diagonal, sample))
        damping = _SAMPLE_DAMPING / self.context.config.trust_region_initial**2
        state = cg.begin(start, sums(start), settings, precondition, damping)
        state = self._iterated(state, reduce, precondition, "sample")
        assert state.solution is not None
        if state.stop is Status.USER_STOP:
            raise StoppedByCallbackError(state.solution)
        self.context.emit(SampleSolved(state.iteration, state.sums.mean_square))
        return _OnSample(state.solution, state.iteration, state.n_products)

    def _iterated(
        self,
        state: cg.CgState,
        reduce: Callable[[cg.Ask], GradientSums],
        precondition: cg.MakePreconditioner,
        stage: str,
        remember: Callable[[cg.CgState], None] = lambda state: None,
    ) -> cg.CgState:
        """Ask and tell until the state says to stop; trials are reported as iterations."""
        scales = self.context.normalizer.scales
        while state.stop is None:
            ask, before = state.wanted, state.params
            try:
                sums = reduce(ask)
            except RowsChangedError:
                state = cg.resumed(state, self._reduce_anew(state.params), precondition)
                remember(state)
                continue
            if not sums.is_finite:
                self.context.iterations.report_non_finite(stage, ask.params, sums.n_nonfinite)
            state = cg.told(state, sums, precondition)
            if not ask.is_trial:
                remember(state)
                continue
            if self.context.iterations.report(
                stage,
                state.params,
                state.sums.mean_square,
                state.sums.relative_slope(scales),
                float(np.linalg.norm((ask.params - before) / scales)),
                accepted=state.params is not before,
            ):
                state = replace(state, stop=Status.USER_STOP, solution=state.params)
            remember(state)
        return state

    def _by_diagonal(self, sample: Sample, params: Vector) -> cg.Preconditioner:
        scales = self.context.normalizer.scales
        return DiagonalPreconditioner(filled(sample.reduce.diagonal(params), scales))

    def _by_sample(self, sample: Sample, n_rows: int, params: Vector) -> cg.Preconditioner:
        """Return the preconditioner for all rows, with the sample's J^T J at ``params``."""
        diagonal = filled(sample.reduce.diagonal(params), self.context.normalizer.scales)
        n_used = max(sample.n_used, 1)
        return SamplePreconditioner(
            partial(sample.reduce.product, params),
            diagonal,
            weight=n_rows / n_used,
            share=min(1.0, len(params) / n_used),
        )

    def covariance(self, details: dict[str, Any], may_pass: bool = True) -> None:
        """Say that there is none: it would be a matrix of the parameters."""
        details["skipped"] = "a covariance would be a matrix of all parameters"

    def errors(self, details: dict[str, Any]) -> Vector | None:
        """Return standard errors by probing the inverse of J^T J, if that is asked for.

        They are infinite where it is known to have none.
        """
        context, state = self.context, self._state
        if self._undetermined is not None:
            return np.full(len(self._undetermined), np.inf)
        n_probes = context.config.cg_error_probes
        if not n_probes or state is None or self._sample is None or not state.sums.is_finite:
            return None
        assert state.solution is not None
        params, sums = state.solution, state.sums
        n_probes = min(n_probes, len(params))
        at_once = batch_size(n_probes, len(params))
        kernel = replace(
            self._traced(context.model, platforms=context.platforms, n_directions=at_once),
            y_reference=self._kernel.y_reference,
        )

        def products(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
            filled_up = np.pad(vectors, ((0, at_once - len(vectors)), (0, 0)))
            found = context.passes.reduce(kernel, params, None, filled_up).products
            return found[: len(vectors)]

        precondition = self._by_sample(self._sample, sums.n_used, params)
        most = context.config.cg_max_iterations

        def solve(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
            # A step, so that the passes of a batch need not be remembered longer than it.
            make = partial(solved_together, products, vectors, precondition, most)
            return context.journal.step("probes", NDArray[np.float64], make)

        probes = probe_batches(n_probes, len(params), context.config.random_seed)
        variances = inverse_diagonal(solve, probes)
        details["probes"] = n_probes
        if not (state.touched.all() and np.isfinite(variances).all()):
            warn_caller(
                "Standard errors of the parameters could not be estimated: the data do not "
                "determine all of them, or cg_max_iterations is too small.",
                OptimizeWarning,
            )
            return np.full(len(params), np.inf)
        scale = 1.0 if context.absolute_sigma else sums.variance(len(params))
        return np.asarray(np.sqrt(variances * scale))
