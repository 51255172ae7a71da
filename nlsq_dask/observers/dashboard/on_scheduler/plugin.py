"""``FitPages``: the plugin of the Dask scheduler that serves the page of fits and metrics."""

from __future__ import annotations

from functools import partial
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from nlsq_dask.observers.dashboard.on_scheduler.collector import Collector, registered
from nlsq_dask.observers.dashboard.on_scheduler.fits import Fits
from nlsq_dask.observers.dashboard.on_scheduler.page import show_fits

PLUGIN = "nlsq-dask"
HANDLER = "nlsq_fit"  # name of the RPC handler
PAGE = "nlsq"  # path of the page on the dashboard


class FitPages(SchedulerPlugin):
    """Scheduler plugin that receives messages of fits and shows the fits on a dashboard page.

    Messages arrive by an RPC handler, because Dask's ``log_event`` would store 100,000 of them.
    """

    name = PLUGIN
    idempotent = True

    def __init__(self) -> None:
        self.fits = Fits()
        self.no_page = ""
        self.collector: Any = None

    async def start(self, scheduler: Any) -> None:
        """Add the RPC handler, the page and the metrics to the scheduler."""
        before = scheduler.handlers.get(HANDLER)
        if before is not None:
            # The plugin was removed and is registered again; the page and the handler still exist.
            self.__dict__.update(before.__self__.__dict__)
            return
        self.no_page = _add_page(scheduler, self.fits)
        self.collector = _register_collector(None, self.fits)
        scheduler.handlers[HANDLER] = self.take

    def take(self, batch: dict[str, Any]) -> dict[str, str]:
        """Record a batch of messages; return why there is no dashboard page, or an empty reason."""
        self.fits.take(batch)
        self.collector = _register_collector(self.collector, self.fits)
        return {"no_page": self.no_page}

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Mark the running fits of a client that disconnected as lost."""
        self.fits.client_left(client)

    async def close(self) -> None:
        """Unregister the metrics, because the process may outlive the scheduler."""
        if self.collector is not None:
            from prometheus_client import REGISTRY

            if self.collector in registered(REGISTRY):
                REGISTRY.unregister(self.collector)


def _add_page(scheduler: Any, fits: Fits) -> str:
    """Add the page to the dashboard; return why it cannot be added, or an empty string."""
    served = [
        app for app in scheduler.http_application.applications
        if "/status" in getattr(app, "app_paths", ())
    ]  # fmt: skip
    if not served:
        return "the scheduler serves no dashboard; start it with a dashboard and bokeh installed"
    # A scheduler that serves a dashboard has the packages of these imports.
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
    """Register the collector, or a new one if it is None, with prometheus_client and return it.

    All schedulers in a process share one registry, so the collector replaces the one of another
    scheduler: metrics are of the scheduler that received the latest message. None is returned if
    prometheus_client is not installed.
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
