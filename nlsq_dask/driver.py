"""The four phases in order: the only place that asks the engine for passes over the data.

0. normalization of the parameters;
1. L-BFGS on a sample of the rows;
2. Gauss-Newton, on the sample first, then on all rows;
3. covariance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.core import gauss_newton as gn
from nlsq_dask.core.covariance import Covariance, covariance
from nlsq_dask.core.defense import first_step_size, is_warm_start, relative_loss
from nlsq_dask.core.kernel import NormalEquationsKernel, check_row_wise, piece_rows_for
from nlsq_dask.core.model import Model
from nlsq_dask.core.normalize import ParameterNormalizer
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.sums import NormalEquations
from nlsq_dask.core.warmup import Warmup, WarmupEnd, WarmupState, clip_count
from nlsq_dask.engine.reduce import DataSet, Sample
from nlsq_dask.errors import DataError, NonFiniteDataError
from nlsq_dask.events import (
    FitStarted,
    IterationFinished,
    Observer,
    PassFinished,
    PhaseEnded,
    PhaseStarted,
    WarmupEnded,
    WarmupStarted,
)
from nlsq_dask.parameters import Parameters
from nlsq_dask.stopping import StopReason

Vector = NDArray[np.float64]
Callback = Callable[[Vector, float, int], Any]

_AUTO_CHUNK_SIZE = 2**20
_AUTO_SAMPLE_ROWS = 2**15
# How far, in normalized parameters, the sample may take what it does not determine.
_ANCHOR_LENGTH = 10.0


class _StoppedByCallbackError(Exception):
    """The callback raised StopIteration while the sample was being fitted."""

    def __init__(self, params: Vector) -> None:
        super().__init__()
        self.params = params


@dataclass(frozen=True)
class Outcome:
    """What the phases found.

    Attributes
    ----------
    params : ndarray, shape (p,)
    stop : StopReason
    point : Point or None
        The last accepted point over all rows; None if there was no pass over them.
    iterations : int
        Gauss-Newton iterations over all rows.
    covariance : Covariance or None
    n_passes, rows_read, bytes_read : int
    diagnostics : dict
        Of warm-up and sample.
    """

    params: Vector
    stop: StopReason
    point: gn.Point | None
    iterations: int
    covariance: Covariance | None
    n_passes: int
    rows_read: int
    bytes_read: int
    diagnostics: dict[str, Any]


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
        emit: Observer,
        callback: Callback | None,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._data = data
        self._config = config
        self._nan_policy = nan_policy
        self._absolute_sigma = absolute_sigma
        self._emit = emit
        self._callback = callback
        self._iteration = 0
        self._n_passes = 0
        self._rows_read = 0
        self._bytes_read = 0
        self._diagnostics: dict[str, Any] = {}
        self.normalizer = ParameterNormalizer(
            parameters.start,
            (parameters.low, parameters.high),
            config.normalization_strategy if config.normalize else "none",
        )

    # --- the phases

    def run(self) -> Outcome:
        """Run all phases; problems of the data or the model are raised, others are a verdict."""
        blocks = self._data.blocks
        names = self._parameters.names
        self._emit(FitStarted(blocks.n_rows, int(np.prod(blocks.grid)), names))
        with self._phase(0, "normalization") as details:
            details["strategy"] = self.normalizer.strategy
            kernel = self._trace_kernel()
        state: gn.State | None = None
        try:
            with self._phase(1, "L-BFGS warm-up") as details:
                sample = self._read_sample(details)
                solver = self._sample_solver(kernel, sample)
                start = self._warm_up(solver, details)
            with self._phase(2, "Gauss-Newton") as details:
                start = self._solve_on_sample(solver, start, details)
                kernel = replace(kernel, y_reference=solver.y_reference)
                state = self._solve_on_all_rows(kernel, solver, start, details)
        except _StoppedByCallbackError as stopped:
            return self._outcome(stopped.params, StopReason.USER_STOP, None, None)
        with self._phase(3, "covariance") as details:
            found = self._find_covariance(state, details)
        assert state.stop is not None
        assert state.solution is not None
        return self._outcome(state.solution, state.stop, state, found)

    def _trace_kernel(self) -> NormalEquationsKernel:
        self._model.check()
        chunk_size = self._config.chunk_size
        rows = piece_rows_for(
            self._data.longest_block,
            _AUTO_CHUNK_SIZE if isinstance(chunk_size, str) else chunk_size,
            self._model.layout.row_bytes,
        )
        return NormalEquationsKernel.trace(self._model, rows)

    def _read_sample(self, details: dict[str, Any]) -> Sample:
        wanted = self._config.sample_rows
        sample = self._data.sample(
            _AUTO_SAMPLE_ROWS if isinstance(wanted, str) else wanted, self._config.random_seed
        )
        self._rows_read += sample.rows_read
        self._bytes_read += sample.bytes_read
        details["sample"] = {"rows": len(sample.rows), "blocks": sample.n_blocks}
        self._diagnostics["sample"] = dict(details["sample"])
        return sample

    def _sample_solver(self, kernel: NormalEquationsKernel, sample: Sample) -> _SampleSolver:
        solver = _SampleSolver(self._model, kernel, sample.rows, self._parameters.start)
        if solver.at_start.n_bad_sigma or (solver.at_start.n_bad and self._nan_policy == "raise"):
            self._pass(kernel, self._parameters.start)  # counts all bad rows, and raises
        return solver

    def _warm_up(self, solver: _SampleSolver, details: dict[str, Any]) -> Vector:
        """Phase 1: return where the warm-up leads to, or the start if it is skipped."""
        start, config = self._parameters.start, self._config
        if not solver.is_informative:
            details["skipped"] = "the sample has too few usable rows"
            return start
        loss = relative_loss(solver.at_start)
        warm = is_warm_start(loss, config)
        skip = warm or config.max_warmup_iterations == 0 or not solver.at_start.is_finite
        mode, step = first_step_size(loss, config)
        self._emit(WarmupStarted(loss, None if skip else mode, warm))
        details |= {"relative_loss": loss, "warm_start": warm, "mode": None if skip else mode}
        self._diagnostics["warm_up"] = dict(details)
        if skip:
            return start
        warmup = solver.prepare_warmup(self.normalizer, step, config)
        state = self._run_warmup(warmup, solver.variance)
        end = WarmupEnd(int(state.end))
        summary = WarmupEnded(
            reason=end.name.lower(),
            iterations=int(state.iteration),
            loss=float(state.best_loss) * solver.variance,
            cost_guard=end is WarmupEnd.COST_GUARD,
            clipped=clip_count(state, warmup.options),
            line_search_failures=int(state.line_search_failures),
            history_filled=int(state.iteration) >= config.lbfgs_history_size,
        )
        self._emit(summary)
        details |= asdict(summary)
        self._diagnostics["warm_up"] = dict(details)
        return self._inside(self.normalizer.denormalize(np.asarray(state.best_params)))

    def _run_warmup(self, warmup: Warmup, variance: float) -> WarmupState:
        state = warmup.start(self.normalizer.normalize(self._parameters.start))
        burst = self._config.callback_frequency
        while int(state.end) == WarmupEnd.RUNNING:
            before = int(state.iteration)
            state = warmup.run(state, before + burst)
            self._iteration += int(state.iteration) - before
            params = self._inside(self.normalizer.denormalize(np.asarray(state.best_params)))
            norm = float(np.linalg.norm(np.asarray(state.gradient)))
            try:
                self._report("warm-up", params, float(state.best_loss) * variance, norm, True)
            except StopIteration:
                raise _StoppedByCallbackError(params) from None
        return state

    def _solve_on_sample(
        self, solver: _SampleSolver, start: Vector, details: dict[str, Any]
    ) -> Vector:
        """Converge on the sample, which costs no reading."""
        if not solver.is_informative:
            return start
        # The sample may say nothing of some parameters (a peak that it missed). A weak pull towards
        # where they are keeps those in place, and moves the others by far less than their errors.
        at_start = solver.reduce(start)
        variance = 2.0 * at_start.cost / at_start.n_used
        weights = variance / (_ANCHOR_LENGTH * self.normalizer.scales) ** 2

        def reduce(params: Vector) -> NormalEquations:
            return solver.reduce(params).anchored(weights, params - start)

        state = gn.start(start, reduce(start), self._settings)
        state = self._iterate(state, reduce, "sample")
        details["sample_iterations"] = state.iteration
        assert state.stop is not None
        assert state.solution is not None
        if state.stop is StopReason.USER_STOP:
            raise _StoppedByCallbackError(state.solution)
        # A sample that leaves no finite point says nothing; what it started from is as good.
        return state.solution if state.point.sums.is_finite else start

    def _solve_on_all_rows(
        self,
        kernel: NormalEquationsKernel,
        solver: _SampleSolver,
        start: Vector,
        details: dict[str, Any],
    ) -> gn.State:
        def reduce(params: Vector) -> NormalEquations:
            return self._pass(kernel, params)

        params, sums = self._better_start(reduce, solver, start)
        state = gn.start(params, sums, self._settings)
        state = self._iterate(state, reduce, "all rows")
        assert state.stop is not None
        details |= {
            "iterations": state.iteration,
            "passes": self._n_passes,
            "reason": state.stop.name.lower(),
        }
        return state

    def _better_start(
        self, reduce: Callable[[Vector], NormalEquations], solver: _SampleSolver, start: Vector
    ) -> tuple[Vector, NormalEquations]:
        """Return the sample's solution with its sums, or p0 with its own if that is better.

        The sample may have missed what matters. Then its solution fits all rows worse than p0
        fitted the sample, by more than chance explains, and p0 gets a pass of its own.
        """
        sums, p0 = reduce(start), self._parameters.start
        at_p0 = solver.at_start
        if np.array_equal(start, p0):
            return start, sums
        chance = 1.0 + 5.0 * np.sqrt(2.0 / max(at_p0.n_used, 1))
        expected = at_p0.cost / max(at_p0.n_used, 1) * chance
        if sums.is_finite and not sums.cost / max(sums.n_used, 1) > expected:
            return start, sums
        other = reduce(p0)
        if other.is_finite and not (sums.is_finite and sums.cost <= other.cost):
            return p0, other
        return start, sums

    def _find_covariance(self, state: gn.State, details: dict[str, Any]) -> Covariance | None:
        if not state.point.sums.is_finite:
            return None
        found = covariance(
            state.point.sums, self.normalizer.scales, self._absolute_sigma, self._settings.epsilon
        )
        details["condition_number"] = found.condition_number
        return found

    # --- what the phases share

    @property
    def _settings(self) -> gn.Settings:
        config = self._config
        return gn.Settings(
            low=self._parameters.low,
            high=self._parameters.high,
            tol=config.gauss_newton_tol,
            max_iterations=config.gauss_newton_max_iterations,
            regularization=config.regularization_factor,
            initial_radius=config.trust_region_initial,
            epsilon=float(np.finfo(self._model.dtype).eps),
        )

    def _inside(self, params: Vector) -> Vector:
        return np.clip(params, self._parameters.low, self._parameters.high)

    def _iterate(
        self, state: gn.State, reduce: Callable[[Vector], NormalEquations], stage: str
    ) -> gn.State:
        """Gauss-Newton: propose, reduce, judge, until there is a reason to stop."""
        while state.stop is None:
            trial = gn.propose(state)
            state = gn.judge(state, trial, reduce(trial.params))
            accepted = state.point.params is trial.params
            sums = state.point.sums
            n = max(sums.n_used, 1)
            variance = sums.total_variation / n or 1.0
            slope = 2.0 / (n * variance) * np.linalg.norm(sums.jtr * self.normalizer.scales)
            self._iteration += 1
            try:
                loss = 2.0 * sums.cost / n
                self._report(stage, state.point.params, loss, float(slope), accepted)
            except StopIteration:
                params = state.point.params
                return replace(state, stop=StopReason.USER_STOP, solution=params)
        return state

    def _report(
        self, stage: str, params: Vector, loss: float, gradient_norm: float, accepted: bool
    ) -> None:
        self._emit(
            IterationFinished(stage, self._iteration, params.copy(), loss, gradient_norm, accepted)
        )
        if self._callback is not None and self._iteration % self._config.callback_frequency == 0:
            self._callback(params.copy(), loss, self._iteration)

    def _pass(self, kernel: NormalEquationsKernel, params: Vector) -> NormalEquations:
        """Reduce over all rows once."""
        began = time.perf_counter()
        sums = self._data.reduce(kernel, params)
        self._n_passes += 1
        self._rows_read += sums.rows_read
        self._bytes_read += sums.bytes_read
        seconds = time.perf_counter() - began
        self._emit(
            PassFinished(
                self._n_passes,
                params.copy(),
                sums.cost if sums.is_finite else np.inf,
                seconds,
                sums.rows_read,
                sums.bytes_read,
            )
        )
        self._check_data(sums)
        return sums

    def _check_data(self, sums: NormalEquations) -> None:
        n_rows = self._data.blocks.n_rows
        if sums.n_bad_sigma:
            raise DataError(
                f"sigma is zero or negative at {sums.n_bad_sigma:,} of {n_rows:,} rows; it must be "
                f"positive. To leave rows out, set their y_data to NaN and use nan_policy='omit'."
            )
        if sums.n_bad and self._nan_policy == "raise":
            grid = self._data.blocks.grid
            block = tuple(map(int, np.unravel_index(sums.first_bad_block, grid)))
            raise NonFiniteDataError(
                f"{sums.n_bad:,} of {n_rows:,} rows hold NaN or infinity in y_data, x_data or "
                f"sigma; the first of them is in block {block} of the grid {grid}. Use "
                f"nan_policy='omit' to leave such rows out.",
                sums.n_bad,
                block,
            )
        if not sums.n_used:
            raise DataError(f"none of the {n_rows:,} rows can be used: all are masked or NaN.")

    @contextmanager
    def _phase(self, number: int, name: str) -> Iterator[dict[str, Any]]:
        began = time.perf_counter()
        details: dict[str, Any] = {}
        self._emit(PhaseStarted(number, name, time.time()))
        failed = True
        try:
            yield details
            failed = False
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
            n_passes=self._n_passes,
            rows_read=self._rows_read,
            bytes_read=self._bytes_read,
            diagnostics=self._diagnostics,
        )


class _SampleSolver:
    """The sample in memory, as something that can be reduced without reading."""

    def __init__(
        self, model: Model, kernel: NormalEquationsKernel, rows: Rows, start: Vector
    ) -> None:
        self._model = model
        self._rows = rows.usable()
        usable_y = self._rows.y.astype(np.float64)
        self.y_reference = float(usable_y.mean()) if len(usable_y) else 0.0
        self._kernel = replace(kernel, y_reference=self.y_reference)
        self._pieces = list(rows.pieces(kernel.piece_rows))
        if len(self._rows):
            check_row_wise(model, self._rows, start)
        self.at_start = self.reduce(start)

    @property
    def is_informative(self) -> bool:
        """Whether there are more usable rows than parameters."""
        return len(self._rows) > self._model.n_params

    @property
    def variance(self) -> float:
        """What the loss of the warm-up is divided by, positive in any case."""
        sums = self.at_start
        return (sums.total_variation or sums.signal or sums.n_used) / max(sums.n_used, 1)

    def reduce(self, params: Vector) -> NormalEquations:
        """Sum over the sample."""
        return self._kernel(self._pieces, params)

    def prepare_warmup(
        self, normalizer: ParameterNormalizer, first_step: float, config: HybridStreamingConfig
    ) -> Warmup:
        """Make the L-BFGS problem of the usable rows, padded by repetition to a power of two."""
        n_rows = len(self._rows)
        capacity = 1 << (n_rows - 1).bit_length()
        return Warmup.prepare(
            self._model,
            self._rows.take(np.arange(capacity) % n_rows),
            n_rows,
            (normalizer.scales, normalizer.offsets),
            normalizer.transform_bounds(),
            self.variance,
            first_step,
            config,
            self._kernel.program.fingerprint,
        )
