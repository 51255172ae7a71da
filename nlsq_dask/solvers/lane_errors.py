"""Covariance of the parameters of many lanes at once, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.solvers.lane_algebra import sweep_once

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LaneCovariance:
    """Inverse of ``J^T J`` per lane."""

    matrix: Array  # (p, p, m), zero for fixed parameters
    is_singular: NDArray[np.bool_]  # (m,)


def inverse_gram(gram: Array, free: NDArray[np.bool_], least_pivot: float) -> LaneCovariance:
    """Return the inverse of ``J^T J``, whose columns are scaled first.

    Parameters
    ----------
    gram : ndarray, shape (p, p, m)
    free : ndarray of bool, shape (p, m)
        Parameters that are not fixed; those at a bound count, as in SciPy.
    least_pivot : float
        Smallest pivot of the scaled matrix that is not a rounding error.
    """
    p = len(gram)
    norms = np.sqrt(np.einsum("iim->im", gram))
    scale = np.where(norms > 0.0, norms, 1.0)
    swept = gram / (scale[:, None] * scale)
    is_singular = np.zeros(gram.shape[2], bool)
    for j in range(p):
        swept, is_good = sweep_once(np, swept, j, free, least_pivot)
        is_singular |= free[j] & ~is_good
    varies = free[:, None] & free
    return LaneCovariance(np.where(varies, -swept, 0.0) / (scale[:, None] * scale), is_singular)


def residual_variance(cost: Array, dof: NDArray[np.int64]) -> Array:
    """Return ``2 cost / dof``, infinite for dof <= 0."""
    return np.where(dof > 0, 2.0 * cost / np.maximum(dof, 1), np.inf)


def scaled_covariance(covariance: Array, factor: Array, varies: NDArray[np.bool_]) -> Array:
    """Return the covariance times a factor per lane, which may be infinite; zero stays zero.

    ``varies`` are the parameters that are not fixed, shape (p, m).
    """
    is_infinite = ~np.isfinite(factor)
    scaled = covariance * np.where(is_infinite, 0.0, factor)
    both = varies[:, None] & varies
    result: Array = np.where(both & is_infinite, np.inf, scaled)
    return result


def expand_covariance(
    covariance: Array, transform: ParameterTransform, rates: Array | None
) -> Array:
    """Return the covariance of all P parameters, with that of tied ones by the delta method.

    ``rates`` are the derivatives of the tied parameters by the free ones, shape (t, p, m).
    """
    p, m = len(covariance), covariance.shape[2]
    n_all = len(transform.names)
    slopes = np.zeros((n_all, p, m))
    slopes[np.flatnonzero(transform.is_free), np.arange(p)] = 1.0
    if rates is not None:
        slopes[np.flatnonzero(transform.is_tied)] = rates
    finite = np.where(np.isfinite(covariance), covariance, 0.0)
    full: Array = np.einsum("aim,ijm,bjm->abm", slopes, finite, slopes, optimize=True)
    is_infinite = np.isinf(np.einsum("iim->im", covariance))
    depends = np.einsum("aim,im->am", slopes != 0.0, is_infinite) > 0
    return np.where(depends[:, None] & depends, np.inf, full)


def standard_errors(covariance: Array) -> Array:
    """Return the square roots of the diagonal, shape (p, m)."""
    diagonal: Array = np.einsum("iim->im", covariance)
    return np.asarray(np.sqrt(np.maximum(diagonal, 0.0)))
