"""``Journal``: what the steps of a fit have found, so that a fit that is cut does not redo them.

The phases are written as if nothing could happen to them. What is worth keeping they do through
the journal: ``step`` makes a value or remembers it, and a loop notes its state before each turn. A
resumed fit runs the same lines from the top; what was done is remembered, and the first step that
was not goes on from the parts that were. (The idea is that of durable execution, as in workflow
engines.)

Steps are named by their place: scope, name and how many of that name came before. So the same
lines find the same names. What stands inside a step goes when the step is done, and what stands
inside the turn of a loop when the next turn is noted.

Events that happen inside an unfinished step happen again when it is resumed; therefore only those
before the last finished step or note are saved.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from nlsq_dask.checkpoints.checkpoint import Checkpoint, decode, new_fit_name
from nlsq_dask.checkpoints.folder import CheckpointFolder, load
from nlsq_dask.checkpoints.identity import FitFingerprint
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
from nlsq_dask.storage.codec import encode
from nlsq_dask.storage.folders import normalize_path

T = TypeVar("T")

_STATE = "state"  # of a loop, among what is inside its scope
_MAX_SAVING_SHARE = 0.05  # of the time of a pass


class Journal:
    """A journal that remembers nothing, for fits without checkpoints: every step is made."""

    events: Sequence[Event] = ()
    last_path: str | None = None
    is_enabled = False
    is_saving = False

    def observe(self, event: Event) -> None:
        """Remember what happened."""

    def step(self, name: str, kind: type[T], make: Callable[[], T], saves: bool = False) -> T:
        """Return what the step found when it was made before, or make it.

        Parameters
        ----------
        name : str
            Says what is done; need not be unique.
        kind : type
            Of the value.
        make : callable
            Makes it.
        saves : bool
            Whether that is worth a checkpoint.
        """
        return make()

    def run_once(self, name: str, act: Callable[[], None]) -> None:
        """Do something that must not be done again when the fit is resumed."""
        self.step(name, type(None), act)

    @contextmanager
    def loop(self, name: str) -> Iterator[None]:
        """Enter the scope of a loop, which notes its state."""
        yield

    def load_state(self, kind: type[T]) -> T | None:
        """Return the state that was noted last in this scope, if any."""
        return None

    def save_state(self, state: Any) -> None:
        """Remember the state of this scope's loop; what is inside is not needed any more."""

    def phase_clock(self, is_resumed: bool) -> Callable[[], float]:
        """Return what tells the seconds of a phase that begins now, or goes on."""
        began = time.perf_counter()
        return lambda: time.perf_counter() - began

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is older than the interval."""
        return False

    def save(self, began: float | None = None) -> None:
        """Write a checkpoint.

        Parameters
        ----------
        began : float, optional
            When what it holds began to be gathered, by ``time.monotonic``.
        """


class CheckpointJournal(Journal):
    """A journal that is saved.

    Parameters
    ----------
    fingerprint : FitFingerprint
        Of what is fitted.
    folder : CheckpointFolder or None
        Where to save; None for nowhere.
    interval : float
        Seconds after which a checkpoint is due, or more where saving takes long; 0 for always.
    emit : callable
        Receives a ``CheckpointWritten`` a file.
    resumed : Checkpoint, optional
        What to go on from.
    resumed_path : str, optional
        Where that was.

    Attributes
    ----------
    events : sequence of Event
        What had happened before this process took over.
    last_path : str or None
        Of the newest checkpoint.
    """

    is_enabled = True

    def __init__(
        self,
        fingerprint: FitFingerprint,
        folder: CheckpointFolder | None,
        interval: float,
        emit: Observer,
        resumed: Checkpoint | None = None,
        resumed_path: str | None = None,
    ) -> None:
        self._fingerprint = fingerprint
        self._folder = folder
        self.is_saving = folder is not None
        self._interval = interval
        self._emit = emit
        self._fit = new_fit_name() if resumed is None else resumed.fit
        self._number = 0 if resumed is None else resumed.number
        self._entries: dict[str, bytes] = {} if resumed is None else dict(resumed.entries)
        self._encoded_events = [] if resumed is None else list(resumed.events)
        self._n_events_saved = len(self._encoded_events)
        self.events = [
            decode(data, EVENTS[name]) for name, data in self._encoded_events if name in EVENTS
        ]
        self._scope = ""
        self._counts: Counter[str] = Counter()
        self._saved_at = time.monotonic()
        self._saving_seconds = 0.0
        self._seconds_before = 0.0 if resumed is None else resumed.phase_seconds
        self._seconds = super().phase_clock(is_resumed=False)
        self.last_path = resumed_path
        self._has_warned = False
        if folder is not None:
            folder.prepare(self._fit)

    def observe(self, event: Event) -> None:
        """Remember what happened."""
        if event.is_transient:
            return
        kept = without_many_params(event)
        self._encoded_events.append((type(kept).__name__, encode(kept)))

    def step(self, name: str, kind: type[T], make: Callable[[], T], saves: bool = False) -> T:
        """Return what the step found when it was made before, or make it."""
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
        """Enter the scope of a loop, which notes its state."""
        with self._enter_scope(self._unique_path(name)):
            yield

    def load_state(self, kind: type[T]) -> T | None:
        """Return the state that was noted last in this scope, if any."""
        data = self._entries.get(f"{self._scope}/{_STATE}")
        return None if data is None else decode(data, kind)

    def save_state(self, state: Any) -> None:
        """Remember the state of this scope's loop; what is inside is not needed any more."""
        self._drop_nested(self._scope)
        self._set_entry(f"{self._scope}/{_STATE}", state)

    def save(self, began: float | None = None) -> None:
        """Write a checkpoint."""
        if self._folder is None:
            return
        began = time.monotonic() if began is None else began
        self._number += 1
        events = self._encoded_events[: self._n_events_saved]
        checkpoint = Checkpoint(
            self._fit, self._number, self._fingerprint, self._seconds(), self._entries, events
        )
        try:
            self.last_path = self._folder.save(checkpoint)
        except OSError as error:  # a disk that is full, perhaps for a while
            self._warn_once(error)
            return
        finally:
            self._saved_at = time.monotonic()
            self._saving_seconds = self._saved_at - began
        self._emit(CheckpointWritten(self.last_path, self._saving_seconds))

    def phase_clock(self, is_resumed: bool) -> Callable[[], float]:
        """Return what tells the seconds of a phase that begins now, or goes on."""
        before = self._seconds_before if is_resumed else 0.0
        now = super().phase_clock(is_resumed)
        self._seconds = lambda: before + now()
        return self._seconds

    def _warn_once(self, error: OSError) -> None:
        if not self._has_warned:
            warn_caller(
                f"Could not write a checkpoint: {error}. The fit continues and will try again."
            )
        self._has_warned = True

    @property
    def is_within_pass(self) -> bool:
        """Whether there is a part of a pass that was cut, which notes what is finished of it."""
        return any("/pass " in path and path.endswith(f"/{_STATE}") for path in self._entries)

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is older than the interval."""
        if self._folder is None:
            return False
        interval = max(self._interval, self._saving_seconds / _MAX_SAVING_SHARE)
        return not self._interval or time.monotonic() - self._saved_at >= interval

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


def open_journal(
    config: HybridStreamingConfig,
    describe: Callable[[], FitFingerprint],
    emit: Observer,
    remember: Observer,
) -> Journal:
    """Return the journal that a configuration asks for, with what a checkpoint holds.

    Parameters
    ----------
    config : HybridStreamingConfig
    describe : callable
        Returns what is fitted.
    emit : callable
        Receives a ``FitResumed`` if the fit goes on from a checkpoint.
    remember : callable
        Receives what had happened before.

    Raises
    ------
    FileNotFoundError, CheckpointError
        If the checkpoint is not there, not usable, or of another fit.
    """
    directory = config.checkpoint_dir if config.enable_checkpoints else None
    folder = None if directory is None else CheckpointFolder(directory)
    wanted = config.resume_from_checkpoint
    if wanted is True:  # which the configuration allows with a folder alone
        wanted = None if folder is None or folder.is_empty else directory
    if wanted is None or wanted is False:
        if folder is None:
            return Journal()
        return CheckpointJournal(describe(), folder, config.checkpoint_interval, emit)
    fingerprint, interval, path = describe(), config.checkpoint_interval, normalize_path(wanted)
    checkpoint, notes = load(path)
    notes += checkpoint.fingerprint.check(fingerprint)
    if notes:
        warn_caller(f"Resuming a fit: {'; '.join(notes)}.")
    journal = CheckpointJournal(fingerprint, folder, interval, emit, checkpoint, path)
    for event in journal.events:
        remember(event)
    n_passes = sum(isinstance(event, PassFinished) for event in journal.events)
    started = next((event for event in journal.events if isinstance(event, FitStarted)), None)
    emit(FitResumed(started, path, n_passes, tuple(notes), journal.is_within_pass))
    return journal
