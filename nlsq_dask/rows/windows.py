"""Split rows into batches: padded views of equal length, for which one compiled program serves.

A padded view is longer than its batch; the start of the batch is an argument of the program. It is
a NumPy view if XLA accepts the alignment of the memory without a copy, else a copy in a buffer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.rows.rows import Array, Rows, as_rows, fill_range

ALIGNMENT = 64  # bytes; XLA does not copy a NumPy array that starts at a multiple
SLACK = 64  # rows by which a padded view is longer than its batch
# Arrays of ``n_rows + SLACK`` rows, the offset of the batch in each of them, and the number of rows
# of the batch. Other values of the arrays have no meaning.
Window = tuple[Rows, Rows, int]

_Buffers = dict[int, NDArray[np.uint8]]


class Memory:
    """Buffers for copies of rows, which ``windows`` reuses in turn.

    Parameters
    ----------
    n_buffer_sets : int
        Number of padded views, see ``windows``, that are valid at the same time.
    """

    def __init__(self, n_buffer_sets: int) -> None:
        self._buffer_sets: list[_Buffers] = [{} for _ in range(n_buffer_sets)]
        self._turn = 0

    def next_buffers(self) -> _Buffers:
        """Return the buffers for the next ``Window``, as a dict by number of the array."""
        self._turn = (self._turn + 1) % len(self._buffer_sets)
        return self._buffer_sets[self._turn]


class MemoryPool:
    """Pool of ``Memory`` objects that threads borrow.

    Buffers are reused because allocating is slow: the operating system clears new pages on one
    thread at a time. Pickling drops the buffers.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Memory]] = defaultdict(list)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def borrow(self, n_buffer_sets: int) -> Iterator[Memory]:
        """Lend a ``Memory`` until the context ends.

        After an error it is not reused, because computations may still read from it.
        """
        free = self._free[n_buffer_sets]
        try:
            memory = free.pop()
        except IndexError:
            memory = Memory(n_buffer_sets)
        yield memory
        free.append(memory)


def windows(
    arrays: Sequence[Array | None],
    shape: tuple[int, ...],
    n_rows: int,
    strip_rows: int,
    memory: Memory,
) -> Iterator[Window]:
    """Yield batches of up to ``n_rows`` rows as padded views, see ``Window``.

    Parameters
    ----------
    arrays : sequence of ndarray or None
        y, x..., sigma, mask; dimensions beyond ``shape`` are features.
    shape : tuple of int
        Shape of y, whose elements in C order are the rows.
    n_rows : int
        Maximum number of rows of a batch.
    strip_rows : int
        Rows that the kernel's compiled program processes at a time. Batches begin at multiples of
        it, and the view reaches to the next multiple after the end of a batch.
    memory : Memory
        Buffers for copies; a padded view is invalid once its buffers are reused.
    """
    flat = [None if array is None else as_rows(array, shape) for array in arrays]
    length = n_rows + SLACK
    for start, count in _view_ranges(math.prod(shape), n_rows, strip_rows):
        buffers = memory.next_buffers()
        stop = start - (count // -strip_rows) * strip_rows  # end of the last strip
        views: list[tuple[Any, Any]] = []
        for i, (array, rows) in enumerate(zip(arrays, flat, strict=True)):
            if array is None:
                views.append((None, None))
                continue
            first = None if rows is None else _aligned_start(rows, start, stop, length)
            if rows is not None and first is not None:
                views.append((rows[first : first + length], np.int64(start - first)))
                continue
            copy = _aligned_memory(buffers, i, (length, *array.shape[len(shape) :]), array.dtype)
            fill_range(copy[:count], array, shape, start)
            # Arbitrary padding could slow down a model that iterates.
            copy[count : stop - start] = 0
            views.append((copy, np.int64(0)))
        padded, offsets = map(Rows.of, zip(*views, strict=True))
        yield padded, offsets, count


def _view_ranges(n_rows: int, max_rows: int, strip_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the number of rows of each batch.

    The first and the last batch are short, because they usually have to be copied.
    """
    has_views = n_rows >= max_rows + SLACK
    start, count = 0, strip_rows if has_views else min(max_rows, n_rows)
    while start < n_rows:
        yield start, count
        start += count
        remaining = n_rows - start
        whole = (remaining - SLACK) // strip_rows * strip_rows if has_views else remaining
        count = min(max_rows, whole if whole > 0 else remaining)


def _aligned_start(rows: Array, start: int, stop: int, length: int) -> int | None:
    """Return the row at which a view of ``length`` rows that needs no copy begins, or None.

    The view begins at an aligned address at or before ``start`` and contains the rows before
    ``stop``.
    """
    latest = min(start, len(rows) - length)
    row_bytes = rows.nbytes // max(len(rows), 1)
    address = rows.__array_interface__["data"][0]
    for first in range(latest, max(latest - SLACK, -1), -1):
        if (address + first * row_bytes) % ALIGNMENT == 0:
            return first if stop <= first + length else None
    return None


def _aligned_memory(
    buffers: _Buffers, name: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """Return an array at an aligned address of buffer ``name``, enlarging the buffer if needed."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if name not in buffers or len(buffers[name]) < n_bytes + ALIGNMENT:
        buffers[name] = np.empty(n_bytes + ALIGNMENT, np.uint8)
    memory = buffers[name]
    first = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[first : first + n_bytes].view(dtype).reshape(shape)
