"""``StripLoops``: JAX code that adds a batch of rows to running sums, a strip at a time.

A strip is a run of rows that fits a core's cache. Subclasses define which sums: the contribution of
a strip, and how it is added to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nlsq_dask.kernels.losses import rho, robust
from nlsq_dask.model.jax_scope import CPU
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import STRIP_ROWS, Rows

_STRIPS_PER_CHECK = 16  # strips between checks for finite sums
_GPU_STRIP_ROWS = 2**18
# Number of parallel running sums on a CPU (SIMD lanes). XLA vectorizes sums by itself only in a
# matrix product, whose setup dominates for few columns.
_LANES = 128

# Running sums:
# - sums: totals of the subclass, from residuals and derivatives;
# - counts (4,): rows used, rows with a non-finite model, masked rows, rows with invalid sigma;
# - moments (3, lanes): sums of w, w (y - y0) and w (y - y0)^2;
# - costs (candidates, lanes): sums of rho(z) at the candidates.
Carry = tuple[Any, Any, Any, Any]


def strip_rows_for(batch_rows: int, platform: str) -> int:
    """Return the number of rows of a strip, the part of a batch that is processed at a time."""
    return min(STRIP_ROWS if platform == CPU else _GPU_STRIP_ROWS, batch_rows)


def lanes_for(batch_rows: int, platform: str) -> int:
    """Return the number of partial sums that are kept in parallel, one per SIMD lane."""
    return min(_LANES, strip_rows_for(batch_rows, platform)) if platform == CPU else 1


def lane_sums(n_slices: int, take: Callable[[int], Any]) -> Any:
    """Return ``take(0) + ... + take(n_slices - 1)``, an array with one element per SIMD lane.

    ``take(i)`` computes the terms of slice i of a strip. XLA fuses such a sum into one loop that
    stores no intermediate products.
    """
    return reduce(add, map(take, range(n_slices)))


def dot(a: Any, b: Any, n_lanes: int) -> Any:
    """Return the sum of ``a * b`` as ``n_lanes`` partial sums."""
    if n_lanes == 1:
        return (a * b).sum()[None]
    a, b = (array.reshape(-1, n_lanes) for array in (a, b))
    return lane_sums(len(a), lambda k: a[k] * b[k])


class StripLoops(ABC):
    """Loops that add the rows of one batch to running sums, a strip of rows at a time.

    A program runs them one after the other: first the sums of the subclass, then moments and costs.

    Parameters
    ----------
    model : Model
    loss : str
        Name of the loss.
    strip_rows : int
    point : tuple of array
        The parameters, and the other arrays that a subclass needs, in the model's dtype.
    f_scale : array
        Scale of the loss.
    n_rows : array
        Number of rows of the batch that are not padding.
    arrays, offsets : pytree
        y, x, sigma and mask, and the index in each of the first row of the batch.
    """

    def __init__(
        self,
        model: Model,
        loss: str,
        strip_rows: int,
        point: Any,
        f_scale: Any,
        n_rows: Any,
        arrays: Any,
        offsets: Any,
    ) -> None:
        self._model = model
        self._loss = loss
        self._strip_rows = strip_rows
        self._point = point
        self._f_scale = f_scale
        self._n_rows = n_rows
        self._arrays = arrays
        self._offsets = offsets
        self._n_full = n_rows // strip_rows
        self._n_strips = (n_rows + strip_rows - 1) // strip_rows

    @abstractmethod
    def contribution(self, rows: Rows, target: Any, usable: Any) -> tuple[Any, Any]:
        """Return the model's values at the rows of a strip, and what ``add`` needs of them.

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
        """Return the running sums after adding the contribution of a strip."""

    @abstractmethod
    def is_finite(self, sums: Any) -> Any:
        """Return whether the running sums are finite."""

    def add_unmasked(self, i: Any, sums: Any) -> Any:
        """Add a strip as if all its rows were usable; the sums become NaN if one is not."""
        rows = self._rows(i)
        return self.add(sums, self.contribution(rows, self._y_with_nan(rows), None)[1])

    def add_unmasked_range(self, start: Any, end: Any, sums: Any) -> Any:
        """Add a range of strips as if all their rows were usable."""
        return lax.fori_loop(start, end, self.add_unmasked, sums)

    def add_strips(self, sums: Any, counts: Any) -> Any:
        """Return sums and row counts after adding all strips, and how many strips needed no mask.

        Unusable rows are masked only after the first of them makes the sums NaN: most batches have
        none, and checking the sums is cheaper than masking.
        """

        def add_range(state: Any) -> Any:
            i, _, sums = state
            end = jnp.minimum(i + _STRIPS_PER_CHECK, self._n_full)
            new = self.add_unmasked_range(i, end, sums)
            is_finite = self.is_finite(new)
            kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, sums)
            return jnp.where(is_finite, end, i), is_finite, kept

        def add_masked(i: Any, state: Any) -> Any:
            sums, counts = state
            rows = self._rows(i)
            usable = self._usable(i, rows)
            values, contribution = self.contribution(rows, rows.y.astype(self._model.dtype), usable)
            none = jnp.zeros((), bool)
            left_out = none if rows.mask is None else self._in_batch(i) & rows.mask
            bad_sigma = none if rows.sigma is None else usable & (rows.sigma <= 0)
            flags = (usable, usable & ~jnp.isfinite(values), left_out, bad_sigma)
            counted = jnp.stack([jnp.sum(flag, dtype=jnp.int64) for flag in flags])
            return self.add(sums, contribution), counts + counted

        start = (jnp.zeros((), jnp.int64), jnp.ones((), bool), sums)
        n_unmasked, _, sums = lax.while_loop(
            lambda s: s[1] & (s[0] < self._n_full), add_range, start
        )
        counts = counts.at[0].add(n_unmasked * self._strip_rows)
        return *lax.fori_loop(n_unmasked, self._n_strips, add_masked, (sums, counts)), n_unmasked

    def _robust(self, residual: Any, factor: Any) -> Any:
        """Return rho, and the factors by which Jacobian and residual are multiplied, per row.

        In float32, residuals are scaled to avoid overflow: ``residual`` is already multiplied by
        ``factor``. The results do not depend on it.
        """
        unit = factor * self._f_scale
        return robust(self._loss, (residual * (1 / unit).astype(residual.dtype)) ** 2)

    def add_moments(self, moments: Any, y0: Any, n_unmasked: Any) -> Any:
        """Add the sums of ``w``, ``w (y - y0)`` and ``w (y - y0)^2`` with ``w = 1 / sigma^2``.

        The first ``n_unmasked`` strips have only usable rows.
        """

        def add(i: Any, moments: Any, is_masked: bool) -> Any:
            rows = self._rows(i)
            offset: Any = rows.y.astype(jnp.float64) - y0
            weight: Any = jnp.ones(self._strip_rows)
            if rows.sigma is not None:
                weight = 1 / rows.sigma.astype(jnp.float64) ** 2
            if is_masked:
                usable = self._usable(i, rows)
                offset, weight = (jnp.where(usable, array, 0) for array in (offset, weight))
            pairs = (weight, jnp.ones_like(offset)), (weight, offset), (weight * offset, offset)
            return moments + jnp.stack([dot(a, b, moments.shape[-1]) for a, b in pairs])

        moments = lax.fori_loop(0, n_unmasked, lambda i, m: add(i, m, False), moments)
        return lax.fori_loop(n_unmasked, self._n_strips, lambda i, m: add(i, m, True), moments)

    def add_costs(self, costs: Any, candidates: Any, n_candidates: Any) -> Any:
        """Add ``sum rho(z)``, with ``z = (r / f_scale)^2``, at the first candidates.

        Candidates are parameters at which no other sums are needed.
        """

        def add(step: Any, costs: Any) -> Any:
            i, k = step // n_candidates, step % n_candidates
            rows = self._rows(i)
            residual = self._model(rows.x, candidates[k]).astype(jnp.float64) - rows.y
            if rows.sigma is not None:
                residual = residual / rows.sigma
            residual = jnp.where(self._usable(i, rows), residual, 0)
            terms = rho(self._loss, (residual / self._f_scale) ** 2)
            return costs.at[k].add(dot(terms, jnp.ones_like(terms), costs.shape[-1]))

        return lax.fori_loop(0, self._n_strips * n_candidates, add, costs)

    def _rows(self, i: Any) -> Rows:
        size = self._strip_rows
        return Rows(
            *jax.tree.map(
                lambda array, offset: lax.dynamic_slice_in_dim(array, offset + i * size, size),
                self._arrays,
                self._offsets,
            )
        )

    def _in_batch(self, i: Any) -> Any:
        return i * self._strip_rows + jnp.arange(self._strip_rows) < self._n_rows

    def _usable(self, i: Any, rows: Rows) -> Any:
        """Return a boolean array that is True for rows that are finite and not masked."""
        usable = self._in_batch(i) & jnp.isfinite(rows.y)
        for leaf in rows.x:
            usable &= jnp.isfinite(leaf) if leaf.ndim == 1 else jnp.isfinite(leaf).all(axis=1)
        if rows.sigma is not None:
            usable &= jnp.isfinite(rows.sigma)
        if rows.mask is not None:
            usable &= ~rows.mask
        return usable

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


MakeLoops = Callable[..., StripLoops]


def accumulator(make_loops: MakeLoops, dtype: str) -> Callable[..., Carry]:
    """Return the function that a kernel compiles: it adds a batch of rows to the running sums.

    Parameters
    ----------
    make_loops : callable
        Subclass of ``StripLoops`` whose arguments model, loss and strip_rows are already bound.
    dtype : str
        dtype of the model.
    """

    def accumulate(
        carry: Carry, point: Any, options: Any, n_rows: Any, arrays: Any, offsets: Any
    ) -> Carry:
        *point, candidates = (array.astype(dtype) for array in point)
        y0, f_scale, wants_moments, n_candidates = options
        sums, counts, moments, costs = carry
        loops = make_loops(point, f_scale, n_rows, arrays, offsets)
        sums, counts, n_unmasked = loops.add_strips(sums, counts)
        moments = lax.cond(
            wants_moments, lambda: loops.add_moments(moments, y0, n_unmasked), lambda: moments
        )
        return sums, counts, moments, loops.add_costs(costs, candidates, n_candidates)

    return accumulate
