"""``DenseTerms``: JAX code that adds ``J^T J`` and ``J^T r`` over rows.

The residual is stacked below the rows of the transposed Jacobian, so that one matrix product gives
``J^T J``, ``J^T r`` and ``r^T r``.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.kernels.dense_algebra import Algebra
from nlsq_dask.kernels.losses import LINEAR
from nlsq_dask.kernels.row_terms import RowTerms, dot
from nlsq_dask.model.jacobian import residual_and_jacobian
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.rows.rows import Rows


class Accumulation(Enum):
    """Which square matrix of p + 1 columns a pass accumulates from Jacobian J and residual r.

    All are stored as upper triangles; the otherwise unused element (p, 0) is the largest r^2. The
    last column of ``ROOT`` contains J^T r and r^T r.
    """

    GRAM = "gram"  # [J r]^T [J r]
    TRIANGLE = "triangle"  # R of the QR factorization of [J r]
    ROOT = "root"  # R of J; with a robust loss, the scaled r spans too many orders of magnitude
    SCORES = "scores"  # R of r J, or of rho' r J with a robust loss

    @property
    def is_factorized(self) -> bool:
        """Whether the matrix is the factor R of a QR factorization."""
        return self is not Accumulation.GRAM


# Running sums:
# - matrix (p+1, p+1, lanes): see ``Accumulation``;
# - residuals (2, lanes): sums of rho(z) and of r^2; zero with the linear loss, where the Gram
#   matrix contains both.


def add_gram(library: Any, gram: Any, other: Any) -> Any:
    """Add two Gram matrices; element (p, 0), the largest r^2, is the maximum of both.

    ``library`` is ``numpy`` or ``jax.numpy``.
    """
    n_rows = len(gram)
    keeps_largest = np.zeros((n_rows, n_rows, 1), bool)
    keeps_largest[-1, 0] = True
    larger = library.where(gram > other, gram, other)
    return library.where(keeps_largest, larger, gram + other)


class DenseTerms(RowTerms):
    """Terms of rows in the matrix of an ``Accumulation`` and in sums of residuals.

    ``point``, an argument of ``RowTerms``, consists of the parameters, and the factors by which the
    columns of the Jacobian and the residual are multiplied.

    Parameters
    ----------
    model : Model
    loss : str
    algebra : Algebra
        How columns are joined, multiplied and factorized.
    accumulation : Accumulation
    mode : Mode
        Forward or reverse, for the Jacobian.
    point, f_scale
        As for ``RowTerms``.
    """

    def __init__(
        self,
        model: Model,
        loss: str,
        algebra: Algebra,
        accumulation: Accumulation,
        mode: Mode,
        point: Any,
        f_scale: Any,
    ) -> None:
        super().__init__(model, loss, point, f_scale)
        self._accumulation = accumulation
        self._algebra = algebra
        self._linearized = residual_and_jacobian(model, mode, algebra.is_stacked)

    def contribution(self, rows: Rows, target: Any, usable: Any) -> tuple[Any, Any]:
        """Return the model's values, and the transposed Jacobian with the residual as last row."""
        values, columns = self._linearized(rows.x, target, *self._point)
        if rows.sigma is not None:
            weight = 1 / rows.sigma.astype(self._model.dtype)
            columns = jax.tree.map(lambda column: column * weight, columns)
        if usable is not None:
            # Masked after the computation, so that a NaN in a masked row does not spread.
            columns = jax.tree.map(lambda column: jnp.where(usable, column, 0), columns)
        return values, columns

    def add(self, sums: Any, contribution: Any) -> Any:
        """Return the running sums after adding a contribution."""
        matrix, residuals = sums
        columns, residual = contribution, contribution[-1]
        jacobian_scale: Any = 1
        residual_scale: Any = 1
        if self._loss != LINEAR:
            _, factors = self._point
            terms, jacobian_scale, residual_scale = self._robust(residual, factors[-1])
            n_lanes = residuals.shape[-1]
            ones = jnp.ones_like(terms)
            totals = dot(terms, ones, n_lanes), dot(residual, residual, n_lanes)
            residuals = residuals + jnp.stack(totals).astype(residuals.dtype)
        is_scores = self._accumulation is Accumulation.SCORES
        if is_scores:
            jacobian_scale = residual * (jacobian_scale * residual_scale)
        is_scaled = is_scores or self._loss != LINEAR
        if is_scaled:
            scaled = jax.tree.map(lambda column: column * jacobian_scale, columns[:-1])
            columns = self._algebra.join(scaled, residual * residual_scale)
        if self._accumulation.is_factorized:
            return self._factorized(matrix, columns, residual)[..., None], residuals
        new = self._algebra.gram(columns, residual if is_scaled else None, matrix.shape[-1])
        return add_gram(jnp, matrix, new.astype(matrix.dtype)), residuals

    def is_finite(self, sums: Any) -> Any:
        """Return whether the accumulated matrix is finite, which its diagonal shows."""
        return jnp.isfinite(jnp.trace(sums[0])).all()

    def partial(self, sums: Any) -> Any:
        """Return float32 sums for a float32 model, whose total is then added in float64.

        A range of strips is short enough for that. In float64, strips are added to the sums one by
        one, so that the bits of the result do not depend on the ranges.
        """
        dtype, matrix = self._model.dtype, sums[0]
        if matrix.shape[-1] == 1 or dtype == matrix.dtype:
            return None
        return jax.tree.map(lambda array: jnp.zeros(array.shape, dtype), sums)

    def add_partial(self, sums: Any, partial: Any) -> Any:
        """Return running sums after adding the float32 sums of a range of strips."""
        matrix, residuals = sums
        gram, more = (array.astype(matrix.dtype) for array in partial)
        return add_gram(jnp, matrix, gram), residuals + more

    def _factorized(self, matrix: Any, columns: Any, residual: Any) -> Any:
        """Return the factor R in ``matrix`` after appending rows.

        ``residual`` updates element (p, 0), the largest r^2.
        """
        append_rows = self._algebra.append_rows
        columns = jax.tree.map(lambda column: column.astype(matrix.dtype), columns)
        triangle = jnp.triu(matrix[..., 0])
        if self._accumulation is not Accumulation.ROOT:
            new = append_rows(triangle, columns)
        else:
            root = append_rows(triangle[:-1, :-1], columns[:-1])
            stacked = jnp.stack(columns) if isinstance(columns, list) else columns
            column = jnp.matmul(stacked, stacked[-1], precision=lax.Precision.HIGHEST)
            new = jnp.pad(root, ((0, 1), (0, 1))).at[:, -1].set(triangle[:, -1] + column)
        largest = jnp.maximum(matrix[-1, 0, 0], (residual**2).max())
        return new.at[-1, 0].set(largest)
