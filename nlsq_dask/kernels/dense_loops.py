"""``DenseLoops``: JAX code that adds ``J^T J`` and ``J^T r`` over rows, a strip at a time.

A strip is a run of rows that fits a core's cache. The residual of a strip is stacked below the rows
of its transposed Jacobian, so that one matrix product gives ``J^T J``, ``J^T r`` and ``r^T r``.
"""

from __future__ import annotations

from enum import Enum
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.kernels.losses import LINEAR
from nlsq_dask.kernels.strip_loops import (
    StripLoops,
    dot,
    lane_sums,
)
from nlsq_dask.kernels.tsqr import append_rows
from nlsq_dask.model.jacobian import residual_and_jacobian
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.rows.rows import Rows

_MAX_IN_LANES = 6  # rows of the Gram matrix, p + 1


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


def n_gram_lanes(n_params: int, n_lanes: int, accumulation: Accumulation) -> int:
    """Return how many partial sums of the matrix are kept.

    One per SIMD lane for the Gram matrix of few parameters, otherwise 1.
    """
    is_in_lanes = n_params < _MAX_IN_LANES and not accumulation.is_factorized
    return n_lanes if is_in_lanes else 1


def add_gram(library: Any, gram: Any, other: Any) -> Any:
    """Add two Gram matrices; element (p, 0), the largest r^2, is the maximum of both.

    ``library`` is ``numpy`` or ``jax.numpy``.
    """
    n_rows = len(gram)
    keeps_largest = np.zeros((n_rows, n_rows, 1), bool)
    keeps_largest[-1, 0] = True
    larger = library.where(gram > other, gram, other)
    return library.where(keeps_largest, larger, gram + other)


def _gram(stacked: Any, residual: Any, n_lanes: int) -> Any:
    """Return ``stacked @ stacked.T`` as described at ``Accumulation``, in partial sums.

    ``stacked`` is the transposed Jacobian with the residual as last row. The last axis of the
    result has the ``n_lanes`` partial sums. Element (p, 0) is the largest square of ``residual``
    or, if that is None, of the last row of ``stacked``.
    """
    n_rows = len(stacked)
    if n_lanes == 1:
        product = jnp.matmul(stacked, stacked.T, precision=lax.Precision.HIGHEST)[..., None]
        last_row = stacked[-1] if residual is None else residual
        return product.at[-1, 0, 0].set((last_row**2).max())
    slices = stacked.reshape(n_rows, -1, n_lanes)

    def row(i: int) -> Any:
        return lane_sums(slices.shape[1], lambda k: slices[i:, k] * slices[i, k])

    def last(k: int) -> Any:
        return slices[-1, k] if residual is None else residual.reshape(-1, n_lanes)[k]

    squares = (last(k) * last(k) for k in range(slices.shape[1]))
    largest = reduce(lambda a, b: jnp.where(a > b, a, b), squares)
    rows = [jnp.pad(row(i), ((i, 0), (0, 0))) for i in range(n_rows - 1)]
    between = jnp.zeros((n_rows - 2, n_lanes), stacked.dtype)
    return jnp.stack([*rows, jnp.concatenate([largest[None], between, row(n_rows - 1)])])


class DenseLoops(StripLoops):
    """Loops that add strips of rows to the matrix of an ``Accumulation`` and sums of residuals.

    ``point``, an argument of ``StripLoops``, consists of the parameters, and the factors by which
    the columns of the Jacobian and the residual are multiplied.

    Parameters
    ----------
    model : Model
    loss : str
    strip_rows : int
    *args
        As for ``StripLoops``.
    accumulation : Accumulation
    panel_rows : int
        Rows per QR factorization.
    mode : Mode
        Forward or reverse, for the Jacobian.
    """

    def __init__(
        self,
        model: Model,
        loss: str,
        strip_rows: int,
        *args: Any,
        accumulation: Accumulation,
        panel_rows: int,
        mode: Mode,
    ) -> None:
        super().__init__(model, loss, strip_rows, *args)
        self._accumulation = accumulation
        self._panel_rows = panel_rows
        self._linearized = residual_and_jacobian(model, mode)

    def contribution(self, rows: Rows, target: Any, usable: Any) -> tuple[Any, Any]:
        """Return the model's values, and the transposed Jacobian with the residual as last row."""
        values, stacked = self._linearized(rows.x, target, *self._point)
        if rows.sigma is not None:
            stacked = stacked * (1 / rows.sigma.astype(self._model.dtype))
        if usable is not None:
            # Masked after the computation, so that a NaN in a masked row does not spread.
            stacked = jnp.where(usable, stacked, 0)
        return values, stacked

    def add(self, sums: Any, contribution: Any) -> Any:
        """Return the running sums after adding a strip."""
        matrix, residuals = sums
        stacked, residual = contribution, contribution[-1]
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
            scaled = stacked[:-1] * jacobian_scale, (residual * residual_scale)[None]
            stacked = jnp.concatenate(scaled)
        if self._accumulation.is_factorized:
            return self._factorized(matrix, stacked, residual)[..., None], residuals
        new = _gram(stacked, residual if is_scaled else None, matrix.shape[-1])
        return add_gram(jnp, matrix, new.astype(matrix.dtype)), residuals

    def is_finite(self, sums: Any) -> Any:
        """Return whether the accumulated matrix is finite, which its diagonal shows."""
        return jnp.isfinite(jnp.trace(sums[0])).all()

    def add_unmasked_range(self, start: Any, end: Any, sums: Any) -> Any:
        """Add strips ``start`` to ``end``, excluded, as if all their rows were usable.

        For a float32 model, the range is summed in float32 and the total added in float64; a range
        is short enough for that. In float64, strips are added to the sums one by one, so that the
        bits of the result do not depend on the ranges.
        """
        dtype, matrix = self._model.dtype, sums[0]
        if matrix.shape[-1] == 1 or dtype == matrix.dtype:
            return super().add_unmasked_range(start, end, sums)
        zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, dtype), sums)
        partial = super().add_unmasked_range(start, end, zeros)
        gram, residuals = (array.astype(matrix.dtype) for array in partial)
        return add_gram(jnp, matrix, gram), sums[1] + residuals

    def _factorized(self, matrix: Any, stacked: Any, residual: Any) -> Any:
        """Return the factor R in ``matrix`` after appending the rows of a strip.

        ``stacked`` has these rows as columns. ``residual`` updates element (p, 0), the largest r^2.
        """
        triangle, stacked = jnp.triu(matrix[..., 0]), stacked.astype(matrix.dtype)
        if self._accumulation is not Accumulation.ROOT:
            new = append_rows(triangle, stacked, self._panel_rows)
        else:
            root = append_rows(triangle[:-1, :-1], stacked[:-1], self._panel_rows)
            column = jnp.matmul(stacked, stacked[-1], precision=lax.Precision.HIGHEST)
            new = jnp.pad(root, ((0, 1), (0, 1))).at[:, -1].set(triangle[:, -1] + column)
        largest = jnp.maximum(matrix[-1, 0, 0], (residual**2).max())
        return new.at[-1, 0].set(largest)
