"""Arrays of any kind become Dask arrays, lazily; what cannot be fitted is refused here."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import zarr

from nlsq_dask.data.from_zarr import from_zarr
from nlsq_dask.errors import DataError

# Rows in a block of an array that is in memory: small enough for every thread to get some.
_MEMORY_BLOCK_ROWS = 2**18

_CONVERT_TIME = (
    "convert it to numbers first, of a unit and since an origin of your choice: for datetime64 "
    "`(t - t[0]) / np.timedelta64(1, 'D')`, for cftime dates "
    "`cftime.date2num(t, 'days since 2000-01-01', calendar=...)`"
)


def is_in_memory(value: Any) -> bool:
    """Whether the values are in this process's memory already."""
    chunks = getattr(value, "chunks", None)
    return chunks is None and "preferred_chunks" not in getattr(value, "encoding", {})


def as_dask(value: Any, name: str, cut: bool = False) -> da.Array:
    """Return a Dask array over ``value`` without reading it.

    Parameters
    ----------
    value : NumPy, JAX, Dask or Zarr array, pandas Series, or anything with shape, dtype and slices
    name : str
        What the caller calls it, for messages.
    cut : bool
        Cut an array in memory into several blocks.
    """
    if da.array_expr_enabled():
        raise DataError(
            "Dask's 'array.query-planning' is not supported; switch it off with "
            "dask.config.set({'array.query-planning': False}) before dask.array is imported."
        )
    if isinstance(value, zarr.Group):
        raise DataError(
            f"{name} is a Zarr group; pass one of its arrays, such as group[{_first_key(value)!r}]."
        )
    if isinstance(value, zarr.Array):
        array = from_zarr(value)
    elif isinstance(value, da.Array):
        array = value
    elif hasattr(value, "chunks") and hasattr(value, "dtype"):  # h5py and its like
        array = da.from_array(value, chunks=value.chunks or "auto", inline_array=True)
    else:
        array = _from_memory(value, name, cut)
    _check_dtype(array.dtype, name)
    _check_chunks(array, name)
    return array


def _first_key(group: zarr.Group) -> str:
    return next(iter(sorted(group.array_keys())), "name")


def _from_memory(value: Any, name: str, cut: bool) -> da.Array:
    if not isinstance(value, np.ma.MaskedArray):
        value = np.asarray(value)
    _check_dtype(value.dtype, name)
    chunks = list(value.shape)
    if cut and value.size:
        chunks[:1] = [max(_MEMORY_BLOCK_ROWS * n // value.size, 1) for n in value.shape[:1]]
    array: da.Array = da.from_array(value, chunks=tuple(chunks), name=False)
    return array


def _check_dtype(dtype: np.dtype[Any], name: str) -> None:
    if dtype.kind in "biuf":
        return
    if dtype.kind == "c":
        raise DataError(
            f"{name} is complex ({dtype}); only real values can be fitted. Fit real and imaginary "
            f"part as two sets of rows, or the absolute value."
        )
    if dtype.kind in "mM":
        raise DataError(f"{name} has dtype {dtype}; {_CONVERT_TIME}.")
    raise DataError(
        f"{name} has dtype {dtype}; expected real numbers. If these are dates, {_CONVERT_TIME}."
    )


def _check_chunks(array: da.Array, name: str) -> None:
    if any(np.isnan(size) for size in array.shape):
        raise DataError(
            f"{name} has unknown chunk sizes (shape {array.shape}, chunks {array.chunks}). Call "
            f"its compute_chunk_sizes() first."
        )


def split_mask(array: da.Array) -> tuple[da.Array, da.Array | None]:
    """Split an array of masked chunks into data and mask; the mask is None for plain chunks."""
    if not isinstance(array._meta, np.ma.MaskedArray):
        return array, None
    return da.ma.getdata(array), da.ma.getmaskarray(array)
