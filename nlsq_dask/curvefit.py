"""``curvefit``: the interface of ``xarray.DataArray.curvefit`` for data of any size."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nlsq_dask._keywords import suggest_keyword
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.sources.from_array import is_in_memory
from nlsq_dask.data.sources.from_xarray import lazy_data
from nlsq_dask.fit.arguments.parameters import Parameters, parse_parameters
from nlsq_dask.maps.fit_map import fit_map
from nlsq_dask.maps.problem.arguments import validate_map_arguments
from nlsq_dask.maps.problem.parameter_maps import Role, Separated
from nlsq_dask.maps.tasks.outputs import Outputs
from nlsq_dask.model.call import is_option, positional_arguments
from nlsq_dask.scipy_call import options as scipy_options
from nlsq_dask.scipy_call.model import row_model
from nlsq_dask.solvers.lanes.records import LaneStatus

_SINGLE = "_single"  # dimension of a map of one pixel
# Arguments of SciPy's curve_fit that ``kwargs`` may have, and those that fit_each takes.
_CURVE_FIT = ("sigma", "absolute_sigma", "check_finite", "nan_policy", "method", "jac")
_PASSED = ("loss", "f_scale", "fixed", "ties", "guess", "min_points")
_VARIABLES = {"stderr": "perr", "chi2": "chi2", "n_points": "n_points", "status": "status"}


def curvefit(
    obj: xr.DataArray | xr.Dataset,
    coords: Any,
    func: Callable[..., Any],
    reduce_dims: Any = None,
    skipna: bool = True,
    p0: Mapping[str, Any] | None = None,
    bounds: Mapping[str, Any] | None = None,
    param_names: Sequence[str] | None = None,
    errors: str = "raise",
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> xr.Dataset:
    """Fit a function along dimensions, for every position in the others, as xarray's method.

    Calls of ``xarray.DataArray.curvefit`` and ``xarray.Dataset.curvefit`` work unchanged, except
    that the function is written with jax.numpy, and that its value at a point must not depend on
    other points. The data may be larger than memory, and chunked along all dimensions. Where the
    fit from p0 fails, other starts are tried.

    Parameters
    ----------
    obj : DataArray or Dataset
        Dependent variable, or several of them.
    coords : str, DataArray, or sequence of them
        Independent variables. The fits run along the dimensions that these coordinates name.
    func : callable
        ``func(x, *params)``, written with jax.numpy. x has shape (b,) for one coordinate and
        (k, b) for k of them. Dates are counts of their unit (such as ns) since 1970, as in xarray;
        cftime dates are days, and the attribute ``dates`` of the result says since when.
    reduce_dims : str or sequence of str, optional
        Further dimensions along which the fits run.
    skipna : bool
        Whether to omit points with NaN or infinity; otherwise they are an error. (In xarray,
        infinity always is.)
    p0 : dict by name, optional
        Initial values, numbers or DataArrays over the map. A parameter without one starts at its
        default in the signature of ``func``, or at 1.0; in the middle of its bounds if that is
        not inside.
    bounds : dict by name of (low, high), optional
        Bounds, numbers or DataArrays over the map.
    param_names : sequence of str, optional
        Names of the parameters, instead of those in the signature. Parameters beyond the last name
        stay at their default.
    errors : {"raise", "ignore"}
        With "raise", a fit that fails is an error. With "ignore", its coefficients and covariance
        are NaN, and ``curvefit_status`` has the reason.
    kwargs : dict, optional
        Arguments of ``curve_fit``: sigma, absolute_sigma, maxfev, method, loss, ... An array sigma
        has the shape of the points of a fit, or is a DataArray, which may vary over the map.
    **options
        The same, and ``config``, fixed, ties, guess and min_points of ``fit_each``. Without
        ``config``, nothing is printed.

    Returns
    -------
    Dataset
        For each variable, with the prefix ``[var]_`` for a Dataset: curvefit_coefficients (param)
        and curvefit_covariance (cov_i, cov_j), and beside them curvefit_stderr, curvefit_chi2,
        curvefit_n_points and curvefit_status; ``fit_each`` explains these. Lazy, unless all arrays
        are in memory.

    Raises
    ------
    PixelFitError
        If a fit failed and ``errors`` is "raise"; a subclass of RuntimeError.
    ValueError, TypeError
        For invalid arguments.

    See Also
    --------
    AdaptiveHybridStreamingOptimizer.fit_each : The interface with all options.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import xarray as xr
    >>> t = np.linspace(0, 4, 50)
    >>> da = xr.DataArray([2 * np.exp(-0.7 * t)], dims=("x", "time"), coords={"time": t})
    >>> fit = curvefit(da, "time", lambda t, a, b: a * jnp.exp(-b * t))
    >>> fit.curvefit_coefficients.values.round(6)
    array([[2. , 0.7]])
    """
    if errors not in ("raise", "ignore"):
        raise ValueError(f"errors must be 'raise' or 'ignore'; got {errors!r}.")
    if not isinstance(obj, xr.DataArray | xr.Dataset):
        raise TypeError(f"obj must be a DataArray or Dataset; got {type(obj).__name__}.")
    if not callable(func):
        raise TypeError(f"func must be a function func(x, *params); got {func!r}.")
    for name, argument in (("p0", p0), ("bounds", bounds)):
        if not isinstance(argument, Mapping | None):
            raise TypeError(f"{name} must be a dict by name of parameter; got {argument!r}.")
    given = _merged(kwargs, options)
    coordinates = _coordinates(obj, coords)
    call = _Call(
        _with_names(func, param_names),
        coordinates,
        _dims(obj, coordinates, reduce_dims),
        bool(skipna),
        dict(p0 or {}),
        dict(bounds or {}),
        param_names,
        errors,
        given,
    )
    call.check_maps(obj.dims)
    if isinstance(obj, xr.DataArray):
        result, attrs = call.fit(obj, ""), {}
    else:
        parts = [call.fit_variable(obj, name) for name in obj.data_vars]
        result, attrs = xr.merge(parts, compat="override", join="exact"), dict(obj.attrs)
    dates = {name: text for name, text in result.attrs.items() if name == "dates"}
    result.attrs = attrs | dates
    return result


def _merged(kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    twice = [name for name in options if name in (kwargs or {})]
    if twice:
        raise TypeError(f"curvefit() has {twice[0]!r} twice, also in kwargs.")
    given = {**(kwargs or {}), **options}
    known = (*_CURVE_FIT, *_PASSED, *scipy_options.OPTIONS, "config")
    own = inspect.signature(curvefit).parameters.keys() - {"obj", "kwargs", "options"}
    for name in given:
        if name in own:
            raise TypeError(f"kwargs has {name!r}. Pass it as curvefit(..., {name}=...).")
        if name not in known:
            hint = suggest_keyword(name, "curvefit", {*known, *own})
            raise TypeError(f"curvefit() has no argument {name!r}. {hint}".rstrip())
    return given


def _coordinates(obj: xr.DataArray | xr.Dataset, coords: Any) -> list[xr.DataArray]:
    """Return the independent variables."""
    is_one = isinstance(coords, str | xr.DataArray) or not isinstance(coords, Iterable)
    arrays = []
    for each in [coords] if is_one else coords:
        if not isinstance(each, str | xr.DataArray):
            raise TypeError(
                f"coords must be a name, a DataArray, or a sequence of these; got {each!r}."
            )
        try:
            arrays.append(obj[each] if isinstance(each, str) else each)
        except KeyError:
            known = ", ".join(map(repr, obj.coords)) or "none"
            raise KeyError(
                f"coords has {each!r}, but the data have the coordinates {known}."
            ) from None
    return arrays


def _dims(
    obj: xr.DataArray | xr.Dataset, coordinates: Sequence[xr.DataArray], reduce_dims: Any
) -> list[Hashable]:
    """Return the dimensions along which the fits run."""
    dims: list[Hashable]
    if not reduce_dims:
        dims = []
    elif isinstance(reduce_dims, str) or not isinstance(reduce_dims, Iterable):
        dims = [reduce_dims]
    else:
        dims = list(reduce_dims)
    for each in coordinates:
        dims += [dim for dim in obj.dims if dim not in dims and each.equals(obj[dim])]
    unknown = [dim for dim in dims if dim not in obj.dims]
    if unknown:
        raise ValueError(
            f"reduce_dims contains {unknown[0]!r}, which is not a dimension of the data. Their "
            f"dimensions are {', '.join(map(repr, obj.dims))}."
        )
    if not dims:
        raise ValueError(
            "coords names no dimension of the data, and reduce_dims is empty, so that each fit "
            "would have a single point. Pass the dimensions along which to fit as reduce_dims."
        )
    return dims


def _as_numbers(array: xr.DataArray) -> xr.DataArray:
    """Return dates as xarray passes them to the function: counts of their unit, since 1970."""
    if array.dtype.kind not in "mM":
        return array
    return array.astype(np.float64).where(array.notnull())


def _with_names(func: Callable[..., Any], param_names: Sequence[str] | None) -> Callable[..., Any]:
    """Return a function with as many parameters as names; the others keep their defaults."""
    try:
        positional = positional_arguments(func)
    except ValueError:  # a builtin
        return func
    fitted = [argument for argument in positional[1:] if not is_option(argument)]
    n = len(fitted) if param_names is None else len(param_names)
    if not 0 < n < len(fitted) or fitted[n].default is inspect.Parameter.empty:
        return func

    @functools.wraps(func)
    def function(x: Any, *params: Any) -> Any:
        return func(x, *params)

    first = positional[: positional.index(fitted[n])]
    function.__signature__ = inspect.Signature(first)  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class _Call:
    """Arguments of ``curvefit`` that are the same for all variables of a Dataset."""

    func: Callable[..., Any]
    coords: list[xr.DataArray]
    dims: list[Hashable]  # along which the fits run
    skipna: bool
    p0: dict[str, Any]
    bounds: dict[str, Any]
    param_names: Sequence[str] | None
    errors: str
    given: Mapping[str, Any]  # arguments of SciPy's curve_fit and of fit_each

    def check_maps(self, dims: Iterable[Hashable]) -> None:
        """Raise a ValueError for a map with a dimension that is not one of the map."""
        of_map = [dim for dim in dims if dim not in self.dims]
        for role, value in self.separated.maps.items():
            unexpected = [dim for dim in getattr(value, "dims", ()) if dim not in of_map]
            if unexpected:
                raise ValueError(
                    f"{role.text} has the dimension {unexpected[0]!r}. Initial values, bounds and "
                    f"fixed values may have dimensions along which no fit runs: "
                    f"{', '.join(map(repr, of_map)) or 'none'}."
                )

    @property
    def separated(self) -> Separated:
        """Initial values, bounds and fixed values, with the maps taken out."""
        return Separated.of(self.p0, self.bounds, self.given.get("fixed"))

    def fit(self, y: xr.DataArray, prefix: str) -> xr.Dataset:
        """Return the result for one variable."""
        fits = self._fit_each(self._with_all_dims(y))
        if _SINGLE in fits.dims:
            fits = fits.isel({_SINGLE: 0}, drop=True)
        return _renamed(fits, prefix, self.errors, _kept_attrs(y))

    def fit_variable(self, obj: xr.Dataset, name: Hashable) -> xr.Dataset:
        """Return the result for one variable of a Dataset."""
        try:
            return self.fit(obj[name], f"{name}_")
        except Exception as error:
            error.add_note(f"The error is in the fit of the variable {name!r}.")
            raise

    def _with_all_dims(self, y: xr.DataArray) -> xr.DataArray:
        """Return y with the dimensions of the map that only coordinates and maps have."""
        missing = [dim for dim in self.dims if dim not in y.dims]
        if missing:
            raise ValueError(
                f"{y.name!r} does not have the dimension {missing[0]!r}, along which to fit. "
                f"Select the variables that have it."
            )
        others = [
            _at_point(each, self.dims)
            for each in (*self.coords, *self.separated.maps.values())
            if isinstance(each, xr.DataArray) and not set(each.dims) <= set(y.dims)
        ]
        if not others and len(self.dims) < y.ndim:
            return y
        if not is_in_memory(y):
            y = y.copy(data=lazy_data(y, "obj"))  # else xarray reads it
        for each in others:
            y = xr.broadcast(*xr.align(y, each, join="exact"))[0]
            added = {n: c for n, c in each.coords.items() if c.dims and n not in y.coords}
            y = y.assign_coords(added)
        return y.expand_dims(_SINGLE) if len(self.dims) == y.ndim else y

    def _fit_each(self, y: xr.DataArray) -> xr.Dataset:
        separated, given = self.separated, self.given
        parameters = parse_parameters(
            self.func,
            separated.p0,
            separated.bounds,
            self.param_names,
            len(self.coords),
            fixed=separated.fixed,
            ties=given.get("ties"),
        )
        scipy_options.check_method(given.get("method"), parameters, None)
        scipy_options.check_loss(given.get("loss"))
        limits = {name: given[name] for name in scipy_options.OPTIONS if name in given}
        config = given.get("config") or HybridStreamingConfig(verbose=0)
        config = scipy_options.configured(config, limits, len(parameters.names), is_in_memory=False)
        policy = scipy_options.fit_nan_policy(given.get("nan_policy"), given.get("check_finite"))
        coords = [_as_numbers(each) for each in self.coords]
        jac = scipy_options.jacobian_function(given.get("jac"))
        map_dims = [dim for dim in y.dims if dim not in self.dims]
        if not y.size:
            return _without_points(y, map_dims, parameters.names)
        problem = validate_map_arguments(
            config,
            row_model(self.func, jac, len(coords) > 1),
            coords[0] if len(coords) == 1 else tuple(coords),
            y,
            self.p0 | _starts(parameters, separated, map_dims),
            self.bounds,
            dims=self.dims,
            sigma=self._sigma(y),
            absolute_sigma=given.get("absolute_sigma", False),
            nan_policy="omit" if self.skipna else policy,
            covariance="full",
            errors="raise" if self.errors == "raise" else "flag",
            param_names=self.param_names,
            **{name: given[name] for name in _PASSED if name in given},
        )
        return fit_map(problem)

    def _sigma(self, y: xr.DataArray) -> Any:
        """Return sigma with names of dimensions; without, it has the shape of the points."""
        sigma = self.given.get("sigma")
        if sigma is None or isinstance(sigma, xr.DataArray):
            return sigma
        if np.size(sigma) == 1:
            return float(np.asarray(sigma).item())
        dims = [dim for dim in y.dims if dim in self.dims]
        shape = tuple(y.sizes[dim] for dim in dims)
        if np.shape(sigma) != shape:
            raise ValueError(
                f"sigma has shape {np.shape(sigma)}; expected a number, an array with the shape "
                f"{shape} of the points of a fit, or a DataArray with dimensions of the data. "
                f"Covariance matrices of the data are not supported."
            )
        return xr.DataArray(sigma, dims=dims)


def _at_point(array: xr.DataArray, dims: Sequence[Hashable]) -> xr.DataArray:
    """Return the first element along some dimensions, without the coordinates along them."""
    along = [name for name, each in array.coords.items() if set(each.dims) & set(dims)]
    return array.drop_vars(along).isel(dict.fromkeys(dims, 0), missing_dims="ignore")


def _without_points(
    y: xr.DataArray, map_dims: Sequence[Hashable], names: tuple[str, ...]
) -> xr.Dataset:
    """Return the result for an empty y, by which ``xarray.map_blocks`` infers that of others."""
    outputs = Outputs(names, (), "float64", "full")
    arrays = outputs.failed(tuple(y.sizes[dim] for dim in map_dims), LaneStatus.NO_DATA)
    variables = {
        name: ((*map_dims, *spec.dims), arrays[name], outputs.attrs_of(name))
        for name, spec in outputs.variables.items()
    }
    coords = {name: each for name, each in y.coords.items() if set(each.dims) <= set(map_dims)}
    own = {dim: list(names) for dim in ("param", "cov_i", "cov_j")}
    return xr.Dataset(variables, coords | own)


def _starts(
    parameters: Parameters, separated: Separated, map_dims: Sequence[Hashable]
) -> dict[str, Any]:
    """Return the starts of the parameters without one, as xarray chooses them.

    They are the defaults in the signature, or 1. Those that are not inside the bounds start in the
    middle of them, or at a distance of 1 from a single one.
    """
    starts: dict[str, Any] = {}
    free, maps = parameters.free, separated.maps
    for name, start, *bounds in zip(free.names, free.start, free.low, free.high, strict=True):
        flags = maps.get(Role("fixed", name))
        is_flagged = flags is not None and np.dtype(flags.dtype).kind == "b"
        if name in separated.p0 or Role("start", name) in maps or is_flagged:
            continue
        starts[name] = start
        roles = [Role("low", name), Role("high", name)]
        if any(role in maps for role in roles):
            low, high = (
                _with_dims(maps.get(role, bound), map_dims)
                for role, bound in zip(roles, bounds, strict=True)
            )
            single = (low + 1.0).where(np.isfinite(low), high - 1.0)
            middle = (0.5 * (low + high)).where(np.isfinite(low) & np.isfinite(high), single)
            starts[name] = middle.where(~((low < start) & (start < high)), start)
    return starts


def _with_dims(value: Any, dims: Sequence[Hashable]) -> xr.DataArray:
    if isinstance(value, xr.DataArray):
        return value
    return xr.DataArray(value, dims=dims if np.ndim(value) else ())


def _kept_attrs(y: xr.DataArray) -> dict[Hashable, Any]:
    """Return the attributes that a computation with y keeps, which is an option of xarray."""
    return dict((xr.DataArray(0.0, attrs=y.attrs) * 1.0).attrs)


def _renamed(fits: xr.Dataset, prefix: str, errors: str, attrs: dict[Hashable, Any]) -> xr.Dataset:
    """Return the variables under the names of xarray, NaN where a fit failed."""
    renamed = {"coefficients": "popt", "covariance": "pcov", **_VARIABLES}
    variables = {new: fits[old] for new, old in renamed.items()}
    is_solved = fits["status"] > LaneStatus.ITERATION_LIMIT
    for name in ("coefficients", "covariance", "stderr"):
        array = variables[name].astype(np.float64)
        variables[name] = array.where(is_solved) if errors == "ignore" else array
    for name in ("coefficients", "covariance"):
        variables[name].attrs = dict(attrs)
    named = {f"{prefix}curvefit_{name}": array for name, array in variables.items()}
    return xr.Dataset(named, attrs=fits.attrs)
