"""``StripLoops``: JAX code that adds a batch of rows to running sums, a strip at a time.

A strip is a run of rows that fits a core's cache. This is how a CPU computes; loops are slow on a
GPU, see ``nlsq_dask.kernels.device_program``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nlsq_dask.kernels.row_terms import MakeTerms, RowTerms
from nlsq_dask.rows.rows import STRIP_ROWS, Rows

_STRIPS_PER_CHECK = 16  # strips between checks for finite sums
# Number of parallel running sums (SIMD lanes). XLA vectorizes sums by itself only in a matrix
# product, whose setup dominates for few columns.
_LANES = 128


def strip_rows_for(batch_rows: int) -> int:
    """Return the number of rows of a strip, the part of a batch that is processed at a time."""
    return min(STRIP_ROWS, batch_rows)


def lanes_for(batch_rows: int) -> int:
    """Return the number of partial sums that are kept in parallel, one per SIMD lane."""
    return min(_LANES, strip_rows_for(batch_rows))


class StripLoops:
    """Loops that add the rows of one batch to running sums, a strip of rows at a time.

    A program runs them one after the other: first the sums of the reduction, then moments and
    costs.

    Parameters
    ----------
    terms : RowTerms
        What the rows of a strip contribute.
    strip_rows : int
    n_rows : array
        Number of rows of the batch that are not padding.
    arrays, offsets : pytree
        y, x, sigma and mask, and the index in each of the first row of the batch.
    """

    def __init__(
        self, terms: RowTerms, strip_rows: int, n_rows: Any, arrays: Any, offsets: Any
    ) -> None:
        self._terms = terms
        self._strip_rows = strip_rows
        self._n_rows = n_rows
        self._arrays = arrays
        self._offsets = offsets
        self._n_full = n_rows // strip_rows
        self._n_strips = (n_rows + strip_rows - 1) // strip_rows

    def add_strips(self, sums: Any, counts: Any) -> Any:
        """Return sums and row counts after adding all strips, and how many strips needed no mask.

        Unusable rows are masked only after the first of them makes the sums NaN: most batches have
        none, and checking the sums is cheaper than masking.
        """

        def add_range(state: Any) -> Any:
            i, _, sums = state
            end = jnp.minimum(i + _STRIPS_PER_CHECK, self._n_full)
            new = self._add_unmasked_range(i, end, sums)
            is_finite = self._terms.is_finite(new)
            kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, sums)
            return jnp.where(is_finite, end, i), is_finite, kept

        def add_masked(i: Any, state: Any) -> Any:
            return self._terms.add_masked(self._rows(i), self._in_batch(i), *state)

        start = (jnp.zeros((), jnp.int64), jnp.ones((), bool), sums)
        n_unmasked, _, sums = lax.while_loop(
            lambda s: s[1] & (s[0] < self._n_full), add_range, start
        )
        counts = counts.at[0].add(n_unmasked * self._strip_rows)
        return *lax.fori_loop(n_unmasked, self._n_strips, add_masked, (sums, counts)), n_unmasked

    def _add_unmasked_range(self, start: Any, end: Any, sums: Any) -> Any:
        """Add strips ``start`` to ``end``, excluded, as if all their rows were usable."""

        def add(i: Any, sums: Any) -> Any:
            return self._terms.add_unmasked(self._rows(i), sums)

        partial = self._terms.partial(sums)
        if partial is None:
            return lax.fori_loop(start, end, add, sums)
        return self._terms.add_partial(sums, lax.fori_loop(start, end, add, partial))

    def add_moments(self, moments: Any, y0: Any, n_unmasked: Any) -> Any:
        """Add the moments; see ``RowTerms``.

        The first ``n_unmasked`` strips have only usable rows.
        """

        def add(i: Any, moments: Any, is_masked: bool) -> Any:
            rows = self._rows(i)
            usable = self._terms.usable(rows, self._in_batch(i)) if is_masked else None
            return moments + self._terms.moments(rows, usable, y0, moments.shape[-1])

        moments = lax.fori_loop(0, n_unmasked, lambda i, m: add(i, m, False), moments)
        return lax.fori_loop(n_unmasked, self._n_strips, lambda i, m: add(i, m, True), moments)

    def add_costs(self, costs: Any, candidates: Any, n_candidates: Any) -> Any:
        """Add the costs at the first candidates, points at which no other sums are needed."""

        def add(step: Any, costs: Any) -> Any:
            i, k = step // n_candidates, step % n_candidates
            rows = self._rows(i)
            usable = self._terms.usable(rows, self._in_batch(i))
            return costs.at[k].add(self._terms.cost(rows, usable, candidates[k], costs.shape[-1]))

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


def accumulator(make_terms: MakeTerms, dtype: str, strip_rows: int) -> Callable[..., Any]:
    """Return the function that is compiled for a CPU: it adds a batch of rows to running sums.

    Parameters
    ----------
    make_terms : callable
    dtype : str
        dtype of the model.
    strip_rows : int
    """

    def accumulate(
        carry: Any, point: Any, options: Any, n_rows: Any, arrays: Any, offsets: Any
    ) -> Any:
        *point, candidates = (array.astype(dtype) for array in point)
        y0, f_scale, wants_moments, n_candidates = options
        sums, counts, moments, costs = carry
        loops = StripLoops(make_terms(point, f_scale), strip_rows, n_rows, arrays, offsets)
        sums, counts, n_unmasked = loops.add_strips(sums, counts)
        moments = lax.cond(
            wants_moments, lambda: loops.add_moments(moments, y0, n_unmasked), lambda: moments
        )
        return sums, counts, moments, loops.add_costs(costs, candidates, n_candidates)

    return accumulate
