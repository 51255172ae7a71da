"""Covariance of the parameters from ``J^T J`` at the solution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.scaled_svd import ScaledSVD

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Covariance:
    """Covariance of the parameters, as a square root."""

    root: Matrix  # (p, p); the covariance is root @ root.T, which loses digits by squaring
    condition_number: float  # of the column-scaled Jacobian
    non_identifiable: NDArray[np.bool_]  # (p,), parameters that take part in a null direction

    @property
    def pcov(self) -> Matrix:
        """Covariance, shape (p, p); infinite if any parameter is non-identifiable."""
        if not np.isfinite(self.root).all():
            return np.full_like(self.root, np.inf)
        pcov = self.root @ self.root.T
        return np.asarray((pcov + pcov.T) / 2)


def covariance(sums: NormalEquations, absolute_sigma: bool, epsilon: float) -> Covariance:
    """Return the inverse of ``J^T J``, computed with columns scaled to norm 1.

    Parameters
    ----------
    sums : NormalEquations
        Sums at the solution.
    absolute_sigma : bool
        If False, the covariance is scaled by the residual variance, as in
        ``scipy.optimize.curve_fit``.
    epsilon : float
        Machine epsilon of the dtype in which the model is evaluated.
    """
    p = len(sums.jtj)
    norms = np.sqrt(np.diag(sums.jtj))
    columns = np.where(norms > 0.0, norms, 1.0)
    svd = ScaledSVD.of(sums, columns, epsilon)
    is_null = svd.is_null
    non_identifiable = np.asarray((np.abs(svd.vectors[:, is_null]) > 1e-3).any(axis=1))
    if is_null.any() or (sums.n_used <= p and not absolute_sigma):
        root = np.full((p, p), np.inf)
    else:
        root = svd.inverse_root / columns[:, None]
        if not absolute_sigma:
            root = root * np.sqrt(sums.variance(p))
    return Covariance(root, svd.condition, non_identifiable)


def sandwich(covariance: Covariance, scores: Matrix, n_rows: int, cov_type: str) -> Covariance:
    """Return the heteroskedasticity-consistent (sandwich) covariance.

    ``(J^T J)^-1 (sum r^2 J^T J) (J^T J)^-1``, times n / (n - p) for "HC1".

    Parameters
    ----------
    covariance : Covariance
        Covariance with pcov = ``(J^T J)^-1``.
    scores : ndarray, shape (k, p)
        Matrix with ``scores.T @ scores = sum r^2 J^T J`` over the rows.
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
