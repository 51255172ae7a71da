"""What can be found out about the inverse of J^T J by random vectors, without a matrix.

References
----------
C. Bekas, E. Kokiopoulou and Y. Saad, "An estimator for the diagonal of a matrix", Applied
Numerical Mathematics 57, 1214-1229 (2007).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.solvers.conjugate_gradients import NULL_EIGENVALUE, LinearSolve

Vector = NDArray[np.float64]
Vectors = NDArray[np.float64]

# Bytes of the probes that are solved for at once, which share each pass: fewer batches are fewer
# passes. A task and the client each need about 8 times as much, which is no more than a block of a
# sensible size. One probe at least is solved for, so that with a million parameters and more it is
# that many vectors of them.
_BATCH_BYTES = 2**23
_ZERO_LENGTH = 1e-2  # of a direction's random length, standard normal: what is left is not lost


def batch_size(n_probes: int, n_params: int) -> int:
    """Return how many probes are solved for at once; all batches but the last are of this size."""
    max_probes = max(_BATCH_BYTES // (8 * n_params), 1)
    n_batches = -(n_probes // -max_probes)
    return -(n_probes // -n_batches)


def probe_batches(n_probes: int, n_params: int, seed: int) -> Iterator[Vectors]:
    """Yield probes, shape (k, p), k as ``batch_size`` says: signs, or unit vectors if enough.

    The signs do not depend on the batches.
    """
    size, rng = batch_size(n_probes, n_params), np.random.default_rng(seed)
    for start in range(0, n_probes, size):
        count = min(size, n_probes - start)
        if n_probes == n_params:
            yield np.eye(count, n_params, start)
        else:
            yield rng.choice([-1.0, 1.0], (count, n_params))


def inverse_diagonal(solve: Callable[[Vectors], Vectors], probes: Iterator[Vectors]) -> Vector:
    """Estimate the diagonal of the inverse of ``J^T J``; infinite where a solve did not end.

    Parameters
    ----------
    solve : callable
        Returns ``(J^T J)^-1 v`` for each of k directions, infinite where it does not know.
    probes : iterator of ndarray, each of shape (k, p)
    """
    total, weight = np.zeros(()), np.zeros(())
    for vectors in probes:
        inverse = solve(vectors)
        if not np.isfinite(inverse).all():
            return np.full(vectors.shape[1], np.inf)
        total = total + (vectors * inverse).sum(axis=0)
        weight = weight + (vectors**2).sum(axis=0)
    return np.asarray(np.maximum(total / weight, 0.0))


def null_direction(
    product: Callable[[Vector], Vector], diagonal: Vector, max_iterations: int, seed: int
) -> Vector | None:
    """Return a direction along which ``J^T J`` is rounding alone, or None if none was found.

    Of a random vector z, conjugate gradients on ``J^T J u = J^T J z`` find all but what ``J^T J``
    does not see. That is at hand at each iteration, ``z - u``, and so is its Rayleigh quotient,
    which the least eigenvalue cannot exceed: what is returned is no matter of chance. None is found
    where ``J^T J`` has an inverse, or would take more iterations.

    Parameters
    ----------
    product : callable
        Returns ``J^T J v``.
    diagonal : ndarray, shape (p,)
        Of ``J^T J``, none of its entries zero.
    max_iterations : int
    seed : int
    """
    start = np.random.default_rng(seed).standard_normal(len(diagonal)) / np.sqrt(diagonal)
    solve: LinearSolve | None = LinearSolve.init(-product(start), lambda v: v / diagonal)
    for _ in range(max_iterations):
        if solve is None:
            return None
        remainder = start - solve.step
        square = float(remainder @ (diagonal * remainder))
        if square <= _ZERO_LENGTH**2:
            return None
        if abs(float(remainder @ solve.residual)) <= NULL_EIGENVALUE * square:
            return remainder
        solve = solve.update(product(solve.direction), lambda v: v / diagonal)
    return None
