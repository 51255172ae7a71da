"""``Driver``: runs the four phases of a fit in order.

0. normalization of the parameters;
1. L-BFGS on a sample of the rows;
2. Gauss-Newton on the sample, then on all rows;
3. covariance.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.engine.dataset import DataSet
from nlsq_dask.errors import CheckpointError, ClusterLostError
from nlsq_dask.events import PHASES, FitStarted, Observer, PhaseEnded, PhaseStarted
from nlsq_dask.fit.dense import DenseFit
from nlsq_dask.fit.full_fit import FitContext, FullFit
from nlsq_dask.fit.interruption import FitInterruptedError, Interruption
from nlsq_dask.fit.iterations import Iterations, StoppedByCallbackError
from nlsq_dask.fit.matrix_free import MatrixFreeFit
from nlsq_dask.fit.outcome import Outcome, Vector
from nlsq_dask.fit.passes import Passes
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.fit.row_checks import explain_not_finite
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.starts import StartFinder
from nlsq_dask.kernels.kernel import batch_rows_for
from nlsq_dask.kernels.request import Request
from nlsq_dask.model.check import check_derivative, check_trace
from nlsq_dask.status import Status

_N_POINTS, _SHIFT = 3, 0.3  # points near p0, in normalized parameters, for comparing models
_SAME_COST = 1e-6  # relative difference allowed between versions or processors


class Driver:
    """Runs the phases of one fit.

    Parameters
    ----------
    problem : FitProblem
    data : DataSet
        Computes sums over all rows, and samples the rows.
    emit : callable
        Called with every event of the fit.
    journal : Journal
        Saves results on the way; after the fit is resumed, returns those of the earlier run.
    interruption : Interruption
        Ends the fit at its time limit, or when the process is asked to terminate.
    """

    def __init__(
        self,
        problem: FitProblem,
        data: DataSet,
        emit: Observer,
        journal: Journal,
        interruption: Interruption,
    ) -> None:
        self._problem = problem
        self._data = data
        self._emit = emit
        self._journal = journal
        self._passes = Passes(problem, data, emit, journal, interruption)
        self._interruption = interruption
        self._iterations = Iterations(
            emit, problem.callback, problem.config.callback_frequency, problem.transform
        )
        for event in journal.events:
            self._passes.count(event)
            self._iterations.count(event)
        self._start_finder = StartFinder(problem, emit, self._iterations, journal, interruption)
        self._diagnostics = self._start_finder.diagnostics
        self._fit: FullFit[Any, Any] | None = None
        self._sample: SampleProblem[Any] | None = None

    def run(self) -> Outcome:
        """Run all phases, and wait until the last checkpoint is written.

        Invalid data and models raise an error. If the fit fails or stops otherwise, the reason is
        ``stop`` of the outcome.
        """
        is_needed = True  # the last checkpoint
        try:
            outcome = self._run_phases()
            is_needed = not outcome.stop.is_success
        except (KeyboardInterrupt, ClusterLostError):
            self._journal.save()
            raise
        finally:
            self._journal.finish(is_needed)
        return self._finish(outcome)

    def _run_phases(self) -> Outcome:
        problem, blocks = self._problem, self._problem.blocks
        names, model = problem.all_parameters.names, problem.model.name
        started = FitStarted(model, blocks.n_rows, blocks.grid, blocks.dims, names, problem.notes)
        self._journal.run_once("beginning", partial(self._emit, started))
        try:
            self._passes.open()
        except FitInterruptedError as interrupted:
            self._journal.save()
            return Outcome(self._latest_params(), interrupted.reason)
        with self._phase(0) as details:
            fit = self._fit = self._build_fit(details)
        try:
            with self._phase(1) as details:
                sample: Any = self._read_sample(fit, details)
                starts = self._start_finder.find(sample, details)
            with self._phase(2) as details:
                outcome = fit.solve(sample, starts, details)
                undefined = fit.undefined_point(outcome)
                if undefined is not None:
                    is_start = outcome.stop is Status.NON_FINITE_START
                    cause = explain_not_finite(undefined, is_start, fit.problem, self._data)
                    outcome = replace(outcome, cause=cause)
            with self._phase(3) as details:
                outcome = self._add_errors(fit, sample, outcome, details)
        except StoppedByCallbackError as stopped:
            return Outcome(stopped.params, Status.USER_STOP)
        except FitInterruptedError as interrupted:
            self._journal.save()
            return self._current_outcome(fit, interrupted.reason)
        if outcome.stop.is_success:
            self._journal.save()
        return outcome

    def _add_errors(
        self,
        fit: FullFit[Any, Any],
        sample: SampleProblem[Any],
        outcome: Outcome,
        details: dict[str, Any],
    ) -> Outcome:
        while True:
            before = self._passes.n_skipped
            covariance, errors = fit.covariance(details), fit.errors(details)
            if self._passes.n_skipped == before:
                return replace(outcome, covariance=covariance, errors=errors)
            outcome = fit.solve_restarted(sample, details)

    def _current_outcome(self, fit: FullFit[Any, Any], reason: Status) -> Outcome:
        """Return the outcome of an interrupted fit, with the parameters reached so far."""
        outcome = fit.current_outcome(reason)
        if outcome is None:
            return Outcome(self._latest_params(), reason)
        return replace(outcome, covariance=fit.covariance({}, may_pass=False))

    def _latest_params(self) -> Vector:
        latest = self._iterations.latest
        return self._problem.parameters.start if latest is None else latest

    def _build_fit(self, details: dict[str, Any]) -> FullFit[Any, Any]:
        """Check the model, and return the object that computes solution and standard errors.

        It is a ``MatrixFreeFit`` from ``cg_param_threshold`` parameters on, otherwise a
        ``DenseFit``.
        """
        problem = self._problem
        details["strategy"] = problem.normalizer.strategy
        details["platforms"] = self._data.platforms
        check_trace(problem.model, problem.blocks.x_labels)
        context = FitContext(
            problem=problem,
            passes=self._passes,
            iterations=self._iterations,
            start_finder=self._start_finder,
            emit=self._emit,
            journal=self._journal,
            interruption=self._interruption,
            batch_rows=batch_rows_for(
                self._data.longest_block, problem.config.batch_rows, problem.model.layout.row_bytes
            ),
            longest_block=self._data.longest_block,
            platforms=details["platforms"],
        )
        if problem.is_without_matrices:
            return MatrixFreeFit(context)
        try:
            return DenseFit(context)
        except (ValueError, TypeError, NotImplementedError):
            check_derivative(problem.model, problem.parameters.names)
            raise

    def _read_sample(self, fit: FullFit[Any, Any], details: dict[str, Any]) -> SampleProblem[Any]:
        problem = self._problem
        rows, n_blocks = self._passes.sample(problem.sample_rows, problem.config.random_seed)
        details["sample"] = {"rows": len(rows), "blocks": n_blocks}
        self._diagnostics["sample"] = dict(details["sample"])
        sample = self._sample = fit.make_sample(rows, n_blocks)
        if self._passes.must_report(sample.at_start):
            # Counts all invalid rows and raises.
            request = Request(problem.parameters.start, is_fresh=True)
            self._passes.run(fit.kernel(request), request)
        if self._journal.is_enabled:
            self._check_model(sample)
        return sample

    def _check_model(self, sample: SampleProblem[Any]) -> None:
        """Raise a CheckpointError if the checkpoint was written with another model.

        The costs of both models are compared at a few points, because hashes of a model differ
        between versions of JAX.
        """
        parameters, scales = self._problem.parameters, self._problem.normalizer.scales
        start = parameters.start
        random = np.random.default_rng(0)
        shifts = _SHIFT * scales * random.uniform(-1.0, 1.0, (_N_POINTS, len(start)))
        points = [start, *np.clip(start + shifts, parameters.low, parameters.high)]
        costs = [float(sample.objective(point).cost) for point in points]
        before = self._journal.step("costs of the sample near p0", list[float], lambda: costs)
        if not np.allclose(costs, before, rtol=_SAME_COST, atol=0.0, equal_nan=True):
            raise CheckpointError(
                f"the checkpoint belongs to another model: near p0, the costs of a sample of rows "
                f"were {before} and are now {costs}. Pass the model of the checkpoint, or fit "
                f"again without resume_from_checkpoint."
            )

    @contextmanager
    def _phase(self, number: int) -> Iterator[dict[str, Any]]:
        """Run the body of the ``with`` statement as a phase, and report its start and end.

        After a fit is resumed, starts and ends that the earlier run has reported are not repeated.
        The body adds details of the phase to the dictionary.
        """
        name, details = PHASES[number], dict[str, Any]()
        before = [event for event in self._journal.events if getattr(event, "phase", -1) == number]
        if any(isinstance(event, PhaseEnded) for event in before):
            yield details
            return
        seconds = self._journal.phase_clock(is_resumed=bool(before))
        if not before:
            self._emit(PhaseStarted(number, name, time.time()))
        try:
            yield details
        except BaseException as error:
            failed = not isinstance(error, StoppedByCallbackError | FitInterruptedError)
            self._emit(PhaseEnded(number, name, seconds(), failed, details))
            raise
        ended = PhaseEnded(number, name, seconds(), False, details)
        self._journal.run_once(f"end of phase {number}", partial(self._emit, ended))

    def _finish(self, outcome: Outcome) -> Outcome:
        """Return the outcome with counts, diagnostics and rows for plots added."""
        sample, seed = self._sample, self._problem.config.random_seed
        counts, journal = self._passes.counts, self._journal
        has_progress = journal.has_saved or not journal.is_saving or self._passes.has_waited
        if outcome.stop is Status.WALLTIME and not has_progress:
            outcome = replace(outcome, stop=Status.NO_PROGRESS)
        return replace(
            outcome,
            mode=None if self._fit is None else self._fit.problem.model.mode,
            counts=counts,
            checkpoint=journal.last_path,
            diagnostics=self._diagnostics
            | {
                "non_finite": dict(self._iterations.non_finite),
                "left_out": [bad.record() for _, bad in sorted(self._passes.skipped.items())],
                "retries": counts.retries,
            },
            sample=None if sample is None else sample.draw_rows(outcome.params, seed),
        )
