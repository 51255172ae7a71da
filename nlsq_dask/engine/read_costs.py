"""``ReadCosts``: whether it pays to keep blocks in memory, by measured times."""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections import deque

import numpy as np

# Fewer bytes are kept without being measured.
_UNMEASURED_BYTES = 16 * 2**20
# Reading must take this many times as long as writing to new memory. What is kept is also slower to
# use than what was just read, because it is not in the processor's cache, and times vary. Measured:
# 0.3 to 1 for uncompressed files in the memory of the operating system, 5 to 8 for Zarr's default
# compression.
_MIN_RATIO = 2.0
_PROBE_BYTES = 2 * 2**20
_N_PROBES = 3
_N_READS = 64
# As memory of arrays; the default is memory to share with other processes, which is slower.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class ReadCosts:
    """Times to read blocks, and to write as many bytes to new memory, of one fit in one process.

    Memory that was not in use before is slow, as the operating system clears it at the first
    access. Where files are in its cache and are not compressed, reading a block again is faster
    than keeping it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_bytes = 0
        self._reads: deque[float] = deque(maxlen=_N_READS)  # seconds per byte
        self._writes: list[float] = []  # seconds per byte of new memory

    @classmethod
    def of(cls, fit: str) -> ReadCosts:
        """Return the times of a fit in this process."""
        with _registry_lock:
            costs = _by_fit.get(fit)
            if costs is None:
                costs = _by_fit[fit] = cls()
            return costs

    def add(self, seconds: float, n_bytes: int) -> None:
        """Add the time that a block took to be read."""
        with self._lock:
            self._n_bytes += n_bytes
            self._reads.append(seconds / max(n_bytes, 1))
            wants = self._n_bytes > _UNMEASURED_BYTES and len(self._writes) < _N_PROBES
        if wants:
            taken = _write_new_memory() / _PROBE_BYTES
            with self._lock:
                self._writes.append(taken)

    @property
    def pays(self) -> bool:
        """Whether a block that is kept saves more than it costs; True until this is known."""
        with self._lock:
            if not self._writes:
                return True
            # Not the mean: where other programs use the processor too, some times are far longer.
            read = sorted(self._reads)[len(self._reads) // 4]
            return read > _MIN_RATIO * min(self._writes)


_by_fit: weakref.WeakValueDictionary[str, ReadCosts] = weakref.WeakValueDictionary()
_registry_lock = threading.Lock()


def _write_new_memory() -> float:
    """Return the seconds to write to memory that this process has not used before."""
    began = time.perf_counter()
    memory = mmap.mmap(-1, _PROBE_BYTES, **_PRIVATE)
    np.frombuffer(memory, np.uint8).fill(1)
    memory.close()
    return time.perf_counter() - began
