"""Lazy conversion of any kind of array to Dask arrays, and checks of their dtypes."""

from __future__ import annotations

import uuid
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
import zarr
from dask.array.core import normalize_chunks, slices_from_chunks

from nlsq_dask.data.sources.from_files import from_file, is_file, memory_block_rows, reopen_by_name
from nlsq_dask.data.sources.from_zarr import from_zarr
from nlsq_dask.data.sources.objects import object_advice
from nlsq_dask.errors import DataError

# What to do instead, by kinds of NumPy dtypes.
_DTYPE_ADVICE = {
    "c": "Fit real and imaginary parts as separate observations, or the absolute value.",
    "mM": "Only x may hold dates. Convert them to numbers first, such as "
    "`({name} - {name}[0]) / np.timedelta64(1, 'D')`.",
    "US": "Convert text of numbers with np.array({name}, dtype=float), text of dates with "
    "np.array({name}, dtype='datetime64[ns]'). Open a path with zarr.open_array(path) or "
    "xarray.open_zarr(path)['name'].",
    "O": "Convert lazy numbers with {name}.astype(float), and lazy dates of x with their calendar: "
    "`{name}.map_blocks(cftime.date2num, 'days since 1970-01-01', calendar='noleap', "
    "dtype=float)`.",
    "V": "Pass one of its fields, such as {name}['{field}'].",
}


def is_in_memory(value: Any) -> bool:
    """Return whether the values of an array are in memory of this process, not on disk or lazy."""
    if getattr(value, "chunks", None) is not None:
        return False
    if "preferred_chunks" in getattr(value, "encoding", {}):
        # From an xarray store opened without Dask. Values read since, such as indexes, keep their
        # encoding; there is no public attribute for that.
        return bool(getattr(value.variable, "_in_memory", False))
    return not is_file(np.ma.getdata(value) if _is_masked(value) else value)


def _is_masked(value: Any) -> bool:
    return isinstance(value, np.ma.MaskedArray)


def as_dask(value: Any, name: str, split_chunks: bool = False) -> da.Array:
    """Return a Dask array of ``value`` without reading it.

    Parameters
    ----------
    value : NumPy, JAX, Dask or Zarr array, memory map, HDF5 dataset, or sliceable array
    name : str
        Name of the array in messages.
    split_chunks : bool
        Whether to split an array in memory into several chunks, so that threads share the work.
    """
    if da.array_expr_enabled():
        raise DataError(
            "Dask's 'array.query-planning' is not supported. Disable it with "
            "dask.config.set({'array.query-planning': False}) before importing dask.array."
        )
    if isinstance(value, zarr.Group):
        key = min(value.array_keys(), default="name")
        raise DataError(f"{name} is a Zarr group. Pass one of its arrays, such as group[{key!r}].")
    if isinstance(value, zarr.Array):
        array = from_zarr(value)
    elif isinstance(value, da.Array):
        array = reopen_by_name(value)
    elif (file := from_file(value)) is not None:
        array = file
    elif hasattr(value, "chunks") and hasattr(value, "dtype"):  # other stores of arrays
        array = da.from_array(value, chunks=value.chunks or "auto", inline_array=True)
    else:
        array = _from_memory(value, name, split_chunks)
    if any(np.isnan(size) for size in array.shape):
        raise DataError(
            f"{name} has unknown chunk sizes (shape {array.shape}, chunks {array.chunks}). Call "
            f"{name}.compute_chunk_sizes() first."
        )
    return array


def as_numpy(value: Any, name: str) -> np.ndarray[Any, Any]:
    """Return a value in memory as a NumPy array.

    Raises
    ------
    DataError
        If ``value`` cannot be converted.
    """
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(
            f"{name} cannot be converted to an array; nested lists, for example, must have equal "
            f"lengths: {error}"
        ) from error


def _from_memory(value: Any, name: str, split_chunks: bool) -> da.Array:
    has_methods = hasattr(value, "astype")
    value = as_numpy(value, name)
    if value.dtype.kind == "O":
        first = next((each for each in value.flat if each is not None), None)
        raise DataError(
            f"{name} has dtype object (first element: {type(first).__name__}); expected real "
            f"numbers. {object_advice(first, name, has_methods)}"
        )
    sizes = list(value.shape)
    if split_chunks and value.size:
        sizes[:1] = [memory_block_rows(value.shape) for _ in value.shape[:1]]
    chunks = normalize_chunks(tuple(sizes), value.shape, dtype=value.dtype)
    return chunked(value, chunks)


def chunked(value: np.ndarray[Any, Any], chunks: tuple[tuple[int, ...], ...]) -> da.Array:
    """Return an array in memory as a Dask array of views with the given chunks."""
    key = f"array-{uuid.uuid4().hex}"
    keys = product([key], *map(range, map(len, chunks)))
    # The graph of da.from_array, but of views: da.from_array copies, in case the caller modifies
    # the array later, which cannot happen during a fit.
    blocks = (value[(*part, ...)] for part in slices_from_chunks(chunks))
    return da.Array(dict(zip(keys, blocks, strict=True)), key, chunks, dtype=value.dtype)


def check_numbers(dtype: np.dtype[Any], name: str) -> None:
    """Raise a DataError unless the dtype is a real one: boolean, integer or floating-point.

    Raises
    ------
    DataError
    """
    if dtype.kind in "biuf":
        return
    field = next(iter(dtype.names or ()), "name")
    advice = next((text for kinds, text in _DTYPE_ADVICE.items() if dtype.kind in kinds), "")
    advice = advice.format(name=name, field=field)
    raise DataError(f"{name} has dtype {dtype}; expected real numbers. {advice}".rstrip())


def split_mask(value: Any, name: str, split_chunks: bool) -> tuple[da.Array, da.Array | None]:
    """Return data and mask as two Dask arrays; the mask is None for arrays that are not masked.

    The parameters are described at ``as_dask``.
    """
    if _is_masked(value):
        data, mask = as_dask(np.ma.getdata(value), name, split_chunks), np.ma.getmask(value)
        is_all_valid = mask is np.ma.nomask
        return data, None if is_all_valid else as_dask(mask, f"the mask of {name}", split_chunks)
    array = as_dask(value, name, split_chunks)
    if not _is_masked(array._meta):
        return array, None
    return da.ma.getdata(array), da.ma.getmaskarray(array)
