"""The observers of a fit: built-in ones, as configured, and those that the caller passed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import warn_caller
from nlsq_dask.events import Event, FitAborted, Observer
from nlsq_dask.observers.dashboard.observer import Page, on_dashboard
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
        yield closing(Progress(config.log_frequency, shows_details=config.verbose > 1))
    if config.log_file is not None:
        yield closing(JsonLines(config.log_file))
    for observer in observers:
        yield nullcontext(GuardedObserver(observer))


def open_observers(
    stack: ExitStack, config: HybridStreamingConfig, observers: Iterable[Observer]
) -> tuple[list[Observer], Page | None]:
    """Return built-in observers, the caller's and the dashboard page, and the page by itself.

    ``stack`` closes them. There is no page without a cluster.
    """
    opened = [stack.enter_context(observer) for observer in build_observers(config, observers)]
    page = stack.enter_context(on_dashboard(config.dashboard))
    return [*opened, *([] if page is None else [page])], page


def send(observers: Iterable[Observer], event: Event) -> None:
    """Call each observer with an event."""
    for observer in observers:
        observer(event)


@contextmanager
def report_abort(emit: Observer, is_map: bool = False) -> Iterator[None]:
    """Emit the event ``FitAborted`` if the code in this context raises an exception.

    ``is_map`` says that the code runs ``fit_each``.
    """
    try:
        yield
    except BaseException as error:
        emit(FitAborted(f"{type(error).__name__}: {error}", is_map))
        raise


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
