"""The model at given parameters: at once for x in memory, lazily for lazy x."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.core.model import Model
from nlsq_dask.core.prediction import PredictionKernel
from nlsq_dask.data.alignment import RowBlocks, align
from nlsq_dask.data.block import Block
from nlsq_dask.data.from_array import is_in_memory, split_mask
from nlsq_dask.data.from_pandas import without_pandas
from nlsq_dask.errors import DataError

_MAX_AT_ONCE = 2**24  # values; more, from coordinates that broadcast by name, are left lazy


def predict(
    model: Model,
    x: Any,
    params: NDArray[np.float64],
    root: NDArray[np.float64] | None = None,
    x_units: Mapping[str, str] | None = None,
) -> Any:
    """Evaluate ``model`` at ``x`` and ``params``; see ``FitResult.predict``.

    With the root of the parameters' covariance (see ``Covariance``) a pair of values and their
    standard errors is returned. Dates in ``x`` must be in the units of the fit, ``x_units``.
    """
    given = _leaves(model, x)
    leaves = without_pandas([(f"x[{i}]", leaf) for i, leaf in enumerate(given)])
    template = _template(leaves, has_columns=any(model.layout.x_features))
    is_lazy = not all(is_in_memory(leaf) for leaf in (template, *leaves))
    if is_lazy:  # what the caller does to an array until it is computed must not matter
        leaves = [copy.deepcopy(leaf) if is_in_memory(leaf) else leaf for leaf in leaves]
    blocks = align(model.layout.assemble(leaves), template)
    _check_units(blocks.x_units, x_units or {})
    layout = replace(
        blocks.layout,
        x_names=model.layout.x_names,
        x_dtypes=("float64",) * len(leaves),
        y_dtype="bool",
        sigma_dtype=None,
        has_mask=False,
    )
    if layout.x_features != model.layout.x_features:
        raise DataError(
            f"a row of x has the shape {layout.x_features}, the model was fitted with "
            f"{model.layout.x_features}."
        )
    kernel = PredictionKernel.trace(replace(model, layout=layout), with_std=root is not None)
    if root is not None and not np.isfinite(root).all():
        root = np.full_like(root, np.nan)
    values = _lazy_values(blocks, kernel, params, root)
    if blocks.mask is not None:
        values = da.where(blocks.mask, np.nan, values)
    if not is_lazy:  # here, whatever cluster is active: the arrays are, and so is the package
        values = values.compute(scheduler="threads")

    def labelled(array: Any) -> Any:
        if isinstance(template, xr.DataArray):
            return xr.DataArray(array, coords=template.coords, dims=template.dims)
        return array

    return labelled(values[0]) if root is None else tuple(map(labelled, values))


def _check_units(given: Mapping[str, str], fitted: Mapping[str, str]) -> None:
    """Refuse dates where the fit had others; numbers are taken to be in the fit's units."""
    for name, units in given.items():
        if units != fitted.get(name):
            raise DataError(
                f"{name} holds dates, which become {units!r}, but the model was fitted with "
                f"{fitted.get(name, 'plain numbers')!r}. Pass x as in the fit."
            )


def _leaves(model: Model, x: Any) -> list[Any]:
    names = model.layout.x_names
    if isinstance(names, int):
        if not isinstance(x, tuple | list) or len(x) != names:
            raise DataError(
                f"x is {_in_words(x)}; the model was fitted with a tuple of {names} arrays as x."
            )
        return list(x)
    if isinstance(names, tuple):
        if not isinstance(x, dict) or set(x) != set(names):
            raise DataError(
                f"x is {_in_words(x)}; the model was fitted with a dict of "
                f"{', '.join(map(repr, names))} as x."
            )
        return [x[name] for name in names]
    return [x]


def _in_words(x: Any) -> str:
    if isinstance(x, dict):
        return f"a dict of {', '.join(map(repr, x))}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}"
    return f"a {type(x).__name__}"


def _template(leaves: list[Any], has_columns: bool) -> Any:
    """Return something with the shape, chunks and dimensions that the result will have."""
    is_table = has_columns and len(leaves) == 1 and np.ndim(leaves[0]) == 2
    if all(isinstance(leaf, xr.DataArray) for leaf in leaves):
        return _named_template(leaves, is_table)
    if any(isinstance(leaf, str) for leaf in leaves):
        raise DataError(f"x is {leaves}; predict needs arrays as in the fit, not names.")
    shapes = [np.shape(leaf) for leaf in leaves]
    if () in shapes:
        raise DataError("x holds a single number; pass arrays of at least one dimension.")
    if any(0 in shape for shape in shapes):
        raise DataError(f"x is empty: its shape is {', '.join(map(str, shapes))}.")
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        raise DataError(
            f"the arrays of x have shapes that do not broadcast: {', '.join(map(str, shapes))}."
        ) from None
    if all(map(is_in_memory, leaves)):
        return np.zeros(shapes[0][:1] if is_table else np.broadcast_shapes(*shapes))
    lazy = [leaf.data if isinstance(leaf, xr.DataArray) else leaf for leaf in leaves]
    chunks = [split_mask(leaf, "x", False)[0].chunks for leaf in lazy]
    if is_table:
        return da.zeros(shapes[0][:1], chunks=chunks[0][:1])
    arrays = [da.zeros(shape, chunks=c) for shape, c in zip(shapes, chunks, strict=True)]
    return functools.reduce(operator.add, arrays)


def _named_template(leaves: list[xr.DataArray], is_table: bool) -> xr.DataArray:
    """Broadcast by name; a result too large to be made at once is lazy whatever its x are."""
    sizes: dict[Any, int] = {}
    chunks: dict[Any, Any] = {}
    coords: dict[Any, Any] = {}
    for leaf in leaves:
        for dim in leaf.dims[:1] if is_table else leaf.dims:
            sizes.setdefault(dim, leaf.sizes[dim])
            if leaf.chunks is not None and not isinstance(chunks.get(dim), tuple):
                chunks[dim] = leaf.chunksizes[dim]
            if dim in leaf.coords:
                coords.setdefault(dim, leaf.coords[dim])
    lazy = bool(chunks) or math.prod(sizes.values()) > _MAX_AT_ONCE
    shape = tuple(sizes.values())
    values = (
        da.zeros(shape, chunks=tuple(chunks.get(dim, "auto") for dim in sizes))
        if lazy
        else np.zeros(shape)
    )
    return xr.DataArray(values, coords=coords, dims=list(sizes))


def _lazy_values(
    blocks: RowBlocks,
    kernel: PredictionKernel,
    params: NDArray[np.float64],
    root: NDArray[np.float64] | None,
) -> da.Array:
    """Return what the kernel gives, values and perhaps their errors, along a first axis."""
    rows = tuple(range(blocks.y.ndim))
    arguments: list[Any] = [blocks.y, rows]
    for i, array in enumerate(blocks.x):
        axes = [
            axis if array.shape[axis] == blocks.y.shape[axis] else blocks.y.ndim + axis
            for axis in rows
        ]
        features = [2 * blocks.y.ndim + i] * (array.ndim - blocks.y.ndim)
        arguments += [array, (*axes, *features)]
    first = max(i for index in arguments[1::2] for i in index) + 1
    values: da.Array = da.blockwise(
        _predict_block,
        (first, *rows),
        *arguments,
        new_axes={first: 1 + kernel.with_std},
        kernel=kernel,
        params=params,
        root=root,
        concatenate=True,
        align_arrays=False,
        dtype=np.float64,
        meta=np.empty((0,) * (1 + blocks.y.ndim)),
    )
    return values


def _predict_block(
    y: NDArray[Any],
    *x: NDArray[Any],
    kernel: PredictionKernel,
    params: NDArray[np.float64],
    root: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    block = Block(y.shape, np.empty(y.shape, bool), x, None, None)
    found = kernel(block.pieces(kernel.piece_rows), params, root)
    return found.reshape(-1, *y.shape)
