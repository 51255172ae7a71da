"""Trust-region step with bounds.

The quadratic model of the cost, ``g^T s + 1/2 s^T H s`` in variables scaled by the column norms of
the Jacobian (Moré 1978), is minimized over ``low <= s <= high`` and ``|s|_2 <= radius``. The length
of the step decreases monotonically with the Levenberg-Marquardt parameter, so the parameter for a
radius is found as a root. Each evaluation solves a bounded least-squares problem (BVLS).

References
----------
J. J. Moré, "The Levenberg-Marquardt algorithm: implementation and theory", Numerical Analysis,
Lecture Notes in Mathematics 630, 105-116 (1978).
P. B. Stark and R. L. Parker, "Bounded-variable least squares", Computational Statistics 10,
129-141 (1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from nlsq_dask.solvers.scaled_svd import ScaledSVD

Vector = NDArray[np.float64]

_LOG_DAMPING_TOL = 0.05  # the radius is approximate; Moré uses 10 %


@dataclass(frozen=True)
class Quadratic:
    """Quadratic model ``g^T s + 1/2 s^T H s`` of the cost: g, eigenvalues and eigenvectors of H."""

    gradient: Vector
    eigenvalues: Vector
    eigenvectors: NDArray[np.float64]
    slopes: Vector  # the gradient along the eigenvectors
    is_flat: bool  # whether singular values were raised to the ``floor`` of ``Quadratic.of``
    null_slope: float  # norm of the gradient along null directions
    # By how much an undamped step along the other flat directions reduces the residual norm.
    damped_residual: float

    @classmethod
    def of(cls, svd: ScaledSVD, floor: float) -> Quadratic:
        """Build the model from the singular values of the scaled Jacobian.

        Singular values below ``floor`` times the largest are replaced by that limit.
        """
        smallest = max(floor, svd.rounding) * float(svd.values.max())
        is_flat, is_null = svd.values <= smallest, svd.is_null
        is_damped = is_flat & ~is_null
        return cls(
            svd.gradient,
            np.maximum(svd.values, smallest) ** 2,
            svd.vectors,
            svd.slopes,
            bool(is_flat.any()),
            float(np.linalg.norm(svd.slopes[is_null])),
            float(np.linalg.norm(svd.slopes[is_damped] / svd.values[is_damped])),
        )

    def reduction(self, step: Vector) -> float:
        """Return by how much the model decreases from zero to ``step``."""
        along = self.eigenvectors.T @ step
        return float(-(self.gradient @ step) - 0.5 * (along**2 @ self.eigenvalues))

    def minimizer(self, damping: float, low: Vector, high: Vector) -> Vector:
        """Return the step s within the bounds that minimizes the model + ``damping / 2 |s|^2``."""
        curvature = self.eigenvalues + damping
        is_positive = curvature > 0.0
        inverse = np.divide(1.0, curvature, out=np.zeros_like(curvature), where=is_positive)
        step: Vector = -self.eigenvectors @ (self.slopes * inverse)
        if ((low <= step) & (step <= high)).all():
            return step
        root = np.sqrt(np.where(is_positive, curvature, 0.0))
        inverse_root = np.divide(1.0, root, out=np.zeros_like(root), where=is_positive)
        return _bounded(root[:, None] * self.eigenvectors.T, -self.slopes * inverse_root, low, high)


def _bounded(matrix: NDArray[np.float64], target: Vector, low: Vector, high: Vector) -> Vector:
    """Minimize ``|matrix @ s - target|`` over ``low <= s <= high``."""
    step = np.clip(np.zeros_like(low), low, high)
    free = low < high
    if free.any():
        solution = optimize.lsq_linear(
            matrix[:, free],
            target - matrix[:, ~free] @ step[~free],
            (low[free], high[free]),
            method="bvls",
            tol=1e-15,
        )
        step[free] = solution.x
    return step


def restricted_step(
    quadratic: Quadratic, low: Vector, high: Vector, radius: float
) -> tuple[Vector, bool]:
    """Return the step that minimizes the model within bounds and trust region.

    Returns
    -------
    step : ndarray, shape (p,)
    full : bool
        True if the step is shorter than the radius, so that only bounds restrict it.
    """
    step = quadratic.minimizer(0.0, low, high)
    if np.linalg.norm(step) <= radius:
        return step, True

    def excess(log_damping: float) -> float:
        return float(np.linalg.norm(quadratic.minimizer(np.exp(log_damping), low, high)) - radius)

    # |s(damping)| decreases monotonically, and |s| <= 2 |g| / damping because s = 0 is feasible.
    highest = float(np.log(2.0 * np.linalg.norm(quadratic.gradient) / radius)) + 0.1
    lowest = highest - 5.0
    while excess(lowest) < 0.0 and lowest > highest - 80.0:
        lowest -= 10.0
    if excess(lowest) < 0.0:  # the radius equals the norm of the full step up to rounding
        return step, True
    log_damping = optimize.brentq(excess, lowest, highest, xtol=_LOG_DAMPING_TOL)
    return quadratic.minimizer(float(np.exp(log_damping)), low, high), False
