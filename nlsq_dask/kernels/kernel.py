"""``Kernel``: a compiled program that sums over rows, called with one batch of rows at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Generic, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.strip_loops import Carry, MakeLoops, accumulator, lanes_for
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.jax_scope import CPU, platform_of, usable_devices, x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program, traced_once
from nlsq_dask.rows.device_rows import Batch, PlacedRows
from nlsq_dask.rows.rows import STRIP_ROWS, Array
from nlsq_dask.rows.windows import SLACK, Memory, MemoryPool, windows

MAX_CANDIDATES = 3  # points per pass at which only the cost is evaluated
# Larger batches need more memory for copies, smaller ones more calls.
_MAX_BATCH_BYTES = 4 * 2**20
_HOST_PLATFORMS = {CPU}  # platforms whose devices share host memory
_IN_FLIGHT = 2  # batches per device: one is computed, one is transferred


def batch_rows_for(longest_block: int, chunk_size: int, row_bytes: int) -> int:
    """Return the number of rows per kernel call, a power of two, at most ``chunk_size``.

    It is limited to the length of the longest block, because more rows are not useful, and to a
    fixed number of bytes, because larger copies into JAX's memory are slower.
    """
    max_rows = max(min(chunk_size, _MAX_BATCH_BYTES // row_bytes), 1)
    needed = max(longest_block, STRIP_ROWS)
    return min(1 << (needed - 1).bit_length(), 1 << (max_rows.bit_length() - 1))


def _rows_spec(model: Model, n_rows: int) -> tuple[Any, ...]:
    """Return shapes and dtypes of y, x, sigma and mask, for tracing."""
    layout = model.layout

    def spec(dtype: str | None) -> Any:
        return None if dtype is None else jax.ShapeDtypeStruct((n_rows,), np.dtype(dtype))

    mask = "bool" if layout.has_mask else None
    return spec(layout.y_dtype), model.x_specs(n_rows), spec(layout.sigma_dtype), spec(mask)


class RowSource(Protocol):
    """Arrays in memory whose elements are rows, such as ``Rows``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of y, to which the arrays broadcast; the rows are its elements in C order."""

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """All arrays, in the order y, x..., sigma, mask."""


Source = TypeVar("Source", bound=RowSource)
S = TypeVar("S", bound=Sums)
S_co = TypeVar("S_co", bound=Sums, covariant=True)


Totals = tuple[Any, ...]


class Reduction(Protocol[S_co]):
    """Definition of sums over rows: initial value, contribution of a row, combination, result.

    ``totals`` are the running sums that differ between reductions. Sums that all reductions have,
    such as the number of rows, are added up by ``Kernel``; see ``Carry``.
    """

    @property
    def sums_type(self) -> type[S_co]:
        """Type of the result."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Settings on which the traced program depends; a part of its key in the cache."""

    @property
    def name(self) -> str:
        """Name that distinguishes these sums from others in a checkpoint."""

    @property
    def combine(self) -> tuple[Callable[[Any, Any], Any], ...]:
        """Functions of NumPy arrays that combine each total of two sets of rows."""

    def zero(self, n_params: int, batch_rows: int, platform: str) -> Totals:
        """Return the totals before the first row."""

    def strip_rows(self, n_params: int, batch_rows: int, platform: str) -> int:
        """Return the number of rows per strip, the part of a batch that is processed at a time."""

    def loops(self, model: Model, loss: str, batch_rows: int, platform: str) -> MakeLoops:
        """Return the constructor of the ``StripLoops`` that add rows to the totals."""

    def point(self, request: Request) -> tuple[NDArray[np.float64], ...]:
        """Return the parameters of the request, and other arrays on which the totals depend."""

    def finish(self, totals: Totals, loss: Loss, **common: Any) -> S_co:
        """Return the result; ``common`` are the fields that all ``Sums`` have."""


def _zero_carry(totals: Totals, batch_rows: int, platform: str) -> Carry:
    n_lanes = lanes_for(batch_rows, platform)
    counts, costs = np.zeros(4, np.int64), np.zeros((MAX_CANDIDATES, n_lanes))
    return totals, counts, np.zeros((3, n_lanes)), costs


def _trace(
    reduction: Reduction[Sums], model: Model, loss: str, batch_rows: int, platform: str
) -> Program:
    """Trace the program that adds one batch of rows to the running sums."""
    arrays, p = _rows_spec(model, batch_rows + SLACK), model.n_params
    zero = _zero_carry(reduction.zero(p, batch_rows, platform), batch_rows, platform)
    point = reduction.point(Request(np.zeros(p)))

    def spec(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

    return Program.trace(
        accumulator(reduction.loops(model, loss, batch_rows, platform), model.dtype),
        jax.tree.map(lambda array: spec(array.dtype.str, *array.shape), zero),
        (*(spec("f8", *a.shape) for a in point), spec("f8", MAX_CANDIDATES, p)),
        (spec("f8"), spec("f8"), spec("bool"), spec("i8")),
        spec("i8"),
        arrays,
        jax.tree.map(lambda _: spec("i8"), arrays),
        platform=platform,
    )


@dataclass(frozen=True)
class Kernel(Generic[S]):
    """Compiled program that returns the ``Sums`` of a ``Request`` over given rows.

    It is called with batches of a fixed number of rows.
    """

    reduction: Reduction[S]
    programs: dict[str, Program]  # by platform; a process uses that of its GPUs, or else the CPU
    n_params: int
    batch_rows: int  # per call of the program
    loss: Loss
    y_reference: float = 0.0  # the y0 of ``Sums``
    uses_all_devices: bool = False  # distribute batches over all devices of a process
    memory: MemoryPool = field(default_factory=MemoryPool, compare=False)  # for copies of rows

    @classmethod
    def trace(
        cls,
        reduction: Reduction[S],
        model: Model,
        batch_rows: int,
        platforms: tuple[str, ...] = (CPU,),
        loss: Loss | None = None,
    ) -> Self:
        """Trace the program of a model and a reduction, or take it from the cache."""
        with x64():
            jaxpr = model.jaxpr()
        loss = loss or Loss()
        key = (*reduction.key, model.layout, model.dtype, model.n_params, loss.name, batch_rows)
        programs = {
            platform: traced_once(
                (*key, platform),
                jaxpr,
                partial(_trace, reduction, model, loss.name, batch_rows, platform),
            )
            for platform in platforms
        }
        return cls(reduction, programs, model.n_params, batch_rows, loss)

    def __call__(
        self, source: RowSource | PlacedRows, request: Request, wants_moments: bool = True
    ) -> S:
        """Return the sums over all rows of ``source``, computed batch by batch.

        In float64 and without masked rows, the bits of the result do not depend on the batches,
        because each batch continues the running sums of the previous one.

        Parameters
        ----------
        source : RowSource or PlacedRows
        request : Request
            At most ``MAX_CANDIDATES`` candidates.
        wants_moments : bool
            Whether to compute the sums that do not depend on the parameters.
        """
        y0, candidates = self.y_reference, request.candidates
        points = np.empty((0, self.n_params)) if candidates is None else candidates
        padded = np.zeros((MAX_CANDIDATES, self.n_params))
        padded[: len(points)] = points
        numbers = np.float64(y0), np.float64(self.loss.f_scale)
        options = (*numbers, np.bool_(wants_moments), np.int64(len(points)))
        point = (*self.reduction.point(request), padded)
        totals, counts, moments, costs = self._accumulate(source, point, options)
        weight, y_sum, y_square = map(float, moments.sum(axis=-1))
        n_used, n_nonfinite, n_masked, n_bad_sigma = map(int, counts)
        return self.reduction.finish(
            totals,
            self.loss,
            weight=weight,
            y_sum=y_sum,
            y_square=y_square,
            signal=y_square + y0 * (2.0 * y_sum + y0 * weight),
            n_used=n_used,
            n_masked=n_masked,
            n_bad=math.prod(source.shape) - n_masked - n_used,
            n_nonfinite=n_nonfinite,
            n_bad_sigma=n_bad_sigma,
            candidate_costs=0.5 * self.loss.f_scale**2 * costs[: len(points)].sum(axis=-1),
        )

    def _accumulate(self, source: RowSource | PlacedRows, point: Any, options: Any) -> Any:
        """Run the program over all batches, and return the sums combined over the devices.

        ``point`` and ``options`` are its arguments that are equal for all batches.
        """
        devices, platform = self._devices()
        zero = self.reduction.zero(self.n_params, self.batch_rows, platform)
        carries = [_zero_carry(zero, self.batch_rows, platform)] * len(devices)
        max_in_flight = _IN_FLIGHT * len(devices)
        in_flight: deque[Any] = deque()
        with self.memory.borrow(max_in_flight + 1) as memory:
            for turn, batch in enumerate(self._batches(source, memory, platform)):
                i = turn % len(devices)
                n_rows = np.int64(batch.n_rows)
                carries[i] = self.programs[platform](
                    carries[i], point, options, n_rows, *batch[:2], device=devices[i]
                )
                in_flight.append(carries[i])
                if len(in_flight) > max_in_flight:
                    jax.block_until_ready(in_flight.popleft())
            return reduce(self._combine, (jax.tree.map(np.asarray, carry) for carry in carries))

    def _combine(self, one: Carry, other: Carry) -> Carry:
        totals = zip(self.reduction.combine, one[0], other[0], strict=True)
        counts, moments, costs = (a + b for a, b in zip(one[1:], other[1:], strict=True))
        return tuple(combine(a, b) for combine, a, b in totals), counts, moments, costs

    def placed(self, source: Source) -> Source | PlacedRows:
        """Copy rows to the GPU for later calls; return them unchanged if they do not fit."""
        devices, platform = self._devices()
        if platform in _HOST_PLATFORMS:
            return source
        batches = []
        try:
            with x64(), self.memory.borrow(_IN_FLIGHT * len(devices) + 1) as memory:
                for turn, batch in enumerate(self._batches(source, memory, platform)):
                    copy = partial(jnp.array, copy=True, device=devices[turn % len(devices)])
                    arrays = jax.block_until_ready(jax.tree.map(copy, batch.arrays))
                    batches.append(batch._replace(arrays=arrays))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return source
        return PlacedRows(source.shape, tuple(batches))

    def _devices(self) -> tuple[list[jax.Device], str]:
        """Return the JAX devices to use, and their platform such as "cpu"."""
        devices = usable_devices(tuple(self.programs), self.uses_all_devices)
        return devices, platform_of(devices[0])

    def _batches(
        self, source: RowSource | PlacedRows, memory: Memory, platform: str
    ) -> Iterator[Batch]:
        if isinstance(source, PlacedRows):
            yield from source.batches
            return
        strip_rows = self.reduction.strip_rows(self.n_params, self.batch_rows, platform)
        rows = self.batch_rows, strip_rows
        for *pair, n_rows in windows(source.arrays, source.shape, *rows, memory):
            arrays, offsets = ((rows.y, rows.x, rows.sigma, rows.mask) for rows in pair)
            yield Batch(arrays, offsets, n_rows)
