"""``Messages``: events as small dicts that msgpack can encode, for the dashboard page."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.events import (
    BlocksFinished,
    BlocksMeasured,
    BlocksSkipped,
    Event,
    FitAborted,
    FitEnded,
    FitResumed,
    FitStarted,
    HalvingRound,
    IterationFinished,
    NonFiniteTrial,
    PassFinished,
    PhaseEnded,
    PhaseStarted,
    WarmupEnded,
    WarmupStarted,
)
from nlsq_dask.observers.format import format_event

Message = dict[str, Any]

_MAX_NAMES = 8  # of parameters
_MAX_TEXT = 500  # characters of a sentence
_MAX_LINES = 5  # of an event
_MAX_CELLS = 100  # along each side of a map
_MAX_STEPS = 1000  # of a profile

# Events that the page shows as text.
_TEXT_EVENTS = (
    FitResumed,
    HalvingRound,
    WarmupStarted,
    WarmupEnded,
    NonFiniteTrial,
    BlocksSkipped,
)


class Messages:
    """Converts events to messages; keeps the grid of the fit."""

    def __init__(self) -> None:
        self._grid: tuple[int, ...] = ()
        self._dims: tuple[str, ...] = ()

    def of(self, event: Event) -> list[Message]:
        """Return the messages of an event."""
        match event:
            case FitStarted():
                self._grid, self._dims = event.grid, event.dims
                return [_started(event)]
            case PhaseStarted():
                start = {"phase": event.phase, "name": event.name, "start": event.start_time}
                return [{"kind": "phase", **start}]
            case PhaseEnded():
                end = {"duration": event.duration, "failed": event.failed}
                return [{"kind": "phase ended", "phase": event.phase, **end}]
            case IterationFinished():
                return [_iteration(event)]
            case BlocksFinished():
                return [_progress(event)]
            case BlocksMeasured() if self._grid:
                return [{"kind": "map", "pass": event.number, **self._map(event)}]
            case PassFinished():
                return [_pass(event)]
            case FitEnded():
                state = "finished" if event.success else "no success"
                return [{"kind": "ended", "state": state, "text": event.message[:_MAX_TEXT]}]
            case FitAborted():
                return [{"kind": "ended", "state": "aborted", "text": event.error[:_MAX_TEXT]}]
        now = time.time()
        return [{"kind": "note", "time": now, "text": t[:_MAX_TEXT]} for t in _notes(event)]

    def _map(self, event: BlocksMeasured) -> Message:
        values = np.full(math.prod(self._grid), np.nan)
        used = event.n_used > 0
        values[event.index[used]] = event.chi2[used] / event.n_used[used]
        table, axes = _two_largest(values.reshape(self._grid))
        dropped = [i for i, n in enumerate(self._grid) if n > 1 and i not in axes]
        size = list(table.shape)
        most = _MAX_STEPS if table.ndim == 1 else _MAX_CELLS
        step = tuple(-(n // -most) for n in table.shape)
        for axis, width in enumerate(step):
            table = _worst(table, axis, width)
        return {
            "shape": list(table.shape),
            "dims": [str(self._dims[axis]) for axis in axes],
            "size": size,
            "step": list(step),
            "largest_over": [str(self._dims[axis]) for axis in dropped],
            "values": table.astype(np.float32).tobytes(),
        }


def _two_largest(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    """Reduce a table to its two longest dimensions, or to one if others have length 1."""
    by_length = sorted(range(table.ndim), key=lambda axis: -table.shape[axis])
    kept = [axis for axis in by_length[:2] if table.shape[axis] > 1] or by_length[:1]
    for axis in sorted(set(range(table.ndim)) - set(kept), reverse=True):
        table = np.fmax.reduce(table, axis=axis)
    return table, tuple(sorted(kept))


def _worst(table: NDArray[np.float64], axis: int, width: int) -> NDArray[np.float64]:
    """Return the maximum of each non-overlapping group of ``width`` neighbors along an axis."""
    if width == 1:
        return table
    starts = np.arange(0, table.shape[axis], width)
    return np.asarray(np.fmax.reduceat(table, starts, axis=axis))


def _started(event: FitStarted) -> Message:
    return {
        "kind": "started",
        "time": time.time(),
        "model": event.model[:80],
        "names": [str(name)[:40] for name in event.param_names[:_MAX_NAMES]],
        "n_params": len(event.param_names),
        "n_rows": int(event.n_rows),
        "grid": [int(n) for n in event.grid],
        "dims": [str(dim) for dim in event.dims],
    }


def _iteration(event: IterationFinished) -> Message:
    return {
        "kind": "iteration",
        "iteration": int(event.iteration),
        "stage": event.stage,
        "loss": float(event.loss),
        "gradient_norm": float(event.gradient_norm),
        "trust_radius": float(event.trust_radius),
        "accepted": bool(event.accepted),
    }


def _progress(event: BlocksFinished) -> Message:
    return {
        "kind": "progress",
        "time": time.time(),
        "pass": event.number,
        "blocks": int(event.blocks),
        "n_blocks": int(event.n_blocks),
        "bytes": int(event.bytes),
        "seconds": float(event.seconds),
    }


def _pass(event: PassFinished) -> Message:
    return {
        "kind": "pass",
        "pass": event.number,
        "seconds": float(event.seconds),
        "rows": int(event.rows + event.rows_cached),
        "cached": int(event.rows_cached),
        "bytes": int(event.bytes),
    }


def _notes(event: Event) -> list[str]:
    text = format_event(event) if isinstance(event, _TEXT_EVENTS) else None
    return [line.strip() for line in (text or "").splitlines()[:_MAX_LINES]]
