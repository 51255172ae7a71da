"""``CheckpointWriter``: writes checkpoints in a thread, while the fit continues."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from nlsq_dask.checkpoints.checkpoint import Checkpoint
from nlsq_dask.checkpoints.folder import CheckpointFolder


@dataclass(frozen=True)
class WriteOutcome:
    """Outcome of writing a checkpoint; either ``path`` or ``error`` is None."""

    number: int  # of the checkpoint
    seconds: float
    path: str | None = None
    error: BaseException | None = None


class CheckpointWriter:
    """Writes checkpoints to a folder in a thread of its own.

    At any time, at most one checkpoint is being written, and one is waiting; a newer one takes the
    place of that which is waiting.

    Parameters
    ----------
    folder : CheckpointFolder
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._changed = threading.Condition()
        self._waiting: Checkpoint | None = None
        self._is_busy = False
        self._outcomes: list[WriteOutcome] = []

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._is_busy

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint as soon as the one that is being written is complete."""
        with self._changed:
            self._waiting = checkpoint
            if not self._is_busy:
                # A daemon, so that the exit of Python does not wait for a store without an answer.
                threading.Thread(target=self._run, name="nlsq-checkpoints", daemon=True).start()
                self._is_busy = True

    def take_outcomes(self) -> list[WriteOutcome]:
        """Return the outcomes since the last call."""
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def wait(self, timeout: float) -> bool:
        """Wait until all checkpoints are written; return False if the time is over before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_busy, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                checkpoint, self._waiting = self._waiting, None
                if checkpoint is None:
                    self._is_busy = False
                    self._changed.notify_all()
                    return
            outcome = self._write(checkpoint)
            with self._changed:
                self._outcomes.append(outcome)

    def _write(self, checkpoint: Checkpoint) -> WriteOutcome:
        began = time.monotonic()
        path, error = None, None
        try:
            path = self._folder.save(checkpoint)
        except BaseException as raised:  # file systems raise errors of any class
            error = raised
        return WriteOutcome(checkpoint.number, time.monotonic() - began, path, error)
