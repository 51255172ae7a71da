"""Preconditioners for conjugate gradients: the diagonal of J^T J, or J^T J of a sample of rows.

J^T J of a representative sample is nearly proportional to J^T J of all rows. With the sample as
preconditioner, conjugate gradients over all rows need few iterations; with the diagonal, many. The
inverse is applied by conjugate gradients on the sample, which read no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

Vector = NDArray[np.float64]

_RTOL = 1e-4  # of the solves on the sample
_MAX_ITERATIONS = 200


def fill_zeros(diagonal: Vector, scales: Vector) -> Vector:
    """Return the diagonal of J^T J with zeros replaced by values like those of other parameters.

    Parameters
    ----------
    diagonal : ndarray, shape (p,)
    scales : ndarray, shape (p,)
        Scales of the parameters, which make the elements of ``diagonal * scales**2`` comparable.
    """
    comparable = diagonal * scales**2
    positive = comparable[comparable > 0.0]
    typical = float(np.median(positive)) if len(positive) else 1.0
    return np.asarray(np.where(comparable > 0.0, diagonal, typical / scales**2))


@dataclass(frozen=True)
class DiagonalPreconditioner:
    """Inverse of the diagonal of ``J^T J``."""

    diagonal: Vector  # without zeros

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Return ``vector / ((1 + damping) * diagonal)``."""
        return vector / (self.diagonal * (1.0 + damping))


@dataclass(frozen=True)
class SamplePreconditioner:
    """Inverse of ``weight * (J^T J + diagonal_share * diag(J^T J))``, with J of a sample of rows.

    Adding some of the diagonal makes small eigenvalues larger. With p parameters and n rows in the
    sample, eigenvalues have relative errors of about ``sqrt(p / n)``, and those that are too small
    do the most harm.
    """

    product: Callable[[Vector], Vector]  # J^T J v of the sample
    sample_diagonal: Vector  # of J^T J of the sample, without zeros
    weight: float  # rows of the data set per row of the sample
    diagonal_share: float

    @property
    def diagonal(self) -> Vector:
        """Diagonal of J^T J over all rows, estimated from the sample."""
        return self.weight * self.sample_diagonal

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Multiply by the inverse, with ``damping`` times the diagonal added to the matrix."""
        added = self.diagonal_share + damping

        def matvec(v: Vector) -> Vector:
            return self.product(v) + added * self.sample_diagonal * v

        shape = (len(vector), len(vector))
        solution, _ = cg(
            LinearOperator(shape, matvec=matvec, dtype=np.float64),
            vector / self.weight,
            rtol=_RTOL,
            maxiter=_MAX_ITERATIONS,
            M=LinearOperator(shape, matvec=lambda v: v / self.sample_diagonal, dtype=np.float64),
        )
        return np.asarray(solution)
