"""Covariance of the parameters of many lanes at once, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.solvers.lanes.algebra import sweep_once

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LaneInverse:
    """Inverse of ``J^T J`` per lane."""

    matrix: Array  # (p, p, m), zero for fixed parameters
    is_singular: NDArray[np.bool_]  # (m,)
    inflation: Array  # (m,), largest diagonal element after scaling of the columns


def inverse_gram(gram: Array, free: NDArray[np.bool_], least_pivot: float) -> LaneInverse:
    """Return the inverse of ``J^T J``, whose columns are scaled first.

    Parameters
    ----------
    gram : ndarray, shape (p, p, m)
    free : ndarray of bool, shape (p, m)
        Parameters that are not fixed; those at a bound count, as in SciPy.
    least_pivot : float
        Smallest pivot of the scaled matrix that is not a rounding error.
    """
    scale = _nonzero(np.sqrt(diagonals(gram)))
    swept = gram / (scale[:, None] * scale)
    is_singular = np.zeros(gram.shape[2], bool)
    for j in range(len(gram)):
        swept, is_good = sweep_once(np, swept, j, free, least_pivot)
        is_singular |= free[j] & ~is_good
    swept[~(free[:, None] & free)] = 0.0
    inflation = diagonals(swept).max(axis=0)
    return LaneInverse(swept / (scale[:, None] * scale), is_singular, inflation)


def inverse_triangle(
    triangle: Array, free: NDArray[np.bool_], rounding: float
) -> tuple[Array, NDArray[np.bool_]]:
    """Return the inverse of R of a QR factorization, and which lanes are singular.

    Parameters
    ----------
    triangle : ndarray, shape (p, p, m)
        Its columns of fixed parameters are zero, and so are their rows in the result.
    free : ndarray of bool, shape (p, m)
    rounding : float
        Largest diagonal element, after scaling of the columns, that is a rounding error.
    """
    p = len(triangle)
    scale = _nonzero(np.sqrt((triangle**2).sum(axis=0)))
    scaled = triangle / scale
    diagonal = np.einsum("iim->im", scaled)
    is_singular = (free & (diagonal <= rounding)).any(axis=0)
    inverse = np.zeros_like(scaled)
    for i in reversed(range(p)):  # row i of R R^-1 = I
        row = -np.einsum("km,kjm->jm", scaled[i], inverse)
        row[i] += 1.0
        inverse[i] = np.where(free[i], row / _nonzero(diagonal[i]), 0.0)
    return inverse / scale[:, None], is_singular


def _nonzero(array: Array) -> Array:
    return np.where(array > 0.0, array, 1.0)


def residual_variance(cost: Array, dof: NDArray[np.int64]) -> Array:
    """Return ``2 cost / dof``, infinite for dof <= 0."""
    return np.where(dof > 0, 2.0 * cost / np.maximum(dof, 1), np.inf)


def scaled_covariance(covariance: Array, factor: Array, varies: NDArray[np.bool_]) -> Array:
    """Return the covariance times a factor per lane, which may be infinite; zero stays zero.

    Parameters
    ----------
    covariance : ndarray, shape (p, p, m) or (p, m)
        With two dimensions, its diagonals.
    factor : ndarray, shape (m,)
    varies : ndarray of bool, shape (p, m)
        Parameters that are not fixed.
    """
    is_finite = np.isfinite(factor)
    scaled = covariance * np.where(is_finite, factor, 0.0)
    if not is_finite.all():
        both = varies if covariance.ndim == 2 else varies[:, None] & varies
        scaled[..., ~is_finite] = np.where(both[..., ~is_finite], np.inf, 0.0)
    return scaled


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
    is_infinite = np.isinf(diagonals(covariance))
    depends = ((slopes != 0.0) & is_infinite).any(axis=1)
    return np.where(depends[:, None] & depends, np.inf, full)


def diagonals(matrices: Array) -> Array:
    """Return the diagonal of each matrix, shape (p, m)."""
    diagonal: Any = np.einsum("iim->im", matrices)
    return np.asarray(diagonal)
