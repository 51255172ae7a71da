"""``metrics_collector``: export the metrics of fits in this process, for fits without a cluster."""

from __future__ import annotations

from nlsq_dask.observers.dashboard.on_scheduler.collector import Collector
from nlsq_dask.observers.telemetry import get_defense_telemetry


def metrics_collector() -> Collector:
    """Return a collector that exports the counters of all fits in this process to Prometheus.

    Returns
    -------
    Collector
        Pass it to ``prometheus_client.REGISTRY.register``. Its metrics are those of
        ``get_defense_telemetry().export_metrics()``.

    See Also
    --------
    get_defense_telemetry : Return the counters as a Python object.

    Examples
    --------
    >>> from prometheus_client import CollectorRegistry
    >>> registry = CollectorRegistry()
    >>> registry.register(metrics_collector())
    >>> registry.get_sample_value("nlsq_fits_total") is None
    False
    """
    return Collector(get_defense_telemetry().export_metrics, is_of_scheduler=False)
