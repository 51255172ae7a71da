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
        Path or fsspec URL; created when needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = normalize_path(path)
        self._files = open_folder(self._path)

    def prepare(self, fit: str) -> None:
        """Create the directory.

        Raises
        ------
        CheckpointError
            If it is not writable.
        """
        try:
            self._files.prepare(fit)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to checkpoint_dir={self._path!r}: {error}. Pass a writable "
                f"directory, or None to write no checkpoints."
            ) from error

    def save(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, remove the oldest of the same fit, and return the path."""
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
        """Whether the directory has no checkpoints, valid or not."""
        return not self._newest_first()

    def newest(self) -> tuple[Checkpoint, list[str]]:
        """Return the newest valid checkpoint, and a note on each newer invalid one.

        Raises
        ------
        CheckpointError
            If there is no valid checkpoint.
        """
        reasons: dict[str, str] = {}  # by file
        for name in self._newest_first():
            try:
                checkpoint = Checkpoint.from_bytes(self._files.read(name))
            except (CheckpointError, OSError) as error:
                reasons[name] = str(error)
            else:
                return checkpoint, [f"checkpoint {n} is invalid: {r}" for n, r in reasons.items()]
        found = f"it contains no {_SUFFIX} file"
        if reasons:
            # Often the same, such as an older format: each is given once, with its newest file.
            newest = {reason: name for name, reason in reversed(reasons.items())}
            found = "; ".join(f"checkpoint {name}: {reason}" for reason, name in newest.items())
        raise CheckpointError(f"no valid checkpoint in {self._path!r}: {found}")


def load(path: str | os.PathLike[str]) -> tuple[Checkpoint, list[str]]:
    """Load the checkpoint of a file, or the newest valid one of a directory, with notes.

    Raises
    ------
    FileNotFoundError
        If the path does not exist.
    CheckpointError
        If the checkpoint is invalid.
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
