"""Matching of xarray objects to y by dimension names and labels."""

from __future__ import annotations

from typing import Any

import dask.array as da
import xarray as xr

from nlsq_dask.data.sources.from_array import as_dask
from nlsq_dask.errors import DataError


def lazy_data(array: xr.DataArray, name: str, split_chunks: bool = False) -> da.Array:
    """Return the values as a Dask array; values on disk are not read.

    ``as_dask`` explains ``name`` and ``split_chunks``.
    """
    if array.chunks is None and not isinstance(array.variable, xr.IndexVariable):
        preferred = array.encoding.get("preferred_chunks")
        if preferred:
            array = array.chunk({dim: preferred[dim] for dim in array.dims if dim in preferred})
    return as_dask(array.data, name, split_chunks)


def resolve_coordinates(x_data: Any, y: Any) -> Any:
    """Return ``x_data`` with each string replaced by the coordinate of ``y`` of this name."""

    def resolve(value: Any) -> Any:
        return _coordinate(value, y) if isinstance(value, str) else value

    if isinstance(x_data, dict):
        return {name: resolve(value) for name, value in x_data.items()}
    # A list of numbers is one array.
    is_names = isinstance(x_data, list) and x_data and all(isinstance(v, str) for v in x_data)
    return tuple(map(resolve, x_data)) if is_names or isinstance(x_data, tuple) else resolve(x_data)


def _coordinate(name: str, y: Any) -> xr.DataArray:
    if not isinstance(y, xr.DataArray):
        raise DataError(
            f"x_data names the coordinate {name!r}, but y_data is of type {type(y).__name__}. Pass "
            f"an xarray.DataArray as y_data, such as xarray.open_zarr(path)['name'], or arrays as "
            f"x_data."
        )
    if name in y.coords:
        coordinate: xr.DataArray = y.coords[name]
        return coordinate
    if name in y.dims:
        raise DataError(
            f"x_data names {name!r}, a dimension of y_data without a coordinate. Assign one, such "
            f"as its positions: y_data.assign_coords({name}=numpy.arange({y.sizes[name]}))."
        )
    names = sorted(map(str, y.coords))
    raise DataError(
        f"x_data names the coordinate {name!r}, but the coordinates of y_data are "
        f"{names or 'none'}. Pass another variable of a Dataset as an array: dataset[{name!r}]."
    )


def like_dims(
    array: xr.DataArray, y: xr.DataArray, name: str, split_chunks: bool, allows_features: bool
) -> da.Array:
    """Return the values with the dimensions of y, of size 1 where ``array`` does not have them.

    Parameters
    ----------
    array, y : xarray.DataArray
    name : str
        Name of ``array`` in messages.
    split_chunks : bool
        See ``as_dask``.
    allows_features : bool
        Whether ``array`` may have one dimension that y does not have; it becomes the last one.

    Raises
    ------
    DataError
        If ``array`` has dimensions that y does not have, or other sizes or labels than y.
    """
    extra = [dim for dim in array.dims if dim not in y.dims]
    if len(extra) > allows_features:
        raise DataError(
            f"{name} has dimensions {array.dims} and y_data has {y.dims}; {extra} cannot be "
            f"matched. Rename these dimensions, or select one element along each with .isel()."
        )
    shared = [dim for dim in y.dims if dim in array.dims]
    for dim in shared:
        if array.sizes[dim] != y.sizes[dim]:
            raise DataError(
                f"{name} has size {array.sizes[dim]} along {dim!r}, but y_data has {y.sizes[dim]} "
                f"(shapes {array.shape} and {y.shape})."
            )
        both_labelled = dim in array.indexes and dim in y.indexes
        if both_labelled and not array.indexes[dim].equals(y.indexes[dim]):
            raise DataError(
                f"The labels of {name} along {dim!r} differ from the labels of y_data. Align both, "
                f"for instance with xarray.align(..., join='inner')."
            )
    values = lazy_data(array.transpose(*shared, *extra), name, split_chunks)
    expanded: da.Array = values[tuple(slice(None) if dim in shared else None for dim in y.dims)]
    return expanded


def is_xarray(value: Any) -> bool:
    """Return whether a value is a DataArray; raise a DataError for a Dataset."""
    if isinstance(value, xr.Dataset):
        raise DataError(
            f"Expected arrays; got an xarray.Dataset with the variables "
            f"{sorted(map(str, value.data_vars))}. Pass DataArrays, such as dataset['name']."
        )
    return isinstance(value, xr.DataArray)
