"""``DefenseLayerTelemetry``: counters of fits, and of the safeguards of the L-BFGS warm-up.

The safeguards, called defense layers, skip, shorten or end a warm-up that would do harm.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from nlsq_dask.events import (
    Event,
    FitAborted,
    FitEnded,
    IterationFinished,
    MapEnded,
    PassFinished,
    SampleRead,
    SubsetFinished,
    TileFinished,
    WarmupEnded,
    WarmupStarted,
)
from nlsq_dask.solvers.lanes.records import LaneStatus

_FIXED = "fixed"  # the mode where layer 2 is off
_MAX_EVENTS = 1000
_PIXEL_STATUSES = [s.name.lower() for s in LaneStatus if s is not LaneStatus.NOT_FITTED]


def _counter(doc: str, metric: str, rate: str = "", first: Any = 0) -> Any:
    """Return a dataclass field for a counter.

    Parameters
    ----------
    doc : str
        Documentation of the counter.
    metric : str
        Name of the counter in Prometheus.
    rate : str
        Name of the counter in ``get_trigger_rates``; empty if it is not part of them.
    first : int, float or dict of str to int
        Value before anything is counted. A dict has one count per key, such as the mode of a
        warm-up or the status of a pixel, and the key replaces the ``*`` in ``metric`` and ``rate``.
    """
    return field(metadata={"doc": doc, "metric": metric, "rate": rate, "first": first})


@dataclass(init=False, eq=False, repr=False)
class DefenseLayerTelemetry:
    """Counters of fits: triggers of the defense layers, iterations, passes, data read, and pixels.

    The defense layers keep the L-BFGS warm-up from moving away from a good start: (1) it is skipped
    if the start already fits, (2) its first step is smaller the better the start fits, (3) it ends
    if the loss grows, (4) long steps are shortened. The methods can be called from several threads.
    """

    total_warmup_calls: int = _counter(
        "Warm-ups started, including those skipped by layer 1.", "nlsq_defense_warmup_calls_total"
    )
    layer1_warm_start_triggers: int = _counter(
        "Warm-ups skipped because the start already fits.",
        "nlsq_defense_layer1_triggers_total",
        "layer1_warm_start_rate",
    )
    layer2_lr_mode_counts: dict[str, int] = _counter(
        'Warm-ups by choice of the first step: "refinement" (relative loss below 0.1), "careful" '
        '(below 1), "exploration", or "fixed" if layer 2 is disabled.',
        "nlsq_defense_layer2_*_total",
        "layer2_*_rate",
        dict.fromkeys(("refinement", "careful", "exploration", _FIXED), 0),
    )
    layer3_cost_guard_triggers: int = _counter(
        "Warm-ups that ended because the loss grew.",
        "nlsq_defense_layer3_triggers_total",
        "layer3_cost_guard_rate",
    )
    layer4_clip_triggers: int = _counter(
        "Warm-ups in which at least one step was shortened.",
        "nlsq_defense_layer4_triggers_total",
        "layer4_clip_rate",
    )
    layer4_clipped_updates: int = _counter(
        "Steps shortened in all warm-ups.", "nlsq_defense_layer4_clipped_updates_total"
    )
    lbfgs_history_buffer_fill_events: int = _counter(
        "Warm-ups with at least as many iterations as L-BFGS keeps in its history.",
        "nlsq_defense_lbfgs_history_fill_total",
        "lbfgs_history_buffer_fill_rate",
    )
    lbfgs_line_search_failures: int = _counter(
        "Line searches that found no acceptable step, in all warm-ups.",
        "nlsq_defense_lbfgs_line_search_failures_total",
        "lbfgs_line_search_failure_rate",
    )
    total_fits: int = _counter("Fits that ended.", "nlsq_fits_total")
    total_iterations: int = _counter("Iterations of all phases.", "nlsq_iterations_total")
    total_passes: int = _counter("Complete passes over all rows.", "nlsq_passes_total")
    total_rows_read: int = _counter(
        "Rows read from the source, for samples and for passes.", "nlsq_rows_read_total"
    )
    total_bytes_read: int = _counter("Bytes read from the source.", "nlsq_bytes_read_total")
    total_maps: int = _counter("Calls of ``fit_each`` that ended.", "nlsq_maps_total")
    pixel_status_counts: dict[str, int] = _counter(
        "Pixels that ``fit_each`` fitted, by status. Lazy results are not counted.",
        "nlsq_pixels_*_total",
        first=dict.fromkeys(_PIXEL_STATUSES, 0),
    )
    last_loss: float = _counter(
        "Loss at the latest iteration; NaN before the first one.", "nlsq_last_loss", first=math.nan
    )

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Reset all counters to their initial values and delete the recorded events."""
        with self._lock:
            for counter in fields(self):
                setattr(self, counter.name, copy(counter.metadata["first"]))
            self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)

    def __call__(self, event: Event) -> None:
        """Update the counters for an event of a fit."""
        with self._lock:
            match event:
                case WarmupStarted():
                    self._count_start(event)
                case WarmupEnded():
                    self._count_end(event)
                case IterationFinished():
                    self.total_iterations += event.n_iterations
                    self.last_loss = float(event.loss)
                case PassFinished():
                    self.total_passes += 1
                    self._count_read(event.rows, event.bytes)
                case SubsetFinished():
                    self._count_read(event.rows, event.bytes)
                case SampleRead():
                    self._count_read(event.rows_read, event.bytes)
                case TileFinished():
                    for status, count in event.counts.items():
                        self.pixel_status_counts[status] += count
                case MapEnded() | FitAborted(is_map=True):
                    self.total_maps += 1
                case FitEnded() | FitAborted():
                    self.total_fits += 1

    def _count_read(self, rows: int, n_bytes: int) -> None:
        self.total_rows_read += int(rows)
        self.total_bytes_read += int(n_bytes)

    def _count_start(self, event: WarmupStarted) -> None:
        self.total_warmup_calls += 1
        data = {"relative_loss": event.relative_loss}
        if event.is_warm_start:
            self.layer1_warm_start_triggers += 1
            self._record("layer1_warm_start", data)
        if event.mode is not None:
            self.layer2_lr_mode_counts[event.mode] += 1
            self._record("layer2_lr_mode", {**data, "mode": event.mode})

    def _count_end(self, event: WarmupEnded) -> None:
        if event.cost_guard:
            self.layer3_cost_guard_triggers += 1
            self._record("layer3_cost_guard", {"iteration": event.iterations, "loss": event.loss})
        if event.clipped:
            self.layer4_clip_triggers += 1
            self.layer4_clipped_updates += event.clipped
            self._record("layer4_clip", {"updates": event.clipped})
        if event.history_filled:
            self.lbfgs_history_buffer_fill_events += 1
            self._record("lbfgs_history_buffer_fill", {"iterations": event.iterations})
        if event.line_search_failures:
            self.lbfgs_line_search_failures += event.line_search_failures
            self._record("lbfgs_line_search_failure", {"failures": event.line_search_failures})

    def _record(self, kind: str, data: dict[str, Any]) -> None:
        self._events.append({"type": kind, "timestamp": time.time(), "data": data})

    def _counts(self, kind: str) -> Iterator[tuple[str, str, float]]:
        """Yield the name, key and count of each counter.

        The name is the counter's "metric" or "rate", as ``kind`` says. A dict of counts yields one
        count per key; for all other counters the key is an empty string.
        """
        for counter in fields(self):
            value = getattr(self, counter.name)
            for key, count in (value if isinstance(value, dict) else {"": value}).items():
                yield counter.metadata[kind].replace("*", key), key, count

    def _percent(self, count: float) -> float:
        return 100.0 * count / max(self.total_warmup_calls, 1)

    def get_trigger_rates(self) -> dict[str, float]:
        """Return how often each defense layer, explained at ``DefenseLayerTelemetry``, acted.

        Returns
        -------
        dict of str to float
            Percentages by name. ``lbfgs_line_search_failure_rate`` counts every failed line
            search, and can exceed 100 because one warm-up can have several failures.
        """
        with self._lock:
            return {
                name: self._percent(count)
                for name, mode, count in self._counts("rate")
                if name and mode != _FIXED
            }

    def get_summary(self) -> dict[str, Any]:
        """Return the counters of warm-ups as a nested dict.

        Returns
        -------
        dict
            ``"total_warmup_calls"``; for each of ``"layer1"`` to ``"layer4"`` a dict of its name,
            number of triggers, and rate in percent of the warm-ups, for ``"layer2"`` also by mode;
            and for ``"lbfgs"`` the numbers of full histories and of failed line searches.
        """
        with self._lock:
            summary: dict[str, Any] = {"total_warmup_calls": self.total_warmup_calls}
            modes = dict(self.layer2_lr_mode_counts)
            for layer, name, n in (
                ("layer1", "warm start detection", self.layer1_warm_start_triggers),
                ("layer2", "adaptive first step", sum(modes.values()) - modes[_FIXED]),
                ("layer3", "cost-increase guard", self.layer3_cost_guard_triggers),
                ("layer4", "step clipping", self.layer4_clip_triggers),
            ):
                summary[layer] = {"name": name, "triggers": n, "rate_pct": self._percent(n)}
            summary["layer2"]["mode_counts"] = modes
            summary["lbfgs"] = {
                "history_buffer_fill_events": self.lbfgs_history_buffer_fill_events,
                "line_search_failures": self.lbfgs_line_search_failures,
            }
            return summary

    def get_recent_events(self, n: int = 10) -> list[dict[str, Any]]:
        """Return the last ``n`` actions of the defense layers, the oldest first.

        ``DefenseLayerTelemetry`` explains the layers.

        Returns
        -------
        list of dict
            Each has a ``"type"`` such as ``"layer4_clip"``, a ``"timestamp"`` in seconds since the
            epoch, and ``"data"``, a dict of details. At most 1,000 are kept.
        """
        with self._lock:
            return list(self._events)[-n:] if n > 0 else []

    def export_metrics(self) -> dict[str, float]:
        """Return all counters, and the last loss, by their names in Prometheus."""
        with self._lock:
            return {name: count for name, _, count in self._counts("metric")}


if DefenseLayerTelemetry.__doc__ is not None:  # python -OO strips docstrings
    DefenseLayerTelemetry.__doc__ += "\n\n    Attributes\n    ----------\n" + "\n".join(
        f"    {counter.name} : {counter.type}\n        {counter.metadata['doc']}"
        for counter in fields(DefenseLayerTelemetry)
    )

_process_telemetry = DefenseLayerTelemetry()


def get_defense_telemetry() -> DefenseLayerTelemetry:
    """Return the counters of all fits in this process, those of pixels included.

    Returns
    -------
    DefenseLayerTelemetry

    See Also
    --------
    reset_defense_telemetry : Reset these counters.

    Examples
    --------
    >>> reset_defense_telemetry()
    >>> get_defense_telemetry().total_fits
    0
    """
    return _process_telemetry


def reset_defense_telemetry() -> None:
    """Reset the counters of all fits in this process.

    See Also
    --------
    get_defense_telemetry : Return these counters.
    """
    _process_telemetry.reset()
