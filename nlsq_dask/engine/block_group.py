"""``BlockGroup``: neighboring blocks that one task reads and may cache for later passes."""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from nlsq_dask.engine.source_graph import GroupReader, ReadBlock
from nlsq_dask.rows.device_rows import PlacedRows
from nlsq_dask.rows.rows import Rows

CachedBlock = Rows | PlacedRows

_cached_bytes: Counter[str] = Counter()
_released: deque[tuple[str, int]] = deque()  # not yet subtracted from _cached_bytes
_lock = threading.Lock()


@dataclass(frozen=True)
class CacheBudget:
    """Limit on the bytes of blocks that one fit caches in each process."""

    fit: str  # unique name of the fit
    process_bytes: int  # maximum per process

    def reserve(self, n_bytes: int) -> bool:
        """Reserve bytes in this process, or return False if fewer are free."""
        with _lock:
            _settle()
            if _cached_bytes[self.fit] + n_bytes > self.process_bytes:
                return False
            _cached_bytes[self.fit] += n_bytes
            return True

    def release(self, n_bytes: int) -> None:
        """Give reserved bytes back.

        The garbage collector may call this at any time, so no lock is taken.
        """
        _released.append((self.fit, n_bytes))


def cached_bytes() -> int:
    """Return the bytes of all cached blocks in this process, over all fits."""
    with _lock:
        _settle()
        return _cached_bytes.total()


def _settle() -> None:
    while _released:
        fit, n_bytes = _released.popleft()
        _cached_bytes[fit] -= n_bytes
        if not _cached_bytes[fit]:
            del _cached_bytes[fit]


class ReadAhead:
    """A thread pool that reads blocks before they are needed.

    Parameters
    ----------
    n_threads : int
        Number of threads, and the maximum number of blocks that are read but not yet used.
    """

    def __init__(self, n_threads: int) -> None:
        self.pool = ThreadPoolExecutor(n_threads, thread_name_prefix="nlsq-read-ahead")
        self._places = threading.Semaphore(n_threads)

    def reserve_place(self) -> bool:
        """Reserve a place for one more block; return False if all places are taken."""
        return self._places.acquire(blocking=False)

    def free_place(self) -> None:
        """Make room for another block to be read ahead, after one that was is now in use."""
        self._places.release()

    def close(self) -> None:
        """Wait for running reads, and cancel those that have not started."""
        self.pool.shutdown(cancel_futures=True)


class BlockGroup:
    """Neighboring blocks that one task reads, and keeps for later passes over the data if they fit.

    A pickled copy has no cached blocks. When a group is deleted, the budget gets its bytes back.

    Parameters
    ----------
    reader : GroupReader
        Reads the blocks.
    n_bytes : int
        Size of all blocks.
    budget : CacheBudget
        Limits the size of cached blocks.
    is_large : bool
        If True, ``sizeof`` counts the blocks, so that the Dask scheduler does not move the group to
        another worker.
    """

    def __init__(
        self, reader: GroupReader, n_bytes: int, budget: CacheBudget, is_large: bool
    ) -> None:
        self.reader = reader
        self._n_bytes = n_bytes
        self._budget = budget
        self._is_large = is_large
        self._at_last: Callable[[], None] | None = None
        self._prefetched: tuple[_Reading, frozenset[int], ReadAhead] | None = None
        self._cached: list[tuple[int, CachedBlock]] | None = None
        # Inputs from shared tasks would be read again in any case.
        self._may_cache = bool(reader.steps) and not reader.inputs

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reader, self._n_bytes, self._budget, self._is_large)

    def read_ahead_of(
        self, following: BlockGroup | None, threads: ReadAhead, skipped: frozenset[int]
    ) -> None:
        """Arrange to read the first block of another group while the last one of this is in use.

        It is called before ``blocks``. Both groups must be in this process.

        Parameters
        ----------
        following : BlockGroup or None
            The other group, or None to read nothing ahead.
        threads : ReadAhead
            Reads the block.
        skipped : frozenset of int
            Flat indices of blocks that are not read.
        """
        self._at_last = None
        if following is not None:
            self._at_last = partial(following._start_reading, threads, skipped)

    def _start_reading(self, threads: ReadAhead, skipped: frozenset[int]) -> None:
        """Start to read the first block, unless it is cached or needs results of other tasks."""
        with _lock:
            wants = self._cached is None and self._prefetched is None and not self.reader.inputs
            if wants and threads.reserve_place():
                reading = _Reading(self.reader.read((), skipped))
                reading.prefetch(threads.pool)
                self._prefetched = reading, skipped, threads

    def _reading(self, inputs: Sequence[Any], skipped: frozenset[int]) -> _Reading:
        with _lock:
            prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None:
            reading, skipped_then, threads = prefetched
            threads.free_place()
            if skipped_then == skipped:
                return reading
        return _Reading(self.reader.read(inputs, skipped))

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + (self._n_bytes if self._is_large else 0)

    def blocks(
        self, inputs: Sequence[Any], skipped: frozenset[int], place: Callable[[Rows], CachedBlock]
    ) -> Iterator[tuple[int, CachedBlock | None, ReadBlock | None]]:
        """Yield the flat index, the rows and the ``ReadBlock`` of each block.

        The rows are None if the block could not be read. The ``ReadBlock`` is None if the block was
        cached.

        Parameters
        ----------
        inputs : sequence
            Results of the tasks ``reader.inputs``, in that order.
        skipped : frozenset of int
            Flat indices of blocks that are neither read nor yielded.
        place : callable
            Copies a block to the memory in which it is cached, for instance that of a GPU.
        """
        if self._cached is not None:
            yield from ((index, rows, None) for index, rows in self._cached if index not in skipped)
            return
        wants = self._may_cache and self._budget.reserve(self._n_bytes)
        reserved = self._n_bytes if wants else 0
        cached: list[tuple[int, CachedBlock]] = []
        try:
            reading, count = self._reading(inputs, skipped), self.reader.count(skipped)
            for read in _ahead(reading, count, self._at_last):
                rows: CachedBlock | None = read.block
                if reserved and read.block is None:
                    # A group is cached as a whole or not at all.
                    self._budget.release(reserved)
                    reserved, cached = 0, []
                elif reserved and read.block is not None:
                    rows = place(read.block.compact())
                    cached.append((read.index, rows))
                    more = max(rows.nbytes - read.block.nbytes, 0)
                    if self._budget.reserve(more):
                        reserved += more
                    else:
                        self._budget.release(reserved)
                        reserved, cached, self._may_cache = 0, [], False
                yield read.index, rows, read
        except BaseException:
            self._budget.release(reserved)
            raise
        if reserved:
            self._cached = cached
            weakref.finalize(self, self._budget.release, reserved)


@dataclass
class _Reading:
    """An iterator over blocks; another thread may already be reading the next block."""

    items: Iterator[ReadBlock]
    prefetched: Future[ReadBlock] | None = None

    def prefetch(self, pool: ThreadPoolExecutor) -> None:
        """Start to read the next block in a thread of the pool."""
        self.prefetched = pool.submit(contextvars.copy_context().run, next, self.items)

    def next(self) -> ReadBlock:
        """Return the next block; wait for it if another thread is reading it."""
        future, self.prefetched = self.prefetched, None
        return next(self.items) if future is None else future.result()


def _ahead(
    reading: _Reading, count: int, at_last: Callable[[], None] | None
) -> Iterator[ReadBlock]:
    """Yield ``count`` blocks; while the caller uses one, another thread reads the next one.

    When all blocks are read, and before the last one is yielded, ``at_last`` is called.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="nlsq-read-ahead") as pool:
        for remaining in reversed(range(count)):
            item = reading.next()
            if remaining:
                reading.prefetch(pool)
            elif at_last is not None:
                at_last()
            yield item
