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
    is_saving = config.enable_checkpoints and config.checkpoint_dir is not None
    folder = CheckpointFolder(config.checkpoint_dir or "") if is_saving else None
    wanted = config.resume_from_checkpoint
    if wanted is True:
        if folder is None or config.checkpoint_dir is None:
            raise ValueError(
                "resume_from_checkpoint=True goes on from what is in checkpoint_dir; set that, too."
            )
        wanted = None if folder.is_empty else config.checkpoint_dir
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
    emit(FitResumed(started, path, n_passes, tuple(notes)))
    return journal
