"""Preconditioners for conjugate gradients: the diagonal of J^T J, and a sample of the rows.

``J^T J`` of a representative sample is nearly proportional to that of all rows. With it, conjugate
gradients need a few products over all rows, with the diagonal many. Its inverse is applied by
conjugate gradients on the sample, without reading data.
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
    """Return a diagonal of J^T J with zeros replaced by values of typical size.

    Parameters
    ----------
    diagonal : ndarray, shape (p,)
    scales : ndarray, shape (p,)
        Scales of the parameters; ``diagonal * scales**2`` has comparable elements.
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
        """Apply the preconditioner."""
        return vector / (self.diagonal * (1.0 + damping))


@dataclass(frozen=True)
class SamplePreconditioner:
    """Inverse of the scaled ``J^T J`` of a sample plus a share of its diagonal.

    The diagonal accounts for sampling: with p parameters and n rows, the relative error of the
    eigenvalues is about ``sqrt(p / n)``, and eigenvalues that are too small do the most harm.
    """

    product: Callable[[Vector], Vector]  # J^T J v of the sample
    sample_diagonal: Vector  # of J^T J of the sample, without zeros
    weight: float  # rows of the data set per row of the sample
    diagonal_share: float

    @property
    def diagonal(self) -> Vector:
        """Diagonal of the sample, scaled to all rows."""
        return self.weight * self.sample_diagonal

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Apply the preconditioner."""
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
