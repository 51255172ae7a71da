"""``Page``: the observer that sends the events of a fit to the dashboard page of a cluster."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

from nlsq_dask.engine.workers import Workers
from nlsq_dask.events import (
    Event,
    FitAborted,
    FitEnded,
    FitStarted,
    MapDrawn,
    MapEnded,
    MapStarted,
    PhaseStarted,
    TileFinished,
)
from nlsq_dask.observers.dashboard.messages import REPLACED, Message, Messages
from nlsq_dask.observers.dashboard.on_scheduler.plugin import HANDLER, PAGE
from nlsq_dask.observers.dashboard.shipping import ShippedPlugin, why_not_to_ship
from nlsq_dask.observers.logs import LOGGER
from nlsq_dask.observers.telemetry import DefenseLayerTelemetry

_INTERVAL = 0.5  # seconds between calls of the scheduler; a call takes about a millisecond
_SHORTER = 0.1  # the same, at the start of a phase
_PATIENCE = 10.0  # timeout of a call, in seconds

_registered: WeakSet[Any] = WeakSet()  # Dask clients that registered the plugin with a scheduler


class Page:
    """Observer that sends the events of a fit, in batches, to the scheduler of a cluster.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster whose dashboard shows the fit.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._fit = uuid.uuid4().hex
        self._messages = Messages()
        self._telemetry = DefenseLayerTelemetry()
        self._waiting: list[Message] = []
        self._sent = -_INTERVAL  # time of the last call
        self._is_known = False  # whether the address of the page was logged
        self._is_on = True

    def __call__(self, event: Event) -> None:
        """Count and queue an event; send the queue at most once per ``_INTERVAL`` seconds."""
        self._safely(self._telemetry, event)
        self._safely(self._take, event)

    def remember(self, event: Event) -> None:
        """Queue an event that a resumed fit read from its checkpoint, without counting it again."""
        self._safely(self._take, event)

    def close(self) -> None:
        """Send the messages that are still queued."""
        if self._waiting:
            self._safely(self._send)

    def _safely(self, act: Callable[..., None], *args: Any) -> None:
        # An error of any class, here or on a scheduler of any version, must not end the fit.
        if not self._is_on:
            return
        try:
            act(*args)
        except Exception as error:
            self._is_on = False
            self._waiting = []
            LOGGER.warning("The dashboard page is disabled: %s: %s", type(error).__name__, error)

    def _take(self, event: Event) -> None:
        new = self._messages.of(event)
        replaced = REPLACED.intersection(message["kind"] for message in new)
        if replaced:
            self._waiting = [m for m in self._waiting if m["kind"] not in replaced]
        self._waiting += new
        if self._is_time(event):
            self._send()

    def _is_time(self, event: Event) -> bool:
        if isinstance(event, FitStarted | MapStarted | FitEnded | MapEnded | FitAborted):
            return True
        if isinstance(event, TileFinished | MapDrawn):  # a picture follows tiles, now and then
            return isinstance(event, MapDrawn)
        waited = time.monotonic() - self._sent
        return waited >= (_SHORTER if isinstance(event, PhaseStarted) else _INTERVAL)

    def _send(self) -> None:
        batch = {
            "fit": self._fit,
            "client": self._client.id,
            "messages": self._waiting,
            "metrics": self._telemetry.export_metrics(),
        }
        self._waiting = []
        answer = self._call(batch) if self._client in _registered else None
        if answer is None:  # also if the scheduler was restarted without the plugin
            no_page = why_not_to_ship(self._python_of_scheduler())
            if no_page:
                self._is_on = False
                self._say(no_page)
                return
            self._client.register_plugin(ShippedPlugin())
            _registered.add(self._client)
            answer = self._call(batch)
        self._sent = time.monotonic()
        if not self._is_known:
            self._is_known = True
            self._say(answer["no_page"])

    def _python_of_scheduler(self) -> str:
        # Client.get_versions would query every worker.
        ask = self._client.scheduler.versions
        versions = self._client.sync(ask, callback_timeout=_PATIENCE)
        return str(versions["host"]["python"])

    def _call(self, batch: dict[str, Any]) -> Any:
        call = getattr(self._client.scheduler, HANDLER)
        batch = {**batch, "time": time.time()}  # the two clocks may differ
        return self._client.sync(call, batch=batch, callback_timeout=_PATIENCE)

    def _say(self, no_page: str) -> None:
        if no_page:
            LOGGER.info("The fit has no dashboard page: %s", no_page)
            return
        link = self._client.dashboard_link or ""
        LOGGER.info("Dashboard page of the fit: %s", link.removesuffix("status") + PAGE)


@contextmanager
def on_dashboard(is_enabled: bool) -> Iterator[Page | None]:
    """Yield a ``Page`` for the active Dask cluster; None without a cluster or if not enabled."""
    client = Workers.active().client if is_enabled else None
    with nullcontext() if client is None else closing(Page(client)) as page:
        yield page
