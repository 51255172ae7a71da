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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.core.covariance import Covariance
from nlsq_dask.core.kernel import RowKernel, piece_rows_for
from nlsq_dask.core.losses import Loss
from nlsq_dask.core.model import Model
from nlsq_dask.core.model_check import check_trace
from nlsq_dask.core.normalize import ParameterNormalizer
from nlsq_dask.core.penalty import GroupVariance
from nlsq_dask.dense_fit import DenseFit
from nlsq_dask.engine.reduce import DataSet
from nlsq_dask.events import FitStarted, Observer, PhaseEnded, PhaseStarted
from nlsq_dask.find_starts import StartFinder
from nlsq_dask.fit_context import FitContext, Solved
from nlsq_dask.gradient_fit import GradientFit
from nlsq_dask.iterations import Callback, Iterations, StoppedByCallbackError
from nlsq_dask.outcome import Outcome
from nlsq_dask.parameters import Parameters
from nlsq_dask.passes import Passes
from nlsq_dask.sample_problem import SampleProblem
from nlsq_dask.stopping import StopReason

Vector = NDArray[np.float64]


class Driver:
    """One fit.

    Parameters
    ----------
    model : Model
    parameters : Parameters
    data : DataSet
    config : HybridStreamingConfig
    nan_policy : {"raise", "omit"}
    absolute_sigma : bool
    loss : Loss
    emit : callable
        Receives every event.
    callback : callable or None
        The caller's ``callback(params, loss, iteration)``.
    """

    def __init__(
        self,
        model: Model,
        parameters: Parameters,
        data: DataSet,
        config: HybridStreamingConfig,
        nan_policy: str,
        absolute_sigma: bool,
        loss: Loss,
        emit: Observer,
        callback: Callback | None,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._data = data
        self._config = config
        self._absolute_sigma = absolute_sigma
        self._loss = loss
        self._emit = emit
        self._penalty = GroupVariance.of(config, len(parameters.names))
        self._passes = Passes(data, nan_policy == "omit", self._penalty, emit)
        self._iterations = Iterations(emit, callback, config.callback_frequency)
        self.normalizer = ParameterNormalizer(
            parameters.start,
            (parameters.low, parameters.high),
            config.normalization_strategy if config.normalize else "none",
        )
        self._start_finder = StartFinder(
            parameters, self.normalizer, config, emit, self._iterations
        )
        self._diagnostics = self._start_finder.diagnostics

    def run(self) -> Outcome:
        """Run all phases; problems of the data or the model are raised, others are a verdict."""
        blocks = self._data.blocks
        n_blocks = int(np.prod(blocks.grid))
        self._emit(FitStarted(blocks.n_rows, n_blocks, self._parameters.names))
        with self._phase(0, "normalization") as details:
            fit = self._prepared(details)
        try:
            with self._phase(1, "L-BFGS warm-up") as details:
                sample: Any = self._read_sample(fit, details)
                starts = self._start_finder.find(sample, details)
            with self._phase(2, "Gauss-Newton") as details:
                solved = fit.solve(sample, starts, details)
        except StoppedByCallbackError as stopped:
            return self._outcome(stopped.params, StopReason.USER_STOP, None, None, None)
        with self._phase(3, "covariance") as details:
            covariance, errors = fit.covariance(details), fit.errors(details)
        return self._outcome(solved.params, solved.stop, solved, covariance, errors)

    def _prepared(self, details: dict[str, Any]) -> DenseFit | GradientFit:
        """Trace the kernels, which depend on the number of parameters."""
        details["strategy"] = self.normalizer.strategy
        check_trace(self._model)
        row_bytes, config = self._model.layout.row_bytes, self._config
        details["platforms"] = self._data.platforms
        context = FitContext(
            model=self._model,
            parameters=self._parameters,
            config=config,
            loss=self._loss,
            absolute_sigma=self._absolute_sigma,
            penalty=self._penalty,
            normalizer=self.normalizer,
            passes=self._passes,
            iterations=self._iterations,
            start_finder=self._start_finder,
            emit=self._emit,
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
        read = self._passes.sample(context.sample_rows, self._config.random_seed)
        details["sample"] = {"rows": len(read.rows), "blocks": read.n_blocks}
        self._diagnostics["sample"] = dict(details["sample"])
        start = self._parameters.start
        sample: SampleProblem[Any] = SampleProblem(
            context.exact_model, fit.sum_rows, read.rows, start, self._penalty, self._loss
        )
        if self._passes.must_report(sample.at_start):
            kernel: RowKernel[Any] = fit.kernel
            self._passes.reduce(kernel, start)  # counts all bad rows, and raises
        return sample

    @contextmanager
    def _phase(self, number: int, name: str) -> Iterator[dict[str, Any]]:
        began = time.perf_counter()
        details: dict[str, Any] = {}
        self._emit(PhaseStarted(number, name, time.time()))
        failed = True
        try:
            yield details
            failed = False
        except StoppedByCallbackError:
            failed = False
            raise
        finally:
            self._emit(PhaseEnded(number, name, time.perf_counter() - began, failed, details))

    def _outcome(
        self,
        params: Vector,
        stop: StopReason,
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
            diagnostics=self._diagnostics | {"non_finite": dict(self._iterations.non_finite)},
        )
