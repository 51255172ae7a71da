"""``rounding_scale``: how strongly rounding errors change the residuals of a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jacobian import choose_mode, residual_and_jacobian
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows


def rounding_scale(model: Model, rows: Rows, params: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the change of each weighted residual per relative rounding error.

    It is ``(|y_i| + |f_i| + sum_j |J_ij p_j| + sum_k |x_ik df_i/dx_ik|) / sigma_i`` for row i: the
    terms are rounding of y, of the values f of the model, of the parameters p, and of x.
    """
    with x64():
        factors = jnp.append(jnp.asarray(params), 1.0)
        x = tuple(jnp.asarray(leaf, model.dtype) for leaf in rows.x)
        y = jnp.asarray(rows.y, model.dtype)
        linearized = residual_and_jacobian(model, choose_mode(model, model.jaxpr()))
        values, stacked = jax.jit(linearized)(x, y, factors[:-1], factors)
        total = jnp.abs(y) + jnp.abs(values) + jnp.abs(stacked[:-1]).sum(axis=0)
        total += _rounding_of_x(model, x, factors[:-1])
    return np.asarray(total) / (1.0 if rows.sigma is None else rows.sigma)


def _rounding_of_x(model: Model, x: tuple[jax.Array, ...], params: jax.Array) -> jax.Array:
    """Return ``sum_k |x_ik df_i/dx_ik|``; zero for a model without forward-mode derivatives."""
    total = jnp.zeros(len(x[0]))
    for i, leaf in enumerate(x):
        # One column at a time: changes of several columns could cancel.
        for column in jnp.eye(1 if leaf.ndim == 1 else leaf.shape[1]):
            change = leaf * (column[0] if leaf.ndim == 1 else column)
            tangents = tuple(change if j == i else jnp.zeros_like(b) for j, b in enumerate(x))
            try:
                _, slope = jax.jvp(lambda *leaves: model(leaves, params), x, tangents)
            except TypeError:
                return jnp.zeros(len(x[0]))
            total += jnp.abs(slope)
    return total
