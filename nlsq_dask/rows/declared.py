"""``as_declared``: computed blocks, checked against what their Dask array declares.

Dask does not compare a block with the shape and dtype that ``from_delayed`` or ``map_blocks`` were
given. Programs are compiled for these, so a block of another kind is converted or refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import DataError


def as_declared(
    name: str, block: Any, dtype: str, shape: tuple[int, ...], where: str = "a block"
) -> NDArray[Any]:
    """Return a block as a NumPy array of the given dtype, without changing its values.

    Parameters
    ----------
    name : str
        Name of the array in messages.
    block : array
        The computed block.
    dtype, shape : str, tuple of int
        What the Dask array declares for this block.
    where : str
        Words for the position of the block.

    Raises
    ------
    DataError
        If the shape differs, if the dtype is of another kind or cannot hold the values, or if
        elements are masked.
    """
    array = np.asarray(np.ma.getdata(block))
    if array.shape != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise DataError(
            f"{name} has shape {array.shape} and dtype {array.dtype} in {where}, but its Dask "
            f"array declares {shape} and {np.dtype(dtype)}. Pass the actual shape and dtype to "
            f"map_blocks or from_delayed."
        )
    n_masked = np.count_nonzero(np.ma.getmask(block))
    if n_masked:
        raise DataError(
            f"{name} masks {n_masked:,} of {array.size:,} elements in {where}, but its Dask array "
            f"does not declare masked arrays. Pass meta=np.ma.empty(0) to map_blocks or "
            f"from_delayed; for an existing Dask array, use array.map_blocks(np.ma.asarray, "
            f"meta=np.ma.empty(0))."
        )
    converted: NDArray[Any] = same_values(name, array, dtype, where)
    return converted


def same_values(name: str, array: Any, dtype: str, where: str = "a block") -> Any:
    """Return an array converted to a dtype; raise a DataError if that changes its values.

    float64 is accepted for every array, because all computations are at most in float64. A masked
    array stays one. The parameters are those of ``as_declared``.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype, copy=False)
    if dtype == "float64" or np.can_cast(array.dtype, dtype, "safe"):
        return converted
    before, after = np.ma.getdata(array), np.ma.getdata(converted)
    is_changed = ~((before == after) | (np.isnan(before) & np.isnan(after)))
    if is_changed.any():
        raise DataError(
            f"{name} has dtype {array.dtype} in {where}, but its Dask array declares {dtype}, "
            f"which changes values: {before[is_changed][0]} becomes {after[is_changed][0]}. Pass "
            f"dtype='{array.dtype}' to map_blocks or from_delayed; for an existing Dask array, "
            f"use array.map_blocks(np.asarray, dtype='{array.dtype}')."
        )
    return converted
