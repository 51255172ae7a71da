"""The kernels: what a worker computes from rows, traced once and run on every piece.

Jacobian and residual of a block of rows are stacked, so that one matrix product gives ``J^T J``,
``J^T r`` and ``r^T r`` together. Blocks are small enough to stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from nlsq_dask.core.compiled_program import Program, traced_once
from nlsq_dask.core.devices import CPU, platform_of, usable_devices
from nlsq_dask.core.jacobian import Mode, choose_mode, residual_and_jacobian
from nlsq_dask.core.model import Model
from nlsq_dask.core.precision import x64
from nlsq_dask.core.rows import FIRST_ROWS, SLACK, Layout, Rows, Window
from nlsq_dask.core.sums import NO_BLOCK, NormalEquations

_STRETCH = 16  # blocks after which the sums are looked at
_GPU_BLOCK_ROWS = 2**18
BLOCK_ROWS = FIRST_ROWS  # rows in one matrix product; 1,000 to 2,000 were equally fast
MOST_CANDIDATES = 3  # points at which a pass gives the cost alone, beside the one with everything
# Larger pieces take new pages from the system for every copy, smaller ones more calls.
_MAX_PIECE_BYTES = 4 * 2**20

# gram (p+1, p+1), counts (used, nonfinite, masked, bad_sigma), moments (weight, y_sum, y_square),
# costs (candidates,)
Carry = tuple[Any, Any, Any, Any]


def piece_rows_for(longest_block: int, chunk_size: int, row_bytes: int) -> int:
    """Return how many rows one kernel call is given: a power of two, at most ``chunk_size``.

    No larger than the longest block needs, and few enough to be copied into JAX's memory cheaply.
    """
    most = max(min(chunk_size, _MAX_PIECE_BYTES // row_bytes), 1)
    wanted = max(longest_block, BLOCK_ROWS)
    return min(1 << (wanted - 1).bit_length(), 1 << (most.bit_length() - 1))


def _sum(array: Any) -> Any:
    """Sum all entries, side by side in lanes, which XLA does not do of its own accord."""
    lanes = 32
    if array.size % lanes == 0:
        array = array.reshape(-1, lanes).sum(0)
    return array.sum()


class _Loops:
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
            return (stacked @ stacked.T).astype(jnp.float64)

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


def _accumulate(model: Model, piece_rows: int, mode: Mode, platform: str) -> Callable[..., Carry]:
    """Return the function that adds a piece of rows to running sums."""
    block_rows = min(BLOCK_ROWS if platform == CPU else _GPU_BLOCK_ROWS, piece_rows)

    def accumulate(
        carry: Carry, point: Any, options: Any, n_rows: Any, arrays: Any, offsets: Any
    ) -> Carry:
        params, factors, candidates = (array.astype(model.dtype) for array in point)
        y0, wants_moments, n_candidates = options
        gram, counts, moments, costs = carry
        loops = _Loops(model, block_rows, mode, n_rows, arrays, offsets)
        gram, counts, n_plain = loops.normal_equations(gram, counts, params, factors)
        moments = lax.cond(
            wants_moments, lambda: loops.moments(moments, y0, n_plain), lambda: moments
        )
        return gram, counts, moments, loops.costs(costs, candidates, n_candidates)

    return accumulate


def _rows_spec(model: Model, n_rows: int) -> tuple[Any, ...]:
    """Return shapes and dtypes of ``Rows`` as a plain tuple, which is what a program takes."""
    layout = model.layout

    def spec(dtype: str | None) -> Any:
        return None if dtype is None else jax.ShapeDtypeStruct((n_rows,), np.dtype(dtype))

    mask = "bool" if layout.has_mask else None
    return spec(layout.y_dtype), model.x_specs(n_rows), spec(layout.sigma_dtype), spec(mask)


def _trace_sums(model: Model, piece_rows: int, mode: Mode, platform: str) -> Program:
    p = model.n_params
    arrays = _rows_spec(model, piece_rows + SLACK)

    def spec(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

    return Program.trace(
        _accumulate(model, piece_rows, mode, platform),
        (spec("f8", p + 1, p + 1), spec("i8", 4), spec("f8", 3), spec("f8", MOST_CANDIDATES)),
        (spec("f8", p), spec("f8", p + 1), spec("f8", MOST_CANDIDATES, p)),
        (spec("f8"), spec("bool"), spec("i8")),
        spec("i8"),
        arrays,
        jax.tree.map(lambda _: spec("i8"), arrays),
        platform=platform,
    )


@dataclass(frozen=True)
class NormalEquationsKernel:
    """Rows and parameters in, ``NormalEquations`` out.

    Attributes
    ----------
    programs : dict of str to Program
        By platform; a process takes the one for its best devices.
    layout : Layout
    n_params : int
    piece_rows : int
        Rows that one call of the program is given.
    factors : tuple of float
        Powers of two, one a column of the Jacobian and one for the residual, by which these are
        multiplied before their products are summed; they keep float32 away from its limits.
    y_reference : float
        The y0 of ``NormalEquations``.
    uses_all_devices : bool
        Whether a process shares its pieces among its devices; else it takes the first.
    """

    programs: dict[str, Program]
    layout: Layout
    n_params: int
    piece_rows: int
    factors: tuple[float, ...]
    y_reference: float = 0.0
    uses_all_devices: bool = False

    @classmethod
    def trace(
        cls,
        model: Model,
        piece_rows: int,
        mode: Mode | None = None,
        platforms: tuple[str, ...] = (CPU,),
    ) -> Self:
        """Trace the kernel of this model for pieces of this length.

        The mode of the Jacobian is chosen by ``choose_mode`` unless it is given.
        """
        with x64():
            jaxpr = model.jaxpr()
            mode = mode or choose_mode(model, jaxpr)
        what = (cls, model.layout, model.dtype, model.n_params, piece_rows, mode)
        programs = {
            platform: traced_once(
                (*what, platform), jaxpr, partial(_trace_sums, model, piece_rows, mode, platform)
            )
            for platform in platforms
        }
        factors = (1.0,) * (model.n_params + 1)
        return cls(programs, model.layout, model.n_params, piece_rows, factors)

    def __call__(
        self,
        windows: Iterable[Window],
        params: NDArray[np.float64],
        block: int = NO_BLOCK,
        *,
        candidates: NDArray[np.float64] | None = None,
        wants_moments: bool = True,
    ) -> NormalEquations:
        """Sum over windows of ``piece_rows`` rows.

        The running sums are carried from window to window, so where a block is cut has no
        influence on the bits of the result.

        Parameters
        ----------
        windows : iterable of Window
            From ``Rows.windows`` or ``Block.windows``.
        params : ndarray, shape (p,)
        block : int
            Flat index of the block, to name it where rows are bad.
        candidates : ndarray, shape (k, p), optional
            At most ``MOST_CANDIDATES`` points at which the cost is wanted, too.
        wants_moments : bool
            Whether to sum what depends on the data alone.
        """
        p = self.n_params
        points = np.empty((0, p)) if candidates is None else candidates
        n_candidates = len(points)
        padded = np.zeros((MOST_CANDIDATES, p))
        padded[:n_candidates] = points
        y0, factors = self.y_reference, np.array(self.factors)
        point = (params, factors, padded)
        options = (np.float64(y0), np.bool_(wants_moments), np.int64(n_candidates))
        n_present = 0
        devices = usable_devices(tuple(self.programs), self.uses_all_devices)
        carries = [self._nothing() for _ in devices]
        for i, (*pair, n_rows) in enumerate(windows):
            n_present += n_rows
            arrays, offsets = ((rows.y, rows.x, rows.sigma, rows.mask) for rows in pair)
            device, carry = devices[i % len(devices)], carries[i % len(devices)]
            if i >= 2 * len(devices):  # one piece computes, one is on its way; no more
                jax.block_until_ready(carry)
            carries[i % len(devices)] = self.programs[platform_of(device)](
                carry, point, options, np.int64(n_rows), arrays, offsets, device=device
            )
        parts = zip(*carries, strict=True)
        scaled, counts, moments, costs = (np.sum(part, axis=0) for part in parts)
        gram = scaled / factors[:, None] / factors
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
            candidate_costs=0.5 * costs[:n_candidates],
        )

    def _nothing(self) -> Carry:
        p = self.n_params
        gram = np.zeros((p + 1, p + 1))
        return gram, np.zeros(4, np.int64), np.zeros(3), np.zeros(MOST_CANDIDATES)


@dataclass(frozen=True)
class PredictionKernel:
    """Rows and parameters in, the model's values out; what ``predict`` runs."""

    program: Program
    layout: Layout
    piece_rows: int

    @classmethod
    def trace(cls, model: Model, piece_rows: int = BLOCK_ROWS * 16) -> PredictionKernel:
        """Trace the evaluation of this model for pieces of this length."""

        def trace() -> Program:
            return Program.trace(
                lambda x, params: model(x, params.astype(model.dtype)),
                model.x_specs(piece_rows),
                jax.ShapeDtypeStruct((model.n_params,), np.dtype("f8")),
            )

        with x64():
            jaxpr = model.jaxpr()
        what = (cls, model.layout, model.dtype, model.n_params, piece_rows)
        program = traced_once(what, jaxpr, trace)
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
