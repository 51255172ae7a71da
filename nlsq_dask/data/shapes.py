"""Matching of arrays without dimension names to y by their shapes, and errors on mismatches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import dask.array as da
import numpy as np
import zarr

from nlsq_dask.errors import DataError

Shape = tuple[int, ...]


def rows_shape(shape: Shape, y_shape: Shape, allows_features: bool) -> Shape | None:
    """Return the shape of an array without its features, or None if it does not match y.

    Features are the k values per row of an x of shape (n, k), for which (n,) is returned.

    Parameters
    ----------
    shape, y_shape : tuple of int
    allows_features : bool
        Whether the array is an x, which may have one dimension more than y. For a 1-d y its shape
        is (n,) or (n, k); other arrays are broadcast to y.
    """
    if allows_features:
        shape = shape[:-1] if len(shape) == len(y_shape) + 1 else shape
        if len(y_shape) == 1:
            return shape if shape == y_shape else None
    is_broadcast = len(shape) <= len(y_shape) and all(
        size in (1, n) for size, n in zip(shape[::-1], y_shape[::-1], strict=False)
    )
    return shape if is_broadcast else None


def check_unambiguous(by_position: Sequence[tuple[str, Any]], y_shape: Shape) -> None:
    """Raise a DataError for an array whose shape matches several dimensions of y.

    Broadcasting would silently choose the last of them: in square images, a 1-d time would be
    matched to the columns. If any x has as many dimensions as y, such as ``t[:, None]``,
    broadcasting is intended and nothing is checked.

    Parameters
    ----------
    by_position : sequence of (name, value)
        Name in messages and value of each array that is not matched by dimension names.
    y_shape : tuple of int

    Raises
    ------
    DataError
    """
    ndim = len(y_shape)
    shaped = [(name, value, np.shape(value)) for name, value in by_position]
    if any(len(shape) == ndim for name, _, shape in shaped if name != "sigma"):
        return
    for name, value, shape in shaped:
        matches = _matching_axes(shape, y_shape)
        if len(matches) > 1:
            ways = " or ".join(
                f"{_index_expression(value, name, axes, ndim)} for {_dimension_text(axes)}"
                for axes in matches
            )
            raise DataError(
                f"{name} has shape {shape}, which is ambiguous: it matches several dimensions of "
                f"y_data with shape {y_shape}. Pass {ways}."
            )


def mismatch_error(
    name: str, value: Any, array: da.Array, y: da.Array, is_lazy: bool, dims: tuple[Any, Any] | None
) -> DataError:
    """Return the error for an array that does not match y.

    Parameters
    ----------
    name : str
    value : array
        Array as passed by the caller.
    array, y : dask.array.Array
        ``value`` as a Dask array, and y.
    is_lazy : bool
        Whether ``value`` or y is not in memory; the message then shows the chunks of both.
    dims : pair of tuple, optional
        Dimension names of ``value`` and of y, if both have them.
    """
    in_chunks = f" (chunks {array.chunks} and {y.chunks})" if is_lazy else ""
    return DataError(
        f"{name} has shape {array.shape} and y_data has shape {y.shape}: they do not "
        f"match{in_chunks}. {_mismatch_hint(name, value, array.shape, y.shape, dims)}"
    )


def _mismatch_hint(
    name: str, value: Any, shape: Shape, y_shape: Shape, dims: tuple[Any, Any] | None
) -> str:
    ndim = len(y_shape)
    if dims is not None:
        return (
            f"Dimensions are matched by name. {name} has the dimensions {dims[0]} and y_data has "
            f"{dims[1]}: rename the dimensions of {name}."
        )
    if 1 in y_shape and shape == tuple(n for n in y_shape if n > 1):
        kept = ", ".join("0" if n == 1 else ":" for n in y_shape)
        return f"y_data has a dimension of size 1: pass y_data[{kept}]."
    matches = _matching_axes(shape, y_shape)
    if matches and len(shape) < ndim:
        expression = _index_expression(value, name, matches[0], ndim)
        return f"Pass {expression} for {_dimension_text(matches[0])} of y_data."
    if name == "sigma":
        return "Pass one number, or an array that broadcasts against y_data."
    if ndim == 1:
        if len(shape) == 2 and shape[1:] == y_shape:
            return (
                f"Observations are rows of x: pass a tuple of the arrays, or np.transpose({name})."
            )
        return (
            "For a 1-d y_data pass x of shape (n,) or (n, k), or a tuple of arrays of shape (n,)."
        )
    return (
        f"For a {ndim}-d y_data pass arrays that broadcast against it, such as "
        f"t[{', '.join([':'] + ['None'] * (ndim - 1))}], or xarray.DataArrays, which are matched "
        f"by name."
    )


def _matching_axes(shape: Shape, y_shape: Shape) -> list[Shape]:
    """Return all choices of dimensions of y, as axis numbers, with the sizes of the array."""
    if len(shape) >= len(y_shape) or 1 in shape or not shape:
        return []
    axes = combinations(range(len(y_shape)), len(shape))
    return [candidate for candidate in axes if shape == tuple(np.take(y_shape, candidate).tolist())]


def _index_expression(value: Any, name: str, axes: Shape, ndim: int) -> str:
    """Return code that aligns an array with dimensions ``axes`` of y, such as ``t[:, None]``."""
    read = "[:]" if isinstance(value, zarr.Array) else ""  # Zarr does not support None as an index
    return f"{name}{read}[{', '.join(':' if axis in axes else 'None' for axis in range(ndim))}]"


def _dimension_text(axes: Shape) -> str:
    numbers = " and ".join(map(str, axes))
    return f"dimension {numbers}" if len(axes) == 1 else f"dimensions {numbers}"


def longest_axes(shape: Shape) -> Shape:
    """Return the indices of the two longest axes, in ascending order, for a picture of an array.

    Only the longest one is returned if all others have length 1.
    """
    by_length = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    return tuple(sorted(axis for axis in by_length[:2] if shape[axis] > 1) or by_length[:1])
