"""The loops over blocks of rows that make the sums of a kernel, as JAX traces them.

Jacobian and residual of a block are stacked, so that one product gives ``J^T J``, ``J^T r`` and
``r^T r`` together. Blocks are small enough to stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.core.devices import CPU
from nlsq_dask.core.jacobian import Mode, residual_and_jacobian
from nlsq_dask.core.losses import LINEAR, rho, robust
from nlsq_dask.core.model import Model
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.triangle import extended, merged, part_rows

_STRETCH = 16  # blocks after which the sums are looked at
_GPU_BLOCK_ROWS = 2**18
BLOCK_ROWS = 1024  # whose columns are in a core's cache; 1,000 to 2,000 were equally fast

# On a CPU sums run in so many lanes side by side. Of its own accord XLA does that only in a matrix
# product, which spends more time on preparations than on sums where there are few columns.
_LANES = 128
_MOST_IN_LANES = 6  # rows of the Gram matrix, p + 1


class Product(Enum):
    """What is made of Jacobian and residual, a square matrix of p + 1 columns.

    Only its upper triangle is of meaning; the largest r^2 is kept in the corner below. The last
    column of a ``ROOT`` is J^T r and r^T r.
    """

    GRAM = "gram"  # [J r]^T [J r]
    TRIANGLE = "triangle"  # R of the QR factorization of [J r]
    ROOT = "root"  # R of that of J; scaled by a robust loss, r spans too many orders for a column
    SCORES = "scores"  # R of J's rows times the derivative of the cost by the residual

    @property
    def is_factorized(self) -> bool:
        """Whether it comes from QR factorizations."""
        return self is not Product.GRAM


# Running sums, most of them in lanes:
# - product (p+1, p+1, lanes): see ``Product``;
# - residuals (2, lanes): sums of rho(z) and of r^2, nothing with the linear loss, where the Gram
#   product holds both;
# - counts (4,): rows used, rows where the model is not finite, masked rows, rows with bad sigma;
# - moments (3, lanes): sums of w, w (y - y0) and w (y - y0)^2;
# - costs (candidates, lanes): sums of rho(z) at further points.
Carry = tuple[tuple[Any, Any], Any, Any, Any]


def block_rows_for(piece_rows: int, platform: str) -> int:
    """Return how many rows are one block of a piece."""
    return min(BLOCK_ROWS if platform == CPU else _GPU_BLOCK_ROWS, piece_rows)


def no_rows(
    n_params: int, n_candidates: int, piece_rows: int, platform: str, product: Product
) -> Carry:
    """Return the sums over no rows at all."""
    n_rows = n_params + 1
    n_lanes = min(_LANES, block_rows_for(piece_rows, platform)) if platform == CPU else 1
    is_in_lanes = n_rows <= _MOST_IN_LANES and not product.is_factorized
    matrix = np.zeros((n_rows, n_rows, n_lanes if is_in_lanes else 1))
    residuals, counts = np.zeros((2, n_lanes)), np.zeros(4, np.int64)
    return (matrix, residuals), counts, np.zeros((3, n_lanes)), np.zeros((n_candidates, n_lanes))


def combined(one: Carry, other: Carry, product: Product) -> Carry:
    """Return the sums over the rows of both, in NumPy."""
    (matrix, residuals), *rest = one
    (other_matrix, other_residuals), *other_rest = other
    counts, moments, costs = (a + b for a, b in zip(rest, other_rest, strict=True))
    total = _add_gram(np, matrix, other_matrix)
    if product.is_factorized:
        end = -1 if product is Product.ROOT else None
        largest = total[-1, 0, 0]
        total[:end, :end, 0] = merged(matrix[:end, :end, 0], other_matrix[:end, :end, 0])
        total[-1, 0, 0] = largest
    return (total, residuals + other_residuals), counts, moments, costs


def _add_gram(library: Any, gram: Any, other: Any) -> Any:
    """Add two Gram matrices, and take the larger of the two r^2 that they keep."""
    n_rows = len(gram)
    keeps_largest = np.zeros((n_rows, n_rows, 1), bool)
    keeps_largest[-1, 0] = True
    larger = library.where(gram > other, gram, other)
    return library.where(keeps_largest, larger, gram + other)


def _lane_sums(n_parts: int, part: Callable[[int], Any]) -> Any:
    """Add parts of a block. Each is to be cut out in one step before anything is done with it.

    XLA then makes one loop of it all and keeps no products in memory.
    """
    return reduce(add, map(part, range(n_parts)))


def _dot(a: Any, b: Any, n_lanes: int) -> Any:
    """Sum ``a * b`` in lanes."""
    if n_lanes == 1:
        return (a * b).sum()[None]
    a, b = (array.reshape(-1, n_lanes) for array in (a, b))
    return _lane_sums(len(a), lambda k: a[k] * b[k])


def _gram(stacked: Any, residual: Any, n_lanes: int) -> Any:
    """Return the products of all pairs of rows, as ``Product`` has them.

    What is below the diagonal is of no meaning, except for the largest square of ``residual``; that
    is the last row if it is None.
    """
    n_rows = len(stacked)
    if n_lanes == 1:
        product = jnp.matmul(stacked, stacked.T, precision=lax.Precision.HIGHEST)[..., None]
        last_row = stacked[-1] if residual is None else residual
        return product.at[-1, 0, 0].set((last_row**2).max())
    parts = stacked.reshape(n_rows, -1, n_lanes)

    def row(i: int) -> Any:
        return _lane_sums(parts.shape[1], lambda k: parts[i:, k] * parts[i, k])

    def last(k: int) -> Any:
        return parts[-1, k] if residual is None else residual.reshape(-1, n_lanes)[k]

    squares = (last(k) * last(k) for k in range(parts.shape[1]))
    largest = reduce(lambda a, b: jnp.where(a > b, a, b), squares)
    rows = [jnp.pad(row(i), ((i, 0), (0, 0))) for i in range(n_rows - 1)]
    between = jnp.zeros((n_rows - 2, n_lanes), stacked.dtype)
    return jnp.stack([*rows, jnp.concatenate([largest[None], between, row(n_rows - 1)])])


class BlockLoops:
    """The loops over the blocks of a piece, all of which one program runs one after the other."""

    def __init__(
        self,
        model: Model,
        loss: str,
        product: Product,
        block_rows: int,
        part_rows: int,
        mode: Mode,
        n_rows: Any,
        arrays: Any,
        offsets: Any,
    ) -> None:
        self._model = model
        self._loss = loss
        self._product = product
        self._block_rows = block_rows
        self._part_rows = part_rows
        self._linearized = residual_and_jacobian(model, mode)
        self._n_rows = n_rows
        self._arrays = arrays
        self._offsets = offsets
        self._n_full = n_rows // block_rows
        self._n_blocks = (n_rows + block_rows - 1) // block_rows

    def normal_equations(
        self, sums: Any, counts: Any, params: Any, factors: Any, f_scale: Any
    ) -> Any:
        """Add to product, residuals and counts, without masks as long as none is needed.

        Most pieces need none, and to find that out afterwards costs less than the masks. Returned
        with the sums is the number of blocks that needed no mask.
        """
        dtype = self._model.dtype
        gram_lanes, n_lanes = sums[0].shape[-1], sums[1].shape[-1]
        # In float32 lanes are short enough for sums of their own, which saves conversions. In
        # float64 blocks are added one by one, so that it does not matter where stretches begin.
        sums_stretches = gram_lanes > 1 and dtype != sums[0].dtype

        def stacked(rows: Rows, target: Any) -> Any:
            values, stacked = self._linearized(rows.x, target, params, factors)
            if rows.sigma is not None:
                stacked = stacked * (1 / rows.sigma.astype(dtype))
            return values, stacked

        def add(sums: Any, stacked: Any) -> Any:
            matrix, residuals = sums
            residual = stacked[-1]
            jacobian_scale: Any = 1
            residual_scale: Any = 1
            if self._loss != LINEAR:
                unit = factors[-1] * f_scale
                z = (residual * (1 / unit).astype(dtype)) ** 2
                terms, jacobian_scale, residual_scale = robust(self._loss, z)
                parts = (
                    _dot(terms, jnp.ones_like(terms), n_lanes),
                    _dot(residual, residual, n_lanes),
                )
                residuals = residuals + jnp.stack(parts).astype(residuals.dtype)
            is_scores = self._product is Product.SCORES
            if is_scores:
                jacobian_scale = residual * (jacobian_scale * residual_scale)
            is_scaled = is_scores or self._loss != LINEAR
            if is_scaled:
                scaled = stacked[:-1] * jacobian_scale, (residual * residual_scale)[None]
                stacked = jnp.concatenate(scaled)
            if self._product.is_factorized:
                return self._factorized(matrix, stacked, residual)[..., None], residuals
            new = _gram(stacked, residual if is_scaled else None, gram_lanes).astype(matrix.dtype)
            return _add_gram(jnp, matrix, new), residuals

        def plain(i: Any, sums: Any) -> Any:
            rows = self._rows(i)
            return add(sums, stacked(rows, self._poisoned(rows))[1])

        def stretch(state: Any) -> Any:
            i, _, sums = state
            end = jnp.minimum(i + _STRETCH, self._n_full)
            if sums_stretches:
                nothing = jax.tree.map(lambda array: jnp.zeros(array.shape, dtype), sums)
                part = lax.fori_loop(i, end, plain, nothing)
                gram, residuals = (array.astype(sums[0].dtype) for array in part)
                new = _add_gram(jnp, sums[0], gram), sums[1] + residuals
            else:
                new = lax.fori_loop(i, end, plain, sums)
            # Sums of squares, of which one at least is infinite or NaN if any product is.
            is_plain = jnp.isfinite(jnp.trace(new[0])).all()
            kept = jax.tree.map(lambda new, old: jnp.where(is_plain, new, old), new, sums)
            return jnp.where(is_plain, end, i), is_plain, kept

        def masked(i: Any, state: Any) -> Any:
            sums, counts = state
            rows = self._rows(i)
            values, unmasked = stacked(rows, rows.y.astype(dtype))
            usable = self._usable(i, rows)
            nothing = jnp.zeros((), bool)
            left_out = nothing if rows.mask is None else self._in_piece(i) & rows.mask
            bad_sigma = nothing if rows.sigma is None else usable & (rows.sigma <= 0)
            flags = (usable, usable & ~jnp.isfinite(values), left_out, bad_sigma)
            counted = jnp.stack([jnp.sum(flag, dtype=jnp.int64) for flag in flags])
            # Masked after it was computed, not before: a NaN in a row left out must not spread.
            return add(sums, jnp.where(usable, unmasked, 0)), counts + counted

        start = (jnp.zeros((), jnp.int64), jnp.ones((), bool), sums)
        n_plain, _, sums = lax.while_loop(lambda s: s[1] & (s[0] < self._n_full), stretch, start)
        counts = counts.at[0].add(n_plain * self._block_rows)
        return *lax.fori_loop(n_plain, self._n_blocks, masked, (sums, counts)), n_plain

    def _factorized(self, matrix: Any, stacked: Any, residual: Any) -> Any:
        """Return R of the rows so far, which are in ``matrix``, and of a block."""
        triangle, stacked = jnp.triu(matrix[..., 0]), stacked.astype(matrix.dtype)
        if self._product is not Product.ROOT:
            new = extended(triangle, stacked, self._part_rows)
        else:
            root = extended(triangle[:-1, :-1], stacked[:-1], self._part_rows)
            column = jnp.matmul(stacked, stacked[-1], precision=lax.Precision.HIGHEST)
            new = jnp.pad(root, ((0, 1), (0, 1))).at[:, -1].set(triangle[:, -1] + column)
        largest = jnp.maximum(matrix[-1, 0, 0], (residual**2).max())
        return new.at[-1, 0].set(largest)

    def moments(self, moments: Any, y0: Any, n_plain: Any) -> Any:
        """Add to the sums of ``w``, ``w (y - y0)`` and ``w (y - y0)^2``."""

        def add(i: Any, moments: Any, is_masked: bool) -> Any:
            rows = self._rows(i)
            offset: Any = rows.y.astype(jnp.float64) - y0
            weight: Any = jnp.ones(self._block_rows)
            if rows.sigma is not None:
                weight = 1 / rows.sigma.astype(jnp.float64) ** 2
            if is_masked:
                usable = self._usable(i, rows)
                offset, weight = (jnp.where(usable, array, 0) for array in (offset, weight))
            pairs = (weight, jnp.ones_like(offset)), (weight, offset), (weight * offset, offset)
            return moments + jnp.stack([_dot(a, b, moments.shape[-1]) for a, b in pairs])

        moments = lax.fori_loop(0, n_plain, lambda i, m: add(i, m, False), moments)
        return lax.fori_loop(n_plain, self._n_blocks, lambda i, m: add(i, m, True), moments)

    def costs(self, costs: Any, candidates: Any, n_candidates: Any, f_scale: Any) -> Any:
        """Add to ``sum rho(z)`` at the first so many candidates."""

        def add(step: Any, costs: Any) -> Any:
            i, k = step // n_candidates, step % n_candidates
            rows = self._rows(i)
            residual = self._model(rows.x, candidates[k]).astype(jnp.float64) - rows.y
            if rows.sigma is not None:
                residual = residual / rows.sigma
            residual = jnp.where(self._usable(i, rows), residual, 0)
            terms = rho(self._loss, (residual / f_scale) ** 2)
            return costs.at[k].add(_dot(terms, jnp.ones_like(terms), costs.shape[-1]))

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


def accumulator(
    model: Model, loss: str, product: Product, piece_rows: int, mode: Mode, platform: str
) -> Callable[..., Carry]:
    """Return the function that adds a piece of rows to running sums."""
    block_rows = block_rows_for(piece_rows, platform)
    n_at_once = part_rows(model.n_params + 1, block_rows) if platform == CPU else block_rows
    sizes = block_rows, n_at_once

    def accumulate(
        carry: Carry, point: Any, options: Any, n_rows: Any, arrays: Any, offsets: Any
    ) -> Carry:
        params, factors, candidates = (array.astype(model.dtype) for array in point)
        y0, f_scale, wants_moments, n_candidates = options
        sums, counts, moments, costs = carry
        loops = BlockLoops(model, loss, product, *sizes, mode, n_rows, arrays, offsets)
        sums, counts, n_plain = loops.normal_equations(sums, counts, params, factors, f_scale)
        moments = lax.cond(
            wants_moments, lambda: loops.moments(moments, y0, n_plain), lambda: moments
        )
        return sums, counts, moments, loops.costs(costs, candidates, n_candidates, f_scale)

    return accumulate
