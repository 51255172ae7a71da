"""``CacheBudget``: limits on the memory that the blocks of one fit take in each process."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nlsq_dask.rows.device_memory import free_device_bytes

_HOST, _DEVICE, _KEPT = "host", "GPU", "kept on GPU"
# Shares of a GPU's free memory: of all rows there, and of those that stay for later passes. The
# rest is for results of the computation.
_MAX_ON_DEVICE, _MAX_KEPT = 0.8, 0.6
_MAX_FITS = 256  # whose limits are remembered

_bytes: Counter[tuple[str, str]] = Counter()  # reserved, by fit and place
_released: deque[tuple[tuple[str, str], int]] = deque()  # not yet subtracted from _bytes
_device_limits: dict[str, int] = {}  # free bytes of the GPUs at the first request, by fit
_lock = threading.Lock()


@dataclass(frozen=True)
class CacheBudget:
    """Limits on the bytes of blocks that one fit holds in each process.

    Attributes
    ----------
    fit : str
        Unique name of the fit.
    process_bytes : int
        Maximum of cached blocks in the memory of a process.
    device_bytes : int or None
        Maximum of cached blocks in the memory of a process's GPUs; None for what is free.
    device_processes : int
        Number of processes that share a GPU.
    must_pay : bool
        Whether blocks are cached in the memory of a process only where ``ReadCosts`` says that it
        pays.
    """

    fit: str
    process_bytes: int
    device_bytes: int | None = None
    device_processes: int = 1
    must_pay: bool = False

    def reserve(self, n_bytes: int) -> bool:
        """Reserve bytes in this process, or return False if fewer are free."""
        return self._reserve(_HOST, n_bytes, self.process_bytes)

    def release(self, n_bytes: int) -> None:
        """Give reserved bytes back.

        The garbage collector may call this at any time, so no lock is taken.
        """
        _released.append(((self.fit, _HOST), n_bytes))

    def reserve_on_device(self, n_bytes: int, devices: Sequence[Any]) -> bool:
        """Reserve bytes on the GPUs of this process, or return False if fewer are free."""
        if self.fit not in _device_limits:
            free = free_device_bytes(devices) // self.device_processes
            with _lock:
                _device_limits.setdefault(self.fit, free)
        most = int(_MAX_ON_DEVICE * _device_limits.get(self.fit, 0))
        return self._reserve(_DEVICE, n_bytes, most)

    def release_on_device(self, n_bytes: int) -> None:
        """Give reserved bytes of the GPUs back; as for ``release``, no lock is taken."""
        _released.append(((self.fit, _DEVICE), n_bytes))

    def keep_on_device(self, n_bytes: int) -> bool:
        """Return whether rows on a GPU may stay there for later passes, and count them if so.

        ``release_kept`` gives these bytes back, in addition to ``release_on_device``.
        """
        most = int(_MAX_KEPT * _device_limits.get(self.fit, 0))
        if self.device_bytes is not None:
            most = min(most, self.device_bytes)
        return self._reserve(_KEPT, n_bytes, most)

    def release_kept(self, n_bytes: int) -> None:
        """Give bytes of rows that were kept on a GPU back; no lock is taken."""
        _released.append(((self.fit, _KEPT), n_bytes))

    def close_device(self) -> None:
        """Let no more rows be copied to the GPUs of this process, which ran out of memory."""
        with _lock:
            _device_limits[self.fit] = 0
            while len(_device_limits) > _MAX_FITS:  # those of fits that ended long ago
                del _device_limits[next(iter(_device_limits))]

    @property
    def is_device_closed(self) -> bool:
        """Whether no more rows are copied to the GPUs."""
        return _device_limits.get(self.fit) == 0

    def _reserve(self, place: str, n_bytes: int, most: int) -> bool:
        with _lock:
            _settle()
            if _bytes[self.fit, place] + n_bytes > most:
                return False
            _bytes[self.fit, place] += n_bytes
            return True


def cached_bytes() -> int:
    """Return the bytes of all blocks that are cached in this process, over all fits."""
    with _lock:
        _settle()
        return sum(n_bytes for (_, place), n_bytes in _bytes.items() if place != _KEPT)


def _settle() -> None:
    while _released:
        key, n_bytes = _released.popleft()
        _bytes[key] -= n_bytes
        if not _bytes[key]:
            del _bytes[key]
