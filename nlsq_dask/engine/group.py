"""``Group``: the blocks of one task, on the worker that holds them from pass to pass."""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from nlsq_dask.data.block import Block
from nlsq_dask.engine.source_graph import GroupReader

T = TypeVar("T")

_kept_bytes: Counter[str] = Counter()
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
            if _kept_bytes[self.fit] + n_bytes > self.process_bytes:
                return False
            _kept_bytes[self.fit] += n_bytes
            return True

    def release(self, n_bytes: int) -> None:
        """Give them back."""
        with _lock:
            _kept_bytes[self.fit] -= n_bytes
            if not _kept_bytes[self.fit]:
                del _kept_bytes[self.fit]


def kept_bytes() -> int:
    """Return how many bytes of blocks this process keeps, over all fits."""
    with _lock:
        return _kept_bytes.total()


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
    """

    def __init__(self, reader: GroupReader, n_bytes: int, budget: CacheBudget) -> None:
        self.reader = reader
        self._n_bytes = n_bytes
        self._budget = budget
        self._kept: list[tuple[int, Block]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reader, self._n_bytes, self._budget)

    def __sizeof__(self) -> int:
        """Return what the group may grow to, so that a scheduler knows what it would move."""
        return object.__sizeof__(self) + (self._n_bytes if self._budget.process_bytes else 0)

    def blocks(self, inputs: Sequence[Any]) -> Iterator[tuple[int, Block, bool]]:
        """Yield flat index and block, and whether it was kept from an earlier pass."""
        if self._kept is not None:
            for index, block in self._kept:
                yield index, block, True
            return
        is_kept = bool(self.reader.steps) and self._budget.reserve(self._n_bytes)
        kept = []
        try:
            for index, block in _ahead(self.reader.read(inputs), len(self.reader.blocks)):
                if is_kept:
                    kept.append((index, block.compact()))
                yield index, block, False
        except BaseException:
            if is_kept:
                self._budget.release(self._n_bytes)
            raise
        if is_kept:
            self._kept = kept
            weakref.finalize(self, self._budget.release, self._n_bytes)


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
