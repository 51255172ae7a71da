"""Where a fit keeps its journal, and what it goes on from."""

from __future__ import annotations

from collections.abc import Callable

from nlsq_dask.checkpoints.folder import CheckpointFolder, load
from nlsq_dask.checkpoints.identity import Identity
from nlsq_dask.checkpoints.journal import CheckpointJournal, Journal
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.errors import warn_caller
from nlsq_dask.events import FitResumed, FitStarted, Observer, PassFinished
from nlsq_dask.storage.folders import normalized


def open_journal(
    config: HybridStreamingConfig,
    describe: Callable[[], Identity],
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
    identity, interval, path = describe(), config.checkpoint_interval, normalized(wanted)
    checkpoint, notes = load(path)
    notes += checkpoint.identity.check(identity)
    if notes:
        warn_caller(f"Resuming a fit: {'; '.join(notes)}.")
    journal = CheckpointJournal(identity, folder, interval, emit, checkpoint, path)
    for event in journal.events:
        remember(event)
    n_passes = sum(isinstance(event, PassFinished) for event in journal.events)
    started = next((event for event in journal.events if isinstance(event, FitStarted)), None)
    emit(FitResumed(started, path, n_passes, tuple(notes), journal.is_within_pass))
    return journal
