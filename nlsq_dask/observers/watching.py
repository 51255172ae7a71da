"""Who watches a fit, as its configuration says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.events import Observer
from nlsq_dask.observers.logs import JsonLines, LogRecords
from nlsq_dask.observers.progress import Progress


def watching(config: HybridStreamingConfig) -> Iterator[AbstractContextManager[Observer]]:
    """Yield the observers of a fit, each as what is to be entered for it."""
    yield nullcontext(LogRecords())
    if config.verbose:
        yield closing(Progress(config.log_frequency, shows_sample=config.verbose > 1))
    if config.log_file is not None:
        yield closing(JsonLines(config.log_file))
