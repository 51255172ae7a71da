"""The four phases in order: the only place that asks the engine for passes over the data.

0. normalization of the parameters;
1. L-BFGS on a sample of the rows;
2. Gauss-Newton, on the sample first, then on all rows;
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
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.core import gauss_newton as gn
from nlsq_dask.core.covariance import Covariance, covariance, sandwich
from nlsq_dask.core.kernel import piece_rows_for
from nlsq_dask.core.losses import Loss
from nlsq_dask.core.model import Model
from nlsq_dask.core.model_check import check_trace
from nlsq_dask.core.normal_equations import NormalEquationsKernel
from nlsq_dask.core.normalize import ParameterNormalizer
from nlsq_dask.core.penalty import GroupVariance
from nlsq_dask.core.point import Settings
from nlsq_dask.core.product_loops import Product
from nlsq_dask.core.sums import NormalEquations
from nlsq_dask.core.surrogate import forecast
from nlsq_dask.engine.reduce import DataSet
from nlsq_dask.events import FitStarted, Observer, PhaseEnded, PhaseStarted, SampleSolved
from nlsq_dask.find_starts import StartFinder
from nlsq_dask.iterations import Callback, Iterations, StoppedByCallbackError
from nlsq_dask.outcome import Outcome
from nlsq_dask.parameters import Parameters
from nlsq_dask.passes import Passes
from nlsq_dask.sample_problem import SampleProblem
from nlsq_dask.solve import SampleSolver, first_product, solve
from nlsq_dask.stopping import StopReason

Vector = NDArray[np.float64]

_PATIENCE = 15  # passes over all rows without progress


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
        self._exact_model = replace(model, dtype="float64")
        self._parameters = parameters
        self._data = data
        self._config = config
        self._absolute_sigma = absolute_sigma
        self._loss = loss
        self._emit = emit
        self._penalty = GroupVariance.of(config, len(parameters.names))
        self._passes = Passes(data, nan_policy == "omit", self._penalty, emit)
        self._sample_size = config.sample_size(data.blocks.n_rows, model.layout.row_bytes)
        self._iterations = Iterations(emit, callback, config.callback_frequency)
        self.normalizer = ParameterNormalizer(
            parameters.start,
            (parameters.low, parameters.high),
            config.normalization_strategy if config.normalize else "none",
        )
        self._settings = Settings(
            low=parameters.low,
            high=parameters.high,
            tol=config.gauss_newton_tol,
            max_iterations=config.gauss_newton_max_iterations,
            patience=_PATIENCE,
            sizes=self.normalizer.scales,
            regularization=config.regularization_factor,
            initial_radius=config.trust_region_initial,
            epsilon=float(np.finfo(model.dtype).eps),
        )
        self._sample_solver = SampleSolver.of(self._settings, self.normalizer.scales, config)
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
            kernel = self._trace_kernels(details)
        try:
            with self._phase(1, "L-BFGS warm-up") as details:
                sample = self._read_sample(kernel, details)
                starts = self._start_finder.find(sample, details)
            with self._phase(2, "Gauss-Newton") as details:
                start = self._solve_on_sample(sample, starts, details)
                state = self._solve_on_all_rows(sample, start, details)
        except StoppedByCallbackError as stopped:
            return self._outcome(stopped.params, StopReason.USER_STOP, None, None)
        with self._phase(3, "covariance") as details:
            found = self._find_covariance(state, details)
        assert state.stop is not None
        assert state.solution is not None
        return self._outcome(state.solution, state.stop, state, found)

    # --- phases 0 and 1

    def _trace_kernels(self, details: dict[str, Any]) -> NormalEquationsKernel:
        """Trace the kernel for all rows, and return that of the sample, always in float64."""
        details["strategy"] = self.normalizer.strategy
        check_trace(self._model)
        row_bytes = self._model.layout.row_bytes
        rows = piece_rows_for(self._data.longest_block, self._config.piece_rows, row_bytes)
        platforms = self._data.platforms
        details["platforms"] = platforms
        kernel = NormalEquationsKernel.trace(
            self._model, rows, platforms=platforms, loss=self._loss
        )
        self._kernel = replace(kernel, uses_all_devices=self._config.enable_multi_device)
        return NormalEquationsKernel.trace(self._exact_model, rows, loss=self._loss)

    def _read_sample(self, kernel: NormalEquationsKernel, details: dict[str, Any]) -> SampleProblem:
        read = self._passes.sample(self._sample_size, self._config.random_seed)
        details["sample"] = {"rows": len(read.rows), "blocks": read.n_blocks}
        self._diagnostics["sample"] = dict(details["sample"])
        start = self._parameters.start
        sample = SampleProblem(self._exact_model, kernel, read.rows, start, self._penalty)
        if self._passes.must_report(sample.at_start):
            self._passes.reduce(kernel, start)  # counts all bad rows, and raises
        return sample

    # --- phases 2 and 3

    def _solve_on_sample(
        self, sample: SampleProblem, starts: list[Vector], details: dict[str, Any]
    ) -> Vector:
        """Converge on the sample; return its solution, or the best start if it has none."""
        if not sample.is_informative:
            return starts[0]
        solver = self._sample_solver
        start = solver.best_start(sample.reduce_few, starts)
        state = solver.solve(sample.reduce, start, partial(self._judged, stage="sample"))
        details["sample_iterations"] = state.iteration
        if state.stop is StopReason.NON_FINITE_START:
            return start
        assert state.solution is not None
        if state.stop is StopReason.USER_STOP:
            raise StoppedByCallbackError(state.solution)
        self._emit(SampleSolved(state.iteration, state.point.mean_square))
        return state.solution

    def _solve_on_all_rows(
        self, sample: SampleProblem, start: Vector, details: dict[str, Any]
    ) -> gn.State:
        """Converge over all rows, a pass a trial; the sample, renewed, forecasts the trials."""
        is_exact = self._model.dtype == self._exact_model.dtype
        factors = self._kernel.factors if is_exact else sample.factors(start)
        y_reference = sample.reduce.kernel.y_reference
        kernel = replace(self._kernel, y_reference=y_reference, factors=factors)
        product = sample.reduce.kernel.product if is_exact else first_product(self._config)
        self._kernel = kernel.making(product, self._model)
        may_change = self._config.gauss_newton_solver == "auto" and is_exact

        def reduce(state: gn.State, trial: gn.Trial) -> NormalEquations:
            further = gn.candidates(state, trial)
            return self._passes.reduce(self._kernel, trial.params, further)

        def reduce_by_qr(params: Vector) -> NormalEquations:
            self._kernel = self._kernel.making(Product.TRIANGLE, self._model)
            return self._passes.reduce(self._kernel, params)

        state = solve(
            gn.start(*self._first_pass(sample, start), self._settings),
            lambda state: forecast(state, sample.reduce) or gn.propose(state),
            reduce,
            reduce_by_qr if may_change else None,
            partial(self._judged, stage="all rows"),
        )
        assert state.stop is not None
        details |= {
            "iterations": state.iteration,
            "passes": self._passes.n_passes,
            "reason": state.stop.name.lower(),
            "solver": "qr" if self._kernel.product.is_factorized else "normal",
        }
        return state

    def _first_pass(self, sample: SampleProblem, start: Vector) -> tuple[Vector, NormalEquations]:
        """Return a start for all rows with its sums: the sample's solution, or a better one.

        The rows that the pass brings back are from all blocks. Where the first sample was not like
        them, because all rows fit its solution worse than it did by more than chance explains, the
        fit starts once more on the new one; that costs a pass if it leads to a better point.
        """
        expected = 2.0 * sample.reduce(start).cost / max(sample.n_used, 1)
        chance = 1.0 + 5.0 * float(np.sqrt(2.0 / max(sample.n_used, 1)))
        result = self._passes.first(
            self._kernel, start, self._sample_size, self._config.random_seed
        )
        sums = result.sums
        if result.sample is not None:
            sample.exchange(result.sample)
        if sums.is_finite and not 2.0 * sums.cost / sums.n_used > expected * chance:
            return start, sums
        again = self._solve_on_sample(sample, self._start_finder.find(sample, {}), {})
        state = gn.start(start, sums, self._settings)
        ahead = None if state.stop is not None else forecast(state, sample.reduce)
        reached = sample.reduce(start if ahead is None else ahead.params)
        there = sample.reduce(again)
        if not there.is_finite:
            again, there = self._parameters.start, sample.at_start
        if not there.is_finite or (reached.is_finite and there.cost * chance >= reached.cost):
            return start, sums
        other = self._passes.reduce(self._kernel, again)
        if other.is_finite and not (sums.is_finite and sums.cost <= other.cost):
            return again, other
        return start, sums

    def _find_covariance(self, state: gn.State, details: dict[str, Any]) -> Covariance | None:
        if not state.point.sums.is_finite:
            return None
        sums, epsilon = state.sums_at_solution, self._settings.epsilon
        cov_type = self._config.cov_type
        details["cov_type"] = cov_type
        is_classical = cov_type == "nonrobust"
        absolute_sigma = self._absolute_sigma or not is_classical
        found = covariance(sums, self.normalizer.scales, absolute_sigma, epsilon)
        if not is_classical and np.isfinite(found.root).all():
            assert state.solution is not None
            kernel = self._kernel.making(Product.SCORES, self._model)
            scores = self._passes.scores(kernel, state.solution)
            found = sandwich(found, scores, sums.n_used, cov_type)
        details["condition_number"] = found.condition_number
        return found

    # --- what the phases share

    def _judged(
        self, state: gn.State, trial: gn.Trial, sums: NormalEquations, stage: str
    ) -> gn.State:
        """Judge a trial and report it; the callback may end the solve."""
        state = gn.judge(state, trial, sums)
        point, accepted = state.point, state.point.params is trial.params
        slope = point.relative_slope(self.normalizer.scales)
        if self._iterations.report(stage, point.params, point.mean_square, slope, accepted):
            state = replace(state, stop=StopReason.USER_STOP, solution=point.params)
        return state

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
        state: gn.State | None,
        found: Covariance | None,
    ) -> Outcome:
        return Outcome(
            params=params,
            stop=stop,
            point=None if state is None else state.point,
            iterations=0 if state is None else state.iteration,
            covariance=found,
            absolute_sigma=self._absolute_sigma,
            n_passes=self._passes.n_passes,
            rows_read=self._passes.rows_read,
            bytes_read=self._passes.bytes_read,
            rows_cached=self._passes.rows_cached,
            diagnostics=self._diagnostics,
        )
