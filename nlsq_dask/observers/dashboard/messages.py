"""``Messages``: converts events of a fit to small dicts, which are sent to the dashboard page.

A message has a ``"kind"`` and only values of built-in types, because Dask sends it by msgpack.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from nlsq_dask.data.shapes import longest_axes
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
    MapDrawn,
    MapEnded,
    MapResumed,
    MapStarted,
    NonFiniteTrial,
    PassFinished,
    PhaseEnded,
    PhaseStarted,
    SubsetFinished,
    TileFinished,
    WaitingForWorkers,
    WarmupEnded,
    WarmupStarted,
    WorkersPaused,
)
from nlsq_dask.observers.format import format_event, format_tiles, format_totals

Message = dict[str, Any]

_MAX_NAMES = 8  # names of parameters
_MAX_TEXT = 500  # characters of one text
_MAX_LINES = 5  # lines of the text of an event
_MAX_CELLS = 100  # cells along each side of a map of the blocks
_MAX_STEPS = 1000  # values, if the blocks have one dimension

# By event: the kind of its message, and the fields of the event that the message has.
_FIELDS: dict[type[Event], tuple[str, str]] = {
    PhaseStarted: ("phase", "phase name start_time"),
    PhaseEnded: ("phase ended", "phase duration failed"),
    IterationFinished: ("iteration", "iteration stage loss gradient_norm trust_radius accepted"),
    BlocksFinished: ("progress", "number subset blocks n_blocks bytes seconds"),
    PassFinished: ("pass", "number"),
    TileFinished: ("tiles", "pixels n_pixels fitted seconds"),
}
_KEYS = {"number": "pass", "start_time": "start"}  # keys that are not the names of their fields

# Kinds of messages of which only the last one matters; it replaces those that are not sent yet.
REPLACED = {"progress", "tiles", "picture"}

# Events that the page shows as lines of text.
_TEXT_EVENTS = (
    FitResumed,
    HalvingRound,
    WarmupStarted,
    WarmupEnded,
    NonFiniteTrial,
    BlocksSkipped,
    SubsetFinished,
    MapResumed,
    WaitingForWorkers,
    WorkersPaused,
)


class Messages:
    """Converter from the events of one fit to messages, small dicts for the dashboard page."""

    def __init__(self) -> None:
        self._grid: tuple[int, ...] = ()  # number of blocks along each dimension of the data
        self._dims: tuple[str, ...] = ()  # names of the dimensions

    def of(self, event: Event) -> list[Message]:
        """Return the messages for an event; an empty list if the page does not show the event."""
        match event:
            case FitStarted():
                self._grid, self._dims = event.grid, event.dims
                return [_started(event)]
            case BlocksMeasured() if self._grid:
                return [{"kind": "map", "pass": event.number, **self._map(event)}]
            case FitEnded():
                state = "finished" if event.success else "no success"
                return [{"kind": "ended", "state": state, "text": event.message[:_MAX_TEXT]}]
            case FitAborted():
                return [{"kind": "ended", "state": "aborted", "text": event.error[:_MAX_TEXT]}]
            case MapStarted():
                return [_map_started(event)]
            case MapDrawn():
                return [_picture(event)]
            case MapEnded():
                state = "finished" if event.is_complete else "stopped"
                return [{"kind": "ended", "state": state, "text": format_event(event)}]
        now = time.time()
        if type(event) in _FIELDS:
            kind, names = _FIELDS[type(event)]
            message = {"kind": kind, "time": now, **_numbers(event, names.split())}
            return [message | (_texts(event) if isinstance(event, TileFinished) else {})]
        return [{"kind": "note", "time": now, "text": t[:_MAX_TEXT]} for t in _notes(event)]

    def _map(self, event: BlocksMeasured) -> Message:
        values = np.full(math.prod(self._grid), np.nan)
        used = event.n_used > 0
        values[event.index[used]] = event.chi2[used] / event.n_used[used]
        kept = longest_axes(self._grid)
        dropped = [axis for axis in range(len(self._grid)) if axis not in kept]
        table = np.fmax.reduce(values.reshape(self._grid), axis=tuple(dropped))
        size = list(table.shape)
        most = _MAX_STEPS if table.ndim == 1 else _MAX_CELLS
        step = [-(n // -most) for n in size]
        for axis, width in enumerate(step):  # the maximum of each ``width`` neighbors
            table = np.fmax.reduceat(table, np.arange(0, size[axis], width), axis)
        return {
            "shape": list(table.shape),
            "dims": [str(self._dims[axis]) for axis in kept],
            "size": size,
            "step": step,
            "largest_over": [str(self._dims[axis]) for axis in dropped if self._grid[axis] > 1],
            "values": table.astype(np.float32).tobytes(),
        }


def _numbers(event: Event, names: list[str]) -> Message:
    """Return the fields ``names`` of an event as a dict of Python scalars, for a message."""
    values = {name: np.asarray(getattr(event, name)).item() for name in names}
    return {_KEYS.get(name, name): value for name, value in values.items()}


def _model(event: FitStarted | MapStarted) -> Message:
    return {
        "kind": "started",
        "model": event.model[:80],
        "names": [str(name)[:40] for name in event.param_names[:_MAX_NAMES]],
        "n_params": len(event.param_names),
        "grid": [int(n) for n in event.grid],
    }


def _started(event: FitStarted) -> Message:
    return {**_model(event), "n_rows": int(event.n_rows)}


def _map_started(event: MapStarted) -> Message:
    return {**_model(event), "n_pixels": int(event.n_pixels), "n_points": int(event.n_points)}


def _texts(event: TileFinished) -> Message:
    return {"text": format_tiles(event), "totals": format_totals(event.totals)}


def _picture(event: MapDrawn) -> Message:
    return {
        "kind": "picture",
        "parameter": event.parameter[:40],
        "shape": list(event.status.shape),
        "dims": list(event.dims),
        "size": list(event.size),
        "step": list(event.step),
        "over": list(event.over),
        "status": event.status.astype(np.int8).tobytes(),
        "values": event.values.astype(np.float32).tobytes(),
    }


def _notes(event: Event) -> list[str]:
    text = format_event(event) if isinstance(event, _TEXT_EVENTS) else None
    return [line.strip() for line in (text or "").splitlines()[:_MAX_LINES]]
