"""The kernels: what a worker computes from rows, traced once and run on every piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.block_loops import BLOCK_ROWS, Carry, accumulator
from nlsq_dask.core.compiled_program import Program, traced_once
from nlsq_dask.core.devices import CPU, platform_of, usable_devices
from nlsq_dask.core.jacobian import Mode, choose_mode
from nlsq_dask.core.model import Model
from nlsq_dask.core.precision import x64
from nlsq_dask.core.rows import SLACK, Layout, Rows, Window
from nlsq_dask.core.sums import NO_BLOCK, NormalEquations

MOST_CANDIDATES = 3  # points at which a pass gives the cost alone, beside the one with everything
# Larger pieces take new pages from the system for every copy, smaller ones more calls.
_MAX_PIECE_BYTES = 4 * 2**20


def piece_rows_for(longest_block: int, chunk_size: int, row_bytes: int) -> int:
    """Return how many rows one kernel call is given: a power of two, at most ``chunk_size``.

    No larger than the longest block needs, and few enough to be copied into JAX's memory cheaply.
    """
    most = max(min(chunk_size, _MAX_PIECE_BYTES // row_bytes), 1)
    wanted = max(longest_block, BLOCK_ROWS)
    return min(1 << (wanted - 1).bit_length(), 1 << (most.bit_length() - 1))


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
        accumulator(model, piece_rows, mode, platform),
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
