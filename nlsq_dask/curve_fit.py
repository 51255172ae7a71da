"""``curve_fit``: the interface of ``scipy.optimize.curve_fit`` for data of any size."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from nlsq_dask._keywords import suggest_keyword
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.sources.from_array import as_dask, is_in_memory
from nlsq_dask.data.sources.from_xarray import is_xarray
from nlsq_dask.errors import DataError
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer
from nlsq_dask.status import Status

# Status codes of fits that were stopped on request: not an error, the best parameters are returned.
_STOPPED_EARLY = {status.code for status in Status if status.is_interruption} | {
    Status.USER_STOP.code
}


def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    bounds: Any = (-np.inf, np.inf),
    *,
    full_output: bool = False,
    config: HybridStreamingConfig | None = None,
    **fit_options: Any,
) -> Any:
    """Fit a function to data with the interface of ``scipy.optimize.curve_fit``.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params)``, written with jax.numpy; x has SciPy's layout, ``(M,)`` or
        ``(k, M)``.
    xdata : array or sequence of arrays
        Independent variable, shape (M,), or k of them, shape (k, M); any kind of array that
        ``fit`` accepts.
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
    bounds : (low, high) or dict by name of (low, high)
        Lower and upper bounds of the parameters. Each of low and high is a number, a sequence or a
        dict by name. By default there are no bounds.
    full_output : bool
        If True, also return infodict, message and ier.
    config : HybridStreamingConfig, optional
        Options of the algorithm.
    **fit_options
        Further arguments of ``AdaptiveHybridStreamingOptimizer.fit``.

    Returns
    -------
    popt : ndarray, shape (p,)
        Best-fit parameters.
    pcov : ndarray, shape (p, p)
        Covariance matrix of the parameters.
    infodict : dict
        Only with ``full_output``: "nfev", the number of passes over the data; "fvec", always None
        because the residuals are never in memory together; and "result", the ``FitResult``.
    message : str
        Only with ``full_output``: the reason for which the fit ended.
    ier : int
        Only with ``full_output``: 1 to 4 if the fit converged; negative if the callback,
        ``max_walltime`` or SIGTERM stopped it, in which case the best parameters are returned.

    Raises
    ------
    RuntimeError
        If the fit did not converge, as in SciPy.
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
    known = inspect.signature(AdaptiveHybridStreamingOptimizer.fit).parameters
    unknown = [name for name in fit_options if name not in known]
    if unknown:
        raise TypeError(
            f"curve_fit() has no argument {unknown[0]!r}. {suggest_keyword(unknown[0])}".rstrip()
            + " Set options with config=HybridStreamingConfig(...)."
        )
    x_data, model = _from_scipy_layout(f, xdata)
    optimizer = AdaptiveHybridStreamingOptimizer(config)
    fit_options.setdefault("verbose", 0 if config is None else None)
    result = optimizer.fit(
        model,
        x_data,
        ydata,
        p0,
        bounds,
        sigma=sigma,
        absolute_sigma=absolute_sigma,
        **fit_options,
    )
    if not result.success and result.status not in _STOPPED_EARLY:
        raise RuntimeError(f"Optimal parameters not found: {result.message}")
    if not full_output:
        return result.popt, result.pcov
    infodict = {"nfev": result.nfev, "fvec": None, "result": result}
    return result.popt, result.pcov, infodict, result.message, result.status


def _from_scipy_layout(f: Callable[..., Any], xdata: Any) -> tuple[Any, Callable[..., Any]]:
    """Return x and the model in the form that ``fit`` expects.

    An x of shape (k, M) becomes a tuple of k arrays, which the model stacks again to call f.
    """
    if isinstance(xdata, tuple | list) and xdata and np.ndim(xdata[0]) > 0:
        variables = tuple(xdata)
    elif hasattr(xdata, "iloc") and xdata.ndim == 2:
        raise DataError(
            f"xdata is a DataFrame. Pass a tuple of columns, (frame[{xdata.columns[0]!r}], ...)."
        )
    elif getattr(xdata, "ndim", 1) == 2:
        lazy = xdata if is_in_memory(xdata) or is_xarray(xdata) else as_dask(xdata, "xdata")
        variables = tuple(lazy[i] for i in range(xdata.shape[0]))
    elif getattr(xdata, "ndim", 1) > 2:
        raise DataError(f"xdata has shape {xdata.shape}; expected (M,) or (k, M).")
    else:
        return xdata, f
    if not callable(f):  # fit raises the error
        return variables, f

    @functools.wraps(f)
    def stacked(x: Any, *params: Any) -> Any:
        return f(jnp.stack(x), *params)

    return variables, stacked
