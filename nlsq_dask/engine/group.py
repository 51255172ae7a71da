"""``Group``: the blocks of one task, on the worker that holds them from pass to pass."""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from nlsq_dask.core.placed_rows import PlacedRows
from nlsq_dask.data.block import Block
from nlsq_dask.engine.source_graph import GroupReader

T = TypeVar("T")
Kept = Block | PlacedRows

_kept_bytes: Counter[str] = Counter()
_released: deque[tuple[str, int]] = deque()
_lock = threading.Lock()


@dataclass(frozen=True)
class CacheBudget:
    """How many bytes the groups of one fit may keep in a process.

    Attributes
    ----------
    fit : str
        Name of the fit.
    process_bytes : int
    """

    fit: str
    process_bytes: int

    def reserve(self, n_bytes: int) -> bool:
        """Take some bytes out of the budget of this process, if there are so many left."""
        with _lock:
            _settle()
            if _kept_bytes[self.fit] + n_bytes > self.process_bytes:
                return False
            _kept_bytes[self.fit] += n_bytes
            return True

    def release(self, n_bytes: int) -> None:
        """Give them back; may be called by the garbage collector at any moment, so no lock."""
        _released.append((self.fit, n_bytes))


def kept_bytes() -> int:
    """Return how many bytes of blocks this process keeps, over all fits."""
    with _lock:
        _settle()
        return _kept_bytes.total()


def _settle() -> None:
    while _released:
        fit, n_bytes = _released.popleft()
        _kept_bytes[fit] -= n_bytes
        if not _kept_bytes[fit]:
            del _kept_bytes[fit]


class Group:
    """What one task works on: how its blocks are read, and the blocks themselves if it keeps them.

    A copy that is sent elsewhere keeps nothing. When the group goes, its bytes go back to the
    budget.

    Parameters
    ----------
    reader : GroupReader
    n_bytes : int
        Bytes of all its blocks.
    budget : CacheBudget
    is_large : bool
        Whether a scheduler should take it for as large as it may become, so that it is not moved.
    """

    def __init__(
        self, reader: GroupReader, n_bytes: int, budget: CacheBudget, is_large: bool
    ) -> None:
        self.reader = reader
        self._n_bytes = n_bytes
        self._budget = budget
        self._is_large = is_large
        self._kept: list[tuple[int, Kept]] | None = None
        # What other tasks read for several groups would be read again all the same.
        self._may_keep = bool(reader.steps) and not reader.inputs

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reader, self._n_bytes, self._budget, self._is_large)

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + (self._n_bytes if self._is_large else 0)

    def blocks(
        self, inputs: Sequence[Any], place: Callable[[Block], Kept]
    ) -> Iterator[tuple[int, Kept, Block | None]]:
        """Yield flat index and rows of each block, and the block itself if it was read now.

        Parameters
        ----------
        inputs : sequence
            Results of the tasks that the reader names.
        place : callable
            Puts a block where it is best kept.
        """
        if self._kept is not None:
            yield from ((index, rows, None) for index, rows in self._kept)
            return
        wants = self._may_keep and self._budget.reserve(self._n_bytes)
        reserved = self._n_bytes if wants else 0
        kept: list[tuple[int, Kept]] = []
        try:
            for index, block in _ahead(self.reader.read(inputs), len(self.reader.blocks)):
                rows: Kept = block
                if reserved:
                    rows = place(block.compact())
                    kept.append((index, rows))
                    more = max(rows.nbytes - block.nbytes, 0)
                    if self._budget.reserve(more):
                        reserved += more
                    else:
                        self._budget.release(reserved)
                        reserved, kept, self._may_keep = 0, [], False
                yield index, rows, block
        except BaseException:
            self._budget.release(reserved)
            raise
        if reserved:
            self._kept = kept
            weakref.finalize(self, self._budget.release, reserved)


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield items while another thread gets the next one: computing overlaps with reading."""
    if count < 2:
        yield from items
        return
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1, thread_name_prefix="nlsq-read-ahead") as thread:
        coming = thread.submit(context.run, next, items)
        for _ in range(count - 1):
            item = coming.result()
            coming = thread.submit(context.run, next, items)
            yield item
        yield coming.result()
