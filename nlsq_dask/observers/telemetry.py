"""``DefenseLayerTelemetry``: counters of the defense layers and of the work of fits."""

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
    PassFinished,
    SampleRead,
    WarmupEnded,
    WarmupStarted,
)

_FIXED = "fixed"  # the mode where layer 2 is off
_MAX_EVENTS = 1000


def _counter(doc: str, metric: str, rate: str = "", first: Any = 0) -> Any:
    """Declare a counter.

    Parameters
    ----------
    doc : str
        Its documentation.
    metric : str
        Its name in Prometheus.
    rate : str
        Its name in ``get_trigger_rates``; none if empty.
    first : int, float or dict of str to int
        Its value before anything is counted. A dict counts by mode, which replaces the ``*`` in
        the names.
    """
    return field(metadata={"doc": doc, "metric": metric, "rate": rate, "first": first})


@dataclass(init=False, eq=False, repr=False)
class DefenseLayerTelemetry:
    """Counters of the defense layers and of the work of fits; safe to use from several threads."""

    total_warmup_calls: int = _counter(
        "Warm-ups started, including those skipped by layer 1.", "nlsq_defense_warmup_calls_total"
    )
    layer1_warm_start_triggers: int = _counter(
        "Warm-ups skipped because the start already fits.",
        "nlsq_defense_layer1_triggers_total",
        "layer1_warm_start_rate",
    )
    layer2_lr_mode_counts: dict[str, int] = _counter(
        'Warm-ups by mode: "refinement", "careful", "exploration", "fixed".',
        "nlsq_defense_layer2_*_total",
        "layer2_*_rate",
        dict.fromkeys(("refinement", "careful", "exploration", _FIXED), 0),
    )
    layer3_cost_guard_triggers: int = _counter(
        "Warm-ups aborted because the loss grew.",
        "nlsq_defense_layer3_triggers_total",
        "layer3_cost_guard_rate",
    )
    layer4_clip_triggers: int = _counter(
        "Warm-ups in which at least one update was clipped.",
        "nlsq_defense_layer4_triggers_total",
        "layer4_clip_rate",
    )
    layer4_clipped_updates: int = _counter(
        "Updates clipped in all warm-ups.", "nlsq_defense_layer4_clipped_updates_total"
    )
    lbfgs_history_buffer_fill_events: int = _counter(
        "Warm-ups in which the history of L-BFGS was filled.",
        "nlsq_defense_lbfgs_history_fill_total",
        "lbfgs_history_buffer_fill_rate",
    )
    lbfgs_line_search_failures: int = _counter(
        "Line searches that failed.",
        "nlsq_defense_lbfgs_line_search_failures_total",
        "lbfgs_line_search_failure_rate",
    )
    total_fits: int = _counter("Fits that ended.", "nlsq_fits_total")
    total_iterations: int = _counter("Iterations of all phases.", "nlsq_iterations_total")
    total_passes: int = _counter("Passes over all rows.", "nlsq_passes_total")
    total_rows_read: int = _counter(
        "Rows read from the source, including those read for samples.", "nlsq_rows_read_total"
    )
    total_bytes_read: int = _counter("Bytes read from the source.", "nlsq_bytes_read_total")
    last_loss: float = _counter(
        "Loss at the last iteration; NaN before the first.", "nlsq_last_loss", first=math.nan
    )

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Set every counter to zero and forget the events."""
        with self._lock:
            for counter in fields(self):
                setattr(self, counter.name, copy(counter.metadata["first"]))
            self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)

    def __call__(self, event: Event) -> None:
        """Count an event."""
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
                case SampleRead():
                    self._count_read(event.rows_read, event.bytes)
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
        """Yield name ("metric" or "rate", as ``kind`` says), mode and count of each counter.

        A counter by mode is several; the mode of the others is empty.
        """
        for counter in fields(self):
            value = getattr(self, counter.name)
            for mode, count in (value if isinstance(value, dict) else {"": value}).items():
                yield counter.metadata[kind].replace("*", mode), mode, count

    def _percent(self, count: float) -> float:
        return 100.0 * count / max(self.total_warmup_calls, 1)

    def get_trigger_rates(self) -> dict[str, float]:
        """Return the triggers of each layer in percent of the warm-ups.

        Returns
        -------
        dict of str to float
            Shares of the warm-ups, except ``lbfgs_line_search_failure_rate``: all failures of a
            warm-up count, so that it can exceed 100.
        """
        with self._lock:
            return {
                name: self._percent(count)
                for name, mode, count in self._counts("rate")
                if name and mode != _FIXED
            }

    def get_summary(self) -> dict[str, Any]:
        """Return the counters by layer: name, triggers and rate in percent."""
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
        """Return the last ``n`` events, the oldest first: dicts of type, timestamp and data."""
        with self._lock:
            return list(self._events)[-n:] if n > 0 else []

    def export_metrics(self) -> dict[str, float]:
        """Return the counters, and the last loss, under Prometheus names."""
        with self._lock:
            return {name: count for name, _, count in self._counts("metric")}


if DefenseLayerTelemetry.__doc__ is not None:  # python -OO strips docstrings
    DefenseLayerTelemetry.__doc__ += "\n\n    Attributes\n    ----------\n" + "\n".join(
        f"    {counter.name} : {counter.type}\n        {counter.metadata['doc']}"
        for counter in fields(DefenseLayerTelemetry)
    )

_process_telemetry = DefenseLayerTelemetry()


def get_defense_telemetry() -> DefenseLayerTelemetry:
    """Return the telemetry of all fits in this process.

    Returns
    -------
    DefenseLayerTelemetry

    See Also
    --------
    reset_defense_telemetry : Reset its counters.

    Examples
    --------
    >>> reset_defense_telemetry()
    >>> get_defense_telemetry().total_fits
    0
    """
    return _process_telemetry


def reset_defense_telemetry() -> None:
    """Reset the telemetry of this process.

    See Also
    --------
    get_defense_telemetry : Return the telemetry.
    """
    _process_telemetry.reset()
