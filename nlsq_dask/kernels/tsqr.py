"""R of the QR factorization of ``[J r]``: what ``J^T J`` and ``J^T r`` say, without squaring.

``J^T J`` squares the condition number of J, so it knows nothing of directions in which J is smaller
by ``sqrt(eps)``. R is made of orthogonal transformations of J alone and keeps them down to ``eps``.
Factorizations of parts of the rows are joined by that of their R, one below the other, in a tree.

References
----------
J. Demmel, L. Grigori, M. Hoemmen and J. Langou, "Communication-optimal parallel and sequential QR
and LU factorizations", SIAM Journal on Scientific Computing 34, A206-A239 (2012).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# OpenBLAS shares larger matrices among its threads, whose number would then show in the bits.
_MAX_ENTRIES = 2**13
_MIN_ROWS = 64


def panel_rows(n_columns: int, n_rows: int) -> int:
    """Return how many rows, a power of two, are best factorized at once on a CPU."""
    max_rows = max(_MAX_ENTRIES // n_columns, _MIN_ROWS)
    return min(1 << (max_rows.bit_length() - 1), n_rows)


def append_rows(triangle: Any, columns: Any, n_panel_rows: int) -> Any:
    """Return R of the rows behind ``triangle`` and further ones, in JAX.

    Parameters
    ----------
    triangle : array, shape (k, k)
        Upper triangular.
    columns : array, shape (k, b)
        The further rows, transposed.
    n_panel_rows : int
        Rows that are factorized at once; a divisor of b.
    """

    def add(i: Any, triangle: Any) -> Any:
        panel = lax.dynamic_slice_in_dim(columns, i * n_panel_rows, n_panel_rows, axis=1)
        return jnp.linalg.qr(jnp.concatenate([triangle, panel.T]), mode="r")

    return lax.fori_loop(0, columns.shape[1] // n_panel_rows, add, triangle)


def merge(one: Matrix, other: Matrix) -> Matrix:
    """Return R of the rows behind both; below the diagonal an R may hold other things."""
    return with_rows(one, np.triu(other))


def with_rows(triangle: Matrix, rows: Matrix) -> Matrix:
    """Return R of the rows behind ``triangle`` and further ones."""
    return np.asarray(np.linalg.qr(np.vstack([np.triu(triangle), rows]), mode="r"))
