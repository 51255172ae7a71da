"""``build_observers``: the observers of a fit, built-in ones and the caller's."""

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
    """Yield the observers of a fit, as context managers."""
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
        If they are not an iterable of callables.
    """
    allowed = "observers must be a list of callables, each of which takes an event"
    if not isinstance(observers, Iterable):
        raise TypeError(f"{allowed}; got {observers!r}. Write observers=[...].")
    checked: tuple[Observer, ...] = tuple(observers)
    for observer in checked:
        if not callable(observer):
            raise TypeError(f"{allowed}; one of them is {observer!r}.")
    return checked


class GuardedObserver:
    """An observer that is disabled when it raises an exception, so that the fit continues.

    KeyboardInterrupt and SystemExit pass through.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._is_on = True

    def __call__(self, event: Event) -> None:
        """Call the observer, or warn once and ignore it from then on."""
        if not self._is_on:
            return
        try:
            self._observer(event)
        except Exception as error:
            self._is_on = False
            LOGGER.debug("Traceback of an observer that raised:", exc_info=error)
            name = getattr(self._observer, "__qualname__", repr(self._observer))
            warn_caller(
                f"The observer {name} raised {type(error).__name__}: {error}. It receives no "
                f"further events of this fit, which continues."
            )
