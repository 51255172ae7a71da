"""The kernels: what a worker computes from rows, traced once and run on every piece."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.block_loops import (
    BLOCK_ROWS,
    Product,
    accumulator,
    block_rows_for,
    combined,
    no_rows,
)
from nlsq_dask.core.block_sums import BlockSums
from nlsq_dask.core.compiled_program import Program, traced_once
from nlsq_dask.core.devices import CPU, platform_of, usable_devices
from nlsq_dask.core.jacobian import Mode, choose_mode
from nlsq_dask.core.losses import Loss
from nlsq_dask.core.model import Model
from nlsq_dask.core.placed_rows import Piece, PlacedRows
from nlsq_dask.core.precision import x64
from nlsq_dask.core.rows import Array, Layout
from nlsq_dask.core.sums import NO_BLOCK, NormalEquations
from nlsq_dask.core.windows import SLACK, Memory, MemoryPool, windows

MOST_CANDIDATES = 3  # points at which a pass gives the cost alone, beside the one with everything
# Larger pieces take more memory for copies, smaller ones more calls.
_MAX_PIECE_BYTES = 4 * 2**20
_HOST_PLATFORMS = {CPU}  # whose devices have no memory of their own
_IN_FLIGHT = 2  # pieces that a device has at once: one is computed, one is on its way


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


def _trace_sums(
    model: Model,
    loss: str,
    product: Product,
    piece_rows: int,
    mode: Mode,
    platform: str,
) -> Program:
    p = model.n_params
    arrays = _rows_spec(model, piece_rows + SLACK)

    def spec(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

    carry = no_rows(p, MOST_CANDIDATES, piece_rows, platform, product)
    return Program.trace(
        accumulator(model, loss, product, piece_rows, mode, platform),
        jax.tree.map(lambda array: spec(array.dtype.str, *array.shape), carry),
        (spec("f8", p), spec("f8", p + 1), spec("f8", MOST_CANDIDATES, p)),
        (spec("f8"), spec("f8"), spec("bool"), spec("i8")),
        spec("i8"),
        arrays,
        jax.tree.map(lambda _: spec("i8"), arrays),
        platform=platform,
    )


class RowSource(Protocol):
    """What a kernel can take its rows from, such as ``Rows`` or a block of an N-d array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape against which the arrays broadcast; its entries in C order are the rows."""

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """All arrays, in the order y, x..., sigma, mask."""


S = TypeVar("S", bound=RowSource)


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
    loss : Loss
    product : Product
        With ``SCORES``, R is that of ``r J``, whose ``R^T R = sum r^2 J^T J`` is the middle of a
        sandwich covariance; with a robust loss ``rho' r`` takes the place of r.
    uses_all_devices : bool
        Whether a process shares its pieces among its devices; else it takes the first.
    memory : MemoryPool
        For copies of rows, as long as the kernel lives.
    """

    programs: dict[str, Program]
    layout: Layout
    n_params: int
    piece_rows: int
    factors: tuple[float, ...]
    y_reference: float = 0.0
    loss: Loss = field(default_factory=Loss)
    product: Product = Product.GRAM
    uses_all_devices: bool = False
    memory: MemoryPool = field(default_factory=MemoryPool, compare=False)

    @classmethod
    def trace(
        cls,
        model: Model,
        piece_rows: int,
        mode: Mode | None = None,
        platforms: tuple[str, ...] = (CPU,),
        loss: Loss | None = None,
        product: Product = Product.GRAM,
    ) -> Self:
        """Trace the kernel of this model for pieces of this length.

        The mode of the Jacobian is chosen by ``choose_mode`` unless it is given.
        """
        with x64():
            jaxpr = model.jaxpr()
            mode = mode or choose_mode(model, jaxpr)
        loss = loss or Loss()
        how = loss.name, product, piece_rows, mode
        what = (cls, model.layout, model.dtype, model.n_params, *how)
        programs = {
            platform: traced_once(
                (*what, platform), jaxpr, partial(_trace_sums, model, *how, platform)
            )
            for platform in platforms
        }
        factors = (1.0,) * (model.n_params + 1)
        return cls(
            programs,
            model.layout,
            model.n_params,
            piece_rows,
            factors,
            loss=loss,
            product=product,
        )

    def making(self, product: Product, model: Model) -> Self:
        """Return the kernel of the same model that makes another product.

        With a robust loss, ``ROOT`` takes the place of ``TRIANGLE``.
        """
        if product is Product.TRIANGLE and not self.loss.is_linear:
            product = Product.ROOT
        if product is self.product:
            return self
        platforms = tuple(self.programs)
        other = self.trace(
            model, self.piece_rows, platforms=platforms, loss=self.loss, product=product
        )
        return replace(self, programs=other.programs, product=product)

    def __call__(
        self,
        source: RowSource | PlacedRows,
        params: NDArray[np.float64],
        block: int = NO_BLOCK,
        *,
        candidates: NDArray[np.float64] | None = None,
        wants_moments: bool = True,
    ) -> NormalEquations:
        """Sum over some rows, in pieces of ``piece_rows``.

        The running sums are carried from piece to piece. In float64, and without rows left out,
        where the rows are cut has no influence on the bits of the result.

        Parameters
        ----------
        source : RowSource or PlacedRows
        params : ndarray, shape (p,)
        block : int
            Flat index of the block, to name it where rows are bad.
        candidates : ndarray, shape (k, p), optional
            At most ``MOST_CANDIDATES`` points at which the cost is wanted, too.
        wants_moments : bool
            Whether to sum what depends on the data alone.
        """
        p, y0, factors = self.n_params, self.y_reference, np.array(self.factors)
        points = np.empty((0, p)) if candidates is None else candidates
        padded = np.zeros((MOST_CANDIDATES, p))
        padded[: len(points)] = points
        numbers = np.float64(y0), np.float64(self.loss.f_scale)
        options = (*numbers, np.bool_(wants_moments), np.int64(len(points)))
        found = self._accumulate(source, (params, factors, padded), options)
        (lanes, residuals), counts, moments, costs = found
        upper = np.triu(lanes.sum(axis=-1))
        triangle, is_root = None, self.product is Product.ROOT
        if self.product is Product.GRAM:
            upper = upper / factors[:, None] / factors
            gram = upper + np.triu(upper, 1).T
        else:
            upper = upper / factors
            triangle = upper[:p, :p] if is_root else upper
            if self.product is Product.SCORES:
                triangle[:p, :p] /= factors[p]
            gram = triangle.T @ triangle
        jtr = upper[:p, p] / factors[:p] if is_root else gram[:p, p]
        rho, squares = residuals.sum(axis=-1)
        # With the linear loss the Gram matrix holds the sum of squares.
        twice_cost, chi2 = self.loss.f_scale**2 * rho, squares / factors[p] ** 2
        if self.loss.is_linear:
            twice_cost = chi2 = gram[p, p]
        largest = np.sqrt(lanes[p, 0].max()) / factors[p]
        weight, y_sum, y_square = map(float, moments.sum(axis=-1))
        n_used, n_nonfinite, n_masked, n_bad_sigma = map(int, counts)
        n_bad = math.prod(source.shape) - n_masked - n_used
        return NormalEquations(
            jtj=gram[:p, :p],
            jtr=jtr,
            triangle=triangle,
            cost=0.5 * float(twice_cost),
            chi2=float(chi2),
            blocks=None if block == NO_BLOCK else BlockSums.of(block, chi2, n_used, largest),
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
            candidate_costs=0.5 * self.loss.f_scale**2 * costs[: len(points)].sum(axis=-1),
        )

    def _accumulate(self, source: RowSource | PlacedRows, point: Any, options: Any) -> Any:
        """Run the program over all pieces; the carries of several devices are combined."""
        devices, platform = self._devices()
        start = no_rows(self.n_params, MOST_CANDIDATES, self.piece_rows, platform, self.product)
        carries = [start] * len(devices)
        most_in_flight = _IN_FLIGHT * len(devices)
        in_flight: deque[Any] = deque()
        with self.memory.borrow(most_in_flight + 1) as memory:
            for turn, piece in enumerate(self._pieces(source, memory, platform)):
                i = turn % len(devices)
                n_rows = np.int64(piece.n_rows)
                carries[i] = self.programs[platform](
                    carries[i], point, options, n_rows, *piece[:2], device=devices[i]
                )
                in_flight.append(carries[i])
                if len(in_flight) > most_in_flight:
                    jax.block_until_ready(in_flight.popleft())
            join = partial(combined, product=self.product)
            return reduce(join, (jax.tree.map(np.asarray, carry) for carry in carries))

    def placed(self, source: S) -> S | PlacedRows:
        """Return rows as they are best kept for later calls: in a GPU's memory if there is room."""
        devices, platform = self._devices()
        if platform in _HOST_PLATFORMS:
            return source
        pieces = []
        try:
            with x64(), self.memory.borrow(_IN_FLIGHT * len(devices) + 1) as memory:
                for turn, piece in enumerate(self._pieces(source, memory, platform)):
                    copy = partial(jnp.array, copy=True, device=devices[turn % len(devices)])
                    arrays = jax.block_until_ready(jax.tree.map(copy, piece.arrays))
                    pieces.append(piece._replace(arrays=arrays))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return source
        return PlacedRows(source.shape, tuple(pieces))

    def _devices(self) -> tuple[list[jax.Device], str]:
        """Return the devices that pieces are dealt to, and their platform."""
        devices = usable_devices(tuple(self.programs), self.uses_all_devices)
        return devices, platform_of(devices[0])

    def _pieces(
        self, source: RowSource | PlacedRows, memory: Memory, platform: str
    ) -> Iterator[Piece]:
        if isinstance(source, PlacedRows):
            yield from source.pieces
            return
        rows = self.piece_rows, block_rows_for(self.piece_rows, platform)
        for *pair, n_rows in windows(source.arrays, source.shape, *rows, memory):
            arrays, offsets = ((rows.y, rows.x, rows.sigma, rows.mask) for rows in pair)
            yield Piece(arrays, offsets, n_rows)
