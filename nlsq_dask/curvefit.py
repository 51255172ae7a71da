"""``curvefit``: the interface of ``xarray.DataArray.curvefit`` for data of any size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nlsq_dask._keywords import suggest_keyword
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.fit.arguments.parameters import Parameters, parse_parameters
from nlsq_dask.maps.arguments import validate_map_arguments
from nlsq_dask.maps.fit_map import fit_map
from nlsq_dask.maps.parameter_maps import Role, Separated
from nlsq_dask.scipy_call import options as scipy_options
from nlsq_dask.scipy_call.model import row_model
from nlsq_dask.solvers.lanes import LaneStatus

_SINGLE = "_single"  # dimension of a map of one pixel
# Arguments of SciPy's curve_fit that ``kwargs`` may have, and those that fit_each takes.
_CURVE_FIT = ("sigma", "absolute_sigma", "check_finite", "nan_policy", "method", "jac")
_PASSED = ("loss", "f_scale", "fixed", "ties", "guess", "min_points")
_VARIABLES = {"perr": "stderr", "chi2": "chi2", "n_points": "n_points", "status": "status"}


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
    other points. The data may be larger than memory, and chunked along all dimensions.

    Parameters
    ----------
    obj : DataArray or Dataset
        Dependent variable, or several of them.
    coords : str, DataArray, or sequence of them
        Independent variables. The fits run along the dimensions that these coordinates name.
    func : callable
        ``func(x, *params)``, written with jax.numpy. x has shape (b,) for one coordinate and
        (k, b) for k of them.
    reduce_dims : str or sequence of str, optional
        Further dimensions along which the fits run.
    skipna : bool
        Whether to omit points with NaN or infinity; otherwise they are an error.
    p0 : dict by name, optional
        Initial values, numbers or DataArrays over the map. A parameter without one starts at its
        default in the signature of ``func``, or at 1.0, moved to the middle of its bounds.
    bounds : dict by name of (low, high), optional
        Bounds, numbers or DataArrays over the map.
    param_names : sequence of str, optional
        Names of the parameters, instead of those in the signature.
    errors : {"raise", "ignore"}
        With "raise", a fit that fails is an error. With "ignore", its coefficients and covariance
        are NaN, and ``curvefit_status`` has the reason.
    kwargs : dict, optional
        Arguments of ``curve_fit``: sigma, absolute_sigma, maxfev, method, loss, ...
    **options
        The same, and ``config``, fixed, ties, guess and min_points of ``fit_each``.

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
    given = _merged(kwargs, options)
    independent, dims = _coordinates(obj, coords, reduce_dims)
    call = _Call(
        func,
        independent,
        dims,
        "omit" if skipna else "raise",
        dict(p0 or {}),
        dict(bounds or {}),
        param_names,
        errors,
        given,
    )
    if isinstance(obj, xr.DataArray):
        result = call.fit(obj, "")
    else:
        parts = [
            call.fit(each.broadcast_like(obj), f"{name}_") for name, each in obj.data_vars.items()
        ]
        result = xr.merge(parts, compat="override", join="exact")
    result.attrs = dict(obj.attrs)
    return result


def _merged(kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    twice = [name for name in options if name in (kwargs or {})]
    if twice:
        raise TypeError(f"curvefit() has {twice[0]!r} twice, also in kwargs.")
    given = {**(kwargs or {}), **options}
    known = (*_CURVE_FIT, *_PASSED, *scipy_options.OPTIONS, "config")
    for name in given:
        if name not in known:
            hint = suggest_keyword(name, "curvefit", known)
            raise TypeError(f"curvefit() has no argument {name!r}. {hint}".rstrip())
    return given


def _coordinates(
    obj: xr.DataArray | xr.Dataset, coords: Any, reduce_dims: Any
) -> tuple[list[xr.DataArray], list[Hashable]]:
    """Return the independent variables and the dimensions along which the fits run."""
    is_one = isinstance(coords, str | xr.DataArray) or not isinstance(coords, Iterable)
    listed = [coords] if is_one else list(coords)
    independent = [obj[each] if isinstance(each, str) else each for each in listed]
    dims: list[Hashable]
    if not reduce_dims:
        dims = []
    elif isinstance(reduce_dims, str) or not isinstance(reduce_dims, Iterable):
        dims = [reduce_dims]
    else:
        dims = list(reduce_dims)
    for each in independent:
        dims += [dim for dim in obj.dims if dim not in dims and each.equals(obj[dim])]
    unknown = [dim for dim in dims if dim not in obj.dims]
    if unknown:
        raise ValueError(
            f"reduce_dims has {unknown[0]!r}, which is no dimension of the data; they have "
            f"{', '.join(map(repr, obj.dims))}."
        )
    if not dims:
        raise ValueError(
            "coords names no dimension of the data, and reduce_dims is empty, so that each fit "
            "would have a single point. Pass the dimensions along which to fit as reduce_dims."
        )
    return independent, dims


@dataclass(frozen=True)
class _Call:
    """Arguments of ``curvefit`` that are the same for all variables of a Dataset."""

    func: Callable[..., Any]
    coords: list[xr.DataArray]
    dims: list[Hashable]  # along which the fits run
    nan_policy: str  # of skipna
    p0: dict[str, Any]
    bounds: dict[str, Any]
    param_names: Sequence[str] | None
    errors: str
    given: Mapping[str, Any]  # arguments of SciPy's curve_fit and of fit_each

    def fit(self, y: xr.DataArray, prefix: str) -> xr.Dataset:
        """Return the result for one variable."""
        is_single = len(self.dims) == y.ndim
        y = y.expand_dims(_SINGLE) if is_single else y
        separated = Separated.of(self.p0, self.bounds, self.given.get("fixed"))
        parameters = parse_parameters(
            self.func,
            separated.p0,
            separated.bounds,
            self.param_names,
            len(self.coords),
            fixed=separated.fixed,
            ties=self.given.get("ties"),
        )
        scipy_options.check_method(self.given.get("method"), parameters, None)
        scipy_options.check_loss(self.given.get("loss"))
        limits = {name: self.given[name] for name in scipy_options.OPTIONS if name in self.given}
        config = self.given.get("config") or HybridStreamingConfig()
        config = scipy_options.configured(config, limits, len(parameters.names), is_in_memory=False)
        policy = self.given.get("nan_policy") or self.nan_policy
        problem = validate_map_arguments(
            config,
            row_model(
                self.func,
                scipy_options.jacobian_function(self.given.get("jac")),
                len(self.coords) > 1,
            ),
            self.coords[0] if len(self.coords) == 1 else tuple(self.coords),
            y,
            self.p0 | _feasible(parameters, separated, self.p0),
            self.bounds,
            dims=self.dims,
            sigma=self.given.get("sigma"),
            absolute_sigma=self.given.get("absolute_sigma", False),
            nan_policy=scipy_options.fit_nan_policy(policy, self.given.get("check_finite")),
            covariance="full",
            errors="raise" if self.errors == "raise" else "flag",
            param_names=self.param_names,
            **{name: self.given[name] for name in _PASSED if name in self.given},
        )
        fits = fit_map(problem)
        if is_single:
            fits = fits.isel({_SINGLE: 0}, drop=True)
        return _renamed(fits, prefix, self.errors)


def _feasible(
    parameters: Parameters, separated: Separated, p0: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the starts that SciPy chooses for the parameters without one.

    They are in the middle of the bounds, at a distance of 1 from a single bound, or 1.
    """
    starts: dict[str, Any] = {}
    free = parameters.free
    for name, start, *bounds in zip(free.names, free.start, free.low, free.high, strict=True):
        if name in p0:
            continue
        if name not in parameters.not_given:
            starts[name] = start  # a default in the signature
            continue
        low, high = (
            xr.DataArray(separated.maps.get(Role(kind, name), bound))
            for kind, bound in zip(("low", "high"), bounds, strict=True)
        )
        above = (high - 1.0).where(np.isfinite(high), 1.0)
        between = (0.5 * (low + high)).where(np.isfinite(high), low + 1.0)
        feasible = between.where(np.isfinite(low), above)
        starts[name] = feasible if feasible.ndim else float(feasible)
    return starts


def _renamed(fits: xr.Dataset, prefix: str, errors: str) -> xr.Dataset:
    """Return the variables under the names of xarray, NaN where a fit failed."""
    coefficients = fits["popt"].astype(np.float64)
    covariance = fits["pcov"].astype(np.float64)
    if errors == "ignore":
        is_solved = fits["status"] > LaneStatus.ITERATION_LIMIT
        coefficients, covariance = coefficients.where(is_solved), covariance.where(is_solved)
    coefficients.attrs, covariance.attrs = {}, {}
    variables = {"coefficients": coefficients, "covariance": covariance}
    variables |= {new: fits[old] for old, new in _VARIABLES.items()}
    return xr.Dataset({f"{prefix}curvefit_{name}": array for name, array in variables.items()})
