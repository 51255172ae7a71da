"""``Journal``: a record of the progress of a fit, so that a resumed fit skips complete work.

Expensive work runs through the journal: ``step`` computes a value and records it, and a loop saves
its state before each iteration. A resumed fit runs the same code from the beginning. Its complete
steps return the recorded values at once, and the first incomplete step continues from the last
saved state of its loop.

A step is recorded under a path: the path of the step around it, its name, and the number of earlier
steps of the same name there. The same code therefore finds its records again. The records inside a
step are deleted when the step is complete, and the records inside an iteration when the loop saves
its next state.

The events of an incomplete step are emitted again when the fit is resumed. Therefore, only events
before the last complete step or saved state are written to a checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from nlsq_dask.checkpoints.checkpoint import Checkpoint, decode
from nlsq_dask.checkpoints.folder import CheckpointFolder, load, summarize
from nlsq_dask.checkpoints.identity import FitFingerprint
from nlsq_dask.checkpoints.writer import CheckpointWriter
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import warn_caller
from nlsq_dask.events import (
    EVENTS,
    CheckpointWritten,
    Event,
    FitResumed,
    FitStarted,
    Observer,
    PassFinished,
    without_many_params,
)
from nlsq_dask.storage.backends import normalize_path
from nlsq_dask.storage.codec import encode

T = TypeVar("T")

_STATE = "state"  # last part of the path of a loop's state
_MAX_SAVING_SHARE = 0.05  # maximum fraction of the time of a pass for collecting its state
_MAX_WAIT = 60.0  # seconds at the end of a fit until its last checkpoint is written
_RETRY_PAUSE = 1.0  # seconds before it is tried again, if that failed


class Journal:
    """Record of the progress of a fit, by which a resumed fit skips complete work.

    This base class records nothing, for fits without checkpoints.
    """

    events: Sequence[Event] = ()  # events from before the fit was resumed
    last_path: str | None = None  # path of the newest checkpoint that is written
    is_enabled = False  # whether steps are recorded
    is_saving = False  # whether checkpoints are written
    has_saved = False  # whether one was written since the fit was started or resumed

    def observe(self, event: Event) -> None:
        """Record an event of the fit."""

    def step(self, name: str, kind: type[T], make: Callable[[], T], saves: bool = False) -> T:
        """Return the recorded value of a step, or compute and record it.

        A step is a named piece of the work of a fit, such as a pass over the data.

        Parameters
        ----------
        name : str
            Name of the step, which other steps may share.
        kind : type
            Type of the value.
        make : callable
            Function that computes the value.
        saves : bool
            Whether to write a checkpoint after the step.
        """
        return make()

    def run_once(self, name: str, act: Callable[[], None]) -> None:
        """Run an action that is not repeated when the fit is resumed."""
        self.step(name, type(None), act)

    @contextmanager
    def loop(self, name: str) -> Iterator[None]:
        """Return a context in which ``load_state`` and ``save_state`` belong to this loop."""
        yield

    def load_state(self, kind: type[T]) -> T | None:
        """Return the last saved state of the current loop, or None if there is none."""
        return None

    def save_state(self, state: Any) -> None:
        """Record the state of the current loop after an iteration.

        The steps that were recorded within the iteration are deleted.
        """

    def phase_clock(self, is_resumed: bool) -> Callable[[], float]:
        """Start the clock of a phase of the fit; return a function that returns its seconds.

        If ``is_resumed``, the time that the phase took before the interruption is included.
        """
        began = time.perf_counter()
        return lambda: time.perf_counter() - began

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is so old that a new one is to be written."""
        return False

    def save(self, began: float | None = None) -> None:
        """Begin to write a checkpoint, unless the last one has the same state.

        It is written in another thread, while the fit continues.

        Parameters
        ----------
        began : float, optional
            Value of ``time.monotonic`` when the preparation of the checkpoint began; by default,
            now. ``is_due`` limits the share of this time in that of the fit.
        """

    def report(self) -> None:
        """Emit events and warnings about the checkpoints that were written since the last call.

        It is called in the thread of the fit, as observers are.
        """

    def finish(self, is_needed: bool = True) -> None:
        """Wait until the last checkpoint is written, at most one minute, and report it.

        If writing it fails, that is tried again, unless ``is_needed`` is False.
        """


class CheckpointJournal(Journal):
    """Journal that records steps and loops, and writes them to checkpoints.

    Parameters
    ----------
    start : Checkpoint
        State of a new fit, or of the fit to be resumed.
    folder : CheckpointFolder or None
        None writes no checkpoints.
    interval : float
        Minimum seconds between two checkpoints, more if collecting the state is slow.
    emit : callable
        Called with a ``CheckpointWritten`` event after each checkpoint.
    path : str, optional
        Path from which ``start`` was loaded.

    Attributes
    ----------
    events : sequence of Event
        Events before the fit was resumed.
    last_path : str or None
        Path of the newest checkpoint.
    """

    is_enabled = True

    def __init__(
        self,
        start: Checkpoint,
        folder: CheckpointFolder | None,
        interval: float,
        emit: Observer,
        path: str | None = None,
    ) -> None:
        self._fit, self._number, self._fingerprint = start.fit, start.number, start.fingerprint
        self._folder = folder
        self._writer = None if folder is None else CheckpointWriter(folder)
        self.is_saving = folder is not None
        self._interval = interval
        self._emit = emit
        self._entries, self._encoded_events = dict(start.entries), list(start.events)
        self._n_events_saved = len(self._encoded_events)
        self.events = [
            decode(data, EVENTS[name]) for name, data in self._encoded_events if name in EVENTS
        ]
        self._scope = ""
        self._counts: Counter[str] = Counter()
        self._saved_at = time.monotonic()
        self._saving_seconds = 0.0
        self._is_changed = False  # since the last checkpoint
        self._seconds_before = start.phase_seconds
        self._seconds = super().phase_clock(is_resumed=False)
        self.last_path = path
        self._n_failed = 0  # checkpoints since the last one that was written
        if folder is not None:
            folder.prepare(self._fit)

    def observe(self, event: Event) -> None:
        """Record an event of the fit."""
        if event.is_transient:
            return
        kept = without_many_params(event)
        self._encoded_events.append((type(kept).__name__, encode(kept)))

    def step(self, name: str, kind: type[T], make: Callable[[], T], saves: bool = False) -> T:
        """Return the recorded value of a step, or compute and record it."""
        path = self._unique_path(name)
        if path in self._entries:
            return decode(self._entries[path], kind)
        with self._enter_scope(path):
            value = make()
        self._drop_nested(path)
        self._set_entry(path, value)
        if saves:
            self.save()
        return value

    @contextmanager
    def loop(self, name: str) -> Iterator[None]:
        """Return a context in which ``load_state`` and ``save_state`` belong to this loop."""
        with self._enter_scope(self._unique_path(name)):
            yield

    def load_state(self, kind: type[T]) -> T | None:
        """Return the last saved state of the current loop, or None if there is none."""
        data = self._entries.get(f"{self._scope}/{_STATE}")
        return None if data is None else decode(data, kind)

    def save_state(self, state: Any) -> None:
        """Record the state of the current loop, and delete the records inside its iteration."""
        self._drop_nested(self._scope)
        self._set_entry(f"{self._scope}/{_STATE}", state)

    def save(self, began: float | None = None) -> None:
        """Begin to write a checkpoint, unless the last one has the same state."""
        self.report()
        if self._writer is None or not self._is_changed:
            return
        began = time.monotonic() if began is None else began
        self._number += 1
        events = self._encoded_events[: self._n_events_saved]
        entries = dict(self._entries)  # a copy, because the fit continues while it is written
        self._writer.write(
            Checkpoint(self._fit, self._number, self._fingerprint, self._seconds(), entries, events)
        )
        self._is_changed = False
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - began

    def report(self) -> None:
        """Emit events and warnings about the checkpoints that were written since the last call."""
        for outcome in [] if self._writer is None else self._writer.take_outcomes():
            if outcome.path is not None:
                self.last_path, self.has_saved = outcome.path, True
                self._emit(CheckpointWritten(outcome.path, outcome.seconds, self._n_failed))
                self._n_failed = 0
                continue
            self._is_changed |= outcome.number == self._number
            self._n_failed += 1
            if self._n_failed == 1 and outcome.error is not None:
                self._warn(summarize(outcome.error), "The fit continues and will try again.")

    def finish(self, is_needed: bool = True) -> None:
        """Wait until the last checkpoint is written, at most one minute, and report it."""
        if self._writer is None:
            return
        end = time.monotonic() + _MAX_WAIT
        is_written = self._writer.wait(_MAX_WAIT)
        self.report()
        pause = _RETRY_PAUSE
        while is_needed and self._has_failed and time.monotonic() + pause < end:
            time.sleep(pause)
            self.save()
            is_written = self._writer.wait(max(end - time.monotonic(), 0.0))
            self.report()
        if not is_written or (is_needed and self._has_failed):
            newest = "No other was written"
            if self.last_path is not None:
                newest = f"The newest complete one is {self.last_path}"
            self._warn(f"the last one is not complete after {_MAX_WAIT:.0f} s", f"{newest}.")

    @property
    def _has_failed(self) -> bool:
        """Whether the newest state could not be written."""
        return bool(self._n_failed) and self._is_changed

    def _warn(self, reason: str, consequence: str) -> None:
        assert self._folder is not None
        warn_caller(
            f"Could not write a checkpoint to checkpoint_dir={self._folder.path!r}: {reason}. "
            f"{consequence}"
        )

    def phase_clock(self, is_resumed: bool) -> Callable[[], float]:
        """Return a function that returns the seconds since a phase of the fit began.

        If ``is_resumed``, the time that the phase took before the interruption is included.
        """
        before = self._seconds_before if is_resumed else 0.0
        now = super().phase_clock(is_resumed)
        self._seconds = lambda: before + now()
        return self._seconds

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is so old that a new one is to be written."""
        if self._writer is None or self._writer.is_busy:
            return False
        interval = max(self._interval, self._saving_seconds / _MAX_SAVING_SHARE)
        return time.monotonic() - self._saved_at >= interval

    def _unique_path(self, name: str) -> str:
        path = f"{self._scope}/{name}"
        self._counts[path] += 1
        return f"{path}-{self._counts[path]}"

    @contextmanager
    def _enter_scope(self, path: str) -> Iterator[None]:
        outside, self._scope = self._scope, path
        try:
            yield
        finally:
            self._scope = outside

    def _drop_nested(self, path: str) -> None:
        inside = f"{path}/"
        for name in [name for name in self._entries if name.startswith(inside)]:
            del self._entries[name]
        for name in [name for name in self._counts if name.startswith(inside)]:
            del self._counts[name]

    def _set_entry(self, path: str, value: Any) -> None:
        self._entries[path] = encode(value)
        self._n_events_saved = len(self._encoded_events)
        self._is_changed = True


def open_journal(
    config: HybridStreamingConfig,
    describe: Callable[[], FitFingerprint],
    emit: Observer,
    remember: Observer,
) -> Journal:
    """Return the journal of a fit, resumed from a checkpoint if ``config`` asks for it.

    Parameters
    ----------
    config : HybridStreamingConfig
    describe : callable
        Function that returns the fingerprint of the fit. It is not called without checkpoints.
    emit : callable
        Called with a ``FitResumed`` event if the fit is resumed.
    remember : callable
        Called before that with each event of the fit up to its interruption.

    Raises
    ------
    FileNotFoundError, CheckpointError
        If the checkpoint does not exist, is invalid, or is of a different fit.
    """
    directory = config.checkpoint_dir if config.enable_checkpoints else None
    folder = None if directory is None else CheckpointFolder(directory)
    source = config.resume_from_checkpoint
    if source is True:  # only with checkpoint_dir
        source = None if folder is None or folder.is_empty else directory
    if source is None or source is False:
        if folder is None:
            return Journal()
        start = Checkpoint.of_new_fit(describe())
        return CheckpointJournal(start, folder, config.checkpoint_interval, emit)
    fingerprint, path = describe(), normalize_path(source)
    checkpoint, notes = load(path)
    notes += checkpoint.fingerprint.check(fingerprint)
    if notes:
        warn_caller(f"Resuming a fit: {'; '.join(notes)}.")
    start = replace(checkpoint, fingerprint=fingerprint)  # of the versions in use now
    journal = CheckpointJournal(start, folder, config.checkpoint_interval, emit, path)
    for event in journal.events:
        remember(event)
    n_passes = sum(isinstance(event, PassFinished) for event in journal.events)
    started = next((event for event in journal.events if isinstance(event, FitStarted)), None)
    is_within_pass = any("/pass " in key and key.endswith(f"/{_STATE}") for key in start.entries)
    emit(FitResumed(started, path, n_passes, tuple(notes), is_within_pass))
    return journal
