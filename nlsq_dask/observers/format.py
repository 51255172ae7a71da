"""Conversion of events to text for the printed progress, the log and the dashboard page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    MapEnded,
    MapResumed,
    MapStarted,
    NonFiniteTrial,
    PassFinished,
    PhaseStarted,
    SampleRead,
    SampleSolved,
    SubsetFinished,
    TileFinished,
    WaitingForWorkers,
    WarmupEnded,
    WarmupStarted,
    WorkersPaused,
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


def format_fit_rate(event: TileFinished | MapEnded) -> str:
    """Return the number of pixels that this run fits per second, such as "510 fits/s"."""
    return f"{format_rate(event.fitted / max(event.seconds, 1e-9))} fits/s"


def format_totals(totals: Mapping[str, int], most: int = 20) -> str:
    """Return the first ``most`` numbers of pixels by status, as "510 converged, 2 stalled"."""
    return join_first([f"{n:,} {status}" for status, n in totals.items()], most, noun="statuses")


def format_tiles(event: TileFinished) -> str:
    """Return how much of a map is complete, at which rate, and how much time remains."""
    remaining = event.seconds * (event.n_pixels - event.pixels) / max(event.fitted, 1)
    return (
        f"{event.pixels:,} of {_count(event.n_pixels, 'pixel')}, {event.tiles:,} of "
        f"{_count(event.n_tiles, 'tile')}, {format_fit_rate(event)}, {remaining:,.0f} s remaining"
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _fit_started(event: FitStarted) -> str:
    names = join_first(event.param_names, noun="parameters")
    rows, blocks = _count(event.n_rows, "row"), _count(event.n_blocks, "block")
    first = f"Fitting {names} to {rows} in {blocks}"
    return _with_notes(first, event.notes)


def _with_notes(first: str, notes: tuple[str, ...]) -> str:
    return "\n".join([first, *(f"  {note}" for note in notes)])


def _fit_resumed(event: FitResumed) -> str:
    complete = f"{event.n_passes} pass{'' if event.n_passes == 1 else 'es'} complete"
    partial = f", pass {event.n_passes + 1} in progress" if event.is_within_pass else ""
    return f"Resuming from {event.path} ({complete}{partial})"


def _warmup_started(event: WarmupStarted) -> str:
    loss = f"relative loss {event.relative_loss:.3g}"
    if event.is_warm_start:
        return f"  warm-up skipped (layer 1, warm start): {event.start} already fits ({loss})"
    if event.mode is None:
        why = f"the model is not finite at {event.start}"
        if math.isfinite(event.relative_loss):
            why = f"no iterations are allowed, or the gradient is not finite at {event.start}"
        return f"  warm-up skipped: {why} ({loss})"
    return f"  warm-up from {event.start}: {loss}, first step (layer 2): {event.mode}"


def _warmup_ended(event: WarmupEnded) -> str:
    reason = _WARMUP_ENDS.get(event.reason, event.reason)
    parts = [f"  warm-up ended after {_count(event.iterations, 'iteration')}: {reason}"]
    if event.cost_guard:
        parts.append("layer 3, cost guard: the loss grew, returned to the best point")
    if event.clipped:
        parts.append(f"layer 4, clipping: {_count(event.clipped, 'step')} shortened")
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
        f"  {format_pass(event)}: {event.blocks:,} of {_count(event.n_blocks, 'block')} "
        f"({share:.0%}) in {event.seconds:.0f} s{remaining}"
    )


def format_pass(event: BlocksFinished) -> str:
    """Return what a running pass sums over: "pass 2", or "subset 1" of the blocks."""
    return f"subset {event.subset}" if event.subset else f"pass {event.number}"


def _pass(event: PassFinished) -> str:
    return f"  pass {event.number}: {_amount(event)}"


def _subset(event: SubsetFinished) -> str:
    of = f" of {event.n_subsets}" if event.n_subsets > 1 else ""
    blocks = _count(event.blocks, "block")
    return f"  subset {event.number}{of}, {blocks}: {_amount(event)}, loss {event.loss:.8g}"


def _amount(event: PassFinished | SubsetFinished) -> str:
    rows = event.rows + event.rows_cached
    rate = format_rate(rows / max(event.seconds, 1e-9))
    cached = f", {event.rows_cached:,} of them from memory" if event.rows_cached else ""
    retries = f", {_count(event.retries, 'read')} retried" if event.retries else ""
    return f"{_count(rows, 'row')}{cached} in {event.seconds:.2f} s ({rate} rows/s){retries}"


def _checkpoint(event: CheckpointWritten) -> str:
    failed = f", after {event.n_failed} that could not be written" if event.n_failed else ""
    return f"  checkpoint {event.path} written in {event.seconds:.2f} s{failed}"


def _map_started(event: MapStarted) -> str:
    names = join_first(event.param_names, noun="parameters")
    pixels, points = _count(event.n_pixels, "pixel"), _count(event.n_points, "point")
    first = f"Fitting {names} to {pixels} of {points} in {_count(event.n_tiles, 'tile')}"
    return _with_notes(first, event.notes)


def _map_resumed(event: MapResumed) -> str:
    verb = "is" if event.tiles == 1 else "are"
    text = f"Resuming: {event.tiles:,} of {_count(event.n_tiles, 'tile')} {verb} in the store"
    return f"{text}; damaged: {event.n_damaged:,}" if event.n_damaged else text


def _map_ended(event: MapEnded) -> str:
    pixels = _count(event.n_pixels, "pixel")
    if not event.is_complete:
        pixels = f"Stopped, {event.message}: {event.pixels:,} of {pixels}"
    if event.fitted < event.pixels:  # others were in the store
        pixels += f" complete, {event.fitted:,} of them"
    rate = f" ({format_fit_rate(event)})" if event.fitted else ""
    totals = f": {format_totals(event.totals)}" if event.totals else ""
    return f"{pixels} fitted in {event.seconds:.2f} s{rate}{totals}"


def _waiting(event: WaitingForWorkers) -> str:
    if event.n_paused:
        which = "its only worker is" if event.n_paused == 1 else f"all {event.n_paused} workers are"
        parts = [f"  waiting for workers of the cluster at {event.scheduler}: {which} paused"]
    else:
        parts = [f"  waiting for workers: the cluster at {event.scheduler} has none"]
        if event.n_requested is not None:
            parts.append(f"requested: {event.n_requested:,}")
    if event.n_tasks:
        parts.append(f"waiting tasks: {event.n_tasks:,}")
    return f"{'; '.join(parts)} ({event.seconds:.0f} s)"


# By the criterion that ended the warm-up; the others are named like options.
_WARMUP_ENDS = {"line_search": "no further decrease along the line", "max_iter": "iteration limit"}

# By event: a template in which {0} is the event, or a function of it.
TEXTS: dict[type[Event], str | Callable[[Any], str]] = {
    FitStarted: _fit_started,
    FitResumed: _fit_resumed,
    PhaseStarted: "Phase {0.phase}: {0.name}",
    SampleRead: lambda event: (
        f"  sample: {_count(event.rows, 'row')} from {_count(event.blocks, 'block')}"
    ),
    HalvingRound: "  successive halving, round {0.round} on {0.rows:,} rows: "
    "best loss {0.best_loss:.8g}, remaining starts: {0.n_remaining}",
    WarmupStarted: _warmup_started,
    WarmupEnded: _warmup_ended,
    SampleSolved: lambda event: (
        f"  sample: loss {event.loss:.8g} after {_count(event.iterations, 'iteration')}"
    ),
    IterationFinished: _iteration,
    NonFiniteTrial: _non_finite,
    BlocksFinished: _progress,
    PassFinished: _pass,
    SubsetFinished: _subset,
    BlocksSkipped: lambda event: "\n".join(f"  skipped: {text}" for text in event.sentences),
    CheckpointWritten: _checkpoint,
    MapStarted: _map_started,
    MapResumed: _map_resumed,
    TileFinished: lambda event: f"  {format_tiles(event)}; {format_totals(event.totals)}",
    MapEnded: _map_ended,
    WaitingForWorkers: _waiting,
    WorkersPaused: lambda event: "\n".join(f"  paused: {text}" for text in event.sentences),
    FitEnded: "{0.message}",
    FitAborted: "{0.error}",
}
