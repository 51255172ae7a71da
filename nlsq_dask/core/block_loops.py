"""The loops over blocks of rows that make the sums of a kernel, as JAX traces them.

Jacobian and residual of a block are stacked, so that one matrix product gives ``J^T J``, ``J^T r``
and ``r^T r`` together. Blocks are small enough to stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nlsq_dask.core.devices import CPU
from nlsq_dask.core.jacobian import Mode, residual_and_jacobian
from nlsq_dask.core.model import Model
from nlsq_dask.core.rows import FIRST_ROWS, Rows

_STRETCH = 16  # blocks after which the sums are looked at
_GPU_BLOCK_ROWS = 2**18
BLOCK_ROWS = FIRST_ROWS  # rows in one matrix product; 1,000 to 2,000 were equally fast

# gram (p+1, p+1), counts (used, nonfinite, masked, bad_sigma), moments (weight, y_sum, y_square),
# costs (candidates,)
Carry = tuple[Any, Any, Any, Any]


def _sum(array: Any) -> Any:
    """Sum all entries, side by side in lanes, which XLA does not do of its own accord."""
    lanes = 32
    if array.size % lanes == 0:
        array = array.reshape(-1, lanes).sum(0)
    return array.sum()


class BlockLoops:
    """The loops over the blocks of a piece, all of which one program runs one after the other."""

    def __init__(
        self, model: Model, block_rows: int, mode: Mode, n_rows: Any, arrays: Any, offsets: Any
    ) -> None:
        self._model = model
        self._block_rows = block_rows
        self._linearized = residual_and_jacobian(model, mode)
        self._n_rows = n_rows
        self._arrays = arrays
        self._offsets = offsets
        self._n_full = n_rows // block_rows
        self._n_blocks = (n_rows + block_rows - 1) // block_rows

    def normal_equations(self, gram: Any, counts: Any, params: Any, factors: Any) -> Any:
        """Add to Gram matrix and counts, without masks up to the stretch that needs the first.

        Most pieces need none, and to find that out afterwards costs less than the masks. Returned
        with the sums is the number of blocks that needed no mask.
        """

        def stacked(rows: Rows, target: Any) -> Any:
            values, stacked = self._linearized(rows.x, target, params, factors)
            if rows.sigma is not None:
                stacked = stacked * (1 / rows.sigma.astype(self._model.dtype))
            return values, stacked

        def product(stacked: Any) -> Any:
            gram = jnp.matmul(stacked, stacked.T, precision=lax.Precision.HIGHEST)
            return gram.astype(jnp.float64)

        def plain(i: Any, gram: Any) -> Any:
            rows = self._rows(i)
            return gram + product(stacked(rows, self._poisoned(rows))[1])

        def stretch(state: Any) -> Any:
            i, _, gram = state
            end = jnp.minimum(i + _STRETCH, self._n_full)
            new = lax.fori_loop(i, end, plain, gram)
            is_plain = jnp.isfinite(new).all()
            return jnp.where(is_plain, end, i), is_plain, jnp.where(is_plain, new, gram)

        def masked(i: Any, state: Any) -> Any:
            gram, counts = state
            rows = self._rows(i)
            values, unmasked = stacked(rows, rows.y.astype(self._model.dtype))
            usable = self._usable(i, rows)
            nothing = jnp.zeros((), bool)
            left_out = nothing if rows.mask is None else self._in_piece(i) & rows.mask
            bad_sigma = nothing if rows.sigma is None else usable & (rows.sigma <= 0)
            flags = (usable, usable & ~jnp.isfinite(values), left_out, bad_sigma)
            counted = jnp.stack([jnp.sum(flag, dtype=jnp.int64) for flag in flags])
            # Masked after it was computed, not before: a NaN in a row left out must not spread.
            return gram + product(jnp.where(usable, unmasked, 0)), counts + counted

        start = (jnp.zeros((), jnp.int64), jnp.ones((), bool), gram)
        n_plain, _, gram = lax.while_loop(lambda s: s[1] & (s[0] < self._n_full), stretch, start)
        counts = counts.at[0].add(n_plain * self._block_rows)
        return *lax.fori_loop(n_plain, self._n_blocks, masked, (gram, counts)), n_plain

    def moments(self, moments: Any, y0: Any, n_plain: Any) -> Any:
        """Add to the sums of ``w``, ``w (y - y0)`` and ``w (y - y0)^2``."""

        def add(i: Any, moments: Any, is_masked: bool) -> Any:
            rows = self._rows(i)
            offset = rows.y.astype(jnp.float64) - y0
            weight: Any = jnp.ones(self._block_rows)
            if rows.sigma is not None:
                weight = 1 / rows.sigma.astype(jnp.float64) ** 2
            terms: Any = (weight, weight * offset, weight * offset**2)
            if is_masked:
                usable = self._usable(i, rows)
                terms = tuple(jnp.where(usable, term, 0) for term in terms)
            return moments + jnp.stack([_sum(term) for term in terms])

        moments = lax.fori_loop(0, n_plain, lambda i, m: add(i, m, False), moments)
        return lax.fori_loop(n_plain, self._n_blocks, lambda i, m: add(i, m, True), moments)

    def costs(self, costs: Any, candidates: Any, n_candidates: Any) -> Any:
        """Add to ``sum r^2`` at the first so many candidates."""

        def add(step: Any, costs: Any) -> Any:
            i, k = step // n_candidates, step % n_candidates
            rows = self._rows(i)
            residual = self._model(rows.x, candidates[k]).astype(jnp.float64) - rows.y
            if rows.sigma is not None:
                residual = residual / rows.sigma
            residual = jnp.where(self._usable(i, rows), residual, 0)
            return costs.at[k].add(_sum(residual**2))

        return lax.fori_loop(0, self._n_blocks * n_candidates, add, costs)

    def _rows(self, i: Any) -> Rows:
        size = self._block_rows
        return Rows(
            *jax.tree.map(
                lambda array, offset: lax.dynamic_slice_in_dim(array, offset + i * size, size),
                self._arrays,
                self._offsets,
            )
        )

    def _in_piece(self, i: Any) -> Any:
        return i * self._block_rows + jnp.arange(self._block_rows) < self._n_rows

    def _usable(self, i: Any, rows: Rows) -> Any:
        """Return, a row, whether it is neither masked nor has a NaN or infinity."""
        usable = self._in_piece(i) & jnp.isfinite(rows.y)
        for leaf in rows.x:
            usable &= jnp.isfinite(leaf) if leaf.ndim == 1 else jnp.isfinite(leaf).all(axis=1)
        if rows.sigma is not None:
            usable &= jnp.isfinite(rows.sigma)
        if rows.mask is not None:
            usable &= ~rows.mask
        return usable

    def _poisoned(self, rows: Rows) -> Any:
        """Return y, with NaN at each row that must not be used."""
        dtype = self._model.dtype
        poison: Any = rows.y.astype(dtype)
        for leaf in rows.x:
            nothing = 0 * leaf.astype(dtype)  # NaN for NaN and infinity
            poison += nothing if leaf.ndim == 1 else nothing.sum(axis=1)
        if rows.sigma is not None:
            is_good = (rows.sigma > 0) & (rows.sigma < jnp.inf)
            poison = jnp.where(is_good, poison, jnp.nan)
        if rows.mask is not None:
            poison = jnp.where(rows.mask, jnp.nan, poison)
        return poison


def accumulator(model: Model, piece_rows: int, mode: Mode, platform: str) -> Callable[..., Carry]:
    """Return the function that adds a piece of rows to running sums."""
    block_rows = min(BLOCK_ROWS if platform == CPU else _GPU_BLOCK_ROWS, piece_rows)

    def accumulate(
        carry: Carry, point: Any, options: Any, n_rows: Any, arrays: Any, offsets: Any
    ) -> Carry:
        params, factors, candidates = (array.astype(model.dtype) for array in point)
        y0, wants_moments, n_candidates = options
        gram, counts, moments, costs = carry
        loops = BlockLoops(model, block_rows, mode, n_rows, arrays, offsets)
        gram, counts, n_plain = loops.normal_equations(gram, counts, params, factors)
        moments = lax.cond(
            wants_moments, lambda: loops.moments(moments, y0, n_plain), lambda: moments
        )
        return gram, counts, moments, loops.costs(costs, candidates, n_candidates)

    return accumulate
