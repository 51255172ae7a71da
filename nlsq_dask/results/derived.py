"""Quantities that follow from parameters and their covariance: intervals and derived values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from nlsq_dask.model import derived

if TYPE_CHECKING:
    from nlsq_dask.results.result import FitResult


def conf_interval(result: FitResult, level: float) -> NDArray[np.float64]:
    """Return confidence intervals of the parameters; see ``FitResult.conf_interval``."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1; got {level!r}.")
    tail = 0.5 * (1.0 + level)
    is_normal = result.absolute_sigma or result.dof <= 0
    quantile = special.ndtri(tail) if is_normal else special.stdtrit(result.dof, tail)
    half = quantile * result.perr
    return np.stack([result.x - half, result.x + half], axis=1)


def derive(
    result: FitResult, function: Callable[[Mapping[str, Any]], Any], covariance: bool
) -> tuple[Any, Any]:
    """Return a function of the parameters and its standard error; see ``FitResult.derive``."""
    if not callable(function):
        raise ValueError(
            f"derive needs a function of the parameters, such as lambda p: 2 * p['width']; got "
            f"{function!r}."
        )
    if result.pcov is None:
        raise ValueError(
            f"derive requires a covariance, but there is no covariance of {len(result.x)} "
            f"parameters. Compute the value from result.popt, without its error."
        )
    values, errors, matrix = derived.derive(
        function, result.param_names, result.x, result.pcov, result._root
    )
    if None in values:
        return values[None], matrix if covariance else errors[None]
    return values, matrix if covariance else errors
