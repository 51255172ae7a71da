"""``split_variables`` converts the layouts of ``xdata`` that SciPy accepts to arrays of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nlsq_dask.data.sources.from_array import as_dask, as_numpy, is_in_memory
from nlsq_dask.data.sources.from_xarray import is_xarray
from nlsq_dask.errors import DataError

Shape = tuple[Any, ...]


def split_variables(xdata: Any, ydata: Any) -> tuple[Any, bool]:
    """Return x as ``fit`` expects it, and whether it is a tuple of the k variables of SciPy's x.

    In the first case, the model gets x as it is. In the second case it expects the k variables
    stacked as rows, shape ``(k, M)``.

    Parameters
    ----------
    xdata : array, sequence of arrays or numbers, dict of arrays, or names of coordinates
    ydata : array

    Raises
    ------
    DataError
        If the shape of ``xdata`` fits no layout.
    """
    if isinstance(xdata, str | dict):
        return xdata, False
    if hasattr(xdata, "iloc") and xdata.ndim == 2:
        raise DataError(
            f"xdata is a DataFrame. Pass a tuple of columns, (frame[{xdata.columns[0]!r}], ...), "
            f"or dict(frame), so that the model gets a dict of columns."
        )
    y_shape = _shape(ydata)
    if isinstance(xdata, tuple | list):
        if any(isinstance(each, str) for each in xdata):  # names of coordinates of y
            return xdata, False
        if _is_sequence_of_variables(xdata, y_shape):
            return tuple(_raveled(each, y_shape) for each in xdata), True
        xdata = as_numpy(xdata, "xdata")
    elif not hasattr(xdata, "ndim"):
        if xdata is None or callable(xdata):
            raise DataError(
                f"xdata must be an array; got {xdata!r}. The model is called with blocks of "
                f"rows, so it must get the independent variables from xdata."
            )
        xdata = as_numpy(xdata, "xdata")
    return _split_array(xdata, ydata, y_shape)


def _shape(value: Any) -> Shape:
    return tuple(value.shape) if hasattr(value, "shape") else np.shape(as_numpy(value, "ydata"))


def _is_sequence_of_variables(values: tuple[Any, ...] | list[Any], y_shape: Shape) -> bool:
    """Whether each item holds one variable, in contrast to the numbers of one row of x."""
    if not values or not all(map(np.ndim, values)):
        return False
    is_rows = len(values) == math.prod(y_shape) and np.size(values[0]) != len(values)
    return not (is_rows and all(np.ndim(row) == 1 and is_in_memory(row) for row in values))


def _split_array(x: Any, ydata: Any, y_shape: Shape) -> tuple[Any, bool]:
    shape = tuple(x.shape)
    if len(shape) < 2 or shape == y_shape or any(n != n for n in (*shape, *y_shape)):
        return x, False  # ``fit`` raises the error about unknown sizes, which are NaN
    if is_xarray(x) and is_xarray(ydata):
        is_split = not set(x.dims) <= set(ydata.dims) and x.dims[0] not in ydata.dims
    else:
        is_split = shape[1:] == y_shape or (
            len(y_shape) == 1 and math.prod(shape[1:]) == y_shape[0]
        )
    if is_split:
        x = x if is_in_memory(x) or is_xarray(x) else as_dask(x, "xdata")
        return tuple(_raveled(x[i], y_shape) for i in range(shape[0])), True
    if len(y_shape) == 1 and not (len(shape) == 2 and shape[0] == y_shape[0]):
        raise DataError(
            f"xdata has shape {shape} and ydata has shape {y_shape}: they do not match. For M "
            f"values of ydata, pass xdata of shape (M,), (k, M) or (M, k), or k arrays of any "
            f"shape with M elements each."
        )
    return x, False


def _raveled(variable: Any, y_shape: Shape) -> Any:
    """Return a variable as 1-d array if it is N-d and y is 1-d with as many elements."""
    if isinstance(variable, tuple | list):
        variable = as_numpy(variable, "xdata")
    shape = tuple(getattr(variable, "shape", ()))
    if len(shape) < 2 or is_xarray(variable) or (math.prod(shape),) != y_shape:
        return variable
    array = variable if is_in_memory(variable) else as_dask(variable, "xdata")
    return array.reshape(-1)
