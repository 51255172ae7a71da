"""``Prefetcher``: reads of the blocks that follow, many at a time, where reading waits.

Behind an object store a read is mostly waiting, so that a thread with one request in flight is
idle. Where the processor is busy instead, with decoding or with sums, more reads at a time gain
nothing; therefore the number of blocks that are read ahead follows the measured use of the
processor. Which blocks are read ahead has no influence on results.
"""

from __future__ import annotations

import contextvars
import heapq
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from distributed import get_worker

from nlsq_dask.engine.source_graph import GroupReader, StepResult

DECODING_COPIES = 2  # encoded and decoded bytes of a chunk are in memory together
_WINDOW = 0.01  # seconds over which the use of the processor is measured, at least
# Shares of the processor that are in use below which blocks are read ahead; the second one for data
# that are not known to be remote, as other programs may use the processor, too.
_IDLE, _IDLE_LOCAL = 0.5, 0.08
_NOT_BUSY, _BUSY = 0.7, 0.9  # below the first share there are more, above the second one fewer
_FIRST_DEPTH = 4  # blocks per thread, or core, that are read ahead as soon as reading waits


@dataclass(frozen=True)
class PrefetchLimits:
    """Limits on what one fit reads ahead in each process."""

    fit: str  # unique name of the fit
    n_threads: int  # that run tasks, per process
    n_blocks: int  # maximum of blocks that are read and not yet used, or being read
    n_bytes: int  # maximum of their bytes, with those of encoded chunks


class PrefetchedGroup(Protocol):
    """What a ``Prefetcher`` needs to know of a group of blocks."""

    reader: GroupReader
    number: int  # of the group in the fit

    @property
    def bytes_ahead(self) -> int:
        """Bytes of memory that reading one of the blocks takes."""

    def is_cached(self, skipped: frozenset[int]) -> bool:
        """Return whether no block needs to be read."""


_Place = tuple[int, int]  # number of a group, and position of a block in it


class Prefetcher:
    """Reads the blocks that follow in other threads: one for each fit in each process.

    Parameters
    ----------
    limits : PrefetchLimits
    """

    def __init__(self, limits: PrefetchLimits) -> None:
        self._limits = limits
        self._cores = min(limits.n_threads, os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._groups: weakref.WeakValueDictionary[int, PrefetchedGroup]
        self._groups = weakref.WeakValueDictionary()
        self._turns: list[int] | None = None  # order of the groups; None if a worker knows it
        self._places: dict[int, int] = {}  # position in it, by number
        self._pass: Any = None  # name of the tasks of the current pass, on a worker of Dask
        self._reading: dict[_Place, tuple[dict[Any, Future[StepResult]], int]] = {}
        self._n_bytes = 0  # of the blocks that are read ahead
        self._running: list[int] = []  # numbers of the groups in use
        self._started: set[int] = set()  # those, and others that were in use in this pass
        self.has_waited = False  # whether reading has left the processor idle
        self._depth = 0  # number of blocks to read ahead
        self._wall = self._cpu = 0.0  # at the beginning of the measured time

    @classmethod
    def of(cls, limits: PrefetchLimits) -> Prefetcher:
        """Return the prefetcher of a fit in this process."""
        with _registry_lock:
            prefetcher = _by_fit.get(limits.fit)
            if prefetcher is None:
                prefetcher = _by_fit[limits.fit] = cls(limits)
            return prefetcher

    def register(self, group: PrefetchedGroup) -> None:
        """Remember a group of this process, as long as it exists."""
        with self._lock:
            self._groups[group.number] = group

    def set_turns(self, numbers: Sequence[int]) -> None:
        """Set the order in which the groups of a pass are used; a worker of Dask knows it."""
        with self._lock:
            self._drop(list(self._reading))  # of a pass that was interrupted
            self._started.clear()
            self._turns = list(numbers)
            self._places = {number: i for i, number in enumerate(numbers)}

    def begin(self, group: PrefetchedGroup) -> None:
        """Note that a task begins to use a group."""
        with self._lock:
            if not self._running:  # the processor may have been idle for other reasons
                self._wall, self._cpu = time.perf_counter(), time.process_time()
            self._running.append(group.number)

    def end(self, group: PrefetchedGroup) -> None:
        """Note that the task ends, and delete what was read for it and not used."""
        with self._lock:
            self._measure(group.reader)
            self._running.remove(group.number)
            self._drop([place for place in self._reading if place[0] == group.number])

    def take(
        self, group: PrefetchedGroup, position: int, skipped: frozenset[int]
    ) -> dict[Any, Future[StepResult]]:
        """Return the reads that are done or running for a block, by key of their step.

        If the block needs several and none was begun, they are begun now, at the same time. Then
        reads of the blocks after it are begun, as many as are useful.

        Parameters
        ----------
        group : PrefetchedGroup
        position : int
            Position of the block in the group.
        skipped : frozenset of int
            Flat indices of blocks that are not read.
        """
        with self._lock:
            self._measure(group.reader)
            self._started.add(group.number)
            futures = self._pop((group.number, position))
            if self._depth:
                if not futures and len(group.reader.reads(position)) > 1:
                    futures = self._begin_reads(group.reader, position)
                self._fill(group, position, skipped)
            return futures

    def _fill(self, group: PrefetchedGroup, position: int, skipped: frozenset[int]) -> None:
        """Begin to read the blocks after one that is in use."""
        if len(self._reading) < self._depth:
            for other, j in self._following(group, position, skipped):
                n_bytes = self._n_bytes + other.bytes_ahead
                if len(self._reading) >= self._depth or n_bytes > self._limits.n_bytes:
                    return
                place = other.number, j
                if place not in self._reading and other.reader.reads(j):
                    futures = self._begin_reads(other.reader, j)
                    self._reading[place] = futures, other.bytes_ahead
                    self._n_bytes = n_bytes

    def close(self) -> None:
        """Wait for running reads, cancel those that have not started, and delete the results."""
        with self._lock:
            self._limits = replace(self._limits, n_blocks=0)  # tasks may still run
            self._depth, self._turns = 0, []
            self._drop(list(self._reading))
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _measure(self, reader: GroupReader) -> None:
        """Adapt the number of blocks to read ahead to the use of the processor."""
        wall, cpu = time.perf_counter(), time.process_time()
        elapsed = wall - self._wall
        if elapsed < _WINDOW:
            return
        busy = (cpu - self._cpu) / (elapsed * self._cores)
        self._wall, self._cpu = wall, cpu
        idle = _IDLE if reader.is_remote else _IDLE_LOCAL
        if busy < (_NOT_BUSY if self._depth else idle):
            self.has_waited = True
            depth = max(2 * self._depth, _FIRST_DEPTH * self._cores)
            self._depth = min(depth, self._limits.n_blocks)
        elif busy > _BUSY:
            self._depth //= 2

    def _following(
        self, group: PrefetchedGroup, position: int, skipped: frozenset[int]
    ) -> Iterator[tuple[PrefetchedGroup, int]]:
        """Yield the blocks that are read after one, as groups with positions in them."""
        others = (self._groups.get(number) for number in self._numbers_after(group.number))
        for other in (group, *(o for o in others if o is not None)):
            if other is group or not (other.number in self._started or other.is_cached(skipped)):
                start = position + 1 if other is group else 0
                for j, (index, *_) in enumerate(other.reader.blocks[start:], start):
                    if index not in skipped:
                        yield other, j

    def _numbers_after(self, number: int) -> Iterable[int]:
        """Return the numbers of the groups that are used after one, in order."""
        most = self._limits.n_blocks + self._limits.n_threads
        if self._turns is None:
            name, numbers = _waiting_groups(most)
            if name != self._pass:  # tasks of the one before may have moved to other workers
                self._pass, self._started = name, set(self._running)
                self._drop([place for place in self._reading if place[0] not in self._running])
            return numbers
        place = self._places.get(number, len(self._turns))
        return self._turns[place + 1 : place + 1 + most]

    def _begin_reads(self, reader: GroupReader, position: int) -> dict[Any, Future[StepResult]]:
        if self._pool is None:
            n_threads = self._limits.n_blocks * len(reader.layout.array_names)
            self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="nlsq-prefetch")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        return {
            key: self._pool.submit(contextvars.copy_context().run, reader.run_read, key)
            for key in reader.reads(position)
        }

    def _pop(self, place: _Place) -> dict[Any, Future[StepResult]]:
        futures, n_bytes = self._reading.pop(place, ({}, 0))
        self._n_bytes -= n_bytes
        return futures

    def _drop(self, places: Iterable[_Place]) -> None:
        for place in places:
            for future in self._pop(place).values():
                future.cancel()


_by_fit: weakref.WeakValueDictionary[str, Prefetcher] = weakref.WeakValueDictionary()
_registry_lock = threading.Lock()


def _waiting_groups(most: int) -> tuple[Any, list[int]]:
    """Return the name of the tasks of the current pass, and which groups wait on this worker.

    They are what a worker of Dask runs next; their order is the scheduler's.
    """
    try:
        worker = get_worker()
        current: Any = worker.get_current_task()
        name = current[0]
        ready: list[tuple[Any, Any]]
        ready = [(task.priority, task.key) for task in list(worker.state.ready)]
    except (ValueError, AttributeError, TypeError, RuntimeError):
        return None, []  # not in a task of a worker, or its tasks changed in this moment
    waiting = [(at, key[1]) for at, key in ready if isinstance(key, tuple) and key[0] == name]
    return name, [number for _, number in heapq.nsmallest(most, waiting)]
