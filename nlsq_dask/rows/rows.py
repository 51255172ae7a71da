"""``Layout`` and ``Rows``: dtypes and shapes of one row, and rows in memory.

x is a flat tuple of arrays; the layout defines the structure that the model receives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STRIP_ROWS = 1024  # their columns fit a core's cache; 1,000 to 2,000 were equally fast


def x_array_names(x_names: int | tuple[str, ...] | None) -> list[str]:
    """Return the names of the x arrays in messages; see ``Layout.x_names``."""
    if x_names is None:
        return ["x_data"]
    keys = range(x_names) if isinstance(x_names, int) else x_names
    return [f"x_data[{key!r}]" for key in keys]


@dataclass(frozen=True)
class Layout:
    """Dtypes and feature shapes of one row, independent of the number of rows.

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
    """

    x_names: int | tuple[str, ...] | None
    x_features: tuple[tuple[int, ...], ...]
    x_dtypes: tuple[str, ...]
    y_dtype: str
    sigma_dtype: str | None
    has_mask: bool

    def assemble(self, x: Sequence[Any]) -> Any:
        """Return the flat x arrays in the structure that the model receives."""
        if self.x_names is None:
            return x[0]
        if isinstance(self.x_names, int):
            return tuple(x)
        return dict(zip(self.x_names, x, strict=True))

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of the arrays in messages, in the order y, x..., sigma, mask."""
        optional = {"sigma": self.sigma_dtype is not None, "the mask": self.has_mask}
        return (
            "y_data",
            *x_array_names(self.x_names),
            *(name for name, is_there in optional.items() if is_there),
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
    """Rows in memory, along the first axis of each array."""

    y: Array  # shape (n,)
    x: tuple[Array, ...]  # shapes (n,) or (n, k)
    sigma: Array | None = None  # shape (n,)
    mask: Array | None = None  # bool, shape (n,); True for rows to be omitted

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of y, ``(n,)``."""
        return self.y.shape

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """All arrays, in the order y, x..., sigma, mask."""
        return self.y, *self.x, self.sigma, self.mask

    def take(self, where: slice | NDArray[Any]) -> Self:
        """Return the rows selected by a slice, index or boolean array."""
        return type(self)(
            self.y[where],
            tuple(leaf[where] for leaf in self.x),
            None if self.sigma is None else self.sigma[where],
            None if self.mask is None else self.mask[where],
        )

    def padded(self, n_rows: int) -> Self:
        """Return the rows padded with zeros to ``n_rows``; no copy if the length is equal."""
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

    def batches(self, n_rows: int) -> Iterator[tuple[Self, int]]:
        """Yield batches padded to ``n_rows`` rows with their true counts."""
        for start in range(0, len(self), n_rows):
            batch = self.take(slice(start, start + n_rows))
            yield batch.padded(n_rows), len(batch)

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
        """Concatenate rows of one layout."""
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
