"""Conversion of events to text for the printed progress, the log and the dashboard page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nlsq_dask._text import join_first
from nlsq_dask.events import (
    BlocksFinished,
    BlocksSkipped,
    CheckpointWritten,
    Event,
    FitAborted,
    FitEnded,
    FitResumed,
    FitStarted,
    HalvingRound,
    IterationFinished,
    NonFiniteTrial,
    PassFinished,
    PhaseStarted,
    SampleRead,
    SampleSolved,
    WarmupEnded,
    WarmupStarted,
)


def format_event(event: Event) -> str | None:
    """Return the text of an event, or None if its class has no text.

    The text is indented by two spaces if the event belongs to a phase of the fit.
    """
    text = TEXTS.get(type(event))
    return text(event) if callable(text) else text and text.format(event)


def format_rate(rate: float) -> str:
    """Return a rate as text with at least two digits, such as "3.2 million" or "510"."""
    if rate >= 1e5:
        return f"{rate / 1e6:.{1 if rate >= 1e6 else 2}f} million"
    return f"{rate:,.0f}"


def _fit_started(event: FitStarted) -> str:
    names = join_first(event.param_names, noun="parameters")
    first = f"Fitting {names} to {event.n_rows:,} rows in {event.n_blocks:,} blocks"
    return "\n".join([first, *(f"  {note}" for note in event.notes)])


def _fit_resumed(event: FitResumed) -> str:
    complete = f"{event.n_passes} pass{'' if event.n_passes == 1 else 'es'} complete"
    partial = f", pass {event.n_passes + 1} in progress" if event.is_within_pass else ""
    return f"Resuming from {event.path} ({complete}{partial})"


def _warmup_started(event: WarmupStarted) -> str:
    loss = f"relative loss {event.relative_loss:.3g}"
    if event.is_warm_start:
        return f"  warm-up skipped (layer 1, warm start): {event.start} already fits ({loss})"
    if event.mode is None:
        why = f"no iterations are allowed, or the model is not finite at {event.start}"
        return f"  warm-up skipped: {why} ({loss})"
    return f"  layer 2, size of the first step: {event.mode} ({loss} at {event.start})"


def _warmup_ended(event: WarmupEnded) -> str:
    parts = [f"  warm-up: {event.iterations} iterations, ended by {event.reason}"]
    if event.cost_guard:
        parts.append("layer 3, cost guard: the loss grew, returned to the best point")
    if event.clipped:
        parts.append(f"layer 4, clipping: {event.clipped} steps shortened")
    if event.line_search_failures:
        parts.append(f"failed line searches: {event.line_search_failures}")
    return "; ".join(parts)


def _iteration(event: IterationFinished) -> str:
    rejected = "" if event.accepted else "  (rejected)"
    return (
        f"  {event.stage:>9} {event.iteration:4d}: loss {event.loss:.8g}, "
        f"|gradient| {event.gradient_norm:.3g}, |step| {event.step_norm:.3g}{rejected}"
    )


def _non_finite(event: NonFiniteTrial) -> str:
    where = f" in {event.n_rows:,} rows" if event.n_rows else ""
    return f"  {event.stage:>9}: model or derivative not finite at a trial point{where}"


def _progress(event: BlocksFinished) -> str:
    share = event.blocks / max(event.n_blocks, 1)
    remaining = f", {event.seconds * (1 / share - 1):.0f} s remaining" if share else ""
    return (
        f"  pass {event.number}: {event.blocks:,} of {event.n_blocks:,} blocks "
        f"({share:.0%}) in {event.seconds:.0f} s{remaining}"
    )


def _pass(event: PassFinished) -> str:
    rows = event.rows + event.rows_cached
    rate = format_rate(rows / max(event.seconds, 1e-9))
    cached = f", {event.rows_cached:,} of them from memory" if event.rows_cached else ""
    retries = f", {event.retries} reads retried" if event.retries else ""
    return (
        f"  pass {event.number}: {rows:,} rows{cached} in {event.seconds:.2f} s "
        f"({rate} rows/s){retries}"
    )


# By event: a template in which {0} is the event, or a function of it.
TEXTS: dict[type[Event], str | Callable[[Any], str]] = {
    FitStarted: _fit_started,
    FitResumed: _fit_resumed,
    PhaseStarted: "Phase {0.phase}: {0.name}",
    SampleRead: "  sample: {0.rows:,} rows from {0.blocks:,} blocks",
    HalvingRound: "  successive halving, round {0.round} on {0.rows:,} rows: "
    "best loss {0.best_loss:.8g}, {0.n_remaining} starts remain",
    WarmupStarted: _warmup_started,
    WarmupEnded: _warmup_ended,
    SampleSolved: "  sample: loss {0.loss:.8g} after {0.iterations} iterations",
    IterationFinished: _iteration,
    NonFiniteTrial: _non_finite,
    BlocksFinished: _progress,
    PassFinished: _pass,
    BlocksSkipped: lambda event: "\n".join(f"  skipped: {text}" for text in event.sentences),
    CheckpointWritten: "  checkpoint {0.path} written in {0.seconds:.2f} s",
    FitEnded: "{0.message}",
    FitAborted: "{0.error}",
}
