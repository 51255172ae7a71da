"""``named_template``: the dimensions and chunks of a result of several DataArrays."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from nlsq_dask.errors import DataError

_MAX_EAGER_VALUES = 2**24  # of a result; larger ones are computed lazily


def named_template(
    arrays: Sequence[xr.DataArray],
    names: Sequence[str],
    dims: Sequence[Sequence[Hashable]],
) -> xr.DataArray:
    """Return zeros that are broadcast by dimension name; lazy if any array is, or if they are many.

    Parameters
    ----------
    arrays : sequence of DataArray
    names : sequence of str
        Names of the arrays in messages.
    dims : sequence of sequences of hashable
        Those dimensions of each array that the result has.

    Raises
    ------
    DataError
        If two arrays have other sizes or labels along a dimension.
    """
    first: dict[Hashable, tuple[str, xr.DataArray]] = {}
    labelled: dict[Hashable, tuple[str, xr.DataArray]] = {}
    chunks: dict[Hashable, Any] = {}
    for array, name, own in zip(arrays, names, dims, strict=True):
        for dim in own:
            other_name, other = first.setdefault(dim, (name, array))
            if other.sizes[dim] != array.sizes[dim]:
                raise DataError(
                    f"{name} has size {array.sizes[dim]} along {dim!r}, but {other_name} has "
                    f"{other.sizes[dim]}. Select the same elements from both, or rename the "
                    f"dimension of one."
                )
            if dim in array.indexes:
                other_name, other = labelled.setdefault(dim, (name, array))
                if not other.indexes[dim].equals(array.indexes[dim]):
                    raise DataError(
                        f"the labels of {name} along {dim!r} differ from the labels of "
                        f"{other_name}. Align them, for instance with xarray.align(..., "
                        f"join='inner')."
                    )
            if array.chunks is not None:
                chunks.setdefault(dim, array.chunksizes[dim])
    shape = tuple(array.sizes[dim] for dim, (_, array) in first.items())
    values: Any
    if chunks or math.prod(shape) > _MAX_EAGER_VALUES:
        by_dim = tuple(chunks.get(dim, "auto") for dim in first)
        values = da.zeros(shape, chunks=by_dim, dtype=float)
    else:
        values = np.zeros(shape)
    return xr.DataArray(values, dims=list(first))
