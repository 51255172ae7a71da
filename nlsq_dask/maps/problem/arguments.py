"""``MapProblem``: the arguments of ``fit_each``, validated before any data are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.rounding import rounding_notices
from nlsq_dask.data.sources.from_array import as_numpy, chunked, is_in_memory
from nlsq_dask.data.sources.from_pandas import pandas_to_numpy
from nlsq_dask.data.sources.from_xarray import is_xarray, resolve_coordinates
from nlsq_dask.errors import DataError, DataWarning, warn_caller
from nlsq_dask.fit.arguments.parameters import Parameters, parse_parameters
from nlsq_dask.fit.problem import parts_of_x
from nlsq_dask.kernels.losses import Loss, check_loss
from nlsq_dask.maps.problem.alignment import align_map, leaves
from nlsq_dask.maps.problem.memory import TileMemory
from nlsq_dask.maps.problem.parameter_maps import Maps, Role, Separated, check_maps
from nlsq_dask.maps.problem.row_wise import check_points, sample_points
from nlsq_dask.maps.problem.tiles import TileGrid, memory_chunks
from nlsq_dask.maps.stores.store import store_chunks
from nlsq_dask.maps.tasks.columns import ColumnReader
from nlsq_dask.maps.tasks.outputs import Outputs
from nlsq_dask.model.check import check_derivative, check_trace
from nlsq_dask.model.model import Model
from nlsq_dask.solvers.lanes.batched_lm import choose_lanes
from nlsq_dask.storage.backends import normalize_path, open_parent

# Options that act on a fit for every pixel; docs/options.md lists them.
OPTIONS = (
    "precision",
    "chunk_size",
    "gauss_newton_tol",
    "gauss_newton_max_iterations",
    "random_seed",
    "enable_fault_tolerance",
    "max_retries_per_batch",
    "retry_seconds",
    "min_success_rate",
    "cov_type",
    "max_walltime",
    "stop_on_sigterm",
    "verbose",
    "log_frequency",
    "log_file",
    "dashboard",
)
# Those that act only while fits run within the call.
_EAGER_OPTIONS = ("max_walltime", "stop_on_sigterm", "log_file")
_CHOICES = {
    "nan_policy": ("raise", "omit"),
    "covariance": ("errors", "full", None),
    "errors": ("flag", "raise"),
}


@dataclass(frozen=True)
class MapProblem:
    """Model, data and options of a fit for every pixel, after validation."""

    config: HybridStreamingConfig
    model: Model
    parameters: Parameters  # all of them; where maps have values, those are not used
    maps: Maps
    blocks: RowBlocks
    grid: TileGrid
    template: xr.DataArray | None  # y, if it is an xarray object
    dims: tuple[str, ...]  # of y
    is_given: bool  # whether the caller gives the start of each parameter
    in_memory: bool  # whether all arrays are in the memory of this process
    loss: Loss
    absolute_sigma: bool
    nan_policy: str
    covariance: str | None
    errors: str
    min_points: int | None
    guess: Callable[..., Any] | None
    store: str | None = None  # path or URL

    @property
    def is_eager(self) -> bool:
        """Whether the fits run now: for arrays in memory, and with a store."""
        return self.in_memory or self.store is not None

    @property
    def has_merged_tiles(self) -> bool:
        """Whether tiles have several columns of chunks; smaller chunks would be merged, too."""
        grid = self.grid
        return grid.largest > math.prod(max(grid.chunks[axis]) for axis in grid.map_axes)

    @property
    def is_single_tile(self) -> bool:
        """Whether the map is a single tile because of the chunks of lazy data."""
        is_one = math.prod(self.grid.shape) == 1 and not self.in_memory
        return is_one and not self.has_merged_tiles and self.grid.can_be_split

    @property
    def outputs(self) -> Outputs:
        """The variables of the result."""
        names = self.parameters.names
        return Outputs(names, self.grid.map_axes, self.model.dtype, self.covariance)

    @property
    def memory(self) -> TileMemory:
        """The memory of the task of a tile."""
        blocks, grid, model = self.blocks, self.grid, self.model
        reader = ColumnReader.of(blocks, grid, model.dtype)
        block_bytes = 0
        if not self.in_memory:
            # A block is decoded, which needs its bytes twice, while earlier ones are in memory.
            n_copies = 1 if all(len(blocks.y.chunks[axis]) == 1 for axis in grid.fitted) else 2
            block_bytes = n_copies * max(int(blocks.block_bytes().max()), blocks.split_bytes)
        return TileMemory.of(
            reader.point_bytes(grid.n_points),
            self.outputs.pixel_bytes,
            block_bytes,
            model.n_params,
            self.n_lanes * grid.n_points,
        )

    @property
    def n_lanes(self) -> int:
        """Number of pixels that one call of the kernel processes."""
        n_points, n_params = self.grid.n_points, self.model.n_params
        if isinstance(self.config.chunk_size, str):
            return choose_lanes(n_points, n_params, self.model.dtype, self.grid.largest)
        return max(self.config.chunk_size // max(n_points, 1), 1)


def validate_map_arguments(
    config: HybridStreamingConfig,
    model: Callable[..., Any],
    x_data: Any,
    y_data: Any,
    p0: Any = None,
    bounds: Any = None,
    *,
    dims: Any,
    sigma: Any = None,
    absolute_sigma: bool = False,
    loss: str = "linear",
    f_scale: float = 1.0,
    nan_policy: str = "omit",
    fixed: Any = None,
    ties: Any = None,
    guess: Callable[..., Any] | None = None,
    min_points: int | None = None,
    covariance: str | None = "errors",
    errors: str = "flag",
    store: str | os.PathLike[str] | None = None,
    param_names: Sequence[str] | None = None,
    verbose: int | None = None,
) -> MapProblem:
    """Validate the arguments of ``fit_each`` and return them as a ``MapProblem``.

    Except for ``config``, signature and defaults are those of ``fit_each``.

    Raises
    ------
    DataError, ModelError, ValueError, TypeError
        If an argument is invalid. Values of the data are not checked, because no data are read.
    """
    given = {"nan_policy": nan_policy, "covariance": covariance, "errors": errors}
    for name, value in given.items():
        if value not in _CHOICES[name]:
            allowed = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"{name} must be one of {allowed}; got {value!r}.")
    _check_min_points(min_points)
    if guess is not None and not callable(guess):
        raise TypeError(f"guess must be a function guess(x, y); got {guess!r}.")
    store = _checked_store(store)
    if not isinstance(absolute_sigma, bool | np.bool_):
        raise TypeError(f"absolute_sigma must be True or False; got {absolute_sigma!r}.")
    check_loss(loss, f_scale)
    config = config.validated_copy() if verbose is None else replace(config, verbose=verbose)
    _check_options(config)
    separated = Separated.of(p0, bounds, fixed, ties)
    parameters = parse_parameters(
        model,
        separated.p0,
        separated.bounds,
        param_names,
        *parts_of_x(x_data),
        fixed=_with_flags(separated, p0),
        ties=ties,
    )
    maps = separated.maps
    check_maps(maps, parameters)
    y_data, axes, is_held = _as_map(y_data, dims)
    x_data = resolve_coordinates(x_data, y_data)
    in_memory = is_held and all(map(is_in_memory, [*leaves(x_data, sigma), *maps.values()]))
    if not in_memory and store is None:
        _check_lazy(config)
    blocks = align_map(x_data, y_data, sigma, maps, axes)
    transform = parameters.transform
    traced = Model(
        model,
        transform.n_free,
        blocks.layout.without_maps,
        config.dtype,
        transform=None if transform.is_identity else transform,
    )
    check_trace(traced, blocks.x_labels)
    check_derivative(traced, parameters.free.names)
    is_held_x = [is_in_memory(leaf) for leaf in leaves(x_data, None)]
    points = sample_points(blocks, axes, is_held_x)
    check_points(traced, parameters.free.start, points)
    grid = TileGrid.of(blocks, axes)
    if store is not None:
        store_chunks(grid.map_chunks, tuple(blocks.dims[axis] for axis in grid.map_axes))
    for notice in (*blocks.notices, *rounding_notices(blocks, traced.dtype, points)):
        warn_caller(notice, DataWarning)
    return MapProblem(
        config=config,
        model=traced,
        parameters=parameters,
        maps=maps,
        blocks=blocks,
        grid=grid,
        template=y_data if is_xarray(y_data) else None,
        dims=blocks.dims,
        is_given=_is_given(p0, parameters, maps),
        in_memory=in_memory,
        loss=Loss(loss, float(f_scale)),
        absolute_sigma=bool(absolute_sigma),
        nan_policy=nan_policy,
        covariance=covariance,
        errors=errors,
        min_points=min_points,
        guess=guess,
        store=store,
    )


def _checked_store(store: Any) -> str | None:
    """Return the path or URL of a store."""
    if store is None:
        return None
    if not isinstance(store, str | os.PathLike) or not os.fspath(store):
        raise TypeError(f"store must be a path or a URL, or None; got {store!r}.")
    path = normalize_path(store)
    try:
        open_parent(path)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one without its library
        raise type(error)(f"store={path!r} cannot be used: {error}") from error
    return path


def _check_min_points(min_points: Any) -> None:
    is_valid = isinstance(min_points, int | np.integer) and not isinstance(min_points, bool)
    if min_points is not None and not (is_valid and min_points >= 1):
        raise ValueError(f"min_points must be a positive integer or None; got {min_points!r}.")


def _check_options(config: HybridStreamingConfig) -> None:
    """Raise a ValueError for an option that does not act on a fit for every pixel."""
    changed = {name: v for name, v in config.changed().items() if name not in OPTIONS}
    if changed:
        listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(
            f"fit_each does not use {listed}. Leave {'it' if len(changed) == 1 else 'them'} at the "
            f"default; the options that act on fit_each are {', '.join(OPTIONS)}."
        )


def _check_lazy(config: HybridStreamingConfig) -> None:
    """Raise a ValueError for an option without effect on fits that the caller computes later."""
    changed = [name for name in _EAGER_OPTIONS if name in config.changed()]
    if changed:
        raise ValueError(
            f"{changed[0]} has no effect on a lazy result, whose fits run when you compute it. "
            f"Pass store=, with which they run at once, or leave {changed[0]} at the default."
        )


def _with_flags(separated: Separated, p0: Any) -> Any:
    """Return ``fixed`` without maps; a map of flags requires a start."""
    for role, value in separated.maps.items():
        is_flag = role.kind == "fixed" and np.dtype(value.dtype).kind == "b"
        if is_flag and isinstance(p0, Mapping | None) and role.name not in (p0 or {}):
            raise ValueError(
                f"{role.text} says where {role.name!r} is fixed, but p0 does not say at which "
                f"value. Add it to p0, or pass a map of the values as {role.text}."
            )
    return separated.fixed


def _is_given(p0: Any, parameters: Parameters, maps: Maps) -> bool:
    """Return whether p0 has a value of each parameter that is not fixed."""
    if p0 is None or not isinstance(p0, Mapping):
        return p0 is not None
    return all(name in p0 or Role("fixed", name) in maps for name in parameters.free.names)


def _as_map(y_data: Any, dims: Any) -> tuple[Any, tuple[int, ...], bool]:
    """Return y, the axes along which fits run, and whether it is in memory.

    In memory it is split into tiles.
    """
    if isinstance(y_data, list | tuple):
        y_data = as_numpy(y_data, "y_data")
    (y_data,) = pandas_to_numpy([("y_data", y_data)])
    is_named = is_xarray(y_data)
    if not hasattr(y_data, "shape") or not hasattr(y_data, "dtype"):
        raise DataError(f"y_data must be an array; got {type(y_data).__name__}.")
    names = tuple(map(str, y_data.dims)) if is_named else tuple(range(y_data.ndim))
    axes = _axes(dims, names, y_data.ndim, is_named)
    is_held = is_in_memory(y_data)
    if is_held and y_data.size and y_data.dtype.kind != "O":  # objects are refused later
        values = y_data.values if is_named else y_data
        if np.ma.isMaskedArray(values):
            values = np.ma.filled(values.astype(np.result_type(values.dtype, np.float32)), np.nan)
        values = as_numpy(values, "y_data")
        split = chunked(values, memory_chunks(values.shape, axes, values.dtype))
        y_data = y_data.copy(data=split) if is_named else split
    return y_data, axes, is_held


def _axes(dims: Any, names: tuple[Any, ...], ndim: int, is_named: bool) -> tuple[int, ...]:
    what = "names of dimensions" if is_named else "axes"
    is_one = isinstance(dims, str | int | np.integer)
    if not is_one and not isinstance(dims, Iterable):
        raise TypeError(f"dims must be {what} of y_data, along which to fit; got {dims!r}.")
    given = [dims] if is_one else list(dims)
    if not given:
        raise ValueError(f"dims is empty; expected {what} of y_data, along which to fit.")
    axes = []
    for dim in given:
        if not is_named and isinstance(dim, int | np.integer) and -ndim <= dim < ndim:
            dim = int(dim) % ndim
        if dim not in names or isinstance(dim, bool):
            raise ValueError(
                f"dims has {dim!r}, but y_data has the {what} {', '.join(map(repr, names))}. Pass "
                f"those along which to fit."
            )
        axes.append(names.index(dim))
    if len(set(axes)) != len(axes):
        raise ValueError(f"dims names a dimension twice: {dims!r}.")
    if len(axes) == ndim:
        raise ValueError(
            f"dims names all dimensions of y_data, {dims!r}, so there is a single fit. Use fit."
        )
    return tuple(sorted(axes))
