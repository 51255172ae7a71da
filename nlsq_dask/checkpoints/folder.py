"""``CheckpointFolder``: a directory of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

from fsspec.core import url_to_fs

from nlsq_dask.checkpoints.checkpoint import Checkpoint
from nlsq_dask.errors import CheckpointError
from nlsq_dask.storage.backends import normalize_path, open_folder

_MAX_FILES = 3
_SUFFIX = ".nlsq"


class CheckpointFolder:
    """A directory of checkpoints.

    Parameters
    ----------
    path : str or os.PathLike
        Path or fsspec URL. ``prepare`` creates the directory if it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = normalize_path(path)
        self._files = open_folder(self._path)

    def prepare(self, fit: str) -> None:
        """Create the directory, and check that checkpoints of the fit can be written to it.

        Raises
        ------
        CheckpointError
            If the directory is not writable.
        """
        try:
            self._files.prepare(fit)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint_dir={self._path!r} is not writable: {error}. Pass a writable "
                f"directory, or None to write no checkpoints."
            ) from error

    def save(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, keep only the last three of the fit, and return the path."""
        name = f"{checkpoint.fit}-{checkpoint.number:08d}{_SUFFIX}"
        self._files.write(name, checkpoint.to_bytes())
        own = [other for other in self._newest_first() if other.startswith(f"{checkpoint.fit}-")]
        for old in own[_MAX_FILES:]:
            self._files.remove(old)
        return f"{self._path.rstrip('/')}/{name}"

    def _newest_first(self) -> list[str]:
        return sorted((n for n in self._files.names() if n.endswith(_SUFFIX)), reverse=True)

    @property
    def is_empty(self) -> bool:
        """Whether the directory contains no files of checkpoints, valid or not."""
        return not self._newest_first()

    def newest(self) -> tuple[Checkpoint, list[str]]:
        """Return the newest valid checkpoint, and a text for each newer file that is invalid.

        Raises
        ------
        CheckpointError
            If the directory contains no valid checkpoint.
        """
        reasons: dict[str, str] = {}  # by file
        for name in self._newest_first():
            try:
                checkpoint = Checkpoint.from_bytes(self._files.read(name))
            except (CheckpointError, OSError) as error:
                reasons[name] = str(error).rstrip(".")
            else:
                return checkpoint, [f"checkpoint {n} is invalid: {r}" for n, r in reasons.items()]
        found = f"it contains no {_SUFFIX} file"
        if reasons:
            # Often the same, such as an older format: each is given once, with its newest file.
            newest = {reason: name for name, reason in reversed(reasons.items())}
            found = "; ".join(f"checkpoint {name}: {reason}" for reason, name in newest.items())
        raise CheckpointError(
            f"There is no valid checkpoint in {self._path!r}: {found}. Omit resume_from_checkpoint "
            f"to start a new fit."
        )


def load(path: str | os.PathLike[str]) -> tuple[Checkpoint, list[str]]:
    """Load a checkpoint from a file, or the newest valid checkpoint from a directory.

    Returns
    -------
    checkpoint : Checkpoint
    notes : list of str
        A text for each newer file of the directory that is invalid.

    Raises
    ------
    FileNotFoundError
        If the path does not exist.
    CheckpointError
        If the file is invalid, or all files of the directory are.
    """
    text = normalize_path(path)
    if "://" in text:
        file_system, inner = url_to_fs(text)
        exists, is_folder = file_system.exists(inner), file_system.isdir(inner)
    else:
        exists, is_folder = Path(text).exists(), Path(text).is_dir()
    if not exists:
        raise FileNotFoundError(
            f"resume_from_checkpoint={text!r} does not exist; pass the path of a checkpoint, or "
            f"of the directory that was checkpoint_dir."
        )
    if is_folder:
        return CheckpointFolder(text).newest()
    folder, slash, name = text.rpartition("/")
    try:
        return Checkpoint.from_bytes(open_folder(folder or slash).read(name)), []
    except CheckpointError as error:
        raise CheckpointError(
            f"resume_from_checkpoint={text!r} is not a valid checkpoint: {error} Pass its "
            f"directory to resume from the newest valid one."
        ) from error
