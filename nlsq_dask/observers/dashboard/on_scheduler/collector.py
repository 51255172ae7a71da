"""``Collector``: exports metrics of fits to Prometheus, by the library prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Collector:
    """Custom collector for a registry of prometheus_client.

    Parameters
    ----------
    read : callable
        Returns the current metrics as a dict of names to values. A metric whose name ends in
        ``_total`` is a counter, any other a gauge.
    is_of_scheduler : bool
        True for the metrics of a Dask scheduler, False for those of the fits in this process. If
        both kinds of collector are registered in one process, the one of the scheduler reports
        nothing, because both would count the same fits.
    """

    is_of_nlsq_dask = True

    def __init__(self, read: Callable[[], dict[str, float]], is_of_scheduler: bool) -> None:
        self._read = read
        self.is_of_scheduler = is_of_scheduler

    def describe(self) -> list[Any]:
        """Return an empty list, so that prometheus_client accepts a second such collector."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the current metrics, as prometheus_client asks for them."""
        from prometheus_client import REGISTRY
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if self.is_of_scheduler and any(not c.is_of_scheduler for c in registered(REGISTRY)):
            return
        for name, value in sorted(self._read().items()):
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(name, f"nlsq_dask: {_description(name)}", value=value)


def registered(registry: Any) -> list[Any]:
    """Return the collectors of this package in a registry.

    They are recognized by an attribute: code that was sent to a scheduler has a class of its own.
    """
    # A private attribute of the registry; if it is missing, the result is empty.
    everyone = list(getattr(registry, "_collector_to_names", ()))
    return [c for c in everyone if getattr(c, "is_of_nlsq_dask", False)]


def _description(name: str) -> str:
    return name.removeprefix("nlsq_").removesuffix("_total").replace("_", " ")
