"""``DeviceProgram``: sums over rows on a GPU, computed for some million rows at a time.

A GPU adds up millions of rows at once as fast as it does few, but each turn of a loop in a program
returns to the host. So these programs have no loops over rows, mask always, and contain only what
is asked for: sums, moments, and costs at other parameters have a program each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from itertools import count, repeat
from threading import BoundedSemaphore
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import DeviceMemoryError
from nlsq_dask.kernels.reduction import (
    MAX_CANDIDATES,
    Carry,
    Evaluation,
    Reduction,
    RowSource,
    TraceOnce,
    combine,
    row_specs,
)
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.row_terms import MakeTerms
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program
from nlsq_dask.rows.device_memory import is_out_of_memory
from nlsq_dask.rows.device_rows import DeviceBatch, PlacedRows, device_batches, padded_bytes
from nlsq_dask.rows.rows import Rows

_MAX_ROWS = 2**24  # per batch
_MAX_BYTES = 2**31  # of a batch with its intermediate results
_FEW_ROWS = 2**18  # up to this length, blocks of similar lengths share a program
_FEWER = 16  # after running out of memory, batches have this many times fewer rows
_IN_FLIGHT = 2  # batches per device: one is computed, one is copied
# Threads of a process that compute and copy at the same time: enough for the full speed, and few
# enough for the memory of the device.
_computing, _copying = BoundedSemaphore(2), BoundedSemaphore(8)


def device_batch_rows(longest_block: int, row_bytes: int) -> int:
    """Return the number of rows of a batch: a block, or equal parts of it.

    For short blocks it is a power of two, so that not each length needs a program of its own.

    Parameters
    ----------
    longest_block : int
        Rows of the longest block.
    row_bytes : int
        Bytes of a row and of its intermediate results.
    """
    most = min(_MAX_ROWS, max(_MAX_BYTES // row_bytes, 1))
    if longest_block <= min(most, _FEW_ROWS):
        return min(1 << (longest_block - 1).bit_length(), most)
    n_batches = math.ceil(longest_block / most)
    return math.ceil(longest_block / n_batches)


class _Functions:
    """The functions that are compiled for batches of one number of rows.

    Each of them takes a vector of float64 numbers, the number of rows that are not padding, and the
    arrays of a ``DeviceBatch``, and returns a vector of float64 numbers: one copy to the device and
    one back.
    """

    def __init__(
        self, make_terms: MakeTerms, zero: Any, point: tuple[NDArray[np.float64], ...], dtype: str
    ) -> None:
        self._make_terms = make_terms
        self._zero = zero
        self._point = point
        self._dtype = dtype

    def sums(self, vector: Any, n_rows: Any, arrays: Any) -> Any:
        """Return the totals and the counts; ``vector`` is the point and f_scale."""
        point = (array.astype(self._dtype) for array in _split(vector, self._point))
        rows = Rows.of(arrays)
        sums, counts = self._make_terms(list(point), vector[-1]).add_masked(
            rows, _in_batch(rows, n_rows), self._zero, jnp.zeros(4, jnp.int64)
        )
        return jnp.concatenate([jnp.ravel(array).astype(jnp.float64) for array in (*sums, counts)])

    def moments(self, vector: Any, n_rows: Any, arrays: Any) -> Any:
        """Return the moments; ``vector`` is y0."""
        terms, rows = self._make_terms(None, None), Rows.of(arrays)
        usable = terms.usable(rows, _in_batch(rows, n_rows))
        return terms.moments(rows, usable, vector[0], 1)[:, 0]

    def costs(self, vector: Any, n_rows: Any, arrays: Any) -> Any:
        """Return the sums of rho(z); ``vector`` is ``MAX_CANDIDATES`` candidates and f_scale."""
        terms, rows = self._make_terms(None, vector[-1]), Rows.of(arrays)
        usable = terms.usable(rows, _in_batch(rows, n_rows))
        candidates = vector[:-1].reshape(MAX_CANDIDATES, -1).astype(self._dtype)
        costs = [terms.cost(rows, usable, candidate, 1) for candidate in candidates]
        return jnp.concatenate(costs)


def _in_batch(rows: Rows, n_rows: Any) -> Any:
    return jnp.arange(len(rows.y)) < n_rows


def _split(vector: Any, like: tuple[Any, ...]) -> list[Any]:
    """Return parts of a vector in the shapes of the arrays ``like``."""
    parts, start = [], 0
    for array in like:
        size = math.prod(array.shape)
        parts.append(vector[start : start + size].reshape(array.shape))
        start += size
    return parts


def _no_room(device: jax.Device, n_rows: int) -> str:
    return (
        f"the GPU {device} ({device.device_kind}) has too little free memory for {n_rows:,} rows "
        f"at a time. End other programs that use it, start fewer workers on it, use smaller "
        f"chunks, or set the environment variable JAX_PLATFORMS=cpu to compute on the CPU."
    )


@dataclass(frozen=True)
class _Programs:
    """Programs for batches of one number of rows."""

    n_rows: int
    sums: Program
    moments: Program
    costs: Program

    @classmethod
    def trace(
        cls,
        reduction: Reduction[Sums],
        model: Model,
        loss: str,
        n_rows: int,
        platform: str,
        once: TraceOnce,
    ) -> Self:
        p = model.n_params
        point = reduction.point(Request(np.zeros(p)))
        make_terms = reduction.terms(model, loss, None)
        functions = _Functions(make_terms, reduction.zero(p, 1), point, model.dtype)
        y, x, sigma, mask = row_specs(model, n_rows)

        def program(function: Callable[..., Any], n_numbers: int) -> Program:
            vector = jax.ShapeDtypeStruct((n_numbers,), np.float64)
            count = jax.ShapeDtypeStruct((), np.int64)
            arrays = y, *x, sigma, mask
            trace = partial(Program.trace, function, vector, count, arrays, platform=platform)
            return once((function.__name__, n_rows, platform), trace)

        n_numbers = sum(array.size for array in point) + 1
        return cls(
            n_rows,
            program(functions.sums, n_numbers),
            program(functions.moments, 1),
            program(functions.costs, MAX_CANDIDATES * p + 1),
        )


class DeviceProgram:
    """Programs that compute the sums of a batch of rows at once, for a GPU.

    Parameters
    ----------
    n_params : int
    programs : sequence of _Programs
        For batches of several sizes, the largest first. Smaller ones are used after the device has
        run out of memory.
    """

    def __init__(self, n_params: int, programs: tuple[_Programs, ...]) -> None:
        self._n_params = n_params
        self._programs = programs
        self._largest = 0  # index in ``programs`` of the largest batches that fit the device
        self._vectors = _Vectors()
        self._turn = count()  # of the devices

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._n_params, self._programs)

    @classmethod
    def trace(
        cls,
        reduction: Reduction[Sums],
        model: Model,
        loss: str,
        longest_block: int,
        platform: str,
        once: TraceOnce,
    ) -> Self:
        """Trace the programs for blocks of up to this length, or take them from the cache."""
        row_bytes = model.layout.row_bytes + reduction.row_bytes(model.n_params)
        n_rows = device_batch_rows(longest_block, row_bytes)
        sizes = dict.fromkeys((n_rows, -(n_rows // -_FEWER)))
        programs = (_Programs.trace(reduction, model, loss, n, platform, once) for n in sizes)
        return cls(model.n_params, tuple(programs))

    @property
    def fingerprint(self) -> str:
        """Digest of the operations and constants."""
        return self._programs[0].sums.fingerprint

    def accumulate(
        self,
        reduction: Reduction[Sums],
        source: RowSource | PlacedRows,
        evaluation: Evaluation,
        devices: list[jax.Device],
    ) -> Carry:
        """Return the sums over all rows, as NumPy arrays.

        Raises
        ------
        DeviceMemoryError
            If a device has too little free memory, even for batches of the smallest size.
        """
        while True:
            largest = self._largest
            try:
                with _computing, x64(devices[0]):
                    return self._accumulate(reduction, source, evaluation, devices)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if isinstance(source, PlacedRows) or largest + 1 == len(self._programs):
                    n_rows = self._programs[largest].n_rows
                    raise DeviceMemoryError(_no_room(devices[0], n_rows)) from error
            self._largest = largest + 1

    def _accumulate(
        self,
        reduction: Reduction[Sums],
        source: RowSource | PlacedRows,
        evaluation: Evaluation,
        devices: list[jax.Device],
    ) -> Carry:
        numbers = _Numbers(evaluation, self._vectors)
        zero = reduction.zero(self._n_params, 1)
        in_flight: deque[list[Any]] = deque()
        carries: list[Carry] = []
        placed = (
            source.batches if isinstance(source, PlacedRows) else self._batches(source, devices)
        )
        for batch in placed:
            in_flight.append(numbers.run(self._of(batch), batch))
            if len(in_flight) > _IN_FLIGHT * len(devices):
                carries.append(numbers.carry(in_flight.popleft(), zero))
        carries += (numbers.carry(results, zero) for results in in_flight)
        nothing = zero, np.zeros(4, np.int64), np.zeros((3, 1)), np.zeros((numbers.n_costs, 1))
        return reduce(partial(combine, reduction), carries or [nothing])

    def _of(self, batch: DeviceBatch) -> _Programs:
        """Return the programs for a batch; those on the device may be larger than new ones."""
        n_rows = len(batch.arrays[0])
        return next(programs for programs in self._programs if programs.n_rows == n_rows)

    def _batches(self, source: RowSource, devices: list[jax.Device]) -> Iterator[DeviceBatch]:
        """Copy rows to the devices in turn; also between calls, as a block may be one batch."""
        turns = (devices[next(self._turn) % len(devices)] for _ in repeat(None))
        return device_batches(source.arrays, source.shape, self._batch_rows(source), turns)

    def _batch_rows(self, source: RowSource) -> int:
        """Return the number of rows of the batches, so that less than half of them is padding."""
        total = math.prod(source.shape)
        *sizes, smallest = (programs.n_rows for programs in self._programs[self._largest :])
        padded = -(total // -smallest) * smallest
        return next((n for n in sizes if -(total // -n) * n <= 2 * padded), smallest)

    def placed_bytes(self, source: RowSource) -> int:
        """Return the bytes of GPU memory that ``placed`` needs."""
        return padded_bytes(source.arrays, source.shape, self._batch_rows(source))

    def placed(self, source: RowSource, devices: list[jax.Device]) -> PlacedRows | None:
        """Copy rows to the devices; return None if they have too little free memory."""
        try:
            with _copying, x64(devices[0]):
                placed = tuple(self._batches(source, devices))
                jax.block_until_ready(placed)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return PlacedRows(source.shape, placed)


class _Vectors:
    """Copies of small vectors on devices, which all blocks of a pass share."""

    _SIZE = 16

    def __init__(self) -> None:
        self._copies: dict[tuple[bytes, jax.Device], Any] = {}

    def on(self, device: jax.Device, vector: NDArray[np.float64]) -> Any:
        """Return a copy of ``vector`` on ``device``."""
        key = vector.tobytes(), device
        copy = self._copies.get(key)
        if copy is None:
            if len(self._copies) >= self._SIZE:
                self._copies = {}
            copy = self._copies[key] = jax.device_put(vector, device)
        return copy


class _Numbers:
    """An evaluation as vectors on the devices of its batches, and results as a ``Carry``."""

    def __init__(self, evaluation: Evaluation, vectors: _Vectors) -> None:
        self._vectors = vectors
        f_scale = [evaluation.f_scale]
        self._sums = np.concatenate([*map(np.ravel, evaluation.point), f_scale])
        self._moments = np.array([evaluation.y0]) if evaluation.wants_moments else None
        self.n_costs = n = len(evaluation.candidates)  # computed are ``MAX_CANDIDATES``
        self._costs = None
        if n:
            repeated = evaluation.candidates[np.arange(MAX_CANDIDATES) % n]
            self._costs = np.append(repeated, f_scale)

    def run(self, programs: _Programs, batch: DeviceBatch) -> list[Any]:
        """Start the computation of a batch on its device, and return what ``carry`` needs."""
        (device,) = batch.n_rows.devices()
        calls = [(programs.sums, self._sums)]
        if self._moments is not None:
            calls.append((programs.moments, self._moments))
        if self._costs is not None:
            calls.append((programs.costs, self._costs))
        results = []
        for program, vector in calls:
            vector_there = self._vectors.on(device, vector)
            result = program(vector_there, batch.n_rows, batch.arrays, device=device)
            result.copy_to_host_async()
            results.append(result)
        return results

    def carry(self, results: list[Any], zero: Any) -> Carry:
        """Wait for the results of a batch, and return them as running sums."""
        sums, *others = map(np.asarray, results)
        *totals, counts = _split(sums, (*zero, np.zeros(4)))
        moments = others.pop(0)[:, None] if self._moments is not None else np.zeros((3, 1))
        costs = others[0][: self.n_costs] if self.n_costs else np.zeros(0)
        return tuple(totals), counts.astype(np.int64), moments, costs[:, None]
