"""``Interruption``: when a fit has to end before it is done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nlsq_dask.status import Status


class FitInterruptedError(Exception):
    """The fit has to end now; raised between pieces of work, never out of them."""

    def __init__(self, reason: Status) -> None:
        super().__init__()
        self.reason = reason


class Interruption:
    """Knows whether the time is up, or the process has been asked to end.

    Parameters
    ----------
    max_walltime : float or None
        Seconds from now.
    """

    def __init__(self, max_walltime: float | None = None) -> None:
        self._end = None if max_walltime is None else time.monotonic() + max_walltime
        self._terminated = False

    def check(self) -> None:
        """Raise a FitInterruptedError if the fit has to end."""
        if self._terminated:
            raise FitInterruptedError(Status.TERMINATED)
        if self._end is not None and time.monotonic() >= self._end:
            raise FitInterruptedError(Status.WALLTIME)

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Take SIGTERM, which batch schedulers send some time before they kill, for the sign.

        Raises
        ------
        ValueError
            Outside of the main thread, where Python handles no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "stop_on_sigterm=True needs a fit in the main thread, the only one in which "
                "Python handles signals; leave it out, and use max_walltime."
            )

        def handle(number: int, frame: Any) -> None:
            self._terminated = True

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            # None where it was set outside of Python, which cannot set it again.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
