"""``FullFit``: solution and standard errors of a fit (phases 2 and 3), for any ``Solver``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.data.rounding import rounding_notices
from nlsq_dask.engine.block_sums import BlockSums
from nlsq_dask.errors import DataWarning, warn_caller
from nlsq_dask.events import ALL_ROWS, Observer
from nlsq_dask.fit.interruption import Interruption
from nlsq_dask.fit.iterations import Iterations
from nlsq_dask.fit.loop import Report, iterate
from nlsq_dask.fit.outcome import Outcome, UndefinedPoint
from nlsq_dask.fit.passes import Passes, Reduced, RowsInUse
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.starts import StartFinder
from nlsq_dask.kernels.in_memory import SampleObjective
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers.covariance import Covariance
from nlsq_dask.solvers.solver import Solver, SolverState
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
S = TypeVar("S", bound=Sums)
T = TypeVar("T", bound=SolverState[Any])


@dataclass(frozen=True)
class FitContext:
    """Objects that the phases of one fit share."""

    problem: FitProblem
    passes: Passes
    iterations: Iterations
    start_finder: StartFinder
    emit: Observer
    journal: Journal
    interruption: Interruption
    batch_rows: int  # rows per kernel call on a CPU
    longest_block: int  # rows
    platforms: tuple[str, ...]  # of the workers


@dataclass(frozen=True)
class _Progress(Generic[T]):
    """Progress of the solve over all rows, as saved in a checkpoint."""

    state: T
    rows: RowsInUse
    blocks: BlockSums | None  # of the pass at the iterate


class FullFit(ABC, Generic[T, S]):
    """Phases 2 and 3: solve on the sample, then over all rows; then standard errors.

    The methods add entries for ``phase_history`` to their argument ``details``.

    Parameters
    ----------
    context : FitContext
    """

    state_type: type[T]

    def __init__(self, context: FitContext) -> None:
        self.context = context
        self.problem = context.problem
        self._state: T | None = None
        self._solver: Solver[T, S] | None = None
        self._sample: SampleProblem[Any] | None = None
        self._blocks: BlockSums | None = None
        self._new_blocks: BlockSums | None = None
        self._undefined: UndefinedPoint | None = None  # the last such trial over all rows

    @abstractmethod
    def kernel(self, request: Request) -> Kernel[S]:
        """Return the kernel that computes the requested sums over all rows."""

    @abstractmethod
    def make_objective(self, rows: Rows, y_reference: float) -> SampleObjective[S]:
        """Return the function from parameters to the sums over rows in memory.

        ``y_reference``, a value near the mean of y, is subtracted from y before the moments of y
        are summed, to avoid cancellation.
        """

    def make_sample(self, rows: Rows, n_blocks: int) -> SampleProblem[Any]:
        """Return the problem for a sample of rows, drawn from ``n_blocks`` blocks.

        If derivatives are finite in the other mode of differentiation only, the fit uses that mode
        from now on.
        """
        check = self.context.interruption.check
        sample: SampleProblem[Any] = SampleProblem(
            self.problem, self.make_objective, rows, n_blocks, check
        )
        if sample.at_start.lacks_derivatives and self._switch_mode():
            other: SampleProblem[Any] = SampleProblem(
                self.problem, self.make_objective, rows, n_blocks, check
            )
            if other.at_start.is_finite:
                return other
            self._switch_mode()
        return sample

    def _switch_mode(self) -> bool:
        """Use the other mode of differentiation from now on; return whether there is one."""
        return False

    @abstractmethod
    def _solve_on_sample(
        self, sample: SampleProblem[Any], starts: list[Vector], details: dict[str, Any]
    ) -> Vector:
        """Return the solution on the sample, or ``starts[0]`` if the sample is too small."""

    @abstractmethod
    def _prepare(self, sample: SampleProblem[Any], start: Vector) -> None:
        """Choose how sums over all rows are computed, given the sample and its solution.

        ``start`` is that solution, from which the fit over all rows starts.
        """

    def _first_request(self, params: Vector) -> Request:
        """Return which sums the first pass over all rows computes."""
        return Request(params, is_fresh=True)

    @property
    def _forecast_rows(self) -> int:
        """Number of rows that the first pass over all rows returns as a sample."""
        return self.problem.sample_rows

    @property
    def _expects_one_pass(self) -> bool:
        """Whether the first pass over all rows is probably the last one."""
        return False

    def _approach(self, sample: SampleProblem[Any], start: Vector) -> Vector:
        """Return a point closer to the solution than ``start``, from sums over a part of the rows.

        The rows of ``sample`` are replaced by rows of that part.
        """
        return start

    @abstractmethod
    def _better_start(
        self,
        sample: SampleProblem[Any],
        start: Vector,
        first: Reduced[S],
        starts: list[Vector],
        chance: float,
    ) -> tuple[Vector, Reduced[S]]:
        """Return a better start and the pass there, or ``start`` and ``first`` if none is found.

        ``first`` is the pass at ``start``; ``starts`` are the starting points of phase 1. It is
        called when the mean squared residual of all rows at ``start`` exceeds that of the first
        sample by more than the factor ``chance``, so that the first sample was not representative.
        ``sample`` has rows from all blocks.
        """

    @abstractmethod
    def _make_solver(self, sample: SampleProblem[Any], sums: S) -> Solver[T, S]:
        """Return the solver for all rows, given the sums of the first pass."""

    @abstractmethod
    def _describe(self, state: T) -> dict[str, Any]:
        """Return the entries of ``phase_history`` that only this solver has."""

    def _confirm(self, state: T) -> tuple[T, NDArray[np.bool_] | None]:
        """Verify the solution, by further passes if needed.

        If the verification fails, the status of the returned state is a failure. The array is True
        for parameters that the data do not determine; it is None if that is not known.
        """
        return state, None

    @abstractmethod
    def covariance(self, details: dict[str, Any], may_pass: bool = True) -> Covariance | None:
        """Return the covariance matrix at the solution.

        None if it cannot be computed, or if a pass is needed for it and ``may_pass`` is False.
        """

    def errors(self, details: dict[str, Any]) -> Vector | None:
        """Return standard errors if they are estimated without a covariance matrix."""
        return None

    def solve(
        self, sample: SampleProblem[Any], starts: list[Vector], details: dict[str, Any]
    ) -> Outcome:
        """Solve on the sample, then over all rows; add entries for the history to ``details``."""
        self._sample = sample
        start = self._solve_on_sample(sample, starts, details)
        self._prepare(sample, start)
        start = self._approach(sample, start)
        start, first = self._first_pass(sample, start, starts)
        self._solver = self._make_solver(sample, first.sums)
        self._blocks = first.blocks
        return self._solve_on_all_rows(partial(self._solver.init, start, first.sums), details)

    def solve_restarted(self, sample: SampleProblem[Any], details: dict[str, Any]) -> Outcome:
        """Solve again from the solution, after blocks became unreadable while errors were computed.

        Without the rows of these blocks, the solution is another one.
        """
        state, solver = self._state, self._solver
        assert state is not None
        assert solver is not None
        assert state.solution is not None
        stop, restarted = state.stop, solver.restart(state, state.solution)
        sums = self._evaluate(solver.ask(restarted))
        assert sums is not None
        self._blocks = self._new_blocks
        self._solver = self._make_solver(sample, sums)
        restarted = self._solver.tell(restarted, sums)
        if stop is Status.USER_STOP:
            restarted = self._solver.end(restarted, stop)
        return self._solve_on_all_rows(lambda: restarted, details)

    def undefined_point(self, outcome: Outcome) -> UndefinedPoint | None:
        """Return where the model or its derivative is not finite, if that ended the fit.

        It is the start or the last trial; None if another reason ended the fit.
        """
        if outcome.stop is Status.NON_FINITE_STEP:
            return self._undefined
        params, sums = outcome.sums_at, outcome.sums
        if outcome.stop is not Status.NON_FINITE_START or params is None or sums is None:
            return None
        return UndefinedPoint(params, sums, outcome.blocks)

    def current_outcome(self, stop: Status) -> Outcome | None:
        """Return the outcome at the last accepted point, with ``stop`` as status.

        None if there are no sums over all rows yet.
        """
        if self._state is None or self._solver is None or not self._state.sums.is_finite:
            return None
        self._state = self._solver.end(self._state, stop)
        return self._outcome(self._state, None)

    def _first_pass(
        self, sample: SampleProblem[Any], start: Vector, starts: list[Vector]
    ) -> tuple[Vector, Reduced[S]]:
        """Return the start over all rows, usually the solution on the sample, and its pass.

        The pass returns rows from all blocks, which become the new sample. If the residuals of all
        rows are larger than those of the first sample by more than chance explains, a better start
        is searched on the new sample.
        """
        max_variance, chance = sample.max_expected(start), sample.chance
        request = self._first_request(start)
        first = self._run_first(request)
        if first.sums.lacks_derivatives and self._switch_mode():
            other = self._run_first(request)
            if other.sums.is_finite:
                first = other
                sample.renew(self.problem)
            else:
                self._switch_mode()
        if first.rows is not None:
            sample.replace_rows(first.rows)
        blocks, dtype = self.problem.blocks, self.problem.model.dtype
        for notice in rounding_notices(blocks, dtype, sample.rows):
            warn_caller(notice, DataWarning)
        if first.sums.is_finite and not first.sums.variance(0) > max_variance:
            return start, first
        return self._better_start(sample, start, first, starts, chance)

    def _run_first(self, request: Request) -> Reduced[S]:
        problem = self.problem
        return self.context.passes.run(
            self.kernel(request),
            request,
            sample_rows=self._forecast_rows,
            is_last=self._expects_one_pass,
            seed=problem.config.random_seed,
        )

    def _solve_on_all_rows(self, init: Callable[[], T], details: dict[str, Any]) -> Outcome:
        """Iterate over all rows and return the outcome.

        The first state is that of a checkpoint if there is one, otherwise ``init()``.
        """
        journal, passes, solver = self.context.journal, self.context.passes, self._solver
        assert solver is not None
        kind: Any = _Progress
        with journal.loop("all rows"):
            saved: _Progress[T] | None = journal.load_state(kind[self.state_type])
            if saved is None:
                state = init()
                self._remember(state)
            else:
                passes.rows_in_use, self._blocks = saved.rows, saved.blocks
                self._state = state = solver.resume(saved.state)
            while True:
                state = self._iterate(state)
                before = passes.n_skipped
                state, non_identifiable = self._confirm(state)
                if passes.n_skipped == before:
                    break
                assert state.solution is not None
                state = solver.restart(state, state.solution)
        assert state.stop is not None
        self._state = state
        details |= {
            "iterations": state.iteration,
            "passes": passes.counts.n_passes,
            "reason": state.stop.name.lower(),
            **self._describe(state),
        }
        return self._outcome(state, non_identifiable)

    def _iterate(self, state: T) -> T:
        report = self._build_report(ALL_ROWS)

        def report_and_keep_blocks(
            request: Request, sums: Sums, before: SolverState[Sums], after: SolverState[Sums]
        ) -> bool:
            if after.sums is not before.sums:
                self._blocks = self._new_blocks
            return report(request, sums, before, after)

        assert self._solver is not None
        return iterate(self._solver, state, self._evaluate, report_and_keep_blocks, self._remember)

    def _evaluate(self, request: Request) -> S | None:
        """Return the sums over all rows; None if a block was skipped that earlier sums contain."""
        passes = self.context.passes
        before = passes.n_skipped
        reduced = passes.run(self.kernel(request), request)
        if passes.n_skipped > before and not request.is_fresh:
            return None
        self._new_blocks = reduced.blocks
        if not reduced.sums.is_finite:
            self._undefined = UndefinedPoint(request.params, reduced.sums, reduced.blocks)
        return reduced.sums

    def _remember(self, state: T) -> None:
        self._state = state
        self.context.journal.save_state(
            _Progress(state, self.context.passes.rows_in_use, self._blocks)
        )

    def _outcome(self, state: T, non_identifiable: NDArray[np.bool_] | None) -> Outcome:
        assert state.stop is not None
        assert state.solution is not None
        outcome = Outcome(
            state.solution,
            state.stop,
            state.sums,
            state.params,
            self._blocks,
            state.iteration,
            non_identifiable=non_identifiable,
        )
        return self._complete(outcome, state)

    def _complete(self, outcome: Outcome, state: T) -> Outcome:
        """Return the outcome with what only this solver knows."""
        return outcome

    def _build_report(self, stage: str, are_iterations: bool = True) -> Report:
        """Return a function that reports trials with non-finite values, and iterations.

        Iterations are not reported if ``are_iterations`` is False.
        """
        iterations, scales = self.context.iterations, self.problem.normalizer.scales

        def report(
            request: Request, sums: Sums, before: SolverState[Sums], after: SolverState[Sums]
        ) -> bool:
            if not request.is_fresh and not sums.is_finite:
                iterations.report_non_finite(stage, request.params, sums.n_nonfinite)
            if not (request.is_trial and are_iterations):
                return False
            return iterations.report(
                stage,
                after.params,
                after.sums.mean_square,
                after.sums.relative_slope(scales),
                float(np.linalg.norm((request.params - before.params) / scales)),
                after.radius,
                accepted=after.params is not before.params,
            )

        return report
