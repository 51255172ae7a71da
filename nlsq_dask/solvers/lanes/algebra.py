"""Solution of the normal equations of many lanes at once, by the sweep operator.

References
----------
J. H. Goodnight, "A tutorial on the SWEEP operator", The American Statistician 33, 149-158 (1979).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

_UNROLLED = 6  # matrices of up to this many parameters are solved without a loop


def sweep_once(library: Any, matrix: Any, j: Any, pivots: Any, least: float) -> tuple[Any, Any]:
    """Sweep a symmetric matrix on its diagonal element j, in the lanes where that is possible.

    With ``[[A, g], [g^T, c]]`` swept on all of A, the result is ``[[A^-1, A^-1 g], [...]]``. Rows
    and columns that are not swept remain as if their parameter were not in the model; in swept
    columns, other rows have the other sign.

    Parameters
    ----------
    library : module
        ``numpy`` or ``jax.numpy``.
    matrix : array, shape (k, k, c)
        Its first p rows are scaled to a unit diagonal.
    j : int
    pivots : array of bool, shape (p, c)
        Which elements to sweep on.
    least : float
        Smallest pivot; a smaller one is a rounding error, and is skipped.

    Returns
    -------
    swept : array, shape (k, k, c)
    is_swept : array of bool, shape (c,)
    """
    pivot = matrix[j, j]
    is_good = pivots[j] & (pivot > least)
    is_j = (np.arange(len(matrix)) == j)[:, None]
    # With the pivot changed by 1, the update of rank one is also right in row and column j.
    column = library.where(is_good, matrix[:, j] - is_j, 0.0)
    row = (matrix[j] + is_j) * (1 / library.where(is_good, pivot, 1.0))
    return matrix - column[:, None] * row, is_good


def sweep(matrix: Any, pivots: Any, least: float) -> tuple[Any, Any]:
    """Sweep on all elements in ``pivots``, in JAX; see ``sweep_once``.

    Returns
    -------
    swept : array, shape (k, k, c)
    is_swept : array of bool, shape (p, c)
    """

    def step(j: Any, carry: Any) -> Any:
        matrix, is_swept = carry
        matrix, is_good = sweep_once(jnp, matrix, j, pivots, least)
        return matrix, is_swept.at[j].set(is_good)

    p = len(pivots)
    start = matrix, jnp.zeros(pivots.shape, bool)
    result: tuple[Any, Any] = lax.fori_loop(0, p, step, start, unroll=p <= _UNROLLED)
    return result
