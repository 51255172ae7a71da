"""``Block``: one block in memory, and its elements as flat rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import DataError
from nlsq_dask.rows.rows import Array, Layout, Rows
from nlsq_dask.rows.windows import flat_range


@dataclass(frozen=True)
class Block:
    """Arrays of one block in their N-d shapes, as they were read."""

    shape: tuple[int, ...]  # of the block of y, against which all arrays broadcast
    y: Array
    x: tuple[Array, ...]
    sigma: Array | None
    mask: Array | None

    @classmethod
    def of(cls, arrays: list[Any], layout: Layout, shapes: Sequence[tuple[int, ...]]) -> Self:
        """Build a block from arrays in the order of ``RowBlocks.arrays``.

        Parameters
        ----------
        arrays : list of array
        layout : Layout
        shapes : sequence of tuple of int
            Shapes declared in the Dask graph.

        Raises
        ------
        DataError
            If shape or dtype of an array differ from the declared ones.
        """
        queue = [
            (name, array, shape)
            for name, array, shape in zip(layout.array_names, arrays, shapes, strict=True)
        ]
        y = _as_declared(*queue.pop(0), layout.y_dtype)
        x = tuple(_as_declared(*queue.pop(0), dtype) for dtype in layout.x_dtypes)
        sigma = _as_declared(*queue.pop(0), layout.sigma_dtype) if layout.sigma_dtype else None
        mask = _as_declared(*queue.pop(0), "bool") if layout.has_mask else None
        return cls(y.shape, y, x, sigma, mask)

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """All arrays, in the order y, x..., sigma, mask."""
        return self.y, *self.x, self.sigma, self.mask

    @property
    def nbytes(self) -> int:
        """Bytes read for this block."""
        return sum(array.nbytes for array in self.arrays if array is not None)

    def compact(self) -> Self:
        """Return the block with copies of arrays that are views of larger ones."""

        def own(array: Array | None) -> Any:
            is_part = array is not None and getattr(array.base, "nbytes", 0) > array.nbytes
            return array.copy() if array is not None and is_part else array

        x = tuple(map(own, self.x))
        return type(self)(self.shape, own(self.y), x, own(self.sigma), own(self.mask))

    def rows(self, start: int, stop: int) -> Rows:
        """Return a range of rows, in C order over the block."""

        def cut(array: Array) -> Array:
            return flat_range(array, self.shape, start, stop)

        return Rows(
            cut(self.y),
            tuple(map(cut, self.x)),
            None if self.sigma is None else cut(self.sigma),
            None if self.mask is None else cut(self.mask),
        )

    def take(self, index: NDArray[np.int64]) -> Rows:
        """Return the rows at flat positions."""
        position = np.unravel_index(index, self.shape)

        def pick(array: Array) -> Array:
            features = array.shape[len(self.shape) :]
            return np.broadcast_to(array, self.shape + features)[position]

        return Rows(
            pick(self.y),
            tuple(map(pick, self.x)),
            None if self.sigma is None else pick(self.sigma),
            None if self.mask is None else pick(self.mask),
        )

    def batches(self, n_rows: int) -> Iterator[tuple[Rows, int]]:
        """Yield batches padded to ``n_rows`` rows with their true counts."""
        for start in range(0, len(self), n_rows):
            stop = min(start + n_rows, len(self))
            yield self.rows(start, stop).padded(n_rows), stop - start


def _as_declared(name: str, value: Any, shape: tuple[int, ...], dtype: str) -> Array:
    array = np.asarray(value)
    if array.shape != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise DataError(
            f"a block of {name} has shape {array.shape} and dtype {array.dtype}, but its Dask "
            f"array declares {shape} and {np.dtype(dtype)}. Pass the actual shape and dtype to "
            f"map_blocks or from_delayed."
        )
    return np.asarray(array, dtype)
