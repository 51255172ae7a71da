"""``align_map``: x, sigma and maps in the blocks of y."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dask.array as da
import numpy as np

from nlsq_dask.data.alignment import RowBlocks, align, realigned_text
from nlsq_dask.data.shapes import rows_shape
from nlsq_dask.data.sources.from_array import as_numpy
from nlsq_dask.data.sources.from_xarray import is_xarray
from nlsq_dask.errors import DataError, DataWarning, warn_caller
from nlsq_dask.maps.problem.parameter_maps import Maps


def _dask_array(value: Any) -> da.Array | None:
    """Return the Dask array that a value is, or has; None for others, which are not read."""
    if is_xarray(value):
        value = None if value.chunks is None else value.data
    return value if isinstance(value, da.Array) else None


def leaves(x_data: Any, sigma: Any) -> list[Any]:
    """Return the arrays of x, and sigma if there is one."""
    arrays = tuple(x_data.values()) if isinstance(x_data, dict) else x_data
    listed = list(arrays) if isinstance(arrays, tuple) else [arrays]
    return listed if sigma is None else [*listed, sigma]


def align_map(x_data: Any, y_data: Any, sigma: Any, maps: Maps, axes: tuple[int, ...]) -> RowBlocks:
    """Return all arrays in blocks of y."""
    dims = tuple(map(str, y_data.dims)) if is_xarray(y_data) else None
    expand = _Expander(tuple(y_data.shape), axes, dims, y_data)
    if isinstance(x_data, dict):
        x_data = {key: expand.points(v, f"x_data[{key!r}]") for key, v in x_data.items()}
    elif isinstance(x_data, tuple):
        x_data = tuple(expand.points(v, f"x_data[{i}]") for i, v in enumerate(x_data))
    else:
        x_data = expand.points(x_data, "x_data")
    blocks = align(
        x_data,
        y_data,
        None if sigma is None else expand.points(sigma, "sigma", may_have_columns=False),
        maps={role.text: expand.pixels(value, role.text) for role, value in maps.items()},
        allows_columns=len(axes) == 1,
    )
    n_x = len(blocks.x) - len(maps)
    is_constant = not any(array.shape[axis] > 1 for array in blocks.x[:n_x] for axis in axes)
    if is_constant and any(y_data.shape[axis] > 1 for axis in axes):
        warn_caller(
            "x_data does not vary along the dimensions of the fits, so that the model is the same "
            "at all points of a fit. Pass x_data that varies along dims.",
            DataWarning,
        )
    check_columns(blocks, axes)
    return replace(blocks, realigned=(*expand.rechunked, *blocks.realigned))


def check_columns(blocks: RowBlocks, axes: Sequence[int]) -> None:
    """Raise a DataError for an x with columns that varies over the map; fits run along ``axes``."""
    ndim = blocks.y.ndim
    for array, name in zip(blocks.x, blocks.layout.array_names[1:], strict=False):
        is_wide = any(array.shape[axis] > 1 for axis in range(ndim) if axis not in axes)
        if array.ndim > ndim and is_wide:
            raise DataError(
                f"{name} has columns and varies over the map (shape {array.shape}). Pass its "
                f"columns as a tuple of arrays."
            )


@dataclass(frozen=True)
class _Expander:
    """Brings arrays to the chunks of y, and plain ones of points or pixels to its dimensions."""

    shape: tuple[int, ...]  # of y
    axes: tuple[int, ...]  # along which fits run
    dims: tuple[str, ...] | None  # of y, if it is an xarray object
    y: Any
    rechunked: list[str] = field(default_factory=list)  # texts on arrays that got the chunks of y

    def points(self, value: Any, name: str, may_have_columns: bool = True) -> Any:
        """Return an x, or sigma, with the dimensions of y, in the chunks of y where it varies."""
        if is_xarray(value):
            return self._in_chunks_of_y(value, name)
        if isinstance(value, list):
            value = as_numpy(value, name)
        whole = self._expanded(value, self.axes, may_have_columns and len(self.axes) == 1)
        shape, expected = np.shape(whole), tuple(self.shape[axis] for axis in self.axes)
        is_short = 0 < len(shape) < len(self.shape)
        if is_short and rows_shape(shape, self.shape, allows_features=False) is None:
            raise DataError(
                f"{name} has shape {shape}, but the fits run along {expected} points of y_data "
                f"with shape {self.shape}. Pass an array of shape {expected}, or one that "
                f"broadcasts against y_data."
            )
        return self._in_chunks_of_y(whole, name)

    def pixels(self, value: Any, name: str) -> Any:
        """Return a map with the dimensions of y."""
        array = _dask_array(value)
        if np.ma.isMaskedArray(value if array is None else array._meta):
            raise DataError(
                f"{name} is a masked array, but each pixel needs a value. Fill it, such as with "
                f"array.filled(np.nan), with which a pixel gets the status 'bad_start'."
            )
        if is_xarray(value):
            fitted = [] if self.dims is None else [self.dims[axis] for axis in self.axes]
            along = [dim for dim in value.dims if dim in fitted]
            if along:
                raise DataError(
                    f"{name} varies along {along[0]!r}, along which the fits run. Pass an array "
                    f"with dimensions of the map."
                )
            return self._in_chunks_of_y(value, name)
        others = tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)
        expected = tuple(self.shape[axis] for axis in others)
        if np.shape(value) != expected:
            raise DataError(
                f"{name} has shape {np.shape(value)}, but the map has the shape {expected}."
            )
        return self._in_chunks_of_y(self._expanded(value, others), name)

    def _expanded(self, value: Any, axes: tuple[int, ...], allows_column: bool = False) -> Any:
        shape = np.shape(value)
        expected = tuple(self.shape[axis] for axis in axes)
        is_column = allows_column and shape[:-1] == expected
        if not shape or len(shape) == len(self.shape) or not (shape == expected or is_column):
            return value
        if not hasattr(value, "reshape"):
            value = da.asarray(value)
        whole = tuple(n if axis in axes else 1 for axis, n in enumerate(self.shape))
        return value.reshape(whole + shape[len(axes) :])

    def _in_chunks_of_y(self, value: Any, name: str) -> Any:
        """Return a lazy array in the chunks of y, so that tiles follow from y alone."""
        array, y = _dask_array(value), _dask_array(self.y)
        if array is None or y is None or np.isnan(array.shape).any():  # refused later
            return value
        if is_xarray(value):
            dims = self.dims or ()
            axes = [dims.index(dim) if dim in dims else None for dim in value.dims]
        else:  # columns are last, and other dimensions are broadcast
            first = max(len(self.shape) - array.ndim, 0)
            axes = [*range(first, len(self.shape)), None][: array.ndim]
        own = {
            i: y.chunks[axis]
            for i, axis in enumerate(axes)
            if axis is not None and array.shape[i] == self.shape[axis]
        }
        new = array.rechunk(own)
        if text := realigned_text(name, array, new):
            self.rechunked.append(text)
        return value.copy(data=new) if is_xarray(value) else new
