"""The four phases in order.

0. normalization of the parameters;
1. L-BFGS on a sample of the rows;
2. Gauss-Newton, on the sample first, then on all rows;
3. covariance.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.engine.dataset import DataSet
from nlsq_dask.errors import CheckpointError, RowsChangedError
from nlsq_dask.events import PHASES, FitStarted, Observer, PhaseEnded, PhaseStarted
from nlsq_dask.fit.context import FitContext, Solved
from nlsq_dask.fit.dense import DenseFit
from nlsq_dask.fit.interruption import FitInterruptedError, Interruption
from nlsq_dask.fit.iterations import Iterations, StoppedByCallbackError
from nlsq_dask.fit.matrix_free import GradientFit
from nlsq_dask.fit.outcome import Outcome
from nlsq_dask.fit.passes import Passes
from nlsq_dask.fit.problem import Call
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.starts import StartFinder
from nlsq_dask.kernels.kernel import RowKernel, piece_rows_for
from nlsq_dask.model.check import check_trace
from nlsq_dask.solvers.covariance import Covariance
from nlsq_dask.status import Status

Vector = NDArray[np.float64]

_POINTS, _SHIFT = 3, 0.3  # near p0, in normalized parameters, at which models are compared
_SAME_COST = 1e-6  # relative difference that another version or processor may make


class Driver:
    """One fit.

    Parameters
    ----------
    call : Call
    data : DataSet
    emit : callable
        Receives every event.
    journal : Journal
        Remembers what was done before the fit was resumed, and what is done.
    interruption : Interruption
        May end the fit before its end.
    """

    def __init__(
        self,
        call: Call,
        data: DataSet,
        emit: Observer,
        journal: Journal,
        interruption: Interruption,
    ) -> None:
        config = call.config
        self._model = call.model
        self._parameters = call.parameters
        self._normalizer = call.normalizer
        self._penalty = call.penalty
        self._loss = call.loss
        self._absolute_sigma = call.absolute_sigma
        self._config = config
        self._data = data
        self._emit = emit
        self._journal = journal
        self._passes = Passes(
            data,
            call.nan_policy == "omit",
            self._penalty,
            emit,
            config.min_success_rate,
            journal,
            interruption,
        )
        self._iterations = Iterations(emit, call.callback, config.callback_frequency, interruption)
        for event in journal.events:
            self._passes.count(event)
            self._iterations.count(event)
        self._start_finder = StartFinder(
            call.parameters, call.normalizer, config, emit, self._iterations, journal
        )
        self._diagnostics = self._start_finder.diagnostics
        self._sample: SampleProblem[Any] | None = None

    def run(self) -> Outcome:
        """Run all phases; problems of the data or the model are raised, others are a verdict."""
        blocks = self._data.blocks
        started = FitStarted(
            self._model.name,
            blocks.n_rows,
            blocks.grid,
            blocks.dims,
            self._parameters.names,
            self._notes(),
        )
        self._journal.once("beginning", partial(self._emit, started))
        with self._phase(0) as details:
            fit = self._prepared(details)
        try:
            with self._phase(1) as details:
                sample: Any = self._read_sample(fit, details)
                starts = self._start_finder.find(sample, details)
            with self._phase(2) as details:
                solved = fit.solve(sample, starts, details)
            with self._phase(3) as details:
                solved, covariance, errors = self._errors(fit, sample, solved, details)
        except StoppedByCallbackError as stopped:
            return self._outcome(stopped.params, Status.USER_STOP, None, None, None)
        except FitInterruptedError as interrupted:
            self._journal.save()
            return self._so_far(fit, interrupted.reason)
        if solved.stop.is_success:
            self._journal.save()
        return self._outcome(solved.params, solved.stop, solved, covariance, errors)

    def _notes(self) -> tuple[str, ...]:
        remark = [self._parameters.remark] if self._parameters.remark else []
        return (*remark, *(f"{notice}." for notice in self._data.blocks.date_notices()))

    def _errors(
        self,
        fit: DenseFit | GradientFit,
        sample: SampleProblem[Any],
        solved: Solved,
        details: dict[str, Any],
    ) -> tuple[Solved, Covariance | None, Vector | None]:
        while True:
            try:
                return solved, fit.covariance(details), fit.errors(details)
            except RowsChangedError:  # in a pass of this phase
                solved = fit.solve_again(sample, details)

    def _so_far(self, fit: DenseFit | GradientFit, reason: Status) -> Outcome:
        """Return what is known where a fit is interrupted."""
        solved = fit.so_far(reason)
        if solved is None:
            latest = self._iterations.latest
            params = self._parameters.start if latest is None else latest
            return self._outcome(params, reason, None, None, None)
        covariance = fit.covariance({}, may_pass=False)
        return self._outcome(solved.params, reason, solved, covariance, None)

    def _prepared(self, details: dict[str, Any]) -> DenseFit | GradientFit:
        """Trace the kernels, which depend on the number of parameters."""
        details["strategy"] = self._normalizer.strategy
        check_trace(self._model, self._data.blocks.x_labels)
        row_bytes, config = self._model.layout.row_bytes, self._config
        details["platforms"] = self._data.platforms
        context = FitContext(
            model=self._model,
            parameters=self._parameters,
            config=config,
            loss=self._loss,
            absolute_sigma=self._absolute_sigma,
            penalty=self._penalty,
            normalizer=self._normalizer,
            passes=self._passes,
            iterations=self._iterations,
            start_finder=self._start_finder,
            emit=self._emit,
            journal=self._journal,
            sample_rows=config.sample_size(
                self._data.blocks.n_rows, row_bytes, self._model.n_params
            ),
            piece_rows=piece_rows_for(self._data.longest_block, config.piece_rows, row_bytes),
            platforms=details["platforms"],
        )
        return GradientFit(context) if self._is_without_matrices else DenseFit(context)

    @property
    def _is_without_matrices(self) -> bool:
        return self._config.is_without_matrices(len(self._parameters.names))

    def _read_sample(
        self, fit: DenseFit | GradientFit, details: dict[str, Any]
    ) -> SampleProblem[Any]:
        context = fit.context
        rows, n_blocks = self._passes.sample(context.sample_rows, self._config.random_seed)
        details["sample"] = {"rows": len(rows), "blocks": n_blocks}
        self._diagnostics["sample"] = dict(details["sample"])
        start = self._parameters.start
        sample: SampleProblem[Any] = SampleProblem(
            context.exact_model, fit.sum_rows, rows, start, self._penalty, self._loss
        )
        self._sample = sample
        if self._passes.must_report(sample.at_start):
            kernel: RowKernel[Any] = fit.kernel
            self._passes.reduce_anew(kernel, start)  # counts all bad rows, and raises
        if self._journal.is_kept:
            self._compare(sample)
        return sample

    def _compare(self, sample: SampleProblem[Any]) -> None:
        """Raise a CheckpointError if the model is not the one that a checkpoint was made with.

        Its fingerprint does not tell if JAX has another version now; so its values are compared.
        """
        start, scales = self._parameters.start, self._normalizer.scales
        random = np.random.default_rng(0)
        shifts = _SHIFT * scales * random.uniform(-1.0, 1.0, (_POINTS, len(start)))
        points = [start, *np.clip(start + shifts, self._parameters.low, self._parameters.high)]
        now = [float(sample.reduce(point).cost) for point in points]
        before = self._journal.step("costs of the sample near p0", list[float], lambda: now)
        if not np.allclose(now, before, rtol=_SAME_COST, atol=0.0, equal_nan=True):
            raise CheckpointError(
                f"the checkpoint is of another model: near p0 costs of a sample of rows were "
                f"{before}, and now they are {now}. Fit again without resume_from_checkpoint."
            )

    @contextmanager
    def _phase(self, number: int) -> Iterator[dict[str, Any]]:
        """Run a phase; one that had begun before the fit was resumed goes on."""
        name, details = PHASES[number], dict[str, Any]()
        before = [event for event in self._journal.events if getattr(event, "phase", -1) == number]
        if any(isinstance(event, PhaseEnded) for event in before):
            yield details
            return
        seconds = self._journal.phase_clock(goes_on=bool(before))
        if not before:
            self._emit(PhaseStarted(number, name, time.time()))
        try:
            yield details
        except BaseException as error:
            failed = not isinstance(error, StoppedByCallbackError | FitInterruptedError)
            self._emit(PhaseEnded(number, name, seconds(), failed, details))
            raise
        ended = PhaseEnded(number, name, seconds(), False, details)
        self._journal.once(f"end of phase {number}", partial(self._emit, ended))

    def _outcome(
        self,
        params: Vector,
        stop: Status,
        solved: Solved | None,
        covariance: Covariance | None,
        errors: Vector | None,
    ) -> Outcome:
        return Outcome(
            params=params,
            stop=stop,
            sums=None if solved is None else solved.sums,
            sums_at=None if solved is None else solved.sums_at,
            iterations=0 if solved is None else solved.iterations,
            covariance=covariance,
            undetermined=None if solved is None else solved.undetermined,
            errors=errors,
            has_covariance=not self._is_without_matrices,
            absolute_sigma=self._absolute_sigma,
            n_passes=self._passes.n_passes,
            rows_read=self._passes.rows_read,
            bytes_read=self._passes.bytes_read,
            rows_cached=self._passes.rows_cached,
            checkpoint=self._journal.last_path,
            diagnostics=self._diagnostics
            | {
                "non_finite": dict(self._iterations.non_finite),
                "left_out": [bad.record() for _, bad in sorted(self._passes.left_out.items())],
                "retries": self._passes.n_retries,
            },
            shown=None
            if self._sample is None
            else self._sample.shown(params, self._config.random_seed),
        )
