"""Where a fit keeps its journal, and what it goes on from."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from nlsq_dask.checkpoints.folder import CheckpointFolder, load
from nlsq_dask.checkpoints.identity import Identity
from nlsq_dask.checkpoints.journal import CheckpointJournal, Journal
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.events import FitResumed, Observer, PassFinished
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
    path = config.resume_from_checkpoint
    is_saving = config.enable_checkpoints and config.checkpoint_dir is not None
    if path is None and not is_saving:
        return Journal()
    folder = CheckpointFolder(config.checkpoint_dir or "") if is_saving else None
    identity, interval = describe(), config.checkpoint_interval
    if path is None:
        return CheckpointJournal(identity, folder, interval, emit)
    path = normalized(path)
    checkpoint, notes = load(path)
    notes += checkpoint.identity.check(identity)
    if notes:
        warnings.warn(f"Resuming a fit: {'; '.join(notes)}.", stacklevel=4)
    journal = CheckpointJournal(identity, folder, interval, emit, checkpoint, path)
    for event in journal.events:
        remember(event)
    n_passes = sum(isinstance(event, PassFinished) for event in journal.events)
    emit(FitResumed(path, n_passes, tuple(notes)))
    return journal
