"""``Layout`` and ``Rows``: what one row consists of, and some rows held in memory.

x is kept as a flat tuple of arrays; the layout knows how the model wants them put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ALIGNMENT = 64  # bytes; XLA takes a NumPy array that begins at a multiple without copying it
FIRST_ROWS = 1024  # in the first window; a multiple of the kernel's block
SLACK = 64  # rows by which a window is longer than what is wanted of it
Window = tuple["Rows", "Rows", int]


@dataclass(frozen=True)
class Layout:
    """What a row consists of: dtypes and feature shapes, without any number of rows.

    Attributes
    ----------
    x_names : None, int or tuple of str
        How the model receives x: one array (None), a tuple of so many arrays (int), or a dict.
    x_features : tuple of tuple of int
        Shape of a row of each x array: ``()`` or ``(k,)``.
    x_dtypes, y_dtype, sigma_dtype : str
        NumPy dtype strings as stored; ``sigma_dtype`` is None without sigma.
    has_mask : bool
        Whether rows can be masked by the caller.
    """

    x_names: int | tuple[str, ...] | None
    x_features: tuple[tuple[int, ...], ...]
    x_dtypes: tuple[str, ...]
    y_dtype: str
    sigma_dtype: str | None
    has_mask: bool

    def assemble(self, x: Sequence[Any]) -> Any:
        """Put the flat x arrays together as the model receives them."""
        if self.x_names is None:
            return x[0]
        if isinstance(self.x_names, int):
            return tuple(x)
        return dict(zip(self.x_names, x, strict=True))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory."""
        x = sum(
            int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
            for shape, dtype in zip(self.x_features, self.x_dtypes, strict=True)
        )
        sigma = np.dtype(self.sigma_dtype).itemsize if self.sigma_dtype else 0
        return x + np.dtype(self.y_dtype).itemsize + sigma + self.has_mask


@dataclass(frozen=True)
class Rows:
    """Rows in memory, the first axis of every array running over them.

    Attributes
    ----------
    y : ndarray, shape (n,)
    x : tuple of ndarray, each of shape (n,) or (n, k)
    sigma : ndarray, shape (n,), or None
    mask : ndarray of bool, shape (n,), or None
        True where the caller wants the row left out.
    """

    y: Array
    x: tuple[Array, ...]
    sigma: Array | None = None
    mask: Array | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, where: slice | NDArray[Any]) -> Self:
        """Return some of the rows, by slice, index or boolean array."""
        return type(self)(
            self.y[where],
            tuple(leaf[where] for leaf in self.x),
            None if self.sigma is None else self.sigma[where],
            None if self.mask is None else self.mask[where],
        )

    def padded(self, n_rows: int) -> Self:
        """Return ``n_rows`` rows, the missing ones zero; no copy if there are as many."""
        if len(self) == n_rows:
            return self

        def pad(array: Array) -> Array:
            out = np.zeros((n_rows, *array.shape[1:]), array.dtype)
            out[: len(array)] = array
            return out

        return type(self)(
            pad(self.y),
            tuple(map(pad, self.x)),
            None if self.sigma is None else pad(self.sigma),
            None if self.mask is None else pad(self.mask),
        )

    def pieces(self, n_rows: int) -> Iterator[tuple[Self, int]]:
        """Yield pieces of exactly ``n_rows`` rows, the last one padded, with their true counts."""
        for start in range(0, len(self), n_rows):
            piece = self.take(slice(start, start + n_rows))
            yield piece.padded(n_rows), len(piece)

    def windows(self, n_rows: int) -> Iterator[Window]:
        """Yield windows of ``n_rows`` rows; see ``cut_window``.

        Yields
        ------
        rows : Rows
            Arrays of ``n_rows + SLACK`` rows.
        offsets : Rows
            In place of each array the place where the wanted rows begin in it.
        count : int
            How many rows are wanted.
        """
        for start, count in window_counts(len(self), n_rows):

            def cut(array: Array, start: int = start, count: int = count) -> tuple[Array, Any]:
                return cut_window(array, start, count, n_rows)

            yield window_of((self.y, *self.x, self.sigma, self.mask), cut, count)

    def usable(self) -> Self:
        """Return the rows that are finite in y, x and sigma and not masked."""
        keep = np.isfinite(self.y)
        for leaf in self.x:
            keep &= np.isfinite(leaf) if leaf.ndim == 1 else np.isfinite(leaf).all(axis=1)
        if self.sigma is not None:
            keep &= np.isfinite(self.sigma)
        if self.mask is not None:
            keep &= ~self.mask
        return self.take(keep)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join rows of one layout."""
        first = parts[0]
        return cls(
            np.concatenate([part.y for part in parts]),
            tuple(np.concatenate([part.x[i] for part in parts]) for i in range(len(first.x))),
            None
            if first.sigma is None
            else np.concatenate([p.sigma for p in parts if p.sigma is not None]),
            None
            if first.mask is None
            else np.concatenate([p.mask for p in parts if p.mask is not None]),
        )


def window_counts(n_rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield where windows begin and how many rows they hold.

    The first is short, because it is the one that mostly has to be copied.
    """
    start, count = 0, min(FIRST_ROWS, most, n_rows)
    while start < n_rows:
        yield start, count
        start, count = start + count, min(most, n_rows - start - count)


def window_of(
    arrays: Sequence[Array | None], cut: Callable[[Array], tuple[Array, Any]], count: int
) -> Window:
    """Put the windows of y, x..., sigma, mask together."""
    cuts = [(None, None) if array is None else cut(array) for array in arrays]
    rows, offsets = (
        Rows(part[0], tuple(part[1:-2]), part[-2], part[-1]) for part in zip(*cuts, strict=True)
    )
    return rows, offsets, count


def cut_window(array: Array, start: int, count: int, n_rows: int) -> tuple[Array, Any]:
    """Return ``n_rows + SLACK`` rows and where among them row ``start`` of ``array`` is.

    They are a view that begins at an aligned address at or before the row where there is one in
    the array, and a copy where not. What they hold beside the wanted rows is of no meaning.
    """
    length = n_rows + SLACK
    if array.flags.c_contiguous:
        row_bytes = array.nbytes // len(array)
        address = array.__array_interface__["data"][0] + start * row_bytes
        back = np.arange(min(start, SLACK) + 1)
        aligned = np.flatnonzero((address - back * row_bytes) % ALIGNMENT == 0)
        if len(aligned) and start - aligned[0] + length <= len(array):
            first = start - int(aligned[0])
            return array[first : first + length], np.int64(aligned[0])
    return aligned_copy(array[start : start + count], length), np.int64(0)


def aligned_copy(array: Array, length: int) -> Array:
    """Return a copy that begins at an aligned address, and has room for ``length`` rows."""
    n_bytes = length * (array.nbytes // max(len(array), 1))
    memory = np.empty(n_bytes + ALIGNMENT, np.uint8)
    first = -memory.__array_interface__["data"][0] % ALIGNMENT
    copy = memory[first : first + n_bytes].view(array.dtype).reshape(length, *array.shape[1:])
    copy[: len(array)] = array
    copy[len(array) :] = 0  # a model with a loop of its own would take part of its time for them
    return copy
