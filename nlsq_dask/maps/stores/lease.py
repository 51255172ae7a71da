"""``Lease``: the right to write to a store, which one process at a time has."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import psutil

from nlsq_dask.errors import CheckpointError
from nlsq_dask.storage.backends import normalize_path, open_parent

_PERIOD = 10.0  # seconds between two renewals
_PATIENCE = 3  # periods without renewal after which a lease on another machine has ended
_SETTLING = 0.5  # seconds in which processes that replace the same lease see each other
_POLL = 1.0  # seconds
_START_TOLERANCE = 2.0  # seconds; the start of a process is computed from clocks that are adjusted

_active: set[str] = set()  # tokens of the leases that this process holds


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    token: str  # unique for each lease
    host: str
    machine: str  # the running system and the namespace in which ``pid`` is valid
    pid: int
    started: float  # start of the process, seconds since 1970
    since: str  # time at which the lease was acquired
    period: float  # seconds between two renewals
    n_renewals: int = 0

    @classmethod
    def of_this_process(cls, period: float) -> Self:
        """Return a new holder."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            since=datetime.now(UTC).isoformat(" ", "seconds"),
            period=period,
        )

    @property
    def text(self) -> str:
        """The process, for messages."""
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_alive(self) -> bool | None:
        """Return whether the lease is in use; None if the process is on another machine."""
        if self.machine != _machine():
            return None
        if self.token in _active:
            return True
        if self.pid == os.getpid():  # a lease that could not be removed, or of a process before
            return False
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < _START_TOLERANCE
            return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


def _machine() -> str:
    """Return an identifier of the running system, within which numbers of processes are unique."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux only
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # differs between containers
    return " ".join(parts)


class Lease:
    """Context in which no other process writes to a store.

    A JSON object beside the store, ``<store>.lock``, names the process that holds the lease, which
    a thread renews. If the process is killed, the next one on the same machine takes the lease at
    once, and one on another machine after 30 seconds without renewal.

    A lease excludes a second writer in practice, not in theory: two processes that replace the
    lease of a killed one at the same moment both hold it if one of them is suspended for half a
    second just then, until the next renewal of the other.

    Parameters
    ----------
    store : path or URL
    period : float
        Seconds between two renewals.

    Raises
    ------
    CheckpointError
        On entering, if another process holds the lease.
    """

    def __init__(self, store: str | os.PathLike[str], period: float = _PERIOD) -> None:
        self._store = normalize_path(store).rstrip("/")
        self._is_remote = "://" in self._store
        self._folder, name = open_parent(self._store)
        self._name = f"{name}.lock"
        self._own = Holder.of_this_process(period)
        self._taken_by: Holder | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="nlsq-lease", daemon=True)

    def __enter__(self) -> Self:
        self._folder.prepare(self._name)
        _active.add(self._own.token)
        try:
            self._acquire()
            self._thread.start()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        try:
            self._thread.join(timeout=self._own.period)
        finally:
            self._release()

    def check(self) -> None:
        """Raise a CheckpointError if another process has taken the lease.

        That happens if this process could not renew it for 30 seconds, such as a suspended one.
        """
        if self._taken_by is not None:
            raise CheckpointError(
                f"{self._store} is now written by another process ({self._taken_by.text}), because "
                f"this one was suspended, or could not reach the store, for too long. What it has "
                f"written is valid. Wait until the other process has ended, then call again to "
                f"fit the remaining tiles."
            )

    def _acquire(self) -> None:
        data = msgspec.json.encode(self._own)
        while True:
            held = self._read()
            if held is None:
                if not self._folder.create(self._name, data):
                    continue
                is_certain = not self._is_remote
                break
            if self._has_ended(held):
                self._folder.write(self._name, data)
                is_certain = False
                break
        if is_certain:
            return
        time.sleep(_SETTLING)
        holder = _decoded(self._read())
        if holder is not None and holder.token != self._own.token:
            raise self._refusal(holder)

    def _has_ended(self, held: bytes) -> bool:
        """Return whether a lease, given as bytes, is that of a killed process.

        False if it has changed, so that it must be looked at again. Raises a CheckpointError if the
        process that holds it is alive.
        """
        holder = _decoded(held)
        is_alive = None if holder is None else holder.is_alive()
        if holder is not None and is_alive:
            raise self._refusal(holder)
        if is_alive is False:
            return True
        # An unreadable one is being written at this moment, or its process was killed then.
        patience = 2 * _SETTLING if holder is None else _PATIENCE * holder.period
        end = time.monotonic() + patience
        while (remaining := end - time.monotonic()) > 0:
            time.sleep(min(_POLL, remaining))
            now = self._read()
            if now != held:
                other = _decoded(now)
                if holder is not None and other is not None and other.token == holder.token:
                    raise self._refusal(other)
                return False
        return True

    def _refusal(self, holder: Holder) -> CheckpointError:
        return CheckpointError(
            f"{self._store} is being written by another fit ({holder.text}). Wait until it has "
            f"ended, or end it, and call again; or pass another path as store."
        )

    def _renew(self) -> None:
        holder = self._own
        while not self._ended.wait(holder.period):
            # File systems raise errors of any class; the network may be back at the next renewal.
            with suppress(Exception):
                other = _decoded(self._read())
                if other is not None and other.token != holder.token:
                    self._taken_by = other
                    return
                holder = replace(holder, n_renewals=holder.n_renewals + 1)
                self._folder.write(self._name, msgspec.json.encode(holder))
                if self._ended.is_set():  # while a slow file system wrote
                    self._release()

    def _release(self) -> None:
        _active.discard(self._own.token)
        # A lease that cannot be removed ends with this process, or by not being renewed.
        with suppress(Exception):
            holder = _decoded(self._read())
            if holder is not None and holder.token == self._own.token:
                self._folder.remove(self._name)

    def _read(self) -> bytes | None:
        with suppress(FileNotFoundError):
            return self._folder.read(self._name)
        return None


def _decoded(data: bytes | None) -> Holder | None:
    with suppress(msgspec.MsgspecError):
        return msgspec.json.decode(data or b"", type=Holder)
    return None
