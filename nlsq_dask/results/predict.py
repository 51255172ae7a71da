"""``FitResult.predict``: values of the model, lazy (a Dask array) if x is lazy."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.data.alignment import align
from nlsq_dask.data.sources.from_array import as_numpy, is_in_memory, split_mask
from nlsq_dask.data.sources.from_pandas import pandas_to_numpy
from nlsq_dask.data.sources.from_xarray import is_xarray
from nlsq_dask.data.sources.objects import check_is_array
from nlsq_dask.data.templates import named_template
from nlsq_dask.engine.evaluation import evaluate
from nlsq_dask.errors import DataError
from nlsq_dask.model.model import Model
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.rows.rows import Rows, x_array_names

_X = "x"  # name of the argument in messages


def predict(
    model: Model,
    x: Any,
    params: NDArray[np.float64],
    root: NDArray[np.float64] | None = None,
    x_units: Mapping[str, str] | None = None,
) -> Any:
    """Evaluate ``model`` at ``x`` and ``params``; see ``FitResult.predict``.

    Parameters
    ----------
    model : Model
    x : array, tuple or dict of arrays
        Independent variables, in the structure (array, tuple or dict) of the fit.
    params : ndarray, shape (p,)
    root : ndarray, shape (p, p), optional
        Square root of the covariance of the parameters (see ``Covariance``). If given, standard
        errors of the values are returned as well.
    x_units : dict of str to str, optional
        Units of dates in the fit, by name of the x array; dates in ``x`` must have the same units.

    Raises
    ------
    DataError
        If ``x`` has another structure or other units than in the fit.
    """
    names = [name.replace("x_data", _X, 1) for name in x_array_names(model.layout.x_names)]
    named = list(zip(names, _leaves(model, x), strict=True))
    for name, leaf in named:
        check_is_array(name, leaf)
    leaves = pandas_to_numpy(named)
    template = _template(leaves, names, model.layout.x_features)
    is_lazy = not all(is_in_memory(leaf) for leaf in (template, *leaves))
    if is_lazy:  # protect against modifications before the result is computed
        leaves = [copy.deepcopy(leaf) if is_in_memory(leaf) else leaf for leaf in leaves]
    blocks = align(model.layout.assemble(leaves), template, x_name=_X)
    _check_units(names, model, blocks.x_units, x_units or {})
    layout = replace(
        blocks.layout,
        x_names=model.layout.x_names,
        x_dtypes=("float64",) * len(leaves),
        y_dtype="bool",
        sigma_dtype=None,
        has_mask=False,
    )
    kernel = PredictionKernel.trace(replace(model, layout=layout), with_std=root is not None)
    if root is not None and not np.isfinite(root).all():
        root = np.full_like(root, np.nan)
    function = _Prediction(kernel, params, root)
    values = evaluate(blocks, names, function, 1 + kernel.with_std)
    if blocks.mask is not None:
        values = da.where(blocks.mask, np.nan, values)
    if not is_lazy:  # in this process: no transfer to a cluster, which may be busy
        values = values.compute(scheduler="threads")
    results = list(values)
    if isinstance(template, xr.DataArray):
        results = [xr.DataArray(each, template.coords, template.dims) for each in results]
    return results[0] if root is None else tuple(results)


def _check_units(
    names: Sequence[str], model: Model, given_units: Mapping[str, str], fitted: Mapping[str, str]
) -> None:
    """Raise a DataError if dates in x have other units than in the fit; numbers are not checked."""
    for name, fit_name in zip(names, x_array_names(model.layout.x_names), strict=True):
        units = given_units.get(name)
        if units is not None and units != fitted.get(fit_name):
            raise DataError(
                f"{name} holds dates with units {units!r}, but the model was fitted with "
                f"{fitted.get(fit_name, 'plain numbers')!r}. Pass x as in the fit."
            )


def _leaves(model: Model, x: Any) -> list[Any]:
    names = model.layout.x_names
    if isinstance(names, int):
        if isinstance(x, tuple | list) and len(x) == names:
            return list(x)
        expected = f"a tuple of {names} array{'s' if names > 1 else ''}"
    elif isinstance(names, tuple):
        if isinstance(x, dict) and set(x) == set(names):
            return [x[name] for name in names]
        expected = f"a dict with the keys {', '.join(map(repr, names))}"
    else:
        if not isinstance(x, tuple | dict):
            return [x]
        expected = "one array"
    raise DataError(f"x must be {expected}, as in the fit; got {_describe(x)}.")


def _describe(x: Any) -> str:
    if isinstance(x, dict):
        return f"a dict with the keys {', '.join(map(repr, x))}" if x else "an empty dict"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of length {len(x)}"
    shape = getattr(x, "shape", None)
    return f"type {type(x).__name__}" + ("" if shape is None else f" with shape {shape}")


def _template(
    leaves: list[Any], names: Sequence[str], x_features: Sequence[tuple[int, ...]]
) -> Any:
    """Return an array with the shape, chunks and dimensions of the result.

    An x of shape (n, k) gives n values if it had k columns in the fit as well.
    """
    if any(map(_are_names, leaves)):
        raise DataError(
            f"x must be arrays as in the fit, not names; got {leaves}. Pass dates as "
            f"np.array(['2030-01-01'], 'datetime64[D]')."
        )
    named = [is_xarray(leaf) for leaf in leaves]  # all of them: a Dataset raises an error
    shapes = [_rows_shape(*each) for each in zip(leaves, names, x_features, strict=True)]
    if all(named):
        template: Any = _named_template(leaves, names, shapes)
        broadcast: tuple[int, ...] = template.shape
    else:
        lazy = None if all(map(is_in_memory, leaves)) else _zeros(leaves, names, shapes)
        broadcast = _broadcast(shapes)
        template = np.zeros(broadcast) if lazy is None else functools.reduce(operator.add, lazy)
    if not broadcast:
        raise DataError("x must have at least one dimension; got a single number.")
    if 0 in broadcast:
        raise DataError(f"x has no rows: {_list_shapes(names, leaves)}.")
    is_flat = len(broadcast) == 1 and all(shape == broadcast for shape in shapes)
    if not is_flat and (len(broadcast) == 1 or any(x_features)):
        raise DataError(
            f"all arrays of x must have the same number of rows: {_list_shapes(names, leaves)}."
        )
    return template


def _are_names(leaf: Any) -> bool:
    names = leaf if isinstance(leaf, list) else [leaf]
    return bool(names) and all(isinstance(name, str) for name in names)


def _rows_shape(leaf: Any, name: str, features: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an x array, without its last axis if it had columns in the fit."""
    shape = leaf.shape if hasattr(leaf, "shape") else as_numpy(leaf, name).shape
    if features and (len(shape) != 2 or shape[1:] != features):
        raise DataError(f"{name} must have shape (n, {features[0]}), as in the fit; got {shape}.")
    return tuple(shape[:1]) if features else tuple(shape)


def _zeros(
    leaves: list[Any], names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> list[da.Array]:
    """Return lazy zeros with the given shapes and the chunks of the x arrays."""
    lazy = [leaf.data if isinstance(leaf, xr.DataArray) else leaf for leaf in leaves]
    chunks = [split_mask(*each, False)[0].chunks for each in zip(lazy, names, strict=True)]
    return [da.zeros(s, chunks=c[: len(s)]) for s, c in zip(shapes, chunks, strict=True)]


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise DataError(
            f"the arrays of x have the shapes {', '.join(map(str, shapes))}, which do not "
            f"broadcast against each other."
        ) from error


def _list_shapes(names: Sequence[str], leaves: Sequence[Any]) -> str:
    return ", ".join(
        f"{name} has shape {np.shape(leaf)}" for name, leaf in zip(names, leaves, strict=True)
    )


def _named_template(
    leaves: list[xr.DataArray], names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> xr.DataArray:
    """Return a DataArray with the labels of the x arrays, without their columns."""
    dims = [leaf.dims[: len(shape)] for leaf, shape in zip(leaves, shapes, strict=True)]
    labels = {
        dim: leaf.coords[dim]
        for leaf, own in zip(leaves[::-1], dims[::-1], strict=True)
        for dim in own
        if dim in leaf.coords
    }
    return named_template(leaves, names, dims).assign_coords(labels)


@dataclass(frozen=True)
class _Prediction:
    """Evaluates the model at the rows of a block."""

    kernel: PredictionKernel
    params: NDArray[np.float64]
    root: NDArray[np.float64] | None

    def __call__(self, shape: tuple[int, ...], x: list[NDArray[Any]]) -> NDArray[np.float64]:
        rows = Rows(np.empty(shape, bool), tuple(x))
        batches = rows.batches(self.kernel.batch_rows)
        return self.kernel(batches, self.params, self.root).reshape(-1, *shape)
