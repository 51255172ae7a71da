"""``Rows``: y, x, sigma and mask in memory; ``Layout``: dtypes and shapes of one row.

x is stored as a flat tuple of arrays; ``Layout.assemble`` turns it into the model's argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.rows.declared import as_declared

Array = NDArray[Any]
STRIP_ROWS = 1024  # their columns fit a core's cache; 1,000 to 2,000 were equally fast


def x_array_names(x_names: int | tuple[str, ...] | None) -> list[str]:
    """Return the names of the x arrays in messages, such as "x_data[0]".

    ``Layout.x_names`` explains the values of ``x_names``.
    """
    if x_names is None:
        return ["x_data"]
    keys = range(x_names) if isinstance(x_names, int) else x_names
    return [f"x_data[{key!r}]" for key in keys]


@dataclass(frozen=True)
class Layout:
    """Dtypes and shapes of one row of y, x and sigma, as stored.

    Attributes
    ----------
    x_names : None, int or tuple of str
        Structure of x in the model: one array (None), a tuple of this length (int), or a dict
        with these keys.
    x_features : tuple of tuple of int
        Shape of one row of each x array: ``()`` or ``(k,)``.
    x_dtypes, y_dtype, sigma_dtype : str
        Stored NumPy dtypes; ``sigma_dtype`` is None without sigma.
    has_mask : bool
        Whether the data are masked arrays.
    map_names : tuple of str
        Names of the arrays after those of x that the model does not receive: the maps of start
        values and bounds of a fit for every pixel.
    """

    x_names: int | tuple[str, ...] | None
    x_features: tuple[tuple[int, ...], ...]
    x_dtypes: tuple[str, ...]
    y_dtype: str
    sigma_dtype: str | None
    has_mask: bool
    map_names: tuple[str, ...] = ()

    def assemble(self, x: Sequence[Any]) -> Any:
        """Return x as the model receives it: one array, a tuple, or a dict."""
        if self.x_names is None:
            return x[0]
        if isinstance(self.x_names, int):
            return tuple(x)
        return dict(zip(self.x_names, x, strict=True))

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of the present arrays for messages, in the order y, x, sigma, mask."""
        optional = {"sigma": self.sigma_dtype is not None, "the mask": self.has_mask}
        present = (name for name, is_present in optional.items() if is_present)
        return ("y_data", *x_array_names(self.x_names), *self.map_names, *present)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes of the arrays, in the order of ``array_names``."""
        optional = self.sigma_dtype, "bool" if self.has_mask else None
        return (self.y_dtype, *self.x_dtypes, *filter(None, optional))

    @property
    def without_maps(self) -> Layout:
        """The layout of what a model receives."""
        n = len(self.x_dtypes) - len(self.map_names)
        return replace(
            self, x_features=self.x_features[:n], x_dtypes=self.x_dtypes[:n], map_names=()
        )

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
    """Rows in memory: the elements of y in C order, each with its x, sigma and mask.

    The other arrays broadcast against y. An x array may have one more dimension, for the columns of
    an x of shape (n, k).
    """

    y: Array
    x: tuple[Array, ...]
    sigma: Array | None = None
    mask: Array | None = None  # bool; True for rows to be omitted

    @classmethod
    def of(cls, arrays: Iterable[Any]) -> Self:
        """Build rows from arrays in the order of the property ``arrays``."""
        y, *x, sigma, mask = arrays
        return cls(y, tuple(x), sigma, mask)

    @classmethod
    def of_block(
        cls,
        arrays: Sequence[Any],
        layout: Layout,
        shapes: Sequence[tuple[int, ...]],
        where: str = "a block",
    ) -> Self:
        """Build rows from the arrays of a Dask block, checked by ``as_declared``.

        Parameters
        ----------
        arrays : sequence of array
            In the order of ``layout.array_names``.
        layout : Layout
        shapes : sequence of tuple of int
            Shape that each Dask array declares for this block.
        where : str
            Words for the position of the block, for messages.

        Raises
        ------
        DataError
            If an array is not what its Dask array declares.
        """
        declared = zip(layout.array_names, arrays, layout.dtypes, shapes, strict=True)
        queue = iter([as_declared(*item, where) for item in declared])
        y, *x = islice(queue, 1 + len(layout.x_dtypes))
        sigma = next(queue) if layout.sigma_dtype else None
        return cls(y, tuple(x), sigma, next(queue, None))

    def __len__(self) -> int:
        return self.y.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of y."""
        return self.y.shape

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """Arrays in the order y, x, sigma, mask; None for sigma or mask if absent."""
        return self.y, *self.x, self.sigma, self.mask

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays if array is not None)

    def _map(self, function: Callable[[Array], Array]) -> Self:
        """Return rows with a function applied to each array that is present."""
        return self.of(None if array is None else function(array) for array in self.arrays)

    def compact(self, held: Collection[int] = ()) -> Self:
        """Return rows without views of larger arrays, which would keep those arrays in memory.

        Such views are replaced by copies.

        Parameters
        ----------
        held : collection of int
            Positions in ``arrays`` of those that are in memory in any case.
        """

        def own(array: Array | None, is_held: bool) -> Array | None:
            if array is None or is_held or getattr(array.base, "nbytes", 0) <= array.nbytes:
                return array
            return array.copy()

        return self.of(own(array, i in held) for i, array in enumerate(self.arrays))

    def take(self, index: NDArray[np.integer[Any]]) -> Self:
        """Return the rows at the given positions, with one-dimensional y."""
        position = np.unravel_index(index, self.shape)

        def pick(array: Array) -> Array:
            features = array.shape[len(self.shape) :]
            return np.broadcast_to(array, self.shape + features)[position]

        return self._map(pick)

    def range(self, start: int, stop: int) -> Self:
        """Return a range of rows, with one-dimensional y."""

        def cut(array: Array) -> Array:
            rows = as_rows(array, self.shape)
            if rows is not None:
                return rows[start:stop]
            out = np.empty((stop - start, *array.shape[len(self.shape) :]), array.dtype)
            fill_range(out, array, self.shape, start)
            return out

        return self._map(cut)

    def padded(self, n_rows: int) -> Self:
        """Return rows with one-dimensional y, padded with zeros to ``n_rows``."""
        if len(self) == n_rows:
            return self

        def pad(array: Array) -> Array:
            out = np.zeros((n_rows, *array.shape[1:]), array.dtype)
            out[: len(array)] = array
            return out

        return self._map(pad)

    def batches(self, n_rows: int) -> Iterator[tuple[Self, int]]:
        """Yield batches padded to ``n_rows`` rows, each with its number of rows before padding."""
        for start in range(0, len(self), n_rows):
            stop = min(start + n_rows, len(self))
            yield self.range(start, stop).padded(n_rows), stop - start

    def usable(self) -> Self:
        """Return the rows that are finite in y, x and sigma and not masked; y is 1-d."""
        return self.take(self.usable_index())

    def usable_index(self) -> NDArray[np.int64]:
        """Return the positions of the rows that are finite in y, x and sigma and not masked."""
        *numbers, mask = self.arrays
        keep = np.ones(len(self), bool) if mask is None else ~mask
        for array in numbers:
            if array is not None:
                keep &= np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        return np.flatnonzero(keep)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Concatenate rows of one layout, each with one-dimensional y."""
        columns = zip(*(part.arrays for part in parts), strict=True)
        return cls.of(None if column[0] is None else np.concatenate(column) for column in columns)


def as_rows(array: Array, shape: tuple[int, ...]) -> Array | None:
    """Return a view of an array with one row per index of its first axis, or None.

    ``shape`` is that of y, to which the array is broadcast. None means that a copy is needed.
    """
    features = array.shape[len(shape) :]
    is_whole = array.shape == shape + features and array.flags.c_contiguous
    return array.reshape(-1, *features) if is_whole else None


def fill_range(out: Array, array: Array, shape: tuple[int, ...], start: int) -> None:
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
            fill_range(out[done : done + count], view[outer], shape[1:], offset)
        done += count
