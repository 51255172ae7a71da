"""``Collector``: metrics for prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Collector:
    """A custom collector of prometheus_client.

    Parameters
    ----------
    read : callable
        Returns a dict of metric names to values; names of counters end in ``_total``.
    is_of_scheduler : bool
        Whether it runs in the Dask scheduler. Then it yields nothing if the process that calls
        ``fit`` is the same and has a collector of its own, because both would report the same fits.
    """

    is_of_nlsq_dask = True

    def __init__(self, read: Callable[[], dict[str, float]], is_of_scheduler: bool) -> None:
        self._read = read
        self.is_of_scheduler = is_of_scheduler

    def describe(self) -> list[Any]:
        """Return nothing, because prometheus_client rejects two collectors of the same names."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics."""
        from prometheus_client import REGISTRY
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if self.is_of_scheduler and any(not c.is_of_scheduler for c in registered(REGISTRY)):
            return
        for name, value in sorted(self._read().items()):
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(name, f"nlsq_dask: {_description(name)}", value=value)


def registered(registry: Any) -> list[Any]:
    """Return the collectors of this package in a registry, from any copy of its code."""
    # A private attribute; without it, the result is empty.
    everyone = list(getattr(registry, "_collector_to_names", ()))
    return [c for c in everyone if getattr(c, "is_of_nlsq_dask", False)]


def _description(name: str) -> str:
    return name.removeprefix("nlsq_").removesuffix("_total").replace("_", " ")
