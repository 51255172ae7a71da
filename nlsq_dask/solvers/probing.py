"""Stochastic estimates of the diagonal of (J^T J)^-1, and of a null direction of J^T J.

No p-by-p matrix is formed: a probe is a random vector, for which a linear system is solved.

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

# Bytes of the probes per batch, which share each pass: fewer batches need fewer passes. A task and
# the client each need about 8 times as much, comparable to a block of usual size. A batch has at
# least one probe, whatever its size.
_BATCH_BYTES = 2**23
_ZERO_LENGTH = 1e-2  # of a standard normal length; a smaller remainder is no null direction


def batch_size(n_probes: int, n_params: int) -> int:
    """Return the number of probes per batch, whose systems are solved with the same passes."""
    max_probes = max(_BATCH_BYTES // (8 * n_params), 1)
    n_batches = -(n_probes // -max_probes)
    return -(n_probes // -n_batches)


def probe_batches(n_probes: int, n_params: int, seed: int) -> Iterator[Vectors]:
    """Yield batches of probes, shape (k, p): random signs, or unit vectors if ``n_probes == p``.

    With unit vectors, the estimate of the diagonal is exact.
    """
    size, rng = batch_size(n_probes, n_params), np.random.default_rng(seed)
    for start in range(0, n_probes, size):
        count = min(size, n_probes - start)
        if n_probes == n_params:
            yield np.eye(count, n_params, start)
        else:
            yield rng.choice([-1.0, 1.0], (count, n_params))


def inverse_diagonal(solve: Callable[[Vectors], Vectors], probes: Iterator[Vectors]) -> Vector:
    """Estimate the diagonal of ``(J^T J)^-1``; infinite if a solve did not converge.

    Parameters
    ----------
    solve : callable
        Returns ``(J^T J)^-1 v`` for each probe v of a batch; infinite if not converged.
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
    """Return a vector v with ``J^T J v = 0`` up to rounding, or None if none was found.

    For a random vector z, conjugate gradients solve ``J^T J u = J^T J z``. The solution u lacks the
    component of z in the null space, so ``z - u`` is that component. Whether it is a null vector is
    checked, so a returned vector is certain. None means that ``J^T J`` is regular, or that
    ``max_iterations`` is too small.

    Parameters
    ----------
    product : callable
        Returns ``J^T J v``.
    diagonal : ndarray, shape (p,)
        Diagonal of ``J^T J``, without zeros.
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
