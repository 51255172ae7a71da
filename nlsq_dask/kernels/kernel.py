"""``Kernel``: compiled programs that sum over rows in memory, on a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import jax
import numpy as np

from nlsq_dask.kernels.device_program import DeviceProgram
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.reduction import Evaluation, Reduction, RowProgram, RowSource
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.strip_program import StripProgram
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.jax_scope import CPU, platform_of, usable_devices, x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program, traced_once
from nlsq_dask.rows.device_rows import PlacedRows
from nlsq_dask.rows.rows import STRIP_ROWS

# Larger batches need more memory for copies, smaller ones more calls.
_MAX_BATCH_BYTES = 4 * 2**20
_HOST_PLATFORMS = {CPU}  # platforms whose devices share host memory

S = TypeVar("S", bound=Sums)


def batch_rows_for(longest_block: int, chunk_size: int, row_bytes: int) -> int:
    """Return the number of rows per kernel call, a power of two, at most ``chunk_size``.

    It is limited to the length of the longest block, because more rows are not useful, and to a
    fixed number of bytes, because larger copies into JAX's memory are slower.
    """
    max_rows = max(min(chunk_size, _MAX_BATCH_BYTES // row_bytes), 1)
    needed = max(longest_block, STRIP_ROWS)
    return min(1 << (needed - 1).bit_length(), 1 << (max_rows.bit_length() - 1))


@dataclass(frozen=True)
class Kernel(Generic[S]):
    """Compiled programs that return the ``Sums`` of a ``Request`` over given rows."""

    reduction: Reduction[S]
    # By platform; a process uses that of its GPUs, or else of the CPU.
    programs: dict[str, RowProgram]
    n_params: int
    batch_rows: int  # per call of the program for a CPU
    loss: Loss
    longest_block: int  # rows; a GPU processes at most one block per call
    y_reference: float = 0.0  # the y0 of ``Sums``
    uses_all_devices: bool = False  # distribute rows over all devices of a process

    @classmethod
    def trace(
        cls,
        reduction: Reduction[S],
        model: Model,
        batch_rows: int,
        platforms: tuple[str, ...] = (CPU,),
        loss: Loss | None = None,
        longest_block: int | None = None,
    ) -> Self:
        """Trace the programs of a model and a reduction, or take them from the cache.

        Parameters
        ----------
        reduction : Reduction
        model : Model
        batch_rows : int
            Number of rows that a CPU processes per call.
        platforms : tuple of str
        loss : Loss, optional
            By default, the linear one.
        longest_block : int, optional
            Number of rows of the longest block, on which those that a GPU processes per call
            depend. By default ``batch_rows``.
        """
        with x64():
            jaxpr = model.jaxpr()
        loss, longest = loss or Loss(), longest_block or batch_rows
        key = (*reduction.key, model.layout, model.dtype, model.n_params, loss.name)

        def once(settings: tuple[Any, ...], trace: Callable[[], Program]) -> Program:
            return traced_once((*key, *settings), jaxpr, trace)

        def program(platform: str) -> RowProgram:
            if platform in _HOST_PLATFORMS:
                return StripProgram.trace(reduction, model, loss.name, batch_rows, platform, once)
            return DeviceProgram.trace(reduction, model, loss.name, longest, platform, once)

        programs = {platform: program(platform) for platform in platforms}
        return cls(reduction, programs, model.n_params, batch_rows, loss, longest)

    def __call__(
        self, source: RowSource | PlacedRows, request: Request, wants_moments: bool = True
    ) -> S:
        """Return the sums over all rows of ``source``.

        Parameters
        ----------
        source : RowSource or PlacedRows
        request : Request
            At most ``MAX_CANDIDATES`` candidates.
        wants_moments : bool
            Whether to compute the sums that do not depend on the parameters.

        Raises
        ------
        DeviceMemoryError
            If a GPU has too little free memory.
        """
        y0, candidates = self.y_reference, request.candidates
        points = np.empty((0, self.n_params)) if candidates is None else candidates
        point, f_scale = self.reduction.point(request), self.loss.f_scale
        evaluation = Evaluation(point, points, y0, f_scale, wants_moments)
        devices, program = self._on_devices()
        carry = program.accumulate(self.reduction, source, evaluation, devices)
        totals, counts, moments, costs = carry
        weight, y_sum, y_square = map(float, moments.sum(axis=-1))
        n_used, n_nonfinite, n_masked, n_bad_sigma = map(int, counts)
        with np.errstate(invalid="ignore", over="ignore"):  # then the sums are not finite
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
                candidate_costs=0.5 * f_scale**2 * costs.sum(axis=-1),
            )

    @property
    def gpus(self) -> list[jax.Device]:
        """GPUs of this process to which rows are copied; none if it computes on the CPU."""
        devices, program = self._on_devices()
        return devices if isinstance(program, DeviceProgram) else []

    def placed_bytes(self, source: RowSource) -> int:
        """Return the bytes of GPU memory that ``placed`` needs; 0 if there is no GPU."""
        _, program = self._on_devices()
        return program.placed_bytes(source) if isinstance(program, DeviceProgram) else 0

    def placed(self, source: RowSource) -> PlacedRows | None:
        """Copy rows to the GPUs; return None if they do not fit, or there is no GPU."""
        devices, program = self._on_devices()
        return program.placed(source, devices) if isinstance(program, DeviceProgram) else None

    def _on_devices(self) -> tuple[list[jax.Device], RowProgram]:
        """Return the JAX devices to use, and the program for them."""
        devices = usable_devices(tuple(self.programs), self.uses_all_devices)
        return devices, self.programs[platform_of(devices[0])]
