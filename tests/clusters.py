"""Clusters in this process whose workers come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client, LocalCluster

from nlsq_dask.events import Event

Observer = Callable[[Event], None]


@contextmanager
def cluster(n_workers: int = 1, **options: Any) -> Iterator[tuple[LocalCluster, Client]]:
    """A cluster in this process, whose client finds workers within a moment or not at all."""
    with (
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=False,
            dashboard_address=":0",
            silence_logs=50,
            **options,
        ) as local,
        Client(local) as client,
    ):
        client._timeout = 0.3
        yield local, client


@contextmanager
def later(delay: float, act: Callable[[], Any]) -> Iterator[None]:
    timer = threading.Timer(delay, act)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def once(kind: type[Event], act: Callable[[], Any], after: int = 1) -> Observer:
    """Return an observer that acts at an event of this kind, the first with blocks finished."""
    is_done = False

    def observe(event: Event) -> None:
        nonlocal is_done
        if isinstance(event, kind) and not is_done and getattr(event, "blocks", after) >= after:
            is_done = True
            act()

    return observe
