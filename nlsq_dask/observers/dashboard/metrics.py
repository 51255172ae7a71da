"""Metrics of this process, for people without a cluster."""

from __future__ import annotations

from nlsq_dask.observers.dashboard.on_scheduler.collector import Collector
from nlsq_dask.observers.telemetry import get_defense_telemetry


def metrics_collector() -> Collector:
    """Return a collector of prometheus_client that shows what the fits of this process count.

    Returns
    -------
    Collector
        For ``prometheus_client.REGISTRY.register``; the names are those of
        ``get_defense_telemetry().export_metrics()``.
    """
    return Collector(get_defense_telemetry().export_metrics, is_of_scheduler=False)
