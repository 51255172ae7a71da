"""``curve_fit``: the interface of ``scipy.optimize.curve_fit`` for data of any size."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning

from nlsq_dask._keywords import suggest_keyword
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.sources.from_array import is_in_memory
from nlsq_dask.data.sources.from_xarray import is_xarray, resolve_coordinates
from nlsq_dask.errors import warn_caller
from nlsq_dask.fit.arguments.parameters import parse_parameters
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer
from nlsq_dask.results.result import FitResult
from nlsq_dask.scipy_call import options
from nlsq_dask.scipy_call.layouts import split_variables
from nlsq_dask.scipy_call.model import row_model
from nlsq_dask.solvers.covariance import infinite_covariance
from nlsq_dask.status import Status

# Status codes of fits that were stopped on request: not an error, the best parameters are returned.
_STOPPED_EARLY = {status.code for status in Status if status.is_interruption} | {
    Status.USER_STOP.code
}
# Of fits that SciPy returns with an infinite covariance.
_RANK_DEFICIENT = {Status.NO_SENSITIVITY.code, Status.ILL_CONDITIONED.code}


def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds: Any = (-np.inf, np.inf),
    method: str | None = None,
    jac: Any = None,
    *,
    full_output: bool = False,
    nan_policy: str | None = None,
    config: HybridStreamingConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Fit a function to data: a drop-in for ``scipy.optimize.curve_fit``.

    Calls written for SciPy work unchanged, except that the model is written with jax.numpy instead
    of numpy, and that the value of the model at a row must not depend on other rows.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params)``, written with jax.numpy. It is called with blocks of rows; x has the
        layout of ``xdata``: (b,), (k, b) or (b, k) for b rows.
    xdata : array, sequence of numbers, or sequence of arrays
        Independent variable, shape (M,), or k of them, shape (k, M) or (k, ...) with M elements
        each, such as the arrays of ``np.meshgrid``. Shape (M, k) is understood where only that
        fits. Any kind of array that ``fit`` accepts, and a dict of arrays, which f gets as a dict.
    ydata : array, shape (M,)
        Dependent variable.
    p0 : sequence or dict by name, optional
        Initial values of the parameters. A parameter without one starts at its default in the
        signature of f, or at 1.0.
    sigma : array or scalar, optional
        Standard deviations of ydata.
    absolute_sigma : bool
        If True, sigma holds the actual standard deviations. If False, only their ratios matter, and
        pcov is scaled by the variance of the residuals.
    check_finite : bool, optional
        With True, NaN and infinity are an error even if ``nan_policy`` is "omit". False does not
        disable the check, which takes no time of its own.
    bounds : (low, high), scipy.optimize.Bounds, or dict by name of (low, high)
        Lower and upper bounds of the parameters. Each of low and high is a number, a sequence or a
        dict by name. By default there are no bounds. Equal bounds fix a parameter.
    method : {"lm", "trf", "dogbox"}, optional
        All methods ask for the same minimum, and use Gauss-Newton with a trust region here. As in
        SciPy, "lm" does not support bounds.
    jac : {"2-point", "3-point", "cs"} or callable, optional
        Derivatives of the model are computed by JAX and exact, also with the names of finite
        differences. A function ``jac(x, *params)``, written with jax.numpy, that returns an array
        of shape (M, p) is used instead.
    full_output : bool
        If True, also return infodict, message and ier.
    nan_policy : {"raise", "omit"}, optional
        What happens to NaN and infinity in xdata, ydata and sigma: None and "raise" raise an error,
        and "omit" omits the row.
    config : HybridStreamingConfig, optional
        Options of the algorithm.
    **kwargs
        - ``ftol``, ``xtol``, ``gtol``: the smallest of them, but at least 1e-15, replaces
          ``gauss_newton_tol`` of the configuration.
        - ``maxfev``, ``max_nfev``: maximum number of evaluations of the model over all rows. With
          less than 100 per parameter, data in memory are fitted without warm-up and sample, so that
          all evaluations count.
        - ``x_scale``: validated only, because parameters are always scaled as with "jac".
        - ``loss`` (a name), ``f_scale``, ``fixed``, ``ties``, ``param_names``, ``callback``,
          ``verbose`` and further arguments of ``AdaptiveHybridStreamingOptimizer.fit``.

    Returns
    -------
    popt : ndarray, shape (p,)
        Best-fit parameters.
    pcov : ndarray, shape (p, p)
        Covariance matrix of the parameters. If the data do not constrain all of them, all elements
        are infinite, and a ``scipy.optimize.OptimizeWarning`` is issued.
    infodict : dict
        Only with ``full_output``: "nfev", the number of evaluations over all rows; "fvec", the
        residuals ``(f(x) - y) / sigma`` of data in memory, otherwise None; and "result", the
        ``FitResult``.
    message : str
        Only with ``full_output``: the reason for which the fit ended.
    ier : int
        Only with ``full_output``: 1 to 4 if the fit converged, also with an infinite ``pcov``;
        negative if the model is insensitive to a parameter, or if the callback, ``max_walltime`` or
        SIGTERM stopped the fit, in which case the best parameters are returned.

    Raises
    ------
    RuntimeError
        If the fit did not converge, or reached ``maxfev`` or ``max_nfev``, as in SciPy.
    DataError, ModelError, ValueError, TypeError
        If an argument is invalid. Any other error of ``fit`` can be raised as well.

    See Also
    --------
    AdaptiveHybridStreamingOptimizer.fit : Fit N-d and labeled data; returns a ``FitResult``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> x = np.linspace(0, 4, 1000)
    >>> y = 2 * np.exp(-0.7 * x)
    >>> popt, pcov = curve_fit(lambda x, a, b: a * jnp.exp(-b * x), x, y, p0=[1, 1])
    >>> popt.round(6)
    array([2. , 0.7])
    """
    optimizer = AdaptiveHybridStreamingOptimizer(config)
    given, fit_arguments = _split_keywords(kwargs)
    x_data, is_stacked = split_variables(xdata, ydata)
    n_x = len(x_data) if isinstance(x_data, tuple) else 1
    names = fit_arguments.get("param_names")
    fixed, ties = fit_arguments.get("fixed"), fit_arguments.get("ties")
    parameters = parse_parameters(f, p0, bounds, names, n_x, fixed=fixed, ties=ties)
    arrays = [*_leaves(x_data), ydata, *([] if sigma is None else [sigma])]
    in_memory = all(map(is_in_memory, arrays))
    options.check_method(method, parameters, _n_rows(ydata))
    options.check_loss(fit_arguments.get("loss"))
    optimizer.config = options.configured(optimizer.config, given, len(parameters.names), in_memory)
    policy = options.fit_nan_policy(nan_policy, check_finite)
    result = optimizer.fit(
        row_model(f, options.jacobian_function(jac), is_stacked),
        x_data,
        ydata,
        p0,
        bounds,
        sigma=sigma,
        absolute_sigma=absolute_sigma,
        nan_policy=policy,
        **{"verbose": 0 if config is None else None, **fit_arguments},
    )
    pcov = _checked_covariance(result, options.evaluation_limit(given))
    if not full_output:
        return result.popt, pcov
    residuals = _residuals(result, x_data, ydata, sigma, policy) if in_memory else None
    infodict = {"nfev": result.nfev, "fvec": residuals, "result": result}
    return result.popt, pcov, infodict, result.message, result.status


def _split_keywords(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of SciPy's solvers, and the arguments of ``fit``, among the keywords.

    Raises
    ------
    TypeError
        If a keyword is neither.
    """
    own = inspect.signature(curve_fit).parameters
    known = {*inspect.signature(AdaptiveHybridStreamingOptimizer.fit).parameters, *options.OPTIONS}
    known -= {"self", "model", "x_data", "y_data"}
    for name in kwargs:
        if name not in known:
            hint = suggest_keyword(name, "curve_fit", {*own, *known} - {"kwargs"})
            raise TypeError(
                f"curve_fit() has no argument {name!r}. {hint}".rstrip()
                + " Set options with config=HybridStreamingConfig(...)."
            )
    given = {name: value for name, value in kwargs.items() if name in options.OPTIONS}
    return given, {name: value for name, value in kwargs.items() if name not in given}


def _leaves(x_data: Any) -> list[Any]:
    if isinstance(x_data, dict):
        return list(x_data.values())
    return list(x_data) if isinstance(x_data, tuple | list) else [x_data]


def _n_rows(ydata: Any) -> int | None:
    """Return the number of rows, or None if it is unknown, as for some Dask arrays."""
    if not isinstance(ydata, list | tuple):
        size = math.prod(getattr(ydata, "shape", (np.nan,)))
        return None if size != size else int(size)
    return np.size(ydata)


def _checked_covariance(result: FitResult, limit: int | None) -> NDArray[np.float64] | None:
    """Return pcov, infinite if the data do not constrain all parameters.

    Raises
    ------
    RuntimeError
        If the fit failed.
    """
    if result.status in _RANK_DEFICIENT:
        if result.pcov is None:  # too many parameters for a matrix
            return None
        if np.isfinite(result.pcov).all():  # otherwise, ``fit`` has issued the warning
            warn_caller(
                f"Covariance of the parameters could not be estimated. {result.message}",
                OptimizeWarning,
            )
        return infinite_covariance(result.free | (np.diag(result.pcov) != 0.0))
    if result.success or result.status in _STOPPED_EARLY:
        return result.pcov
    message = result.message
    if limit is not None and result.status == Status.ITERATION_LIMIT.code:
        message = (
            f"the number of evaluations has reached the limit of {limit}. Start closer to the "
            f"solution, or raise maxfev or max_nfev."
        )
    raise RuntimeError(f"Optimal parameters not found: {message}")


def _residuals(
    result: FitResult, x_data: Any, ydata: Any, sigma: Any, nan_policy: str
) -> NDArray[np.float64]:
    """Return ``(f(x) - y) / sigma`` as a 1-d array, without omitted rows."""
    y, deviation = (
        value if is_xarray(value) or value is None else np.ma.asanyarray(value)
        for value in (ydata, sigma)
    )
    residuals = result.predict(resolve_coordinates(x_data, ydata)) - y
    if deviation is not None:
        residuals = residuals / deviation
    if is_xarray(residuals):
        residuals = residuals.transpose(*getattr(y, "dims", residuals.dims)).to_numpy()
    values = np.ma.filled(np.ma.asarray(residuals, np.float64), np.nan).ravel()
    is_omitted = np.ma.getmaskarray(residuals).ravel()
    if nan_policy == "omit":
        is_omitted |= ~np.isfinite(values)
    return values[~is_omitted]
