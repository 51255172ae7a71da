"""Covariance of the parameters from ``J^T J`` at the solution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.identifiability import confounded_groups, in_null_directions
from nlsq_dask.solvers.scaled_svd import ScaledSVD

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Covariance:
    """Covariance matrix of the parameters, stored as a square root of the matrix."""

    root: Matrix  # (p, p); the covariance is root @ root.T, which loses digits by squaring
    condition_number: float  # of the column-scaled Jacobian
    non_identifiable: NDArray[np.bool_]  # (p,), parameters that take part in a null direction
    # Groups of parameters, by index, that the data cannot tell apart.
    confounded: tuple[tuple[int, ...], ...]

    @property
    def pcov(self) -> Matrix:
        """Covariance matrix, shape (p, p); infinite if J^T J is singular.

        Rows of zeros in the root, those of fixed parameters, remain zero.
        """
        is_finite = np.asarray(np.isfinite(self.root).all(axis=1))
        root = np.where(is_finite[:, None], self.root, 0.0)
        pcov = root @ root.T
        varies = np.asarray(~is_finite | (root != 0.0).any(axis=1))
        is_infinite = np.asarray(infinite_covariance(varies) > 0.0)
        is_infinite[np.ix_(is_finite, is_finite)] = False
        return np.where(is_infinite, np.inf, (pcov + pcov.T) / 2)


def infinite_covariance(varies: NDArray[np.bool_]) -> Matrix:
    """Return an infinite covariance matrix, which is zero for parameters that do not vary."""
    return np.where(np.outer(varies, varies), np.inf, 0.0)


def covariance(
    sums: NormalEquations,
    params: Vector,
    absolute_sigma: bool,
    epsilon: float,
    is_scaled: bool = True,
) -> Covariance:
    """Return the inverse of ``J^T J``, times the residual variance unless ``absolute_sigma``.

    It is not multiplied by it either if not ``is_scaled``, for ``sandwich``.

    For accuracy, the columns of J are scaled to norm 1 first.

    Parameters
    ----------
    sums : NormalEquations
        Sums at the solution.
    params : ndarray, shape (p,)
        The solution.
    absolute_sigma : bool
        As in ``scipy.optimize.curve_fit``.
    epsilon : float
        Machine epsilon of the dtype in which the model is evaluated. It decides which singular
        values of J are rounding errors.
    is_scaled : bool
    """
    p = len(sums.jtj)
    norms = np.sqrt(np.diag(sums.jtj))
    columns = np.where(norms > 0.0, norms, 1.0)
    svd = ScaledSVD.of(sums, columns, epsilon)
    has_variance = absolute_sigma or sums.n_used > p
    deviation = 1.0 if absolute_sigma else float(np.sqrt(sums.variance(p)))
    if svd.is_null.any() or (is_scaled and not has_variance):
        root = np.full((p, p), np.inf)
    else:
        root = (deviation if is_scaled else 1.0) * (svd.inverse_root / columns[:, None])
    errors = deviation / columns if has_variance else np.full(p, np.nan)
    confounded = tuple(confounded_groups(svd, errors, params))
    return Covariance(root, svd.condition, in_null_directions(svd), confounded)


def sandwich(covariance: Covariance, scores: Matrix, n_rows: int, cov_type: str) -> Covariance:
    """Return the heteroskedasticity-consistent (sandwich) covariance.

    ``(J^T J)^-1 (sum r^2 J^T J) (J^T J)^-1``, times n / (n - p) for "HC1".

    Parameters
    ----------
    covariance : Covariance
        The inverse of ``J^T J``, not scaled by the residual variance.
    scores : ndarray, shape (k, p)
        Matrix S with ``S.T @ S = sum r^2 J^T J``, summed over the rows.
    n_rows : int
    cov_type : {"HC0", "HC1"}

    References
    ----------
    H. White, "A heteroskedasticity-consistent covariance matrix estimator and a direct test for
    heteroskedasticity", Econometrica 48, 817-838 (1980).
    J. G. MacKinnon and H. White, "Some heteroskedasticity-consistent covariance matrix estimators
    with improved finite sample properties", Journal of Econometrics 29, 305-325 (1985).
    """
    dof = n_rows - len(covariance.root)
    if dof <= 0 or not np.isfinite(covariance.root).all():
        return replace(covariance, root=np.full_like(covariance.root, np.inf))
    factor = np.sqrt(n_rows / dof) if cov_type == "HC1" else 1.0
    root = covariance.root @ (scores @ covariance.root).T * factor
    return replace(covariance, root=np.asarray(np.linalg.qr(root.T, mode="r")).T)  # of shape (p, p)
