"""Singular values of the column-scaled Jacobian, from whichever sums there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.rows.rows import STRIP_ROWS

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class ScaledSVD:
    """Singular values and right singular vectors of ``J / scale``.

    Attributes
    ----------
    values : ndarray, shape (p,)
        Singular values.
    vectors : ndarray, shape (p, p)
        The right singular vectors, one a column.
    gradient : ndarray, shape (p,)
        Of the cost by the scaled parameters.
    slopes : ndarray, shape (p,)
        The same along the vectors.
    rounding : float
        Multiple of the largest singular value below which another is rounding.
    """

    values: Vector
    vectors: NDArray[np.float64]
    gradient: Vector
    slopes: Vector
    rounding: float

    @classmethod
    def of(cls, sums: NormalEquations, scale: Vector, epsilon: float) -> ScaledSVD:
        """Decompose; ``epsilon`` is that of the arithmetic which made the sums."""
        p, gradient = len(scale), sums.jtr / scale
        if sums.triangle is not None:
            # Rounding adds up from strip to strip, as in a random walk.
            rounding = (4.0 * p + float(np.sqrt(sums.n_used / STRIP_ROWS))) * epsilon
            left, values, rows = np.linalg.svd(sums.triangle[:p, :p] / scale)
            slopes = rows @ gradient
            if sums.triangle.shape[1] > p:  # the residual's column gives them without squaring
                slopes = values * (left.T @ sums.triangle[:p, p])
            # Where a singular value is rounding alone, so is the slope.
            slopes = np.where(values <= rounding * values.max(), 0.0, slopes)
            return cls(values, rows.T, gradient, slopes, rounding)
        squares, vectors = np.linalg.eigh(sums.jtj / np.outer(scale, scale))
        values = np.sqrt(np.maximum(squares, 0.0))
        return cls(
            values, vectors, gradient, vectors.T @ gradient, float(np.sqrt(4.0 * p * epsilon))
        )

    @property
    def condition(self) -> float:
        """The condition number of the scaled Jacobian."""
        least = float(self.values.min())
        return float(self.values.max()) / least if least > 0.0 else np.inf

    @property
    def is_null(self) -> NDArray[np.bool_]:
        """Which singular values are rounding alone, or zero."""
        return np.asarray(self.values <= self.rounding * self.values.max())

    @property
    def inverse_root(self) -> NDArray[np.float64]:
        """A matrix whose product with its transpose is the inverse of the scaled ``J^T J``.

        Infinite where that has none.
        """
        if not self.values.all():
            return np.full_like(self.vectors, np.inf)
        return np.asarray(self.vectors / self.values)
