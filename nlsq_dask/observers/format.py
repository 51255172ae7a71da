"""What happens during a fit, in words: one line or none for each event."""

from __future__ import annotations

from nlsq_dask._text import join_first
from nlsq_dask.events import (
    BlocksFinished,
    BlocksLeftOut,
    CheckpointWritten,
    Event,
    FitEnded,
    FitResumed,
    FitStarted,
    IterationFinished,
    NonFiniteTrial,
    PassFinished,
    PhaseStarted,
    SampleRead,
    SampleSolved,
    TournamentRound,
    WarmupEnded,
    WarmupStarted,
)


def sentence(event: Event) -> str | None:
    """Return what a person should know of an event, None where that is nothing."""
    match event:
        case FitStarted():
            names = join_first(event.param_names, noun="parameters")
            first = f"Fitting {names} to {event.n_rows:,} rows in {event.n_blocks:,} blocks"
            return "\n".join([first, *(f"  {note}" for note in event.notes)])
        case FitResumed():
            return f"Going on from {event.path}, {passes_before(event)}"
        case PhaseStarted():
            return f"Phase {event.phase}: {event.name}"
        case SampleRead():
            return f"  sample: {event.rows:,} rows from {event.blocks:,} blocks"
        case TournamentRound():
            return (
                f"  round {event.round} on {event.rows:,} rows: "
                f"best loss {event.best_loss:.8g}, {event.survivors} starts go on"
            )
        case WarmupStarted(is_warm_start=True):
            return f"  skipped: {event.start} fits (relative loss {event.relative_loss:.3g})"
        case WarmupStarted(mode=None):
            why = f"no iterations are allowed, or the model is not finite at {event.start}"
            return f"  skipped: {why} (relative loss {event.relative_loss:.3g})"
        case WarmupStarted():
            loss = f"relative loss {event.relative_loss:.3g}"
            return f"  {loss} at {event.start}, first step: {event.mode}"
        case WarmupEnded():
            return f"  {event.iterations} iterations, ended by {event.reason}"
        case SampleSolved():
            return f"  sample: loss {event.loss:.8g} after {event.iterations} iterations"
        case BlocksLeftOut():
            return "\n".join(f"  left out: {text}" for text in event.sentences)
        case CheckpointWritten():
            return f"  checkpoint {event.path} written in {event.seconds:.2f} s"
        case FitEnded():
            return event.message
    return _of_iteration(event) or _of_pass(event)


def passes_before(event: FitResumed) -> str:
    """Return which passes a fit that goes on need not make again."""
    number = "1 pass" if event.n_passes == 1 else f"{event.n_passes} passes"
    return f"after {number}{' and a part of the next' if event.is_within_pass else ''}"


def in_words(rate: float) -> str:
    """Return a rate with two digits at least, such as "3.2 million" or "510"."""
    if rate >= 1e5:
        return f"{rate / 1e6:.{1 if rate >= 1e6 else 2}f} million"
    return f"{rate:,.0f}"


def _of_iteration(event: Event) -> str | None:
    match event:
        case IterationFinished():
            verdict = "" if event.accepted else "  (rejected)"
            return (
                f"  {event.stage:>9} {event.iteration:4d}: loss {event.loss:.8g}, "
                f"|gradient| {event.gradient_norm:.3g}, |step| {event.step_norm:.3g}{verdict}"
            )
        case NonFiniteTrial():
            where = f" at {event.n_rows:,} rows" if event.n_rows else ""
            return f"  {event.stage:>9}: a trial point was not finite{where}"
    return None


def _of_pass(event: Event) -> str | None:
    match event:
        case BlocksFinished():
            share = event.blocks / max(event.n_blocks, 1)
            left = "" if not share else f", {event.seconds * (1 / share - 1):.0f} s left"
            return (
                f"  pass {event.number}: {event.blocks:,} of {event.n_blocks:,} blocks "
                f"({share:.0%}) in {event.seconds:.0f} s{left}"
            )
        case PassFinished():
            rows = event.rows + event.rows_cached
            rate = in_words(rows / max(event.seconds, 1e-9))
            cached = f", {event.rows_cached:,} of them from memory" if event.rows_cached else ""
            retries = f", {event.retries} reads tried again" if event.retries else ""
            return (
                f"  pass {event.number}: {rows:,} rows{cached} in {event.seconds:.2f} s "
                f"({rate} rows/s){retries}"
            )
    return None
