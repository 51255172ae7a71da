"""``StripProgram``: sums over rows on a CPU, computed strip by strip in batches of rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Self

import jax
import numpy as np

from nlsq_dask.kernels.reduction import (
    MAX_CANDIDATES,
    Carry,
    Evaluation,
    Reduction,
    RowSource,
    Totals,
    TraceOnce,
    combine,
    row_specs,
)
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.strip_loops import accumulator, lanes_for
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program
from nlsq_dask.rows.device_rows import PlacedRows
from nlsq_dask.rows.windows import SLACK, Memory, MemoryPool, windows

_IN_FLIGHT = 2  # batches per device: one is computed, one is prepared


def _zero_carry(totals: Totals, batch_rows: int) -> Carry:
    n_lanes = lanes_for(batch_rows)
    counts, costs = np.zeros(4, np.int64), np.zeros((MAX_CANDIDATES, n_lanes))
    return totals, counts, np.zeros((3, n_lanes)), costs


@dataclass(frozen=True)
class StripProgram:
    """Program that adds a batch of a fixed number of rows to running sums, for a CPU.

    In float64 and without masked rows, the bits of the result do not depend on the batches, because
    each batch continues the running sums of the previous one.
    """

    program: Program
    n_params: int
    batch_rows: int
    strip_rows: int
    memory: MemoryPool = field(default_factory=MemoryPool, compare=False)  # for copies of rows

    @classmethod
    def trace(
        cls,
        reduction: Reduction[Sums],
        model: Model,
        loss: str,
        batch_rows: int,
        platform: str,
        once: TraceOnce,
    ) -> Self:
        """Trace the program, or take it from the cache."""
        p, n_rows = model.n_params, reduction.strip_rows(model.n_params, batch_rows)
        arrays = row_specs(model, batch_rows + SLACK)
        zero = _zero_carry(reduction.zero(p, lanes_for(batch_rows)), batch_rows)
        point = reduction.point(Request(np.zeros(p)))

        def spec(dtype: str, *shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, np.dtype(dtype))

        def program() -> Program:
            return Program.trace(
                accumulator(reduction.terms(model, loss, n_rows), model.dtype, n_rows),
                jax.tree.map(lambda array: spec(array.dtype.str, *array.shape), zero),
                (*(spec("f8", *a.shape) for a in point), spec("f8", MAX_CANDIDATES, p)),
                (spec("f8"), spec("f8"), spec("bool"), spec("i8")),
                spec("i8"),
                arrays,
                jax.tree.map(lambda _: spec("i8"), arrays),
                platform=platform,
            )

        return cls(once(("strips", batch_rows, platform), program), p, batch_rows, n_rows)

    @property
    def fingerprint(self) -> str:
        """Digest of the operations and constants."""
        return self.program.fingerprint

    def accumulate(
        self,
        reduction: Reduction[Sums],
        source: RowSource | PlacedRows,
        evaluation: Evaluation,
        devices: list[jax.Device],
    ) -> Carry:
        """Run the program over all batches, and return the sums combined over the devices."""
        assert not isinstance(source, PlacedRows)
        n_candidates = len(evaluation.candidates)
        padded = np.zeros((MAX_CANDIDATES, self.n_params))
        padded[:n_candidates] = evaluation.candidates
        point = *evaluation.point, padded
        numbers = np.float64(evaluation.y0), np.float64(evaluation.f_scale)
        options = *numbers, np.bool_(evaluation.wants_moments), np.int64(n_candidates)
        zero = reduction.zero(self.n_params, lanes_for(self.batch_rows))
        carries: list[Any] = [_zero_carry(zero, self.batch_rows)] * len(devices)
        max_in_flight = _IN_FLIGHT * len(devices)
        in_flight: deque[Any] = deque()
        with self.memory.borrow(max_in_flight + 1) as memory:
            for turn, (n_rows, *batch) in enumerate(self._batches(source, memory)):
                i = turn % len(devices)
                carries[i] = self.program(
                    carries[i], point, options, n_rows, *batch, device=devices[i]
                )
                in_flight.append(carries[i])
                if len(in_flight) > max_in_flight:
                    jax.block_until_ready(in_flight.popleft())
            on_host = (jax.tree.map(np.asarray, carry) for carry in carries)
            *totals, costs = reduce(partial(combine, reduction), on_host)
        return totals[0], totals[1], totals[2], costs[:n_candidates]

    def _batches(self, source: RowSource, memory: Memory) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the number of rows of each batch, its arrays and their offsets."""
        rows = self.batch_rows, self.strip_rows
        for *pair, n_rows in windows(source.arrays, source.shape, *rows, memory):
            arrays, offsets = ((rows.y, rows.x, rows.sigma, rows.mask) for rows in pair)
            yield np.int64(n_rows), arrays, offsets
