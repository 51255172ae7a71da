"""``GradientTerms``: JAX code that adds ``J^T r`` and ``J^T J v`` over rows.

Jacobian-vector products give J v and vector-Jacobian products J^T of that, so that the Jacobian
itself is never stored.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nlsq_dask.kernels.losses import LINEAR
from nlsq_dask.kernels.row_terms import RowTerms, dot
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows

_MAX_ENTRIES = 2**18  # of the per-row gradients in memory

# Running sums:
# - vectors (1 + directions, p): J^T r, and J^T J v for each direction;
# - residuals (2, lanes): sums of rho(z) and of r^2;
# - largest (): the largest r^2.


class GradientTerms(RowTerms):
    """Terms of rows in ``J^T r`` and ``J^T J v``, sums of residuals and the largest r^2.

    ``point``, an argument of ``RowTerms``, consists of the parameters and an array of vectors v.

    Parameters
    ----------
    model, loss
        As for ``RowTerms``.
    max_directions : int
        Number of vectors v whose products are computed at the same time.
    point, f_scale
        As for ``RowTerms``.
    """

    def __init__(
        self, model: Model, loss: str, max_directions: int, point: Any, f_scale: Any
    ) -> None:
        super().__init__(model, loss, point, f_scale)
        self._max_directions = max_directions

    def contribution(self, rows: Rows, target: Any, usable: Any) -> tuple[Any, Any]:
        """Return the model's values, and J^T r with J^T J v, rho and residuals of these rows."""
        params, directions = self._point
        x = rows.x if usable is None else _with_usable(rows.x, usable)
        values, push = jax.linearize(lambda q: self._model(x, q), params)
        pull = jax.linear_transpose(push, params)
        weight: Any = jnp.ones((), values.dtype)
        if rows.sigma is not None:
            weight = 1 / rows.sigma.astype(values.dtype)
        residual = (values - target) * weight
        if usable is not None:
            residual = jnp.where(usable, residual, 0)
            weight = jnp.where(usable, weight, 0)
        rho, slope, curvature = residual**2, residual, jnp.ones_like(residual)
        if self._loss != LINEAR:
            rho, jacobian_scale, residual_scale = self._robust(residual, jnp.ones(()))
            slope = residual * (jacobian_scale * residual_scale)
            curvature = jacobian_scale**2
        slope, curvature = slope * weight, weight**2 * curvature
        if len(directions) <= self._max_directions:
            changes = jax.vmap(push)(directions) * curvature
            (vectors,) = jax.vmap(pull)(jnp.concatenate([slope[None], changes]))
        else:
            products = lax.map(
                lambda v: pull(push(v) * curvature)[0], directions, batch_size=self._max_directions
            )
            vectors = jnp.concatenate([pull(slope)[0][None], products])
        if usable is not None:  # NaN if no row is usable
            vectors = jnp.where(usable.any(), vectors, 0)
        return values, (vectors, rho, residual)

    def add(self, sums: Any, contribution: Any) -> Any:
        """Return the running sums after adding a contribution."""
        (totals, residuals, largest), (vectors, rho, residual) = sums, contribution
        n_lanes = residuals.shape[-1]
        partial = dot(rho, jnp.ones_like(rho), n_lanes), dot(residual, residual, n_lanes)
        return (
            totals + vectors.astype(totals.dtype),
            residuals + jnp.stack(partial).astype(residuals.dtype),
            jnp.maximum(largest, (residual**2).max().astype(largest.dtype)),
        )

    def is_finite(self, sums: Any) -> Any:
        """Return whether the running sums are finite."""
        vectors, residuals, _ = sums
        return jnp.isfinite(vectors).all() & jnp.isfinite(residuals).all()


class DiagonalTerms(GradientTerms):
    """Terms of rows in the diagonal of ``J^T J`` in the place of a product ``J^T J v``.

    It is the sum of squares of the model's gradients, which are computed for some rows at a time.
    """

    def contribution(self, rows: Rows, target: Any, usable: Any) -> tuple[Any, Any]:
        """Return the model's values, and J^T r with diag(J^T J), rho and residuals."""
        values, (vectors, rho, residual) = super().contribution(rows, target, usable)
        params, _ = self._point
        x = rows.x if usable is None else _with_usable(rows.x, usable)
        weight: Any = jnp.ones_like(residual)
        if rows.sigma is not None:
            weight = 1 / rows.sigma.astype(values.dtype)
        if self._loss != LINEAR:
            weight = weight * self._robust(residual, jnp.ones(()))[1]
        if usable is not None:
            weight = jnp.where(usable, weight, 0)
        max_rows = max(_MAX_ENTRIES // self._model.n_params, 1)
        group_rows = min(1 << (max_rows.bit_length() - 1), len(residual))

        def of_row(row: Any, q: Any) -> Any:
            return self._model(tuple(leaf[None] for leaf in row), q)[0]

        def add(total: Any, group: Any) -> tuple[Any, None]:
            x, weight = group
            gradients = jax.vmap(jax.grad(of_row, argnums=1), (0, None))(x, params)
            return total + ((gradients * weight[:, None]) ** 2).sum(axis=0), None

        def split(array: Any) -> Any:
            return array.reshape(-1, group_rows, *array.shape[1:])

        start = jnp.zeros_like(params)
        diagonal, _ = lax.scan(add, start, jax.tree.map(split, (x, weight)))
        if usable is not None:
            diagonal = jnp.where(usable.any(), diagonal, 0)
        return values, (jnp.stack([vectors[0], diagonal]), rho, residual)


def _with_usable(x: tuple[Any, ...], usable: Any) -> tuple[Any, ...]:
    """Return x with each unusable row replaced by a usable one.

    With a NaN in x, a vector-Jacobian product is NaN even where its vector is zero.
    """
    first = jnp.argmax(usable)

    def replaced(leaf: Any) -> Any:
        counts = usable if leaf.ndim == 1 else usable[:, None]
        return jnp.where(counts, leaf, leaf[first])

    return tuple(map(replaced, x))
