"""``BlockGroup``: neighboring blocks that one task reads and may cache for later passes."""

from __future__ import annotations

import contextvars
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

from nlsq_dask.engine.cache_budget import CacheBudget
from nlsq_dask.engine.prefetch import DECODING_COPIES, Prefetcher, PrefetchLimits
from nlsq_dask.engine.read_costs import ReadCosts
from nlsq_dask.engine.source_graph import GroupReader, ReadBlock
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.rows.device_rows import PlacedRows
from nlsq_dask.rows.rows import Rows

CachedBlock = Rows | PlacedRows
_Read = tuple[ReadBlock, PlacedRows | None]  # a block, and its copy on the GPU
T = TypeVar("T")

_lock = threading.Lock()
_placed: weakref.WeakSet[BlockGroup] = weakref.WeakSet()  # groups with blocks on GPUs


class CacheLostError(Exception):
    """A group whose blocks were cached must be read again, but was not given its inputs."""


class ReadAhead:
    """A thread pool that reads blocks before they are needed.

    Parameters
    ----------
    n_threads : int
        Number of threads, and the maximum number of blocks that are read but not yet used.
    limits : PrefetchLimits
        Limits on further blocks, which are read where reading waits.
    """

    def __init__(self, n_threads: int, limits: PrefetchLimits) -> None:
        self._n_threads = n_threads
        self._prefetcher = Prefetcher.of(limits)
        self.pool = ThreadPoolExecutor(n_threads, thread_name_prefix="nlsq-read-ahead")
        self._places = threading.Semaphore(n_threads)

    def reserve_place(self) -> bool:
        """Reserve a place for one more block; return False if all places are taken."""
        return self._places.acquire(blocking=False)

    def free_place(self) -> None:
        """Make room for another block to be read ahead, after one that was is now in use."""
        self._places.release()

    def arrange(
        self, groups: Sequence[BlockGroup], skipped: frozenset[int], kernel: Kernel[Any]
    ) -> None:
        """Arrange what is read ahead in a pass, given the groups in the order of their use.

        The other parameters are those of ``BlockGroup.read_ahead_of``.
        """
        self._prefetcher.set_turns([group.number for group in groups])
        # Groups finish in order, so the next group of a thread is n_threads places ahead.
        for group, other in zip_longest(groups, groups[self._n_threads :]):
            group.read_ahead_of(other, self, skipped, kernel)

    def close(self) -> None:
        """Wait for running reads, and cancel those that have not started."""
        self._prefetcher.close()
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
    is_held : bool
        Whether the inputs of the reader are in memory, so that it costs nothing to get them again.
    is_large : bool
        If True, ``sizeof`` counts the blocks, so that the Dask scheduler does not move the group to
        another worker.
    number : int
        Number of the group in the fit.
    limits : PrefetchLimits
        Limits on what is read ahead.
    """

    def __init__(
        self,
        reader: GroupReader,
        n_bytes: int,
        budget: CacheBudget,
        is_held: bool,
        is_large: bool,
        number: int,
        limits: PrefetchLimits,
    ) -> None:
        self.reader = reader
        self.number = number
        self._n_bytes = n_bytes
        self._budget = budget
        self._is_held = is_held
        self._is_large = is_large
        self._limits = limits
        self._ahead = Prefetcher.of(limits)
        self._ahead.register(self)
        # Positions among the arrays of a block of those that are inputs in memory.
        keys = reader.blocks[0][1]
        self._held = {i for i, key in enumerate(keys) if is_held and key in reader.inputs}
        self._at_last: Callable[[], None] | None = None
        self._prefetched: tuple[_Reading, frozenset[int], ReadAhead] | None = None
        self._cached: list[tuple[int, CachedBlock]] | None = None
        self._give_back: Callable[[], object] = lambda: None
        self._costs = ReadCosts.of(budget.fit)
        # Blocks that are made of arrays in memory alone, such as slices, are not kept twice.
        self._may_cache = not is_held or reader.has_sources
        self._may_place = is_held or not reader.inputs

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self._n_bytes, self._budget, self._is_held, self._is_large
        return type(self), (self.reader, *arguments, self.number, self._limits)

    @property
    def bytes_ahead(self) -> int:
        """Bytes of memory that reading one of the blocks takes."""
        return DECODING_COPIES * self._n_bytes // len(self.reader.blocks)

    def is_cached(self, skipped: frozenset[int]) -> bool:
        """Return whether all blocks are in memory, except skipped ones."""
        return self._usable(skipped) is not None

    def _usable(self, skipped: frozenset[int]) -> list[tuple[int, CachedBlock]] | None:
        """Return the cached blocks that are not skipped; None if one of them is missing."""
        cached = self._cached  # another thread may delete it
        if cached is None:
            return None
        usable = [(i, rows) for i, rows in cached if i not in skipped]
        return usable if len(usable) == self.reader.count(skipped) else None

    def read_ahead_of(
        self,
        following: BlockGroup | None,
        threads: ReadAhead,
        skipped: frozenset[int],
        kernel: Kernel[Any],
    ) -> None:
        """Arrange to read the first block of another group while the last one of this is in use.

        It is called before ``map_blocks``. Both groups must be in this process.

        Parameters
        ----------
        following : BlockGroup or None
            The other group, or None to read nothing ahead.
        threads : ReadAhead
            Reads the block.
        skipped : frozenset of int
            Flat indices of blocks that are not read.
        kernel : Kernel
            As for ``map_blocks``.
        """
        self._at_last = None
        if following is not None:
            self._at_last = partial(following._start_reading, threads, skipped, kernel)

    def _start_reading(
        self, threads: ReadAhead, skipped: frozenset[int], kernel: Kernel[Any]
    ) -> None:
        """Start to read the first block, unless it is cached or needs results of other tasks."""
        with _lock:
            wants = (
                not self.is_cached(skipped) and self._prefetched is None and not self.reader.inputs
            )
            if wants and threads.reserve_place():
                reading = _Reading(self._read((), skipped, kernel))
                reading.prefetch(threads.pool)
                self._prefetched = reading, skipped, threads

    def _reading(
        self, inputs: Sequence[Any], skipped: frozenset[int], kernel: Kernel[Any]
    ) -> _Reading:
        with _lock:
            prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None:
            reading, skipped_then, threads = prefetched
            threads.free_place()
            if skipped_then == skipped:
                return reading
        return _Reading(self._read(inputs, skipped, kernel))

    def _read(
        self, inputs: Sequence[Any], skipped: frozenset[int], kernel: Kernel[Any]
    ) -> Iterator[_Read]:
        """Read the blocks, and copy them to the GPU if the kernel computes there."""
        ahead = partial(self._ahead.take, self, skipped=skipped)
        for read in self.reader.read(inputs, skipped, ahead):
            yield read, self._place(read.block, kernel)

    def _place(self, block: Rows | None, kernel: Kernel[Any]) -> PlacedRows | None:
        """Copy a block to the GPU, and return None if there is none or it has no room."""
        gpus = [] if block is None else kernel.gpus
        if block is None or not gpus:
            return None
        n_bytes = kernel.placed_bytes(block)
        if not self._budget.reserve_on_device(n_bytes, gpus):
            return None
        placed = None
        try:
            placed = kernel.placed(block)
        finally:
            if placed is None:
                self._budget.release_on_device(n_bytes)
        if placed is None:
            self._budget.close_device()
        else:
            weakref.finalize(placed, self._budget.release_on_device, n_bytes)
        return placed

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + (self._n_bytes if self._is_large else 0)

    def map_blocks(
        self,
        function: Callable[[int, CachedBlock | None, ReadBlock | None], T],
        inputs: Sequence[Any],
        skipped: frozenset[int],
        kernel: Kernel[Any],
        is_last: bool = False,
    ) -> Generator[T, None, None]:
        """Yield what a function returns for each block, in order.

        Blocks are read in the calling thread, because reading may compute Dask arrays, which a
        worker allows only in the thread of a task. While a block is read, the function is called
        with the one before it in another thread.

        Parameters
        ----------
        function : callable
            Called with the flat index, the rows and the ``ReadBlock`` of a block. The rows are None
            if the block could not be read. The ``ReadBlock`` is None if the block was cached.
        inputs : sequence
            Results of the tasks ``reader.inputs``, in that order.
        skipped : frozenset of int
            Flat indices of blocks that are skipped.
        kernel : Kernel
            Copies blocks to the GPU if it computes there.
        is_last : bool
            Whether a further pass is unlikely. Blocks are then not kept, unless the size of the
            cache was requested.
        """
        usable = self._usable(skipped)
        if usable is not None:
            yield from (function(i, rows, None) for i, rows in usable)
            return
        if len(inputs) < len(self.reader.inputs):
            raise CacheLostError
        self._delete_cached()
        self._ahead.begin(self)
        self._costs.begin()
        try:
            keeps = self._may_cache and not (is_last and self._budget.must_pay)
            yield from self._map_read(function, inputs, skipped, kernel, keeps)
        finally:
            self._costs.end()
            self._ahead.end(self)

    def _timed(self, call: Callable[[], T]) -> T:
        """Return the result of a call, and add its processor time to the costs."""
        began = time.thread_time()
        try:
            return call()
        finally:
            self._costs.add_kernel(time.thread_time() - began)

    def _map_read(
        self,
        function: Callable[[int, CachedBlock | None, ReadBlock | None], T],
        inputs: Sequence[Any],
        skipped: frozenset[int],
        kernel: Kernel[Any],
        keeps: bool,
    ) -> Generator[T, None, None]:
        """Read the blocks, yield what the function returns for each, and cache them."""
        wants = keeps and self._pays and self._budget.reserve(self._n_bytes)
        reserved = self._n_bytes if wants else 0
        cached: list[tuple[int, CachedBlock]] | None = []
        running: Future[T] | None = None
        try:
            reading, count = self._reading(inputs, skipped, kernel), self.reader.count(skipped)
            with ThreadPoolExecutor(1, thread_name_prefix="nlsq-kernel") as pool:
                for remaining in reversed(range(count)):
                    read, placed = reading.next()
                    if running is not None:
                        result, running = running.result(), None
                        yield result
                        del result
                    rows = self._to_cache(read, placed, wants=bool(reserved))
                    if cached is not None and rows is not None:
                        cached.append((read.index, rows))
                    else:  # a group is cached as a whole or not at all
                        self._budget.release(reserved)
                        reserved, cached = 0, None
                    in_use = next((r for r in (placed, rows) if r is not None), read.block)
                    call = partial(self._timed, partial(function, read.index, in_use, read))
                    del read, placed, rows, in_use  # may not outlive the call
                    if remaining:
                        running = pool.submit(contextvars.copy_context().run, call)
                    else:
                        if self._at_last is not None:
                            self._at_last()
                        yield call()
                    del call
        except BaseException:
            running = None  # whose error refers to this frame, with its blocks
            self._budget.release(reserved)
            raise
        if cached is not None:
            self._cache(cached, reserved)
        else:
            self._budget.release(reserved)

    @property
    def _pays(self) -> bool:
        """Whether blocks are worth the memory that the budget allows for them."""
        return not self._budget.must_pay or self._ahead.has_waited or self._costs.pays

    def _to_cache(
        self, read: ReadBlock, placed: PlacedRows | None, wants: bool
    ) -> CachedBlock | None:
        """Return what is cached of a block: rows on a GPU, otherwise in memory if ``wants``."""
        n_bytes = 0 if placed is None else placed.nbytes
        if placed is not None and self._may_place and self._budget.keep_on_device(n_bytes):
            weakref.finalize(placed, self._budget.release_kept, n_bytes)
            return placed
        if read.block is None or not self._may_cache:
            return None
        self._costs.add_block(read.block.nbytes)
        return read.block.compact(self._held) if wants and self._pays else None

    def _cache(self, cached: list[tuple[int, CachedBlock]], reserved: int) -> None:
        """Keep blocks, for which bytes in memory were reserved."""
        are_placed = [isinstance(rows, PlacedRows) for _, rows in cached]
        if all(are_placed):
            self._budget.release(reserved)
            reserved = 0
        with _lock:
            if any(are_placed) and self._budget.is_device_closed:  # in the meantime
                self._budget.release(reserved)
                return
            self._give_back = weakref.finalize(self, self._budget.release, reserved)
            self._cached = cached
            if any(are_placed):
                _placed.add(self)

    def _delete_cached(self) -> None:
        with _lock:
            self._cached = None
        self._give_back()

    def forget(self) -> None:
        """Delete the cached blocks, and a block that was read ahead."""
        with _lock:
            prefetched, self._prefetched = self._prefetched, None
        self._delete_cached()
        if prefetched is not None:
            prefetched[-1].free_place()

    def read_again(self) -> None:
        """Delete the cached blocks if any is on a GPU, where rows cannot be sampled."""
        if any(isinstance(rows, PlacedRows) for _, rows in self._cached or ()):
            self.forget()

    def leave_device(self) -> None:
        """Delete all blocks of this fit on the GPUs of this process, and let no more be kept."""
        self._budget.close_device()
        with _lock:
            groups = [group for group in _placed if group._budget.fit == self._budget.fit]
            _placed.difference_update(groups)
        for group in (self, *groups):  # another thread may have begun to delete this one
            group.forget()


@dataclass
class _Reading:
    """An iterator over blocks; another thread may already be reading the first one."""

    items: Iterator[_Read]
    prefetched: Future[_Read] | None = None

    def prefetch(self, pool: ThreadPoolExecutor) -> None:
        """Start to read the first block in a thread of the pool."""
        self.prefetched = pool.submit(contextvars.copy_context().run, next, self.items)

    def next(self) -> _Read:
        """Return the next block; wait for it if another thread is reading it."""
        future, self.prefetched = self.prefetched, None
        return next(self.items) if future is None else future.result()
