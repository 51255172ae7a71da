"""SciPy's options of ``curve_fit`` as options of the configuration and arguments of ``fit``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.fit.arguments.parameters import Parameters

METHODS = ("lm", "trf", "dogbox")
FINITE_DIFFERENCES = ("2-point", "3-point", "cs")
TOLERANCES = ("ftol", "xtol", "gtol")
LIMITS = ("maxfev", "max_nfev")
OPTIONS = (*TOLERANCES, *LIMITS, "x_scale")  # keywords of SciPy's solvers

_MIN_TOLERANCE = 1e-15
_SCIPY_LIMIT = 100  # SciPy's default limit is 100 evaluations per parameter, or more


def check_method(method: Any, parameters: Parameters, n_rows: int | None) -> None:
    """Raise an error for a method that SciPy does not have, or does not allow for this problem.

    Each method asks for the same minimum, so that the choice makes no other difference.

    Parameters
    ----------
    method : str or None
    parameters : Parameters
    n_rows : int or None
        Number of rows; None if it is unknown.

    Raises
    ------
    ValueError
        If there is no such method, or if "lm" is combined with bounds.
    TypeError
        If "lm", the default without bounds, has fewer rows than parameters.
    """
    if method is not None and not (isinstance(method, str) and method in METHODS):
        raise ValueError(
            f"method must be None or one of {_join(METHODS)}; got {method!r}. All of them use "
            f"Gauss-Newton with a trust region here."
        )
    if parameters.has_bounds:
        if method == "lm":
            raise ValueError(
                "method 'lm' does not support bounds, as in SciPy. Use method='trf', or omit it."
            )
        return
    n_params = parameters.transform.n_free
    if method in (None, "lm") and n_rows is not None and n_rows < n_params:
        raise TypeError(
            f"the number of parameters ({n_params}) must not exceed the number of data points "
            f"({n_rows}) for method 'lm', the default without bounds. With method='trf', the "
            f"parameters are fitted, but their covariance is infinite."
        )


def jacobian_function(jac: Any) -> Callable[..., Any] | None:
    """Return ``jac`` if it is callable, and None if derivatives are left to JAX."""
    if callable(jac):
        function: Callable[..., Any] = jac
        return function
    if jac is not None and not (isinstance(jac, str) and jac in FINITE_DIFFERENCES):
        raise ValueError(
            f"jac must be None, one of {_join(FINITE_DIFFERENCES)}, or a function "
            f"jac(x, *params), written with jax.numpy, that returns an array of shape (M, p); got "
            f"{jac!r}. It can be omitted: derivatives of the model are computed by JAX."
        )
    return None


def fit_nan_policy(nan_policy: Any, check_finite: Any) -> str:
    """Return the ``nan_policy`` of ``fit``.

    Values are checked while they are summed, which costs nothing: ``check_finite=False`` does not
    disable it, and ``check_finite=True`` forbids omitting rows, as in SciPy.
    """
    if check_finite is not None and not isinstance(check_finite, bool | np.bool_):
        raise ValueError(f"check_finite must be True, False or None; got {check_finite!r}.")
    if nan_policy not in (None, "raise", "omit"):
        raise ValueError(f"nan_policy must be None, 'raise' or 'omit'; got {nan_policy!r}.")
    return "raise" if nan_policy is None or check_finite else str(nan_policy)


def check_loss(loss: Any) -> None:
    """Raise a ValueError for a loss function that is not given by name."""
    if callable(loss):
        raise ValueError(
            "loss must be the name of a loss function; functions are not supported. Use "
            "loss='soft_l1', 'huber', 'cauchy' or 'arctan', with f_scale."
        )


def configured(
    config: HybridStreamingConfig,
    options: Mapping[str, Any],
    n_params: int,
    is_in_memory: bool,
) -> HybridStreamingConfig:
    """Return the configuration with SciPy's tolerances and limits of evaluations.

    Parameters
    ----------
    config : HybridStreamingConfig
    options : dict
        Values of some of ``OPTIONS``.
    n_params : int
    is_in_memory : bool
        Whether all data are in memory.
    """
    _check_x_scale(options.get("x_scale"), n_params)
    changes: dict[str, Any] = {}
    tolerances = [_tolerance(name, options[name]) for name in TOLERANCES if name in options]
    if given := [value for value in tolerances if value is not None]:
        changes["gauss_newton_tol"] = max(min(given), _MIN_TOLERANCE)
    limit = evaluation_limit(options)
    if limit is not None:
        changes["gauss_newton_max_iterations"] = max(limit - 1, 1)  # after the first evaluation
        is_tight = limit < _SCIPY_LIMIT * n_params
        if is_tight and is_in_memory and not config.enable_multistart:
            # Without sample and warm-up, each evaluation is one over all rows, and counts.
            changes |= {"max_warmup_iterations": 0, "sample_rows": 1}
    return replace(config, **changes) if changes else config


def evaluation_limit(options: Mapping[str, Any]) -> int | None:
    """Return the smallest limit of evaluations that is given, or None."""
    limits = (_limit(name, options[name]) for name in LIMITS if name in options)
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(name: str, value: Any) -> int | None:
    if value is None or (name == "maxfev" and _is_number(value) and value == 0):
        return None  # SciPy's default
    if not (_is_number(value) and value >= 1 and value == int(value)):
        raise ValueError(f"{name} must be a positive integer or None; got {value!r}.")
    return int(value)


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not (_is_number(value) and 0.0 <= value < 1.0):
        raise ValueError(f"{name} must be a number >= 0 and < 1, or None; got {value!r}.")
    return float(value)


def _check_x_scale(x_scale: Any, n_params: int) -> None:
    """Raise a ValueError unless ``x_scale`` is valid; it has no effect beyond that.

    Steps are always scaled by the column norms of the Jacobian, as with "jac".
    """
    if x_scale is None or (isinstance(x_scale, str) and x_scale == "jac"):
        return
    try:
        scale = np.asarray(x_scale, float)
    except (TypeError, ValueError):
        scale = np.array([-1.0])
    is_positive = bool((np.isfinite(scale) & (scale > 0.0)).all())
    if not is_positive or scale.shape not in ((), (1,), (n_params,)):
        raise ValueError(
            f"x_scale must be 'jac', a positive number, or {n_params} positive numbers, one per "
            f"parameter; got {x_scale!r}. It can be omitted: parameters are scaled automatically."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _join(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
