"""``FitPages``: the scheduler plugin that serves the page and the metrics."""

from __future__ import annotations

from functools import partial
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from nlsq_dask.observers.dashboard.on_scheduler.collector import Collector, registered
from nlsq_dask.observers.dashboard.on_scheduler.fits import Fits
from nlsq_dask.observers.dashboard.on_scheduler.page import show_fits

PLUGIN = "nlsq-dask"
HANDLER = "nlsq_fit"  # name of the RPC handler
PAGE = "nlsq"


class FitPages(SchedulerPlugin):
    """Receives and shows messages of fits.

    Messages have their own handler, because ``log_event`` would keep 100,000 of them.
    """

    name = PLUGIN
    idempotent = True

    def __init__(self) -> None:
        self.fits = Fits()
        self.no_page = ""
        self.collector: Any = None

    async def start(self, scheduler: Any) -> None:
        """Register the handler, the page and the metrics on the scheduler."""
        before = scheduler.handlers.get(HANDLER)
        if before is not None:
            # Removed and registered again: the page and the handler still exist.
            self.__dict__.update(before.__self__.__dict__)
            return
        self.no_page = _add_page(scheduler, self.fits)
        self.collector = _register_collector(None, self.fits)
        scheduler.handlers[HANDLER] = self.take

    def take(self, batch: dict[str, Any]) -> dict[str, str]:
        """Record messages of a fit; return why there is no page, or an empty string."""
        self.fits.take(batch)
        self.collector = _register_collector(self.collector, self.fits)
        return {"no_page": self.no_page}

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Mark the running fits of a client as lost."""
        self.fits.client_left(client)

    async def close(self) -> None:
        """Unregister the metrics, because the process may outlive the scheduler."""
        if self.collector is not None:
            from prometheus_client import REGISTRY

            if self.collector in registered(REGISTRY):
                REGISTRY.unregister(self.collector)


def _add_page(scheduler: Any, fits: Fits) -> str:
    """Add the page to the dashboard; return why that failed, or an empty string."""
    served = [
        app for app in scheduler.http_application.applications
        if "/status" in getattr(app, "app_paths", ())
    ]  # fmt: skip
    if not served:
        return "the scheduler serves no dashboard; install bokeh and start it with a dashboard"
    # A scheduler that serves a dashboard can import these.
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    variables = template_variables(scheduler)
    app = BokehApplication(
        {f"/{PAGE}": partial(show_fits, fits)},
        scheduler,
        prefix=served[0].prefix,
        template_variables=variables,
    )
    scheduler.http_application.add_application(app)
    app.initialize(IOLoop.current())
    app.start()
    variables["pages"].append(PAGE)  # the menu of all pages shares this list
    return ""


def _register_collector(collector: Any, fits: Fits) -> Any:
    """Register the collector of these fits, and create it if it is None.

    Schedulers in one process share a registry, which shows the one with the latest message.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return None
    known = registered(REGISTRY)
    if collector is not None and collector in known:
        return collector
    for other in known:
        if other.is_of_scheduler:
            REGISTRY.unregister(other)
    collector = collector or Collector(fits.metrics, is_of_scheduler=True)
    REGISTRY.register(collector)
    return collector
