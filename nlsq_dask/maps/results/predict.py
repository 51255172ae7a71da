"""``predict_each``: the model at every position of a map."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.array.core import normalize_chunks
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks, align, x_leaves
from nlsq_dask.data.dates import describe_units
from nlsq_dask.data.sources.from_array import as_dask, as_numpy, chunked, is_in_memory
from nlsq_dask.data.sources.from_pandas import pandas_to_numpy
from nlsq_dask.data.sources.from_xarray import is_xarray, lazy_data
from nlsq_dask.data.sources.objects import check_is_array
from nlsq_dask.data.templates import named_template
from nlsq_dask.engine.evaluation import evaluate
from nlsq_dask.engine.execution import is_inside_task
from nlsq_dask.errors import DataError, DataWarning, warn_caller
from nlsq_dask.fit.arguments.parameters import order_names
from nlsq_dask.maps.problem.alignment import check_columns
from nlsq_dask.maps.problem.tiles import memory_chunks
from nlsq_dask.maps.results.variables import parameter_names, variable_of
from nlsq_dask.maps.tasks.columns import ArrayKind
from nlsq_dask.model.check import check_trace
from nlsq_dask.model.lane_function import LaneFunction
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import x_array_names

Array = NDArray[Any]
Shape = tuple[int, ...]

_MAX_BLOCK_BYTES = 2**27  # of the result, if it is lazy
_CALL_VALUES = 2**16  # per call of the program; its arrays fit a core's cache
_CALL_POINTS = 1024
_NUMBERED = re.compile(r"dim_(\d+)")  # what fit_each calls the dimensions of plain arrays
_POPT = "ds.popt"  # in messages
_COLUMNS, _SINGLE = "_columns", "_single"  # dimensions of plain x, and of a map of one pixel


def predict_each(
    model: Callable[..., Any],
    ds: xr.Dataset,
    x_data: Any,
    *,
    param_names: Sequence[str] | None = None,
) -> xr.DataArray:
    """Evaluate the model at every position of a map, with the parameters of each.

    Parameters
    ----------
    model : callable
        The model of the fit, ``model(x, *params)``, written with jax.numpy.
    ds : Dataset
        Result of ``fit_each``, or a part of it, such as ``ds.isel(lat=0)``; also one that was read
        from a file, and one of ``curvefit``.
    x_data : DataArray, array, number, tuple or dict
        Independent variables in the structure that the model takes, as in ``fit_each``, at any
        points. DataArrays are matched by name of dimension, such as ``cube.time``, and may vary
        over the map. An array without names has the shape of the points of a fit. Dates are
        converted to the days that ``fit_each`` counts.
    param_names : sequence of str, optional
        Names of the parameters in the order of the model's arguments, if those in its signature
        are others.

    Returns
    -------
    DataArray
        Values of the model, in float32 if the parameters are. The dimensions of x come first, then
        those of the map; if the fits were of plain arrays, dimensions have the order of these. NaN
        where a parameter or an x is NaN or masked. Lazy if ``ds`` or an x is, or if there are more
        than 16 million values; a block then has 128 MiB at most.

    Raises
    ------
    ValueError
        If the parameters of the model are not those in ``ds``.
    DataError
        If an x does not match the map, or holds other dates than in the fit.
    ModelError
        If the model cannot be called with x.

    See Also
    --------
    AdaptiveHybridStreamingOptimizer.fit_each : Returns ``ds``.
    FitResult.predict : The same for one fit.

    Notes
    -----
    ``cube - predict_each(model, ds, cube.time)`` are the residuals. If ``ds`` is lazy, compute them
    together with ``ds``, or store it first: each computation of a lazy ``ds`` repeats the fits.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import xarray as xr
    >>> import nlsq_dask
    >>> time = np.linspace(0, 4, 50)
    >>> y = np.stack([2 * np.exp(-0.7 * time), 3 * np.exp(-time)])
    >>> da = xr.DataArray(y, dims=("x", "time"), coords={"time": time})
    >>> def decay(t, height, rate):
    ...     return height * jnp.exp(-rate * t)
    >>> fits = da.nlsq.fit_each(decay, "time", dims="time", verbose=0)
    >>> bool(abs(da - nlsq_dask.predict_each(decay, fits, da.time)).max() < 1e-6)
    True
    >>> nlsq_dask.predict_each(decay, fits, 0.0).values.round(6)
    array([2., 3.])
    """
    popt = _ordered(model, ds, param_names)
    is_single = popt.ndim == 1
    if is_single:
        popt = popt.expand_dims(_SINGLE)
    x = _NamedX.of(x_data, ds, popt)
    template = _template(x, popt)
    is_lazy = not all(map(is_in_memory, (*x.leaves, popt, template)))
    if is_lazy:  # protect against modifications before the result is computed
        x, popt = x.copy(), popt.copy(deep=is_in_memory(popt))
    n_point_dims = template.ndim - (popt.ndim - 1)
    blocks = _aligned(x, ds, popt, _in_blocks(template, n_point_dims))
    check_columns(blocks, range(n_point_dims))
    values = _values(model, blocks, x, popt)
    if not is_lazy:
        values = values.compute(scheduler="sync" if is_inside_task() else "threads")
    result = _labelled(xr.DataArray(values, dims=template.dims), (popt, *x.leaves))
    if is_single:
        result = result.isel({_SINGLE: 0})
    result.name = ds.attrs.get("data")
    result.attrs = _attrs(ds)
    return result.transpose(*_in_order_of_y(result.dims))


def _ordered(
    model: Callable[..., Any], ds: xr.Dataset, param_names: Sequence[str] | None
) -> xr.DataArray:
    """Return the parameters, in the order of the model's arguments and along the last dimension."""
    popt = variable_of(ds, "popt")
    if "param" not in popt.dims or "param" not in popt.coords:
        raise ValueError(
            f"{popt.name} has the dimensions {popt.dims}, but needs 'param' with the names of all "
            f"parameters. Pass the Dataset without a selection along 'param'."
        )
    given = parameter_names(popt)
    names = order_names(model, given, param_names)
    if list(names) != given:
        popt = popt.isel(param=[given.index(name) for name in names])
    return popt.transpose(..., "param")


@dataclass(frozen=True)
class _NamedX:
    """The x arrays with names of dimensions; those with columns have them last."""

    keys: int | tuple[str, ...] | None  # structure of x, as in ``Layout.x_names``
    names: list[str]  # in messages
    leaves: list[xr.DataArray]
    dims: list[tuple[Hashable, ...]]  # of the leaves, without columns

    @classmethod
    def of(cls, x_data: Any, ds: xr.Dataset, popt: xr.DataArray) -> _NamedX:
        """Name the dimensions of x."""
        keys, given = x_leaves(x_data)
        names = x_array_names(keys)
        for name, leaf in zip(names, given, strict=True):
            _reject_name(leaf, name)
            check_is_array(name, leaf)
        arrays = pandas_to_numpy(list(zip(names, given, strict=True)))
        fitted = tuple(str(ds.attrs.get("fitted_dims", "")).split())
        map_dims = popt.dims[:-1]
        leaves, dims = [], []
        for name, leaf in zip(names, arrays, strict=True):
            named = leaf if is_xarray(leaf) else _with_names(leaf, name, fitted, map_dims)
            points = [dim for dim in named.dims if dim not in map_dims]
            _reject_selected(points, name, popt)
            columns = []
            if len(fitted) == 1 and len(points) == 2 and fitted[0] in points:
                columns = [dim for dim in points if dim != fitted[0]]
            own = tuple(dim for dim in named.dims if dim not in columns)
            leaves.append(named.transpose(*own, *columns))
            dims.append(own)
        return cls(keys, names, leaves, dims)

    def joined(self) -> Any:
        """Return x in the structure that the caller passed."""
        if self.keys is None:
            return self.leaves[0]
        if isinstance(self.keys, int):
            return tuple(self.leaves)
        return dict(zip(self.keys, self.leaves, strict=True))

    def copy(self) -> _NamedX:
        """Return copies of those in memory."""
        return replace(self, leaves=[leaf.copy(deep=is_in_memory(leaf)) for leaf in self.leaves])

    def filling(self, template: xr.DataArray) -> _NamedX:
        """Return x with numbers repeated along the dimension of a 1-d template."""
        if template.ndim > 1:
            return self
        (dim,), n = template.dims, template.size
        leaves = [leaf if leaf.ndim else leaf.expand_dims({dim: n}) for leaf in self.leaves]
        return replace(self, leaves=leaves)


def _reject_name(leaf: Any, name: str) -> None:
    texts = leaf if isinstance(leaf, list) else [leaf]
    if texts and all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{name} is the name {texts[0]!r}, but a map does not have the coordinates of the "
            f"points. Pass the coordinate itself, such as cube[{texts[0]!r}]."
        )


def _reject_selected(points: Sequence[Hashable], name: str, popt: xr.DataArray) -> None:
    """Raise a DataError for an x along a dimension of which the map is a single element."""
    for dim in points:
        if dim in popt.coords and not popt.coords[dim].ndim:
            raise DataError(
                f"{name} has the dimension {dim!r}, but the map is a part of it, at {dim} = "
                f"{popt.coords[dim].values}. Select the same from x, or drop the coordinate of the "
                f"map: ds.drop_vars({dim!r})."
            )


def _with_names(
    value: Any, name: str, fitted: tuple[str, ...], map_dims: tuple[Hashable, ...]
) -> xr.DataArray:
    """Return an array without names of dimensions as a DataArray."""
    if not is_in_memory(value):
        value = as_dask(value, name)
    elif not np.ma.isMaskedArray(value):  # xarray writes NaN where it is masked
        value = as_numpy(value, name)
    every = _in_order_of_y((*fitted, *map_dims))
    is_whole = value.ndim == len(every)
    is_plain = all(_NUMBERED.fullmatch(str(dim)) for dim in every)
    if not value.ndim:
        return xr.DataArray(value)
    if not fitted:
        raise DataError(
            f"{name} has no names of dimensions, and ds.attrs has no 'fitted_dims', the dimensions "
            f"of the fits. Pass a DataArray, such as xarray.DataArray({name}, dims='time')."
        )
    if is_whole and is_plain:
        array = xr.DataArray(value, dims=every)
        constant: xr.DataArray = array.isel({dim: 0 for dim in map_dims if array.sizes[dim] == 1})
        return constant
    if value.ndim == len(fitted):
        return xr.DataArray(value, dims=fitted)
    if len(fitted) == 1 and value.ndim == 2 and not is_whole:
        return xr.DataArray(value, dims=(*fitted, _COLUMNS))
    listed = ", ".join(map(repr, fitted))
    raise DataError(
        f"{name} has shape {value.shape}, but the points of the fits have the dimensions {listed}. "
        f"Pass an array with {'this dimension' if len(fitted) == 1 else 'these dimensions'}, or a "
        f"DataArray with names of dimensions, which may vary over the map."
    )


def _template(x: _NamedX, popt: xr.DataArray) -> xr.DataArray:
    """Return zeros in the shape and chunks of the result, dimensions of the map last."""
    map_dims = popt.dims[:-1]
    template = named_template([*x.leaves, popt], [*x.names, _POPT], [*x.dims, map_dims])
    points = [dim for dim in template.dims if dim not in map_dims]
    template = template.transpose(*points, *map_dims)
    if not template.size:
        sizes = ", ".join(f"{dim}: {n}" for dim, n in template.sizes.items())
        raise DataError(f"there is nothing to predict: x_data or the map is empty ({sizes}).")
    return template


def _in_blocks(template: xr.DataArray, n_point_dims: int) -> xr.DataArray:
    """Return the template in chunks of at most 128 MiB, those of lazy arrays if possible."""
    shape, dtype, chunks = template.shape, template.dtype, template.chunks
    if chunks is None:
        chunks = memory_chunks(shape, tuple(range(n_point_dims)), dtype)
    elif math.prod(map(max, chunks)) * dtype.itemsize > _MAX_BLOCK_BYTES:
        chunks = normalize_chunks("auto", shape, _MAX_BLOCK_BYTES, dtype, previous_chunks=chunks)
    return template.copy(data=da.zeros(shape, chunks=chunks))


def _aligned(x: _NamedX, ds: xr.Dataset, popt: xr.DataArray, template: xr.DataArray) -> RowBlocks:
    """Return x in blocks of the template, with numbers for dates."""
    blocks = align(x.filling(template).joined(), template, allows_columns=True)
    _check_dates(blocks, ds, popt)
    for notice in blocks.notices:
        warn_caller(notice, DataWarning)
    return blocks


def _values(
    model: Callable[..., Any], blocks: RowBlocks, x: _NamedX, popt: xr.DataArray
) -> da.Array:
    """Return the values of the model in the shape and chunks of the blocks."""
    dtype = "float32" if popt.dtype.newbyteorder("=") == np.float32 else "float64"
    traced = Model(model, popt.sizes["param"], blocks.layout, dtype)
    check_trace(traced, blocks.x_labels)
    function = _OfBlock.of(traced, blocks, blocks.y.ndim - (popt.ndim - 1))
    with_popt = _with_parameters(blocks, x, popt)
    values: da.Array
    (values,) = evaluate(with_popt, [*x.names, _POPT], function, 1, dtype)
    return values if blocks.mask is None else da.where(blocks.mask, np.nan, values)


def _check_dates(blocks: RowBlocks, ds: xr.Dataset, popt: xr.DataArray) -> None:
    """Raise a DataError for dates, if the model of the fit got other ones, or numbers."""
    is_known = "fitted_dims" in ds.attrs or popt.name != "popt"
    fitted = str(ds.attrs.get("dates", "numbers, and no dates"))
    for name, units in blocks.x_units.items():
        own = f" as {describe_units(units)}"
        if is_known and not any(text.endswith(own) for text in fitted.split("; ")):
            raise DataError(
                f"{name} holds dates, which become {units}, but the model was fitted with: "
                f"{fitted}. Pass x as the model of the fit got it. (curvefit passes dates as "
                f"counts of their unit: x.astype(float).)"
            )


def _with_parameters(blocks: RowBlocks, x: _NamedX, popt: xr.DataArray) -> RowBlocks:
    """Return blocks with the parameters of each pixel as the last x, one column per parameter."""
    arrays = []
    for name, leaf, array in zip(x.names, x.leaves, blocks.x, strict=True):
        if name in blocks.x_units and is_in_memory(leaf):
            # A scheduler then needs no function of this package that converts dates.
            array = chunked(array.compute(scheduler="sync"), array.chunks)
        arrays.append(array)
    values = lazy_data(popt, _POPT)
    n_point_dims = blocks.y.ndim - (values.ndim - 1)
    chunks = (*((1,) for _ in range(n_point_dims)), *blocks.y.chunks[n_point_dims:], -1)
    arrays.append(values[(None,) * n_point_dims].rechunk(chunks))
    x_dtypes = (*blocks.layout.x_dtypes, values.dtype.newbyteorder("=").name)
    return replace(blocks, x=tuple(arrays), layout=replace(blocks.layout, x_dtypes=x_dtypes))


@dataclass(frozen=True)
class _OfBlock:
    """Evaluates the model at a block of points and pixels."""

    function: LaneFunction
    kinds: tuple[ArrayKind, ...]  # of the x arrays
    n_point_dims: int
    n_points: int  # per call

    @classmethod
    def of(cls, model: Model, blocks: RowBlocks, n_point_dims: int) -> _OfBlock:
        """Trace the model for calls with some points of some pixels."""
        order = tuple(range(blocks.y.ndim))
        kinds = tuple(ArrayKind.of(x, blocks.y, order, n_point_dims) for x in blocks.x)
        largest = tuple(map(max, blocks.y.chunks))
        n_points = min(math.prod(largest[:n_point_dims]), _CALL_POINTS)
        n_lanes = min(math.prod(largest[n_point_dims:]), max(_CALL_VALUES // n_points, 1))
        x_varies = [kind.over_pixels for kind in kinds]
        sizes = (model.n_params,)
        function = LaneFunction.trace(model.__call__, model, n_points, n_lanes, x_varies, sizes)
        return cls(function, kinds, n_point_dims, n_points)

    def __call__(self, shape: Shape, arrays: list[Array]) -> Array:
        *x, params = arrays
        points, pixels = shape[: self.n_point_dims], shape[self.n_point_dims :]
        by_lane = params.reshape(math.prod(pixels), -1).T
        flat = [kind.flat(a, points, pixels) for kind, a in zip(self.kinds, x, strict=True)]
        values = np.empty((math.prod(points), by_lane.shape[1]), self.function.dtype)
        for first in range(0, len(values), self.n_points):
            index = np.minimum(np.arange(first, first + self.n_points), len(values) - 1)
            some = self.function([leaf[index] for leaf in flat], by_lane)
            values[first : first + self.n_points] = some[: len(values) - first]
        # The model may be finite all the same.
        values[:, np.isnan(by_lane).any(axis=0)] = np.nan
        for kind, leaf in zip(self.kinds, flat, strict=True):
            is_missing = np.isnan(leaf)
            has_columns = kind.n_more and not kind.over_pixels
            values[is_missing.any(axis=1) if has_columns else is_missing] = np.nan
        return values.reshape(1, *shape)


def _labelled(values: xr.DataArray, arrays: Sequence[xr.DataArray]) -> xr.DataArray:
    """Return values with the coordinates of other arrays along their dimensions."""
    for array in arrays:
        unwanted = [
            name
            for name, each in array.coords.items()
            if name in values.coords or not set(each.dims) <= set(values.dims)
        ]
        values = values.assign_coords(array.drop_vars(unwanted).coords)
    return values


def _in_order_of_y(dims: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """Return the dimensions in the order that they had in y, if y had no names for them."""
    numbers = {dim: _NUMBERED.fullmatch(str(dim)) for dim in dims}
    if not all(numbers.values()):
        return dims
    return tuple(sorted(dims, key=lambda dim: int(str(dim).removeprefix("dim_"))))


def _attrs(ds: xr.Dataset) -> dict[str, str]:
    # No long_name: xarray would pass it on to residuals.
    units = ds.attrs.get("data_units")
    return {"units": units} if units else {}
