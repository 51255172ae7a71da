"""``CheckpointFolder``: a directory of checkpoints."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fsspec.core import url_to_fs

from nlsq_dask.checkpoints.checkpoint import Checkpoint
from nlsq_dask.engine.error_kinds import ErrorKind, classify
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

    Attributes
    ----------
    path : str
        Absolute path, or the URL.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = normalize_path(path)
        self._files = open_folder(self.path)

    def prepare(self, fit: str) -> None:
        """Create the directory, and check that checkpoints of the fit can be written to it.

        Raises
        ------
        CheckpointError
            If the directory is not writable.
        """
        try:
            self._files.prepare(fit)
        except Exception as error:  # file systems raise errors of any class
            raise CheckpointError(
                f"checkpoint_dir={self.path!r} is not writable: {summarize(error)}. "
                f"{_remedy(error, self.path)}Pass a writable directory, or None to write no "
                f"checkpoints."
            ) from error

    def save(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, keep only the last three of the fit, and return the path."""
        name = f"{checkpoint.fit}-{checkpoint.number:08d}{_SUFFIX}"
        self._files.write(name, checkpoint.to_bytes())
        with suppress(Exception):  # the checkpoint is written; old ones are removed next time
            names = [other for other in self._names() if other.startswith(f"{checkpoint.fit}-")]
            for old in names[_MAX_FILES:]:
                self._files.remove(old)
        return f"{self.path.rstrip('/')}/{name}"

    def _names(self) -> list[str]:
        """Return the names of the files of checkpoints, the newest first."""
        return sorted((n for n in self._files.names() if n.endswith(_SUFFIX)), reverse=True)

    @property
    def is_empty(self) -> bool:
        """Whether the directory contains no files of checkpoints, valid or not."""
        try:
            return not self._names()
        except Exception as error:
            raise _unreadable(error, "checkpoint_dir", self.path) from error

    def newest(self) -> tuple[Checkpoint, list[str]]:
        """Return the newest valid checkpoint, and a text for each newer file that is invalid.

        Raises
        ------
        CheckpointError
            If the directory contains no valid checkpoint.
        """
        reasons: dict[str, str] = {}  # by file
        for name in self._names():
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
            f"There is no valid checkpoint in {self.path!r}: {found}. Omit resume_from_checkpoint "
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
    try:
        return _load(text)
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:  # file systems raise errors of any class
        raise _unreadable(error, "resume_from_checkpoint", text) from error


def _load(path: str) -> tuple[Checkpoint, list[str]]:
    if "://" in path:
        file_system, inner = url_to_fs(path)
        exists, is_folder = file_system.exists(inner), file_system.isdir(inner)
    else:
        exists, is_folder = Path(path).exists(), Path(path).is_dir()
    if not exists:
        raise FileNotFoundError(
            f"resume_from_checkpoint={path!r} does not exist; pass the path of a checkpoint, or "
            f"of the directory that was checkpoint_dir."
        )
    if is_folder:
        return CheckpointFolder(path).newest()
    folder, slash, name = path.rpartition("/")
    try:
        return Checkpoint.from_bytes(open_folder(folder or slash).read(name)), []
    except CheckpointError as error:
        raise CheckpointError(
            f"resume_from_checkpoint={path!r} is not a valid checkpoint: {error} Pass its "
            f"directory to resume from the newest valid one."
        ) from error


def summarize(error: BaseException) -> str:
    """Return the class and the first line of an error, without a period at the end."""
    text = str(error).strip().partition("\n")[0].rstrip(". ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _unreadable(error: Exception, option: str, path: str) -> CheckpointError:
    return CheckpointError(
        f"{option}={path!r} cannot be read: {summarize(error)}. {_remedy(error, path)}Fit again "
        f"when it can be read, or pass another path."
    )


def _remedy(error: Exception, path: str) -> str:
    """Return a sentence on what to do about an error of a store, or ""."""
    if "://" not in path:
        return ""
    if classify(error) is ErrorKind.DENIED:
        return (
            "Configure credentials that allow it, such as by variables in the environment of this "
            "process. "
        )
    if isinstance(error, FileNotFoundError):
        return "Create the bucket; a fit creates folders only. "
    return ""
