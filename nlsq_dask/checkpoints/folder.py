"""``CheckpointFolder``: the last few checkpoints of a fit, on a disk or at any fsspec URL.

On a disk a file appears under its name only when all of it is durable: it is written under another
name, synchronized and renamed. Elsewhere that is left to the store (an object appears when it is
whole); the checksum tells if it was not.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs

from nlsq_dask.checkpoints.checkpoint import Checkpoint
from nlsq_dask.errors import CheckpointError

_KEPT = 3
_SUFFIX = ".nlsq"


class _Files(Protocol):
    """The few things that are done with a folder."""

    def prepare(self, fit: str) -> None: ...

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None: ...


class _LocalFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, fit: str) -> None:
        """Make the folder, see that it can be written to, and remove what a killed fit has left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob(f".{fit}-*.unfinished"):
            unfinished.unlink(missing_ok=True)
        probe = self._folder / f".{fit}-{uuid.uuid4().hex[:8]}.unfinished"
        probe.touch()
        probe.unlink()

    def names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        fit = name.rpartition("-")[0]
        unfinished = self._folder / f".{fit}-{uuid.uuid4().hex[:8]}.unfinished"
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._folder / name)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self._synchronize_folder()

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def _synchronize_folder(self) -> None:
        if os.name == "nt":  # where a folder cannot be opened
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _RemoteFiles:
    def __init__(self, file_system: Any, folder: str) -> None:
        self._fs = file_system
        self._folder = folder.rstrip("/")

    def prepare(self, fit: str) -> None:
        """Make the folder, where there are folders."""
        self._fs.makedirs(self._folder, exist_ok=True)

    def names(self) -> list[str]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._folder):
            return []
        return [path.rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(f"{self._folder}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self._folder}/{name}", data)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._folder}/{name}")


def normalized(path: str | os.PathLike[str]) -> str:
    """Return a URL as it is, and a path on a disk from its root, also of such a URL."""
    text = os.fspath(path)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    return text if "://" in text else str(Path(text).expanduser().absolute())


def _files(folder: str) -> _Files:
    if "://" not in folder:
        return _LocalFiles(Path(folder))
    return _RemoteFiles(*url_to_fs(folder))


class CheckpointFolder:
    """The folder in which a fit keeps its checkpoints.

    Parameters
    ----------
    path : str or os.PathLike
        A folder, made when it is needed, or an fsspec URL of one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = normalized(path)
        self._files = _files(self._path)

    def prepare(self, fit: str) -> None:
        """See that checkpoints can be written.

        Raises
        ------
        CheckpointError
            If they cannot.
        """
        try:
            self._files.prepare(fit)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint_dir={self._path!r} cannot be written to: {error}. Choose another, or "
                f"leave it out."
            ) from error

    def save(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, remove the oldest of its fit, and return its path."""
        name = f"{checkpoint.fit}-{checkpoint.number:08d}{_SUFFIX}"
        self._files.write(name, checkpoint.to_bytes())
        own = [other for other in self._newest_first() if other.startswith(f"{checkpoint.fit}-")]
        for old in own[_KEPT:]:
            self._files.remove(old)
        return f"{self._path.rstrip('/')}/{name}"

    def _newest_first(self) -> list[str]:
        return sorted((n for n in self._files.names() if n.endswith(_SUFFIX)), reverse=True)

    def newest(self) -> tuple[Checkpoint, list[str]]:
        """Return the newest checkpoint that is whole, and a note on each newer one that is not.

        Raises
        ------
        CheckpointError
            If there is none.
        """
        notes: list[str] = []
        for name in self._newest_first():
            try:
                return Checkpoint.from_bytes(self._files.read(name)), notes
            except (CheckpointError, OSError) as error:
                notes.append(f"checkpoint {name} cannot be used: {error}")
        found = "; ".join(notes) or f"no file in it ends in {_SUFFIX!r}"
        raise CheckpointError(f"there is no usable checkpoint in {self._path!r}: {found}")


def load(path: str | os.PathLike[str]) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint of a file of any name, or the newest whole one of a folder.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    CheckpointError
        If it cannot be used.
    """
    text = normalized(path)
    if "://" in text:
        file_system, inner = url_to_fs(text)
        exists, is_folder = file_system.exists(inner), file_system.isdir(inner)
    else:
        exists, is_folder = Path(text).exists(), Path(text).is_dir()
    if not exists:
        raise FileNotFoundError(
            f"resume_from_checkpoint={text!r} does not exist; give a checkpoint, or the folder "
            f"that was checkpoint_dir."
        )
    if is_folder:
        return CheckpointFolder(text).newest()
    folder, slash, name = text.rpartition("/")
    try:
        return Checkpoint.from_bytes(_files(folder or slash).read(name)), []
    except CheckpointError as error:
        raise CheckpointError(
            f"resume_from_checkpoint={text!r} cannot be used: {error} Give the folder instead to "
            f"go on from the newest one that can be."
        ) from error
