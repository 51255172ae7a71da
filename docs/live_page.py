"""Photograph the live page while a map is fitted, for ``make pictures``; needs Chromium.

python -m docs.live_page PICTURE
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

from docs import demo
from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig
from nlsq_dask.events import Event, TileFinished
from tests.browser import Browser

WIDTH, HEIGHT = 1200, 745


def photograph(client: Client, folder: Path, picture: Path) -> None:
    """Fit the film of the demo, and write what the page shows when most of it is fitted."""
    film = demo.open_film(folder)
    page = client.dashboard_link.replace("/status", "/nlsq")
    is_ready = threading.Event()

    def wait(event: Event) -> None:
        if isinstance(event, TileFinished) and event.pixels > 0.85 * event.n_pixels:
            is_ready.wait(60)  # the page shows what was there when the observer was called

    # The first fit of a model compiles it, which the page need not show.
    quiet = HybridStreamingConfig(dashboard=False, verbose=0)
    film.nlsq.fit_each(demo.decay, "t", dims="t", store=folder / "first.zarr", config=quiet)
    optimizer = AdaptiveHybridStreamingOptimizer(HybridStreamingConfig(verbose=0), observers=[wait])
    options: dict[str, Any] = {"dims": "t", "store": folder / "maps.zarr"}
    fit = threading.Thread(target=optimizer.fit_each, args=(demo.decay, "t", film), kwargs=options)
    fit.start()
    try:
        with Browser(folder / "browser") as browser:
            time.sleep(3)
            browser.open(page, WIDTH, HEIGHT)
            browser.wait_for("window.Bokeh && Bokeh.documents.length == 1")
            time.sleep(3)
            browser.screenshot(picture)
    finally:
        is_ready.set()
        fit.join()


def main() -> None:
    """Start a cluster and write the picture."""
    cluster = LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", env={"NPROC": "1"}
    )
    with tempfile.TemporaryDirectory() as folder, cluster, Client(cluster) as client:
        photograph(client, Path(folder), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
