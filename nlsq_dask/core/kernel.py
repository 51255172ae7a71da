"""The kernels: what a worker computes from rows, traced once and run on every piece.

The Jacobian is made in forward mode: ``jax.linearize`` once a block of rows, pushed forward along
every parameter. Stacked with the residual it needs one matrix product for ``J^T J``, ``J^T r``
and ``r^T r`` together. Blocks are small enough to stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from nlsq_dask.core.compiled_program import Program
from nlsq_dask.core.model import Model
from nlsq_dask.core.rows import Layout, Rows
from nlsq_dask.core.sums import NO_BLOCK, NormalEquations

BLOCK_ROWS = 1024  # rows in one matrix product; 1,000 to 2,000 were equally fast
_MAX_PIECE_BYTES = 64 * 2**20  # a piece of very wide rows is cut shorter than chunk_size

# gram (p+1, p+1), moments (weight, y_sum, y_square), counts (used, nonfinite, masked, bad_sigma)
Carry = tuple[Any, Any, Any]


def piece_rows_for(longest_block: int, chunk_size: int, row_bytes: int) -> int:
    """Return how many rows one kernel call is given: a power of two, at most ``chunk_size``.

    No larger than the longest block needs, and smaller for very wide rows.
    """
    most = max(min(chunk_size, _MAX_PIECE_BYTES // row_bytes), 1)
    wanted = max(longest_block, BLOCK_ROWS)
    return min(1 << (wanted - 1).bit_length(), 1 << (most.bit_length() - 1))


def _is_usable(rows: Rows) -> Any:
    """Return, a row, whether it is neither masked nor has a NaN or infinity."""
    usable = jnp.isfinite(rows.y)
    for leaf in rows.x:
        usable &= jnp.isfinite(leaf) if leaf.ndim == 1 else jnp.isfinite(leaf).all(axis=1)
    if rows.sigma is not None:
        usable &= jnp.isfinite(rows.sigma)
    if rows.mask is not None:
        usable &= ~rows.mask
    return usable


def _accumulate(model: Model, piece_rows: int) -> Callable[..., Carry]:
    """Return the function that adds a piece of rows to running sums."""
    block_rows = min(BLOCK_ROWS, piece_rows)

    def add_block(i: Any, carry: Carry, params: Any, y0: Any, n_rows: Any, arrays: Any) -> Carry:
        first = i * block_rows
        rows = Rows(*jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, block_rows), arrays))
        in_piece = first + jnp.arange(block_rows) < n_rows
        usable = in_piece & _is_usable(rows)

        values, push_forward = jax.linearize(lambda p: model(rows.x, p), params)
        jacobian = jax.vmap(push_forward)(jnp.eye(model.n_params, dtype=model.dtype))
        residual = values - rows.y.astype(model.dtype)
        stacked = jnp.concatenate([jacobian, residual[None]])
        offset = rows.y.astype(jnp.float64) - y0
        weight: Any = jnp.ones(block_rows)
        if rows.sigma is not None:
            stacked = stacked / rows.sigma.astype(model.dtype)
            weight = 1 / rows.sigma.astype(jnp.float64) ** 2
        terms = (stacked, weight, weight * offset, weight * offset**2)

        def count_and_mask(terms: Any) -> Any:
            # Masked after it was computed, not before: a NaN in a row left out must not spread.
            masked = jnp.zeros((), bool) if rows.mask is None else in_piece & rows.mask
            bad_sigma = jnp.zeros((), bool) if rows.sigma is None else usable & (rows.sigma <= 0)
            flags = (usable, usable & ~jnp.isfinite(values), masked, bad_sigma)
            counts = jnp.stack([jnp.sum(flag, dtype=jnp.int64) for flag in flags])
            return jax.tree.map(lambda a: jnp.where(usable, a, 0), terms), counts

        # Most blocks need no mask, and a branch costs less than the mask.
        plain = usable.all() & jnp.isfinite(values.sum())
        if rows.sigma is not None:
            plain &= (rows.sigma > 0).all()
        all_used = jnp.array([block_rows, 0, 0, 0], jnp.int64)
        terms, counts = lax.cond(plain, lambda t: (t, all_used), count_and_mask, terms)

        rows_of_gram, *moments = terms
        gram = (rows_of_gram @ rows_of_gram.T).astype(jnp.float64)
        sums = (gram, jnp.stack([m.sum() for m in moments]), counts)
        total: Carry = jax.tree.map(jnp.add, carry, sums)
        return total

    def accumulate(carry: Carry, params: Any, y0: Any, n_rows: Any, arrays: Any) -> Carry:
        params = params.astype(model.dtype)
        n_blocks = (n_rows + block_rows - 1) // block_rows
        total: Carry = lax.fori_loop(
            0, n_blocks, lambda i, c: add_block(i, c, params, y0, n_rows, arrays), carry
        )
        return total

    return accumulate


def _rows_spec(model: Model, n_rows: int) -> tuple[Any, ...]:
    """Return shapes and dtypes of ``Rows`` as a plain tuple, which is what a program takes."""
    layout = model.layout

    def spec(dtype: str | None) -> Any:
        return None if dtype is None else jax.ShapeDtypeStruct((n_rows,), np.dtype(dtype))

    mask = "bool" if layout.has_mask else None
    return spec(layout.y_dtype), model.x_specs(n_rows), spec(layout.sigma_dtype), spec(mask)


@dataclass(frozen=True)
class NormalEquationsKernel:
    """Rows and parameters in, ``NormalEquations`` out.

    Attributes
    ----------
    program : Program
    layout : Layout
    n_params : int
    piece_rows : int
        Rows that one call of the program is given.
    y_reference : float
        The y0 of ``NormalEquations``.
    """

    program: Program
    layout: Layout
    n_params: int
    piece_rows: int
    y_reference: float = 0.0

    @classmethod
    def trace(cls, model: Model, piece_rows: int) -> NormalEquationsKernel:
        """Trace the kernel of this model for pieces of this length."""
        p = model.n_params
        f64, i64 = np.dtype("f8"), np.dtype("i8")
        spec: Any = jax.ShapeDtypeStruct
        carry = (spec((p + 1, p + 1), f64), spec((3,), f64), spec((4,), i64))
        program = Program.trace(
            _accumulate(model, piece_rows),
            carry,
            spec((p,), f64),
            spec((), f64),
            spec((), i64),
            _rows_spec(model, piece_rows),
        )
        return cls(program, model.layout, p, piece_rows)

    def __call__(
        self, pieces: Iterable[tuple[Rows, int]], params: NDArray[np.float64], block: int = NO_BLOCK
    ) -> NormalEquations:
        """Sum over padded pieces, each with its true number of rows.

        The running sums are carried from piece to piece, so where a block is cut has no
        influence on the bits of the result.
        """
        p = self.n_params
        carry: Carry = (np.zeros((p + 1, p + 1)), np.zeros(3), np.zeros(4, np.int64))
        y0 = self.y_reference
        n_present = 0
        for rows, n_rows in pieces:
            arrays = (rows.y, rows.x, rows.sigma, rows.mask)
            n_present += n_rows
            carry = self.program(carry, params, np.float64(y0), np.int64(n_rows), arrays)
        gram, moments, counts = (np.asarray(part) for part in carry)
        weight, y_sum, y_square = map(float, moments)
        n_used, n_nonfinite, n_masked, n_bad_sigma = map(int, counts)
        n_bad = n_present - n_masked - n_used
        return NormalEquations(
            jtj=gram[:p, :p],
            jtr=gram[:p, p],
            cost=0.5 * float(gram[p, p]),
            weight=weight,
            y_sum=y_sum,
            y_square=y_square,
            signal=y_square + y0 * (2.0 * y_sum + y0 * weight),
            n_used=n_used,
            n_masked=n_masked,
            n_bad=n_bad,
            n_nonfinite=n_nonfinite,
            n_bad_sigma=n_bad_sigma,
            first_bad_block=block if n_bad else NO_BLOCK,
        )


@dataclass(frozen=True)
class PredictionKernel:
    """Rows and parameters in, the model's values out; what ``predict`` runs."""

    program: Program
    layout: Layout
    piece_rows: int

    @classmethod
    def trace(cls, model: Model, piece_rows: int = BLOCK_ROWS * 16) -> PredictionKernel:
        """Trace the evaluation of this model for pieces of this length."""
        program = Program.trace(
            lambda x, params: model(x, params.astype(model.dtype)),
            model.x_specs(piece_rows),
            jax.ShapeDtypeStruct((model.n_params,), np.dtype("f8")),
        )
        return cls(program, model.layout, piece_rows)

    def __call__(
        self, pieces: Iterable[tuple[Rows, int]], params: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Evaluate the model at the x of padded pieces, each with its true number of rows."""
        values = []
        for rows, n_rows in pieces:
            x = tuple(
                np.asarray(leaf, dtype)
                for leaf, dtype in zip(rows.x, self.layout.x_dtypes, strict=True)
            )
            values.append(np.asarray(self.program(x, params), np.float64)[:n_rows])
        return np.concatenate(values) if values else np.empty(0)
