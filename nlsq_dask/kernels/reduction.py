"""``Reduction``: definition of sums over rows; ``RowProgram``: compiled code that computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.row_terms import MakeTerms
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program
from nlsq_dask.rows.device_rows import PlacedRows
from nlsq_dask.rows.rows import Array

S_co = TypeVar("S_co", bound=Sums, covariant=True)

MAX_CANDIDATES = 3  # points per pass at which only the cost is evaluated

Totals = tuple[Any, ...]
# Running sums:
# - sums: totals of the reduction, from residuals and derivatives;
# - counts (4,): rows used, rows with a non-finite model, masked rows, rows with invalid sigma;
# - moments (3, lanes): sums of w, w (y - y0) and w (y - y0)^2;
# - costs (candidates, lanes): sums of rho(z) at the candidates.
Carry = tuple[Totals, Any, Any, Any]


class RowSource(Protocol):
    """Arrays in memory whose elements are rows, such as ``Rows``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of y, to which the arrays broadcast; the rows are its elements in C order."""

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """All arrays, in the order y, x..., sigma, mask."""


class Reduction(Protocol[S_co]):
    """Definition of sums over rows: initial value, contribution of a row, combination, result.

    ``totals`` are the running sums that differ between reductions. Sums that all reductions have,
    such as the number of rows, are the same for all; see ``Carry``.
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

    def zero(self, n_params: int, n_lanes: int) -> Totals:
        """Return the totals before the first row, with one partial sum per SIMD lane."""

    def strip_rows(self, n_params: int, batch_rows: int) -> int:
        """Return the number of rows that a CPU processes at a time."""

    def row_bytes(self, n_params: int) -> int:
        """Return about how many bytes of intermediate results a GPU stores per row of a batch.

        It is equal for all reductions of one fit, so that batches on a GPU serve all of them.
        """

    def terms(self, model: Model, loss: str, strip_rows: int | None) -> MakeTerms:
        """Return the constructor of the terms of ``strip_rows`` rows, or of a batch if None."""

    def point(self, request: Request) -> tuple[NDArray[np.float64], ...]:
        """Return the parameters of the request, and other arrays on which the totals depend."""

    def finish(self, totals: Totals, loss: Loss, **common: Any) -> S_co:
        """Return the result; ``common`` are the fields that all ``Sums`` have."""


@dataclass(frozen=True)
class Evaluation:
    """Arguments of a ``RowProgram`` that are the same for all rows."""

    point: tuple[NDArray[np.float64], ...]  # see ``Reduction.point``
    candidates: NDArray[np.float64]  # (k, p), points at which only the cost is computed
    y0: float
    f_scale: float
    wants_moments: bool


# Returns a traced program, from the cache if it holds one; the arguments are the settings on which
# the program depends beside the model and the reduction, and the function that traces it.
TraceOnce = Callable[[tuple[Any, ...], Callable[[], Program]], Program]


class RowProgram(Protocol):
    """Compiled code for the sums of one reduction of one model on one platform."""

    @property
    def fingerprint(self) -> str:
        """Digest of the operations and constants."""

    def accumulate(
        self,
        reduction: Reduction[Sums],
        source: RowSource | PlacedRows,
        evaluation: Evaluation,
        devices: list[jax.Device],
    ) -> Carry:
        """Return the sums over all rows, as NumPy arrays."""


def combine(reduction: Reduction[Sums], one: Carry, other: Carry) -> Carry:
    """Return the running sums over two sets of rows."""
    totals = zip(reduction.combine, one[0], other[0], strict=True)
    with np.errstate(invalid="ignore", over="ignore"):  # then the sums are not finite
        counts, moments, costs = (a + b for a, b in zip(one[1:], other[1:], strict=True))
        return tuple(function(a, b) for function, a, b in totals), counts, moments, costs


def row_specs(model: Model, n_rows: int) -> tuple[Any, ...]:
    """Return shapes and dtypes of y, x, sigma and mask, for tracing."""
    layout = model.layout

    def spec(dtype: str | None) -> Any:
        return None if dtype is None else jax.ShapeDtypeStruct((n_rows,), np.dtype(dtype))

    mask = "bool" if layout.has_mask else None
    return spec(layout.y_dtype), model.x_specs(n_rows), spec(layout.sigma_dtype), spec(mask)
