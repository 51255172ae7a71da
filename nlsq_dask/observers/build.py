"""``build_observers``: the observers that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.events import Observer
from nlsq_dask.observers.logs import JsonLines, LogRecords
from nlsq_dask.observers.progress import Progress


def build_observers(config: HybridStreamingConfig) -> Iterator[AbstractContextManager[Observer]]:
    """Yield the observers of a fit, each as a context manager to enter for the fit."""
    yield nullcontext(LogRecords())
    if config.verbose:
        yield closing(Progress(config.log_frequency, shows_sample=config.verbose > 1))
    if config.log_file is not None:
        yield closing(JsonLines(config.log_file))
