"""Tall-skinny QR: R of the factorization of ``[J r]``, without forming ``J^T J``.

``J^T J`` squares the condition number of J and loses directions in which J is smaller by
``sqrt(eps)``. R results from orthogonal transformations of J and resolves them down to ``eps``.
Factors of two sets of rows are merged by factorizing one R stacked on the other, in a tree.

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

# OpenBLAS uses threads for larger matrices; the bits would then depend on their number.
_MAX_ENTRIES = 2**13
_MIN_ROWS = 64


def panel_rows(n_columns: int, n_rows: int) -> int:
    """Return the number of rows per QR factorization on a CPU, a power of two."""
    max_rows = max(_MAX_ENTRIES // n_columns, _MIN_ROWS)
    return min(1 << (max_rows.bit_length() - 1), n_rows)


def append_rows(triangle: Any, columns: Any, n_panel_rows: int) -> Any:
    """Return R of the QR factorization of ``triangle`` with rows appended, in JAX.

    Parameters
    ----------
    triangle : array, shape (k, k)
        Upper triangular.
    columns : array, shape (k, b)
        The additional rows, transposed.
    n_panel_rows : int
        Rows per factorization; a divisor of b.
    """

    def add(i: Any, triangle: Any) -> Any:
        panel = lax.dynamic_slice_in_dim(columns, i * n_panel_rows, n_panel_rows, axis=1)
        return jnp.linalg.qr(jnp.concatenate([triangle, panel.T]), mode="r")

    return lax.fori_loop(0, columns.shape[1] // n_panel_rows, add, triangle)


def merge(one: Matrix, other: Matrix) -> Matrix:
    """Return R for the rows that two factors R stand for; elements below diagonals are ignored."""
    return with_rows(one, np.triu(other))


def with_rows(triangle: Matrix, rows: Matrix) -> Matrix:
    """Return R of the QR factorization of ``triangle`` with rows appended."""
    return np.asarray(np.linalg.qr(np.vstack([np.triu(triangle), rows]), mode="r"))
