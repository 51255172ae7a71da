"""``RowTerms``: JAX code for the terms that rows contribute to running sums.

It serves the strips of rows that a CPU adds up one after the other, and the batches of some million
rows that a GPU adds up at once. Subclasses define which sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax.numpy as jnp

from nlsq_dask.kernels.losses import rho, robust
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows


def lane_sums(n_slices: int, take: Callable[[int], Any]) -> Any:
    """Return ``take(0) + ... + take(n_slices - 1)``, an array with one element per SIMD lane.

    ``take(i)`` computes the terms of slice i of a strip. XLA fuses such a sum into one loop that
    stores no intermediate products.
    """
    return reduce(add, map(take, range(n_slices)))


def dot(a: Any, b: Any, n_lanes: int) -> Any:
    """Return the sum of ``a * b`` as ``n_lanes`` partial sums.

    A single sum is in float64: it may be that of millions of rows.
    """
    if n_lanes == 1:
        return (a * b).sum(dtype=jnp.float64)[None]
    a, b = (array.reshape(-1, n_lanes) for array in (a, b))
    return lane_sums(len(a), lambda k: a[k] * b[k])


class RowTerms(ABC):
    """Terms of some rows in the sums of a reduction, and in those that all reductions have.

    Parameters
    ----------
    model : Model
    loss : str
        Name of the loss.
    point : tuple of array
        The parameters, and the other arrays that a subclass needs, in the model's dtype.
    f_scale : array
        Scale of the loss.
    """

    def __init__(self, model: Model, loss: str, point: Any, f_scale: Any) -> None:
        self._model = model
        self._loss = loss
        self._point = point
        self._f_scale = f_scale

    @abstractmethod
    def contribution(self, rows: Rows, target: Any, usable: Any) -> tuple[Any, Any]:
        """Return the model's values, and what ``add`` needs of these rows.

        Parameters
        ----------
        rows : Rows
        target : array, shape (b,)
            y in the model's dtype; NaN at unusable rows if ``usable`` is None.
        usable : array of bool, shape (b,), or None
            Rows to use. If None, no row is excluded, so that an unusable row gives NaN.
        """

    @abstractmethod
    def add(self, sums: Any, contribution: Any) -> Any:
        """Return the running sums after adding a contribution."""

    @abstractmethod
    def is_finite(self, sums: Any) -> Any:
        """Return whether the running sums are finite."""

    def partial(self, sums: Any) -> Any:
        """Return sums over no rows, in which to add up some strips before they are added to others.

        None if each strip is to be added to the running sums ``sums`` themselves.
        """
        return None

    def add_partial(self, sums: Any, partial: Any) -> Any:
        """Return running sums after adding those that began with the result of ``partial``."""
        raise NotImplementedError

    def add_unmasked(self, rows: Rows, sums: Any) -> Any:
        """Add rows as if all were usable; the sums become NaN if one is not."""
        return self.add(sums, self.contribution(rows, self._y_with_nan(rows), None)[1])

    def add_masked(self, rows: Rows, in_batch: Any, sums: Any, counts: Any) -> Any:
        """Return sums and row counts after adding the usable ones of the rows.

        Parameters
        ----------
        rows : Rows
        in_batch : array of bool, shape (b,)
            False for rows that are padding.
        sums, counts : pytree
            See ``Carry``.
        """
        usable = self.usable(rows, in_batch)
        values, contribution = self.contribution(rows, rows.y.astype(self._model.dtype), usable)
        none = jnp.zeros((), bool)
        left_out = none if rows.mask is None else in_batch & rows.mask
        bad_sigma = none if rows.sigma is None else usable & (rows.sigma <= 0)
        flags = (usable, usable & ~jnp.isfinite(values), left_out, bad_sigma)
        counted = jnp.stack([jnp.sum(flag, dtype=jnp.int64) for flag in flags])
        return self.add(sums, contribution), counts + counted

    def moments(self, rows: Rows, usable: Any, y0: Any, n_lanes: int) -> Any:
        """Return the sums of ``w``, ``w (y - y0)`` and ``w (y - y0)^2`` with ``w = 1 / sigma^2``.

        ``usable`` is as for ``contribution``. The result has the shape (3, n_lanes).
        """
        offset: Any = rows.y.astype(jnp.float64) - y0
        weight: Any = jnp.ones(offset.shape)
        if rows.sigma is not None:
            weight = 1 / rows.sigma.astype(jnp.float64) ** 2
        if usable is not None:
            offset, weight = (jnp.where(usable, array, 0) for array in (offset, weight))
        pairs = (weight, jnp.ones_like(offset)), (weight, offset), (weight * offset, offset)
        return jnp.stack([dot(a, b, n_lanes) for a, b in pairs])

    def cost(self, rows: Rows, usable: Any, candidate: Any, n_lanes: int) -> Any:
        """Return ``sum rho(z)``, with ``z = (r / f_scale)^2``, at other parameters."""
        residual = self._model(rows.x, candidate).astype(jnp.float64) - rows.y
        if rows.sigma is not None:
            residual = residual / rows.sigma
        residual = jnp.where(usable, residual, 0)
        terms = rho(self._loss, (residual / self._f_scale) ** 2)
        return dot(terms, jnp.ones_like(terms), n_lanes)

    def usable(self, rows: Rows, in_batch: Any) -> Any:
        """Return a boolean array that is True for rows that are finite and not masked."""
        usable = in_batch & jnp.isfinite(rows.y)
        for leaf in rows.x:
            usable &= jnp.isfinite(leaf) if leaf.ndim == 1 else jnp.isfinite(leaf).all(axis=1)
        if rows.sigma is not None:
            usable &= jnp.isfinite(rows.sigma)
        if rows.mask is not None:
            usable &= ~rows.mask
        return usable

    def _robust(self, residual: Any, factor: Any) -> Any:
        """Return rho, and the factors by which Jacobian and residual are multiplied, per row.

        In float32, residuals are scaled to avoid overflow: ``residual`` is already multiplied by
        ``factor``. The results do not depend on it.
        """
        unit = factor * self._f_scale
        return robust(self._loss, (residual * (1 / unit).astype(residual.dtype)) ** 2)

    def _y_with_nan(self, rows: Rows) -> Any:
        """Return y with NaN at the unusable rows."""
        dtype = self._model.dtype
        y: Any = rows.y.astype(dtype)
        for leaf in rows.x:
            zeros = 0 * leaf.astype(dtype)  # NaN for NaN and infinity
            y += zeros if leaf.ndim == 1 else zeros.sum(axis=1)
        if rows.sigma is not None:
            is_good = (rows.sigma > 0) & (rows.sigma < jnp.inf)
            y = jnp.where(is_good, y, jnp.nan)
        if rows.mask is not None:
            y = jnp.where(rows.mask, jnp.nan, y)
        return y


# Returns the terms at a point, given ``point`` and ``f_scale`` of ``RowTerms``.
MakeTerms = Callable[[Any, Any], RowTerms]
