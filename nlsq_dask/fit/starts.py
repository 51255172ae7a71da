"""``StartFinder``: phase 1, from p0 to starting points for Gauss-Newton.

With multistart, successive halving comes first and L-BFGS continues from its best candidate. The
starting points of a fit without multistart are added, so that the result is not worse.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.events import HalvingRound, Observer, WarmupEnded, WarmupStarted
from nlsq_dask.fit.interruption import Interruption
from nlsq_dask.fit.iterations import Iterations, StoppedByCallbackError
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.fit.settings import multistart_settings, start_settings
from nlsq_dask.warmup.defense_layers import first_step_size, is_warm_start, relative_loss
from nlsq_dask.warmup.lbfgs import (
    Warmup,
    WarmupEnd,
    WarmupState,
    clip_count,
    pack,
    unpack,
)
from nlsq_dask.warmup.multistart import draw_starts

Vector = NDArray[np.float64]

# Iterations between checks of max_walltime, SIGTERM and Ctrl-C. If they are slow, there are fewer:
# one, and those that start within some seconds after it.
_MAX_BURST, _MAX_BURST_SECONDS = 10, 1.0
_FAST = 0.05  # seconds of an iteration, below which the others of a burst run in one call
_MAX_RESTARTS = 3  # of a warm-up after non-finite values
_STEP_FACTOR = 0.1  # factor of the step lengths per restart
_MAX_SURVIVORS = 8  # maximum number of survivors that are used as starts
_SKIPPED = "the sample has too few usable rows"


@dataclass(frozen=True)
class _Starts:
    """Starting points, the most promising first.

    ``details`` are entries for ``phase_history``, ``diagnostics`` for ``FitResult.diagnostics``.
    """

    starts: list[Vector]
    details: dict[str, Any]
    diagnostics: dict[str, Any]


@dataclass(frozen=True)
class _WarmupResult:
    """End point and summary of L-BFGS from one start, as saved in a checkpoint."""

    params: Vector
    summary: dict[str, Any]


@dataclass
class StartFinder:
    """Runs multistart and the L-BFGS warm-up on the sample."""

    problem: FitProblem
    emit: Observer
    iterations: Iterations
    journal: Journal
    interruption: Interruption
    # Summaries by "warm_up" and "multistart".
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def find(self, sample: SampleProblem[Any], details: dict[str, Any]) -> list[Vector]:
        """Return starting points, the most promising first and p0 last.

        Entries for ``phase_history`` are added to ``details``.
        """
        selection = self.journal.step("starts", _Starts, partial(self._find, sample))
        details |= selection.details
        self.diagnostics |= selection.diagnostics
        return selection.starts

    def _find(self, sample: SampleProblem[Any]) -> _Starts:
        own, is_enabled = self.problem.parameters.start, self.problem.config.enable_multistart
        if not sample.is_informative:
            skipped = {"skipped": _SKIPPED}
            return _Starts([own], skipped, {"multistart": skipped} if is_enabled else {})
        if not is_enabled:
            warmup = self._warm_up(sample, "p0", own)
            summary = warmup.summary
            return _Starts(_distinct([warmup.params, own]), summary, {"warm_up": summary})
        run_halving = partial(self._run_halving, sample)
        halving = self.journal.step("successive halving", _Starts, run_halving)
        survivors, multistart = halving.starts, dict(halving.diagnostics)
        is_own = multistart["winner"] == 0
        name, first = ("p0", own) if is_own else ("winner", survivors[0])
        warmup = self._warm_up(sample, name, first)
        starts = [warmup.params, *survivors]
        if not is_own:
            from_p0 = self._warm_up(sample, "p0", own)
            multistart["warm_up_of_p0"] = from_p0.summary
            starts.append(from_p0.params)
        return _Starts(
            _distinct([*starts, own]),
            halving.details | warmup.summary,
            {"warm_up": warmup.summary, "multistart": multistart},
        )

    def _run_halving(self, sample: SampleProblem[Any]) -> _Starts:
        """Run successive halving and return the surviving candidates, the best first.

        Candidates are improved by a few steps. If the one that began at p0 wins, p0 itself is put
        before the improved point.
        """
        parameters, settings = self.problem.parameters, multistart_settings(self.problem.config)
        own = parameters.start
        candidates = draw_starts(own, parameters.low, parameters.high, settings)
        normalized = self.problem.normalizer.normalize(candidates)
        rounds = []
        for number, result in enumerate(
            sample.prepare_halving().rounds(normalized, settings, self.interruption.check), start=1
        ):
            rounds.append(result)
            best = float(result.losses[result.survivors[0]])
            self.emit(HalvingRound(number, result.n_rows, len(result.survivors), best))
        last = rounds[-1]
        survivors = [self._original(last.params[i]) for i in last.survivors[:_MAX_SURVIVORS]]
        winner = int(last.survivors[0])
        details = {
            "candidates": len(candidates),
            "rows": [r.n_rows for r in rounds],
            "survivors": [len(r.survivors) for r in rounds],
            "winner": winner,
        }
        diagnostics = {
            "candidates": candidates,
            "rounds": [
                {"rows": r.n_rows, "losses": r.losses, "survivors": r.survivors} for r in rounds
            ],
            "winner": winner,
            "start": survivors[0],
        }
        starts = [own, *survivors] if winner == 0 else survivors
        return _Starts(starts, {"multistart": details}, diagnostics)

    def _warm_up(self, sample: SampleProblem[Any], name: str, start: Vector) -> _WarmupResult:
        """Run L-BFGS from ``start`` and return its end point, with facts for ``phase_history``.

        The end point is ``start`` itself if the warm-up is disabled, the start fits already, or the
        model is not finite there. ``name`` names the start in events.
        """
        make = partial(self._run_warm_up, sample, name, start)
        return self.journal.step("warm-up", _WarmupResult, make)

    def _run_warm_up(self, sample: SampleProblem[Any], name: str, start: Vector) -> _WarmupResult:
        config, sums = self.problem.config, sample.objective(start)
        loss, settings = relative_loss(sums), start_settings(config)
        is_warm = is_warm_start(loss, settings)
        skip = is_warm or config.max_warmup_iterations == 0 or not sums.is_finite
        mode, step = first_step_size(loss, settings)
        started = WarmupStarted(name, loss, None if skip else mode, is_warm)
        self.journal.run_once("beginning", partial(self.emit, started))
        summary = asdict(started)
        if not skip:
            warmup = sample.prepare_warmup(step)
            runs = [self._run_bursts(warmup, start, sample.variance)]
            while self._may_restart(runs, warmup):
                state = runs[-1]
                warmup = warmup.with_smaller_steps(_STEP_FACTOR, int(state.iteration))
                start = self._original(np.asarray(state.best_params))
                report = partial(self.iterations.report_non_finite, "warm-up", start, 0)
                self.journal.run_once("restart", report)
                runs.append(self._run_bursts(warmup, start, sample.variance))
            state = runs[-1]
            start = self._original(np.asarray(state.best_params))
            end = WarmupEnd(int(state.end))
            iterations = [int(run.iteration) for run in runs]
            ended = WarmupEnded(
                reason=end.name.lower(),
                iterations=sum(iterations),
                loss=float(state.best_loss) * sample.variance,
                cost_guard=end is WarmupEnd.COST_GUARD,
                clipped=sum(clip_count(run, warmup.options) for run in runs),
                line_search_failures=sum(int(run.line_search_failures) for run in runs),
                history_filled=max(iterations) >= config.lbfgs_history_size,
                restarts=len(runs) - 1,
            )
            self.emit(ended)
            summary |= asdict(ended)
        return _WarmupResult(start, summary)

    def _may_restart(self, runs: list[WarmupState], warmup: Warmup) -> bool:
        """Whether L-BFGS restarts with smaller steps, because it met non-finite values."""
        last = runs[-1]
        return (
            self.problem.config.validate_numerics
            and int(last.end) == WarmupEnd.NON_FINITE
            and len(runs) <= _MAX_RESTARTS
            and int(last.iteration) < int(warmup.problem.max_iterations)
        )

    def _run_bursts(self, warmup: Warmup, start: Vector, variance: float) -> WarmupState:
        state = warmup.init(self.problem.normalizer.normalize(start))
        with self.journal.loop("iterations"):
            noted = self.journal.load_state(list[NDArray[Any]])
            state = state if noted is None else unpack(state, noted)
            while int(state.end) == WarmupEnd.RUNNING:
                before = state
                state = self._run_burst(warmup, state)
                self._report(state, before, variance)
                self.journal.save_state(pack(state))
                self.interruption.check()
                frequency = self.problem.config.checkpoint_frequency
                is_multiple = int(state.iteration) // frequency > int(before.iteration) // frequency
                if is_multiple or self.journal.is_due:
                    self.journal.save()
        return state

    def _run_burst(self, warmup: Warmup, state: WarmupState) -> WarmupState:
        """Run iterations of L-BFGS until its next pause, or fewer if they are slow."""
        done = int(state.iteration)
        until, end, is_fast = self._burst_end(done), np.inf, False
        while int(state.end) == WarmupEnd.RUNNING and done < until and time.monotonic() < end:
            began = time.monotonic()
            state = warmup.run(state, until if is_fast else done + 1)
            done = int(state.iteration)  # waits for the result
            now = time.monotonic()
            # The time of the first iteration does not count, because it may include compilation.
            is_fast, end = now - began < _FAST, min(end, now + _MAX_BURST_SECONDS)
        return state

    def _burst_end(self, done: int) -> int:
        """Return at which iteration L-BFGS pauses next, given the number of iterations done.

        Callbacks, checkpoints and interruptions are handled in pauses only.
        """
        config = self.problem.config
        every = (config.callback_frequency, config.checkpoint_frequency, _MAX_BURST)
        return min(done - done % frequency + frequency for frequency in every)

    def _report(self, state: WarmupState, before: WarmupState, variance: float) -> None:
        """Report the iterations from ``before`` to ``state`` to the observers as one step.

        The step leads from the best point of one state to that of the other. ``variance`` converts
        the relative loss to a mean squared residual.
        """
        params = self._original(np.asarray(state.best_params))
        step = np.asarray(state.best_params) - np.asarray(before.best_params)
        loss = float(state.best_loss) * variance
        with np.errstate(over="ignore"):
            slope = float(np.linalg.norm(np.asarray(state.gradient)))
        if self.iterations.report(
            "warm-up",
            params,
            loss,
            slope,
            float(np.linalg.norm(step)),
            n_iterations=int(state.iteration) - int(before.iteration),
        ):
            raise StoppedByCallbackError(params)

    def _original(self, normalized: Vector) -> Vector:
        """Return parameters in the units of the model, clipped to the bounds."""
        params = self.problem.normalizer.denormalize(normalized)
        return np.clip(params, self.problem.parameters.low, self.problem.parameters.high)


def _distinct(starts: list[Vector]) -> list[Vector]:
    """Return starts without duplicates, in order."""
    return list({start.tobytes(): start for start in starts}.values())
