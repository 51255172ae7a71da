"""``Interruption``: ends a fit at its time limit or when its process is asked to terminate."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nlsq_dask.status import Status


class FitInterruptedError(Exception):
    """The fit must end now, for ``reason``: its time limit or the signal SIGTERM."""

    def __init__(self, reason: Status) -> None:
        super().__init__()
        self.reason = reason


class Interruption:
    """The time limit of one fit, and the signal SIGTERM if it is handled.

    Parameters
    ----------
    max_walltime : float or None
        Time limit in seconds from now; None for no limit.
    """

    def __init__(self, max_walltime: float | None = None) -> None:
        self._end = None if max_walltime is None else time.monotonic() + max_walltime
        self._terminated = False

    def check(self) -> None:
        """Raise a FitInterruptedError if the time limit has passed or SIGTERM was received."""
        if self._terminated:
            raise FitInterruptedError(Status.TERMINATED)
        if self._end is not None and time.monotonic() >= self._end:
            raise FitInterruptedError(Status.WALLTIME)

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Within this context, let SIGTERM end the fit at its next ``check``, not the process.

        Batch schedulers send this signal some time before they kill a process.

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
