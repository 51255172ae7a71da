"""Preconditioners for conjugate gradients: from the diagonal of J^T J, and from a sample of rows.

A sample that is like the rest has nearly their ``J^T J`` but for its weight, so conjugate gradients
over all rows need a handful of products with it, where they would need many with the diagonal
alone. To apply its inverse means conjugate gradients on the sample, which cost no reading.
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
    """Return a diagonal of J^T J with something of the usual size where it is zero.

    Parameters
    ----------
    diagonal : ndarray, shape (p,)
    scales : ndarray, shape (p,)
        Of the parameters; times the square of these the diagonal's entries are comparable.
    """
    comparable = diagonal * scales**2
    positive = comparable[comparable > 0.0]
    typical = float(np.median(positive)) if len(positive) else 1.0
    return np.asarray(np.where(comparable > 0.0, diagonal, typical / scales**2))


@dataclass(frozen=True)
class DiagonalPreconditioner:
    """The inverse of the diagonal of ``J^T J``.

    Attributes
    ----------
    diagonal : ndarray, shape (p,)
        None of its entries zero.
    """

    diagonal: Vector

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Apply it."""
        return vector / (self.diagonal * (1.0 + damping))


@dataclass(frozen=True)
class SamplePreconditioner:
    """The inverse of the sample's ``J^T J`` as all rows would have it, and a share of its diagonal.

    The share is that of chance: with p parameters and n rows the sample's eigenvalues are off by
    about ``sqrt(p / n)``, and those that are too small would be the worst.

    Attributes
    ----------
    product : callable
        ``J^T J v`` of the sample.
    sample_diagonal : ndarray, shape (p,)
        Of that, none of its entries zero.
    weight : float
        Rows of the data set for each of the sample.
    share : float
    """

    product: Callable[[Vector], Vector]
    sample_diagonal: Vector
    weight: float
    diagonal_share: float

    @property
    def diagonal(self) -> Vector:
        """The sample's diagonal as all rows would have it."""
        return self.weight * self.sample_diagonal

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Apply it."""
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
