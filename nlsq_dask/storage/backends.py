"""Folders on a disk or at an fsspec URL, with atomic writes of files.

On a disk, a file is written under a temporary name, synchronized and renamed. In an object store,
an object becomes visible when it is complete; if a store violates this, the checksum in the file
does not match.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs

_ABANDONED_AFTER = 3600.0  # seconds
_MAX_PREFIX_LENGTH = 64  # characters; more than in the name of a fit


class Folder(Protocol):
    """Operations on a folder of files."""

    def prepare(self, fit: str) -> None:
        """Create the folder, and check that files whose names begin with ``fit`` can be written."""

    def names(self) -> list[str]:
        """Return the names of the files; an empty list if the folder does not exist."""

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists, and return whether it was written.

        Some object stores overwrite a file that another process creates at the same time.
        """

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""


def _unfinished_name(fit: str) -> str:
    """Return a unique name for a file that is being written, or only shows that it can be."""
    return f".{fit}-{uuid.uuid4().hex[:8]}.unfinished"


class _LocalFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, fit: str) -> None:
        """Create the folder, remove temporary files of killed fits, and check write access."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob(".*.unfinished"):
            if unfinished.name.startswith(f".{fit}-") or _is_abandoned(unfinished):
                unfinished.unlink(missing_ok=True)
        probe = self._folder / _unfinished_name(fit)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have prepared the folder, too

    def names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        fit = name.rpartition("-")[0][:_MAX_PREFIX_LENGTH]
        unfinished = self._folder / _unfinished_name(fit)
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._folder / name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._synchronize_folder()

    def create(self, name: str, data: bytes) -> bool:
        try:
            with (self._folder / name).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def _synchronize_folder(self) -> None:
        if os.name == "nt":  # folders cannot be opened on Windows
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Return whether a file was last written so long ago that no process is still writing it."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER
    return False


class _RemoteFolder:
    def __init__(self, file_system: Any, folder: str) -> None:
        self._fs = file_system
        self._folder = folder.rstrip("/")

    def prepare(self, fit: str) -> None:
        """Create the folder if the store has folders, and check write access.

        Paths in an object store begin with a bucket, not with a slash. Buckets are not created.
        """
        if self._folder.startswith("/") and not self._fs.exists(self._folder):
            self._fs.makedirs(self._folder, exist_ok=True)
        probe = f"{self._folder}/{_unfinished_name(fit)}"
        self._fs.pipe_file(probe, b"")
        with suppress(Exception):  # of a store that may be written to, but not deleted from
            self._fs.rm_file(probe)

    def names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:  # not ``exists``, which is False if some stores do not answer
            paths = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        return [path.rpartition("/")[2] for path in paths]

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(f"{self._folder}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self._folder}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        path = f"{self._folder}/{name}"
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except Exception:
            # A file system that does not know the mode, or reports an existing file in its own way.
            self._fs.invalidate_cache()
            if self._fs.exists(path):
                return False
            self._fs.pipe_file(path, data)
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._folder}/{name}")


def normalize_path(path: str | os.PathLike[str]) -> str:
    """Return a URL unchanged, and a path or ``file://`` URL as an absolute path."""
    text = os.fspath(path)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    return text if "://" in text else str(Path(text).expanduser().absolute())


def open_parent(path: str) -> tuple[Folder, str]:
    """Return the folder that contains a path or fsspec URL, and the name in it.

    Raises
    ------
    ValueError
        If the URL is a bucket, or the root of a file system.
    """
    if "://" not in path:
        return _LocalFolder(Path(path).parent), Path(path).name
    file_system, inner = url_to_fs(path)
    parent, slash, name = inner.rstrip("/").rpartition("/")
    if not name or not slash:
        raise ValueError(f"{path!r} is a bucket. Pass a path in it, such as {path}/name.")
    return _RemoteFolder(file_system, parent), name


def open_folder(folder: str) -> Folder:
    """Return the folder at a path or fsspec URL, which need not exist yet."""
    if "://" not in folder:
        return _LocalFolder(Path(folder))
    return _RemoteFolder(*url_to_fs(folder))
