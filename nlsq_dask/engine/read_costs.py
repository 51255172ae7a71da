"""``ReadCosts``: whether it pays to keep blocks in memory, by measured processor time."""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections import deque
from statistics import mean, median

import numpy as np

_WINDOW_BYTES = 16 * 2**20  # over which the processor time of reading is measured
_MIN_WINDOWS = 3  # before these, blocks are kept
_MAX_WINDOWS = 64
# Reading must take this many times as long as writing to new memory. What is kept is also slower to
# use than what was just read, because it is not in the processor's cache. Measured ratios of
# uncompressed and compressed files in the memory of the operating system: benchmarks/README.md.
_MIN_RATIO = 1.9
_PROBE_BYTES = 2 * 2**20
# As memory of arrays; the default is memory to share with other processes, which is slower.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class ReadCosts:
    """Processor time to read blocks, and to write to new memory, of one fit in one process.

    Memory that was not in use before is slow, as the operating system clears it at the first
    access. Where files are in its own memory and are not compressed, reading a block again is
    faster than keeping it. Processor time tells more than time, which grows with all that runs
    beside: threads that read, kernels, and other programs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_running = 0
        self._cpu = 0.0  # of the process at the beginning of the window
        self._kernel_cpu = 0.0  # of kernels in the window
        self._n_bytes = 0  # read in the window
        self._reads: deque[float] = deque(maxlen=_MAX_WINDOWS)  # seconds per byte
        self._writes: list[float] = []  # seconds per byte of new memory

    @classmethod
    def of(cls, fit: str) -> ReadCosts:
        """Return the costs of a fit in this process."""
        with _registry_lock:
            costs = _by_fit.get(fit)
            if costs is None:
                costs = _by_fit[fit] = cls()
            return costs

    def begin(self) -> None:
        """Note that a task begins to read blocks."""
        with self._lock:
            if not self._n_running:  # the process may have computed other things
                self._open_window()
            self._n_running += 1

    def end(self) -> None:
        """Note that the task ends."""
        with self._lock:
            self._n_running -= 1

    def add_kernel(self, seconds: float) -> None:
        """Add the processor time of sums over a block, which is none of reading."""
        with self._lock:
            self._kernel_cpu += seconds

    def add_block(self, n_bytes: int) -> None:
        """Add a block that was read."""
        with self._lock:
            self._n_bytes += n_bytes
            if self._n_bytes < _WINDOW_BYTES:
                return
            cpu = time.process_time() - self._cpu - self._kernel_cpu
            self._reads.append(cpu / self._n_bytes)
            if len(self._writes) < _MIN_WINDOWS:
                self._writes.append(_write_new_memory() / _PROBE_BYTES)
            self._open_window()

    def _open_window(self) -> None:
        self._cpu, self._kernel_cpu, self._n_bytes = time.process_time(), 0.0, 0

    @property
    def pays(self) -> bool:
        """Whether a block that is kept saves more than it costs; True until this is known."""
        with self._lock:
            if len(self._writes) < _MIN_WINDOWS:
                return True
            # A mean, because threads read at a time and end together. Compiling in the first fit
            # of a model adds to it, so that the blocks of that fit are kept.
            return mean(self._reads) > _MIN_RATIO * median(self._writes)


_by_fit: weakref.WeakValueDictionary[str, ReadCosts] = weakref.WeakValueDictionary()
_registry_lock = threading.Lock()


def _write_new_memory() -> float:
    """Return the processor time to write to memory that this process has not used before."""
    began = time.thread_time()
    memory = mmap.mmap(-1, _PROBE_BYTES, **_PRIVATE)
    np.frombuffer(memory, np.uint8).fill(1)
    memory.close()
    return time.thread_time() - began
