"""Windows: the pieces of a block that a kernel is given one after the other.

All have the same number of rows, so that one program serves them all. Where rows lie in memory as
XLA wants them a window is a view; where not it is a copy, in memory that is used again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.rows import Rows

Array = NDArray[Any]

ALIGNMENT = 64  # bytes; XLA takes a NumPy array that begins at a multiple without copying it
FIRST_ROWS = 1024  # in the first window; a multiple of the kernel's block
SLACK = 64  # rows by which a window is longer than what is wanted of it
# The arrays of ``n_rows + SLACK`` rows; in their place where in them the wanted rows begin; and how
# many are wanted. What they hold beside these is of no meaning.
Window = tuple[Rows, Rows, int]

_Slot = dict[int, NDArray[np.uint8]]


class Memory:
    """Memory for copies, of one caller.

    Parameters
    ----------
    n_slots : int
        Windows after which the memory of the first of them is used for another.
    """

    def __init__(self, n_slots: int) -> None:
        self._slots: list[_Slot] = [{} for _ in range(n_slots)]
        self._turn = 0

    def next_slot(self) -> _Slot:
        """Return the memory of the next window."""
        self._turn = (self._turn + 1) % len(self._slots)
        return self._slots[self._turn]


class MemoryPool:
    """Memory for copies that several threads borrow.

    New memory is slow, because the system hands it out page by page and clears it first, on one
    thread at a time. A copy of a pool that is sent elsewhere begins empty.
    """

    def __init__(self) -> None:
        self._free: list[Memory] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def borrow(self, n_slots: int) -> Iterator[Memory]:
        """Lend memory until the context ends; after an error it is not used again.

        Parameters
        ----------
        n_slots : int
            The same at every call.
        """
        try:
            memory = self._free.pop()
        except IndexError:
            memory = Memory(n_slots)
        yield memory
        self._free.append(memory)


def windows(
    arrays: Sequence[Array | None], shape: tuple[int, ...], n_rows: int, memory: Memory
) -> Iterator[Window]:
    """Yield windows of ``n_rows`` rows over arrays that broadcast against ``shape``.

    Parameters
    ----------
    arrays : sequence of ndarray or None
        y, x..., sigma, mask; dimensions beyond ``shape`` are features.
    shape : tuple of int
        The entries of an array of this shape, in C order, are the rows.
    n_rows : int
    memory : Memory
        Of copies; a window is no longer valid when all slots have been used by later ones.
    """
    flat = [None if array is None else _flat(array, shape) for array in arrays]
    for start, count in _window_counts(math.prod(shape), n_rows):
        slot = memory.next_slot()
        cuts: list[tuple[Any, Any]] = []
        for i, (array, rows) in enumerate(zip(arrays, flat, strict=True)):
            if array is None:
                cuts.append((None, None))
                continue
            first = None if rows is None else _aligned_start(rows, start, count, n_rows)
            if rows is not None and first is not None:
                cuts.append((rows[first : first + n_rows + SLACK], np.int64(start - first)))
            else:
                cuts.append((_copy(array, shape, start, count, n_rows, i, slot), np.int64(0)))
        held, offsets = (
            Rows(part[0], tuple(part[1:-2]), part[-2], part[-1]) for part in zip(*cuts, strict=True)
        )
        yield held, offsets, count


def _window_counts(n_rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield where windows begin and how many rows they hold.

    The first and the last are short, because they are the ones that mostly have to be copied.
    """
    unit = min(FIRST_ROWS, most)
    has_views = n_rows >= most + SLACK
    start, count = 0, unit if has_views else min(most, n_rows)
    while start < n_rows:
        yield start, count
        start += count
        left = n_rows - start
        whole = (left - SLACK) // unit * unit if has_views else left
        count = min(most, whole if whole > 0 else left)


def _aligned_start(rows: Array, start: int, count: int, n_rows: int) -> int | None:
    """Return the row at an aligned address at or before ``start`` where a window can begin."""
    length, block = n_rows + SLACK, min(FIRST_ROWS, n_rows)
    stop = start - (count // -block) * block  # the last block is looked at as a whole
    latest = min(start, len(rows) - length)
    row_bytes = rows.nbytes // max(len(rows), 1)
    address = rows.__array_interface__["data"][0]
    for first in range(latest, max(latest - SLACK, -1), -1):
        if (address + first * row_bytes) % ALIGNMENT == 0:
            return first if stop <= first + length else None
    return None


def _copy(
    array: Array,
    shape: tuple[int, ...],
    start: int,
    count: int,
    n_rows: int,
    name: int,
    slot: _Slot,
) -> Array:
    """Copy rows to an aligned address in the slot's memory, with room for a whole window."""
    length, block = n_rows + SLACK, min(FIRST_ROWS, n_rows)
    features = array.shape[len(shape) :]
    n_bytes = length * math.prod(features) * array.itemsize
    if name not in slot:
        slot[name] = np.empty(0, np.uint8)
    if len(slot[name]) < n_bytes + ALIGNMENT:
        slot[name] = np.empty(n_bytes + ALIGNMENT, np.uint8)
    memory = slot[name]
    first = -memory.__array_interface__["data"][0] % ALIGNMENT
    copy = memory[first : first + n_bytes].view(array.dtype).reshape(length, *features)
    _fill(copy[:count], array, shape, start)
    # A model with a loop of its own would take part of its time for the rows that fill up a block.
    # The blocks after it are never looked at.
    copy[count : -(count // -block) * block] = 0
    return copy


def flat_range(array: Array, shape: tuple[int, ...], start: int, stop: int) -> Array:
    """Return ``broadcast(array, shape).reshape(-1)[start:stop]``, expanding that range only.

    Trailing dimensions beyond ``shape`` are features and stay.
    """
    rows = _flat(array, shape)
    if rows is not None:
        return rows[start:stop]
    out = np.empty((stop - start, *array.shape[len(shape) :]), array.dtype)
    _fill(out, array, shape, start)
    return out


def _flat(array: Array, shape: tuple[int, ...]) -> Array | None:
    """Return the array with its rows along one axis if that needs no copy."""
    features = array.shape[len(shape) :]
    is_whole = array.shape == shape + features and array.flags.c_contiguous
    return array.reshape(-1, *features) if is_whole else None


def _fill(out: Array, array: Array, shape: tuple[int, ...], start: int) -> None:
    """Write ``broadcast(array, shape).reshape(-1)[start : start + len(out)]`` into ``out``."""
    features = array.shape[len(shape) :]
    if len(shape) == 1:
        out[...] = array[start : start + len(out)] if len(array) > 1 else array
        return
    view = np.broadcast_to(array, shape + features)
    inner = math.prod(shape[1:])
    done = 0
    while done < len(out):
        outer, skipped = divmod(start + done, inner)
        whole = 0 if skipped else (len(out) - done) // inner
        if whole:
            count = whole * inner
            rows = out[done : done + count].reshape(whole, *shape[1:], *features)
            rows[...] = view[outer : outer + whole]
        else:
            count = min(inner - skipped, len(out) - done)
            _fill(out[done : done + count], view[outer], shape[1:], skipped)
        done += count
