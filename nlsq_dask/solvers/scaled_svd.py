"""``ScaledSVD``: singular values of the Jacobian J, from ``J^T J`` or a QR factorization."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.rows.rows import STRIP_ROWS

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class ScaledSVD:
    """Singular values and right singular vectors of J, with its columns scaled as in ``of``."""

    values: Vector
    vectors: NDArray[np.float64]  # right singular vectors as columns
    gradient: Vector  # derivatives of the cost by the scaled parameters
    slopes: Vector  # the gradient along the singular vectors
    rounding: float  # singular values below this multiple of the largest are rounding errors

    @classmethod
    def of(cls, sums: NormalEquations, scale: Vector, epsilon: float) -> ScaledSVD:
        """Decompose J, given its sums and the machine epsilon of the model's dtype."""
        p, gradient = len(scale), sums.jtr / scale
        if sums.triangle is not None:
            # Rounding errors of the strips add up as in a random walk.
            rounding = (4.0 * p + float(np.sqrt(sums.n_used / STRIP_ROWS))) * epsilon
            left, values, rows = np.linalg.svd(sums.triangle[:p, :p] / scale)
            slopes = rows @ gradient
            if sums.triangle.shape[1] > p:  # avoids squaring
                slopes = values * (left.T @ sums.triangle[:p, p])
            # The slope along a null direction is rounding.
            slopes = np.where(values <= rounding * values.max(), 0.0, slopes)
            return cls(values, rows.T, gradient, slopes, rounding)
        squares, vectors = np.linalg.eigh(sums.jtj / np.outer(scale, scale))
        values = np.sqrt(np.maximum(squares, 0.0))
        return cls(
            values, vectors, gradient, vectors.T @ gradient, float(np.sqrt(4.0 * p * epsilon))
        )

    @property
    def condition(self) -> float:
        """Condition number: the ratio of the largest to the smallest singular value."""
        least = float(self.values.min())
        return float(self.values.max()) / least if least > 0.0 else np.inf

    @property
    def is_null(self) -> NDArray[np.bool_]:
        """Boolean array, True for singular values that are zero or rounding errors."""
        return np.asarray(self.values <= self.rounding * self.values.max())

    @property
    def inverse_root(self) -> NDArray[np.float64]:
        """Matrix R such that ``R R^T`` inverts the scaled ``J^T J``; infinite if singular."""
        if not self.values.all():
            return np.full_like(self.vectors, np.inf)
        return np.asarray(self.vectors / self.values)
