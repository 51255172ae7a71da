"""``DefenseLayerTelemetry``: how often the defence layers acted, and how much fits have done."""

from __future__ import annotations

import threading
import time
from collections import deque
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

_MODES = ("refinement", "careful", "exploration", "fixed")
_MAX_EVENTS = 1000


class DefenseLayerTelemetry:
    """Counters of the defence layers; safe to use from several threads.

    Attributes
    ----------
    total_warmup_calls : int
        Warm-ups begun, those that layer 1 skipped included.
    layer1_warm_start_triggers : int
    layer2_lr_mode_counts : dict of str to int
        By mode: "refinement", "careful", "exploration", "fixed".
    layer3_cost_guard_triggers : int
    layer4_clip_triggers : int
        Warm-ups in which at least one update was shortened.
    layer4_clipped_updates : int
        Updates shortened in all.
    lbfgs_history_buffer_fill_events : int
        Warm-ups in which the memory of L-BFGS was filled.
    lbfgs_line_search_failures : int
    total_fits : int
        Fits that have ended.
    total_iterations, total_passes : int
    total_rows_read, total_bytes_read : int
        From the source, sampling included.
    last_loss : float
        That of the last iteration; NaN before there was one.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Set every counter to zero and forget the events."""
        with self._lock:
            self.total_warmup_calls = 0
            self.layer1_warm_start_triggers = 0
            self.layer2_lr_mode_counts = dict.fromkeys(_MODES, 0)
            self.layer3_cost_guard_triggers = 0
            self.layer4_clip_triggers = 0
            self.layer4_clipped_updates = 0
            self.lbfgs_history_buffer_fill_events = 0
            self.lbfgs_line_search_failures = 0
            self.total_fits = 0
            self.total_iterations = 0
            self.total_passes = 0
            self.total_rows_read = 0
            self.total_bytes_read = 0
            self.last_loss = float("nan")
            self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)

    def __call__(self, event: Event) -> None:
        """Count what an event of a fit says."""
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

    def get_trigger_rates(self) -> dict[str, float]:
        """Return how often each layer acted, in percent of the warm-ups.

        Returns
        -------
        dict of str to float
            Shares of the warm-ups, but of ``lbfgs_line_search_failure_rate``: a warm-up may have
            several of these failures, all of which count, so that it may be above 100.
        """
        with self._lock:
            modes = self.layer2_lr_mode_counts
            counts = {
                "layer1_warm_start_rate": self.layer1_warm_start_triggers,
                "layer2_refinement_rate": modes["refinement"],
                "layer2_careful_rate": modes["careful"],
                "layer2_exploration_rate": modes["exploration"],
                "layer3_cost_guard_rate": self.layer3_cost_guard_triggers,
                "layer4_clip_rate": self.layer4_clip_triggers,
                "lbfgs_history_buffer_fill_rate": self.lbfgs_history_buffer_fill_events,
                "lbfgs_line_search_failure_rate": self.lbfgs_line_search_failures,
            }
            calls = max(self.total_warmup_calls, 1)
            return {name: 100.0 * count / calls for name, count in counts.items()}

    def get_summary(self) -> dict[str, Any]:
        """Return the counters by layer: name, triggers and rate in percent."""
        with self._lock:
            rates = self.get_trigger_rates()
            modes = self.layer2_lr_mode_counts

            def layer(name: str, triggers: int, rate: float) -> dict[str, Any]:
                return {"name": name, "triggers": triggers, "rate_pct": rate}

            adaptive = sum(count for mode, count in modes.items() if mode != "fixed")
            adaptive_rate = 100.0 * adaptive / max(self.total_warmup_calls, 1)
            return {
                "total_warmup_calls": self.total_warmup_calls,
                "layer1": layer(
                    "warm start detection",
                    self.layer1_warm_start_triggers,
                    rates["layer1_warm_start_rate"],
                ),
                "layer2": {
                    **layer("adaptive first step", adaptive, adaptive_rate),
                    "mode_counts": dict(modes),
                },
                "layer3": layer(
                    "cost-increase guard",
                    self.layer3_cost_guard_triggers,
                    rates["layer3_cost_guard_rate"],
                ),
                "layer4": layer(
                    "step clipping", self.layer4_clip_triggers, rates["layer4_clip_rate"]
                ),
                "lbfgs": {
                    "history_buffer_fill_events": self.lbfgs_history_buffer_fill_events,
                    "line_search_failures": self.lbfgs_line_search_failures,
                },
            }

    def get_recent_events(self, n: int = 10) -> list[dict[str, Any]]:
        """Return the last ``n`` events, the oldest first: dicts of type, timestamp and data."""
        with self._lock:
            return list(self._events)[-n:] if n > 0 else []

    def export_metrics(self) -> dict[str, float]:
        """Return the counters, and the last loss, under Prometheus names."""
        with self._lock:
            modes = {
                f"nlsq_defense_layer2_{mode}_total": count
                for mode, count in self.layer2_lr_mode_counts.items()
            }
            return {
                "nlsq_defense_warmup_calls_total": self.total_warmup_calls,
                "nlsq_defense_layer1_triggers_total": self.layer1_warm_start_triggers,
                **modes,
                "nlsq_defense_layer3_triggers_total": self.layer3_cost_guard_triggers,
                "nlsq_defense_layer4_triggers_total": self.layer4_clip_triggers,
                "nlsq_defense_layer4_clipped_updates_total": self.layer4_clipped_updates,
                "nlsq_defense_lbfgs_history_fill_total": self.lbfgs_history_buffer_fill_events,
                "nlsq_defense_lbfgs_line_search_failures_total": self.lbfgs_line_search_failures,
                "nlsq_fits_total": self.total_fits,
                "nlsq_iterations_total": self.total_iterations,
                "nlsq_passes_total": self.total_passes,
                "nlsq_rows_read_total": self.total_rows_read,
                "nlsq_bytes_read_total": self.total_bytes_read,
                "nlsq_last_loss": self.last_loss,
            }


_process_telemetry = DefenseLayerTelemetry()


def get_defense_telemetry() -> DefenseLayerTelemetry:
    """Return the telemetry that counts over all fits of this process."""
    return _process_telemetry


def reset_defense_telemetry() -> None:
    """Set the counters of this process to zero."""
    _process_telemetry.reset()
