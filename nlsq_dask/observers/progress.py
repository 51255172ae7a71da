"""Progress in words: phases and iterations, one line each."""

from __future__ import annotations

import sys
from typing import TextIO

from nlsq_dask.events import (
    BlocksLeftOut,
    Event,
    FitEnded,
    FitResumed,
    FitStarted,
    IterationFinished,
    NonFiniteTrial,
    PassFinished,
    PhaseStarted,
    SampleSolved,
    TournamentRound,
    WarmupEnded,
    WarmupStarted,
)

_MOST_NAMES = 20  # of parameters that are listed


class Progress:
    """Prints what happens to ``stream``.

    Parameters
    ----------
    log_frequency : int
        Iterations between printed lines.
    shows_sample : bool
        Whether iterations on the sample are shown, too.
    stream : file-like, optional
        Standard output if not given.
    """

    def __init__(
        self, log_frequency: int = 1, shows_sample: bool = False, stream: TextIO | None = None
    ) -> None:
        self._log_frequency = log_frequency
        self._shows_sample = shows_sample
        self._stream = stream

    def __call__(self, event: Event) -> None:
        """Print the event if it is one of those that are shown."""
        line = self._line(event)
        if line is not None:
            print(line, file=self._stream or sys.stdout, flush=True)

    def _line(self, event: Event) -> str | None:
        match event:
            case FitStarted():
                names = ", ".join(event.param_names[:_MOST_NAMES])
                if len(event.param_names) > _MOST_NAMES:
                    names += f" and {len(event.param_names) - _MOST_NAMES:,} more parameters"
                return f"Fitting {names} to {event.n_rows:,} rows in {event.n_blocks:,} blocks"
            case FitResumed():
                return f"Going on from {event.path}, after {event.n_passes} passes"
            case PhaseStarted():
                return f"Phase {event.phase}: {event.name}"
            case TournamentRound():
                return (
                    f"  round {event.round} on {event.rows:,} rows: "
                    f"best loss {event.best_loss:.8g}, {event.survivors} starts go on"
                )
            case WarmupStarted(is_warm_start=True):
                return f"  skipped: {event.start} fits (relative loss {event.relative_loss:.3g})"
            case WarmupStarted():
                loss = f"relative loss {event.relative_loss:.3g}"
                return f"  {loss} at {event.start}, first step: {event.mode}"
            case WarmupEnded():
                return f"  {event.iterations} iterations, ended by {event.reason}"
            case SampleSolved():
                return f"  sample: loss {event.loss:.8g} after {event.iterations} iterations"
            case IterationFinished() if self._is_shown(event):
                verdict = "" if event.accepted else "  (rejected)"
                return (
                    f"  {event.stage:>9} {event.iteration:4d}: loss {event.loss:.8g}, "
                    f"|gradient| {event.gradient_norm:.3g}{verdict}"
                )
            case NonFiniteTrial() if self._shows_sample or event.stage != "sample":
                where = f" at {event.n_rows:,} rows" if event.n_rows else ""
                return f"  {event.stage:>9}: a trial point was not finite{where}"
            case PassFinished():
                rows = event.rows + event.rows_cached
                rate = rows / max(event.seconds, 1e-9) / 1e6
                cached = f", {event.rows_cached:,} of them from memory" if event.rows_cached else ""
                retries = f", {event.retries} reads tried again" if event.retries else ""
                return (
                    f"  pass {event.number}: {rows:,} rows{cached} in {event.seconds:.2f} s "
                    f"({rate:.1f} million rows/s){retries}"
                )
            case BlocksLeftOut():
                return "\n".join(f"  left out: {sentence}" for sentence in event.sentences)
            case FitEnded():
                return event.message
        return None

    def _is_shown(self, event: IterationFinished) -> bool:
        wanted = self._shows_sample or event.stage == "all rows"
        return wanted and event.iteration % self._log_frequency == 0
