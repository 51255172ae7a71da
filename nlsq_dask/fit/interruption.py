"""``Interruption``: time limit and termination signal of a fit."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nlsq_dask.status import Status


class FitInterruptedError(Exception):
    """The fit must end now. Raised between tasks, never within one."""

    def __init__(self, reason: Status) -> None:
        super().__init__()
        self.reason = reason


class Interruption:
    """Checks the time limit and the termination signal.

    Parameters
    ----------
    max_walltime : float or None
        Seconds from now.
    """

    def __init__(self, max_walltime: float | None = None) -> None:
        self._end = None if max_walltime is None else time.monotonic() + max_walltime
        self._terminated = False

    def check(self) -> None:
        """Raise a FitInterruptedError if the fit must end."""
        if self._terminated:
            raise FitInterruptedError(Status.TERMINATED)
        if self._end is not None and time.monotonic() >= self._end:
            raise FitInterruptedError(Status.WALLTIME)

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Handle SIGTERM, which batch schedulers send before they kill a process.

        Raises
        ------
        ValueError
            If called outside the main thread, where Python handles no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "stop_on_sigterm=True requires a fit in the main thread, because Python handles "
                "signals only there. Use max_walltime in other threads."
            )

        def handle(number: int, frame: Any) -> None:
            self._terminated = True

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            # None if the handler was not set from Python; it cannot be restored.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
