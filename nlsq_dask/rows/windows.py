"""Padded views of a block, the batches on which a kernel is called.

All have the same length, so that they share one program. A padded view is a NumPy view where the
rows have XLA's alignment, otherwise a copy in a reused buffer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.rows.rows import Array, Rows

ALIGNMENT = 64  # bytes; XLA does not copy a NumPy array that starts at a multiple
SLACK = 64  # rows by which a padded view is longer than its batch
# Arrays of ``n_rows + SLACK`` rows, the offset of the batch in each of them, and the number of rows
# of the batch. Other values of the arrays have no meaning.
Window = tuple[Rows, Rows, int]

_Buffers = dict[int, NDArray[np.uint8]]


class Memory:
    """Ring of buffers for copies, used by one caller.

    Parameters
    ----------
    n_buffer_sets : int
        Number of padded views after which a buffer is reused.
    """

    def __init__(self, n_buffer_sets: int) -> None:
        self._buffer_sets: list[_Buffers] = [{} for _ in range(n_buffer_sets)]
        self._turn = 0

    def next_buffers(self) -> _Buffers:
        """Return the buffers for the next padded view, by index of the array in ``arrays``."""
        self._turn = (self._turn + 1) % len(self._buffer_sets)
        return self._buffer_sets[self._turn]


class MemoryPool:
    """Pool of buffers for several threads.

    Allocating is slow, because the system clears new pages on one thread at a time. A pickled pool
    is empty.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Memory]] = defaultdict(list)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def borrow(self, n_buffer_sets: int) -> Iterator[Memory]:
        """Lend a ring of buffers until the context ends.

        After an error it is not reused, as computations may still read it.
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
    """Yield padded views of ``n_rows`` rows of arrays that broadcast against ``shape``.

    Parameters
    ----------
    arrays : sequence of ndarray or None
        y, x..., sigma, mask; dimensions beyond ``shape`` are features.
    shape : tuple of int
        Shape of y, whose elements in C order are the rows.
    n_rows : int
        Maximum number of rows of a batch.
    strip_rows : int
        Rows of the kernel's strips, whose boundaries the batches respect. The kernel reads the last
        strip of a batch completely, masked beyond its rows.
    memory : Memory
        Buffers of copies; a padded view is invalid once its buffers are reused.
    """
    flat = [None if array is None else _flat(array, shape) for array in arrays]
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
            _fill(copy[:count], array, shape, start)
            # Arbitrary padding could slow down a model that iterates.
            copy[count : stop - start] = 0
            views.append((copy, np.int64(0)))
        padded, offsets = (
            Rows(part[0], tuple(part[1:-2]), part[-2], part[-1])
            for part in zip(*views, strict=True)
        )
        yield padded, offsets, count


def _view_ranges(n_rows: int, max_rows: int, strip_rows: int) -> Iterator[tuple[int, int]]:
    """Yield start and number of rows of each batch.

    The first and the last are short, because they usually have to be copied.
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
    """Return the last aligned row from which a padded view covers start to stop, or None."""
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
    """Return an array at an aligned address of the buffer ``name``, enlarged if needed."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if name not in buffers or len(buffers[name]) < n_bytes + ALIGNMENT:
        buffers[name] = np.empty(n_bytes + ALIGNMENT, np.uint8)
    memory = buffers[name]
    first = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[first : first + n_bytes].view(dtype).reshape(shape)


def flat_range(array: Array, shape: tuple[int, ...], start: int, stop: int) -> Array:
    """Return ``broadcast(array, shape).reshape(-1)[start:stop]``, expanding only that range.

    Trailing dimensions beyond ``shape`` are features and are kept.
    """
    rows = _flat(array, shape)
    if rows is not None:
        return rows[start:stop]
    out = np.empty((stop - start, *array.shape[len(shape) :]), array.dtype)
    _fill(out, array, shape, start)
    return out


def _flat(array: Array, shape: tuple[int, ...]) -> Array | None:
    """Return the array with its rows along one axis, or None if that requires a copy."""
    features = array.shape[len(shape) :]
    is_whole = array.shape == shape + features and array.flags.c_contiguous
    return array.reshape(-1, *features) if is_whole else None


def _fill(out: Array, array: Array, shape: tuple[int, ...], start: int) -> None:
    """Write ``broadcast(array, shape).reshape(-1)[start : start + len(out)]`` into ``out``."""
    features = array.shape[len(shape) :]
    whole_shape = shape + features
    view = array if array.shape == whole_shape else np.broadcast_to(array, whole_shape)
    if len(shape) == 1:
        out[...] = view[start : start + len(out)]
        return
    inner = math.prod(shape[1:])
    done = 0
    while done < len(out):
        outer, offset = divmod(start + done, inner)
        whole = 0 if offset else (len(out) - done) // inner
        if whole:
            count = whole * inner
            rows = out[done : done + count].reshape(whole, *shape[1:], *features)
            rows[...] = view[outer : outer + whole]
        else:
            count = min(inner - offset, len(out) - done)
            _fill(out[done : done + count], view[outer], shape[1:], offset)
        done += count
