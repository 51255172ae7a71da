"""A clock that runs only while somebody waits."""

from __future__ import annotations

import threading

import pytest


class Clock:
    """Stands for the module ``time``: waiting takes no time, and moves the clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds
            self.pauses.append(seconds)


def patch_retries(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let retries wait on such a clock."""
    clock = Clock()
    monkeypatch.setattr("nlsq_dask.engine.retries.time", clock)
    return clock
