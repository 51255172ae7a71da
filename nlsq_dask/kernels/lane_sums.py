"""Sums over the points of many small fits at once, in JAX: ``J^T J``, ``J^T r`` and the cost.

Points come first and lanes last. The model sees one lane: its parameters are scalars there. Sums
are added in float64, also those of a float32 model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.kernels.losses import Loss, robust
from nlsq_dask.kernels.trigonometry import vectorized
from nlsq_dask.model.jacobian import residual_and_jacobian
from nlsq_dask.model.model import Mode, Model

_MAX_SEPARATE = 7  # columns of [J r] with separate products; with more, they are stacked first
_MIN_STRIP, _MAX_STRIP = 5, 10  # points that are processed at a time


class LaneData(NamedTuple):
    """Data of c lanes with n points each, n a multiple of the strip."""

    y: Any  # (n, c), not finite at points that are not used
    x: tuple[Any, ...]  # each (n, c), or (n,) or (n, k) if the lanes share it
    sigma: Any  # (n, c), (n, 1) or None


class LaneSums(NamedTuple):
    """Sums over the points of c lanes."""

    gram: Any  # upper triangle of [J r]^T [J r], row by row, (k (k + 1) / 2, c), k = p + 1
    cost: Any  # (c,)
    chi2: Any  # (c,)

    @property
    def is_finite(self) -> Any:
        """Which lanes have finite sums, (c,)."""
        return jnp.isfinite(self.gram).all(axis=0) & jnp.isfinite(self.cost)


class LaneFactors(NamedTuple):
    """QR factorization of the Jacobian of c lanes, with columns and rows scaled as the sums."""

    triangle: Any  # R of [J r], (k, k, c), k = p + 1
    scores: Any  # sum of r^2 q q^T over the rows q of Q, (p, p, c)
    cost: Any  # (c,)
    chi2: Any  # (c,)


def strip_points(n_points: int) -> int:
    """Return how many points are processed at a time: the number that needs least padding."""
    sizes = range(_MAX_STRIP, _MIN_STRIP - 1, -1)
    return min(sizes, key=lambda size: -(-n_points // size) * size)


def padded_points(n_points: int) -> int:
    """Return the number of points including padding, a multiple of ``strip_points``."""
    size = strip_points(n_points)
    return -(-n_points // size) * size


def triangle_indices(k: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where each element of a symmetric matrix is in its upper triangle, shape (k, k)."""
    indices = np.zeros((k, k), np.int64)
    indices[np.triu_indices(k)] = np.arange(k * (k + 1) // 2)
    return np.maximum(indices, indices.T)


@dataclass(frozen=True)
class LaneSummation:
    """Function of data and parameters that returns the ``LaneSums``, for a traced program."""

    model: Model
    mode: Mode  # of differentiation
    loss: Loss
    x_varies: tuple[bool, ...]  # which x arrays vary over the lanes
    strip: int  # points that are processed at a time

    def __call__(self, data: LaneData, params: Any) -> LaneSums:
        """Return the sums at ``params``, shape (p, c)."""
        n_points, n_lanes = data.y.shape
        columns_of = self._columns_of(params)

        def add(i: Any, sums: Any) -> Any:
            strip = jax.tree.map(
                lambda array: lax.dynamic_slice_in_dim(array, i * self.strip, self.strip), data
            )
            columns, more = columns_of(strip)
            return sums + _products(columns, more)

        k = len(params) + 1
        n_sums = k * (k + 1) // 2 + (0 if self.loss.is_linear else 2)
        sums = lax.fori_loop(0, n_points // self.strip, add, jnp.zeros((n_sums, n_lanes)))
        if self.loss.is_linear:
            return LaneSums(sums, 0.5 * sums[-1], sums[-1])
        return LaneSums(sums[:-2], 0.5 * self.loss.f_scale**2 * sums[-2], sums[-1])

    def factors(self, data: LaneData, params: Any, free: Any) -> LaneFactors:
        """Return the QR factorization at ``params``, shape (p, c).

        Columns of parameters that are not ``free``, shape (p, c), are zero.
        """
        columns, more = self._columns_of(params)(data)
        columns, more = jax.tree.map(lambda a: a.astype(jnp.float64), (columns, more))
        jacobian = jnp.stack(columns[:-1]) * free[:, None]
        residual = columns[-1]
        basis, triangle = gram_schmidt(jnp.concatenate([jacobian, residual[None]]))
        scores = basis[:-1] * residual
        rows = [(score * scores).sum(axis=1) for score in scores]
        square = (residual**2).sum(axis=0)
        cost, chi2 = 0.5 * square, square
        if more:
            cost = 0.5 * self.loss.f_scale**2 * more[0].sum(axis=0)
            chi2 = more[1].sum(axis=0)
        return LaneFactors(triangle, jnp.stack(rows), cost, chi2)

    def _columns_of(self, params: Any) -> Callable[[LaneData], tuple[list[Any], list[Any]]]:
        """Return the function from data to weighted columns of [J r].

        With a robust loss they are scaled, and rho and r^2 are returned, too.
        """
        point_terms = vectorized(self._point_terms())
        q = [params[i].astype(self.model.dtype) for i in range(self.model.n_params)]

        def columns_of(data: LaneData) -> tuple[list[Any], list[Any]]:
            columns = self._weighted(data, point_terms(data.x, data.y, q))
            if self.loss.is_linear:
                return columns, []
            residual = columns[-1]
            unit = jnp.asarray(1 / self.loss.f_scale, residual.dtype)
            rho, jacobian_scale, residual_scale = robust(self.loss.name, (residual * unit) ** 2)
            scaled = [column * jacobian_scale for column in columns[:-1]]
            return [*scaled, residual * residual_scale], [rho, residual**2]

        return columns_of

    def _point_terms(self) -> Callable[..., Any]:
        """Return the function of x, y and parameters of a strip to the columns of [J r].

        The model is vectorized first over lanes, then over points, if it can be called with one
        row. XLA then has arrays with the lanes last throughout; with several rows in each call it
        would transpose them.
        """
        p = self.model.n_params
        linearized = residual_and_jacobian(self.model, self.mode, is_stacked=False)
        ones = np.ones(p + 1, self.model.dtype)

        def of_rows(x: Any, y: Any, params: Any) -> Any:
            return linearized(x, y, params, ones)[1]

        if not self.model.accepts_one_row:
            axes = tuple(1 if varies else None for varies in self.x_varies)
            return jax.vmap(of_rows, (axes, 1, 0), out_axes=1)

        def of_row(x: Any, y: Any, params: Any) -> Any:
            columns = of_rows(tuple(leaf[None] for leaf in x), y[None], params)
            return [column[0] for column in columns]

        axes = tuple(0 if varies else None for varies in self.x_varies)
        return jax.vmap(jax.vmap(of_row, (axes, 0, 0)), (0, 0, None))

    def _weighted(self, strip: LaneData, columns: list[Any]) -> list[Any]:
        """Return the columns over sigma, zero at points that are not used."""
        is_used = jnp.isfinite(strip.y)
        if strip.sigma is not None:
            weight = 1 / strip.sigma
            columns = [column * weight for column in columns]
        # Masked after the computation, so that a NaN at a point that is not used does not spread.
        return [jnp.where(is_used, column, 0) for column in columns]


def _products(columns: list[Any], more: list[Any]) -> Any:
    """Return the upper triangle of a Gram matrix, and sums of ``more``, each below the other."""
    k, others = len(columns), [array.sum(axis=0) for array in more]
    if k <= _MAX_SEPARATE:
        products = [(a * b).sum(axis=0) for i, a in enumerate(columns) for b in columns[i:]]
        return jnp.stack(products + others).astype(jnp.float64)
    stacked = jnp.stack(columns).astype(jnp.float64)
    rows = [(stacked[i:] * stacked[i]).sum(axis=1) for i in range(k)]
    return jnp.concatenate([*rows, *(array[None].astype(jnp.float64) for array in others)])


def gram_schmidt(columns: Any) -> tuple[Any, Any]:
    """Return the QR factorization by modified Gram-Schmidt, of a matrix per lane.

    Parameters
    ----------
    columns : array, shape (k, n, c)

    Returns
    -------
    basis : array, shape (k, n, c)
        Orthonormal columns; zero where a column depends on those before it.
    triangle : array, shape (k, k, c)
        The factor R.
    """
    k = len(columns)

    def step(j: Any, carry: Any) -> Any:
        columns, triangle = carry
        column = columns[j]
        # Scaled, so that squares neither overflow nor underflow.
        largest = jnp.abs(column).max(axis=0)
        unit = jnp.where(largest > 0, largest, 1.0)
        norm = unit * jnp.sqrt(((column / unit) ** 2).sum(axis=0))
        basis = column / jnp.where(norm > 0, norm, 1.0)
        is_later = (jnp.arange(k) > j)[:, None]
        row = jnp.where(is_later, (columns * basis).sum(axis=1), 0.0)
        columns = (columns - basis * row[:, None]).at[j].set(basis)
        return columns, triangle.at[j].set(row.at[j].set(norm))

    start = columns, jnp.zeros((k, k, columns.shape[2]))
    result: tuple[Any, Any] = lax.fori_loop(0, k, step, start)
    return result
