"""The observers of a fit: built-in ones, as configured, and those that the caller passed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import warn_caller
from nlsq_dask.events import Event, Observer
from nlsq_dask.observers.logs import LOGGER, JsonLines, LogRecords
from nlsq_dask.observers.progress import Progress


def build_observers(
    config: HybridStreamingConfig, observers: Iterable[Observer] = ()
) -> Iterator[AbstractContextManager[Observer]]:
    """Yield the built-in observers that ``config`` asks for, then the caller's ``observers``.

    Each is wrapped in a context manager, which returns the observer and closes it at the end.
    """
    yield nullcontext(LogRecords())
    if config.verbose:
        yield closing(Progress(config.log_frequency, shows_sample=config.verbose > 1))
    if config.log_file is not None:
        yield closing(JsonLines(config.log_file))
    for observer in observers:
        yield nullcontext(GuardedObserver(observer))


def validate_observers(observers: Any) -> tuple[Observer, ...]:
    """Validate the caller's observers and return them as a tuple.

    Raises
    ------
    TypeError
        If ``observers`` is not an iterable of callables.
    """
    allowed = "observers must be a list of callables, each of which takes an event"
    if not isinstance(observers, Iterable):
        raise TypeError(f"{allowed}; got {observers!r}. Write observers=[...].")
    checked: tuple[Observer, ...] = tuple(observers)
    for observer in checked:
        if not callable(observer):
            raise TypeError(f"{allowed}; one element is {observer!r}.")
    return checked


class GuardedObserver:
    """Wrapper of a caller's observer, which is never called again after it raises an exception.

    The fit continues without it. Only KeyboardInterrupt and SystemExit end the fit.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._is_on = True

    def __call__(self, event: Event) -> None:
        """Call the observer; if it raises an exception, warn and disable the observer."""
        if not self._is_on:
            return
        try:
            self._observer(event)
        except Exception as error:
            self._is_on = False
            LOGGER.debug("Traceback of an observer that raised:", exc_info=error)
            name = getattr(self._observer, "__qualname__", repr(self._observer))
            warn_caller(
                f"The observer {name} raised {type(error).__name__}: {error}. The fit continues "
                f"without this observer."
            )
