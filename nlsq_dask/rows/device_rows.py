"""``PlacedRows``: rows in GPU memory, where later passes use them again; copies to that memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.rows.rows import Array, as_rows, fill_range

# One copy of a large array is three times slower than copies of its parts that run side by side.
_TRANSFER_BYTES = 8 * 2**20


class DeviceBatch(NamedTuple):
    """A fixed number of rows in the memory of one device, the last ones of which are padding."""

    arrays: tuple[Any, ...]  # JAX arrays or None, in the order y, x..., sigma, mask
    n_rows: Any  # JAX scalar, the number without padding


@dataclass(frozen=True)
class PlacedRows:
    """Rows in GPU memory, split into batches; with several GPUs, each holds some batches."""

    shape: tuple[int, ...]  # of y; its elements are the rows
    batches: tuple[DeviceBatch, ...]

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory."""
        return sum(array.nbytes for batch in self.batches for array in jax.tree.leaves(batch))


def device_batches(
    arrays: tuple[Array | None, ...],
    shape: tuple[int, ...],
    n_rows: int,
    devices: Iterator[jax.Device],
) -> Iterator[DeviceBatch]:
    """Copy rows to devices, ``n_rows`` at a time; call it in ``x64()``.

    Parameters
    ----------
    arrays : tuple of ndarray or None
        y, x..., sigma, mask; dimensions beyond ``shape`` are features.
    shape : tuple of int
        Shape of y, whose elements in C order are the rows.
    n_rows : int
        Number of rows of a batch, with padding.
    devices : iterator of Device
        The device of each batch.
    """
    total = math.prod(shape)
    for start in range(0, total, n_rows):
        device, count = next(devices), min(n_rows, total - start)
        parts = tuple(
            None if array is None else _part(array, shape, start, count, n_rows, device)
            for array in arrays
        )
        yield DeviceBatch(parts, jax.device_put(np.int64(count), device))


def _part(
    array: Array,
    shape: tuple[int, ...],
    start: int,
    count: int,
    n_rows: int,
    device: jax.Device,
) -> Any:
    """Copy ``count`` rows of an array that broadcasts to ``shape``, padded to ``n_rows``."""
    rows = as_rows(array, shape)
    if rows is not None and count == n_rows:
        return to_device(rows[start : start + n_rows], device)
    if array.shape[: len(shape)] != shape:  # such as a coordinate of one dimension
        return _broadcast(to_device(array, device), np.int64(start), shape, n_rows)
    copy = np.empty((n_rows, *array.shape[len(shape) :]), array.dtype)
    fill_range(copy[:count], array, shape, start)
    copy[count:] = 0  # arbitrary padding could slow down a model that iterates
    return to_device(copy, device)


def padded_bytes(arrays: tuple[Array | None, ...], shape: tuple[int, ...], n_rows: int) -> int:
    """Return the bytes that ``device_batches`` of these arrays need."""
    row_bytes = sum(
        array.itemsize * math.prod(array.shape[len(shape) :])
        for array in arrays
        if array is not None
    )
    return -(math.prod(shape) // -n_rows) * n_rows * row_bytes


def to_device(array: Array, device: jax.Device) -> Any:
    """Copy a NumPy array to a device, in parts that are copied at the same time."""
    n_parts = min(max(array.nbytes // _TRANSFER_BYTES, 1), len(array))
    bounds = [len(array) * i // n_parts for i in range(n_parts + 1)]
    parts = [jax.device_put(array[start:stop], device) for start, stop in pairwise(bounds)]
    return _joined(parts) if n_parts > 1 else parts[0]


@partial(jax.jit, static_argnums=(2, 3))
def _broadcast(array: Any, start: Any, shape: tuple[int, ...], n_rows: int) -> Any:
    """Broadcast an array to the rows of a block, and return those of one batch."""
    features = array.shape[len(shape) :]
    rows = jnp.broadcast_to(array, shape + features).reshape(-1, *features)
    padded = jnp.pad(rows, ((0, -len(rows) % n_rows), *((0, 0) for _ in features)))
    return lax.dynamic_slice_in_dim(padded, start, n_rows)


@jax.jit
def _joined(parts: list[Any]) -> Any:
    return jnp.concatenate(parts)
