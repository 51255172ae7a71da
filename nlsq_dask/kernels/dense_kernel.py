"""``DenseReduction``: the sums from which a Gauss-Newton step is solved with p-by-p matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_algebra import (
    MAX_SEPARATE_SUMS,
    Algebra,
    DeviceAlgebra,
    StripAlgebra,
)
from nlsq_dask.kernels.dense_terms import Accumulation, DenseTerms, add_gram
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.reduction import Totals
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.row_terms import MakeTerms
from nlsq_dask.kernels.strip_loops import strip_rows_for
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.kernels.tsqr import merge, panel_rows
from nlsq_dask.model.jacobian import choose_mode
from nlsq_dask.model.jax_scope import CPU, x64
from nlsq_dask.model.model import Mode, Model

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class DenseReduction:
    """Definition of the sums ``J^T J`` and ``J^T r``, or of R of a QR factorization of ``[J r]``.

    ``accumulation`` selects which. For the sandwich covariance (``SCORES``), R is the factor of the
    matrix with rows ``r_i J_i``, so that ``R^T R = sum_i r_i^2 J_i^T J_i``; with a robust loss,
    ``rho'(z_i) r_i`` takes the place of ``r_i``.
    """

    mode: Mode  # forward or reverse, for the Jacobian
    # Powers of two that scale the columns of the Jacobian and the residual before the products are
    # summed, which avoids overflow and underflow in float32.
    factors: tuple[float, ...]
    accumulation: Accumulation = Accumulation.GRAM

    sums_type = NormalEquations

    @property
    def key(self) -> tuple[Any, ...]:
        """Settings on which the traced program depends; a part of its key in the cache."""
        return self.accumulation, self.mode

    @property
    def name(self) -> str:
        """Name that distinguishes these sums from others in a checkpoint."""
        return self.accumulation.value

    @property
    def combine(self) -> tuple[Any, ...]:
        """Functions that combine the totals of two sets of rows, one per element of ``zero()``."""
        return self._combine_matrix, add

    def _combine_matrix(self, one: Matrix, other: Matrix) -> Matrix:
        total = np.asarray(add_gram(np, one, other))
        if self.accumulation.is_factorized:
            end = -1 if self.accumulation is Accumulation.ROOT else None
            largest = total[-1, 0, 0]
            total[:end, :end, 0] = merge(one[:end, :end, 0], other[:end, :end, 0])
            total[-1, 0, 0] = largest
        return total

    def zero(self, n_params: int, n_lanes: int) -> Totals:
        """Return the totals before the first row: zeros for the matrix, sums of rho and r^2."""
        is_in_lanes = n_params < MAX_SEPARATE_SUMS and not self.accumulation.is_factorized
        n_matrix_lanes = n_lanes if is_in_lanes else 1
        return np.zeros((n_params + 1, n_params + 1, n_matrix_lanes)), np.zeros((2, n_lanes))

    def strip_rows(self, n_params: int, batch_rows: int) -> int:
        """Return the number of rows that a CPU processes at a time."""
        return strip_rows_for(batch_rows)

    def row_bytes(self, n_params: int) -> int:
        """Return about how many bytes of intermediate results a GPU stores per row of a batch."""
        return 24 * (n_params + 1)

    def terms(self, model: Model, loss: str, strip_rows: int | None) -> MakeTerms:
        """Return ``DenseTerms`` with model and settings bound."""
        algebra: Algebra = DeviceAlgebra()
        if strip_rows is not None:
            algebra = StripAlgebra(panel_rows(model.n_params + 1, strip_rows))
        return partial(DenseTerms, model, loss, algebra, self.accumulation, self.mode)

    def point(self, request: Request) -> tuple[NDArray[np.float64], ...]:
        """Return the arrays at which the sums are evaluated: parameters, and ``factors``."""
        return request.params, np.array(self.factors)

    def finish(self, totals: Totals, loss: Loss, **common: Any) -> NormalEquations:
        """Return the result: add up partial sums of SIMD lanes, divide out the scaling factors.

        ``common`` are the fields that all ``Sums`` have.
        """
        (lanes, residuals), factors = totals, np.array(self.factors)
        p = len(factors) - 1
        jtj, jtr, square, triangle = self._unscale(lanes.sum(axis=-1), factors)
        rho, squares = residuals.sum(axis=-1)
        # With the linear loss, the product contains the sum of squares.
        twice_cost, chi2 = loss.f_scale**2 * rho, squares / factors[p] ** 2
        if loss.is_linear:
            twice_cost = chi2 = square
        return NormalEquations(
            jtj=jtj,
            jtr=jtr,
            triangle=triangle,
            cost=0.5 * float(twice_cost),
            chi2=float(chi2),
            largest=float(np.sqrt(lanes[p, 0].max()) / factors[p]),
            **common,
        )

    def _unscale(
        self, product: Matrix, factors: NDArray[np.float64]
    ) -> tuple[Matrix, NDArray[np.float64], float, Matrix | None]:
        """Return ``J^T J``, ``J^T r``, ``r^T r`` and R, with the scaling factors divided out.

        ``product`` is the accumulated matrix; R is None unless that is a factor R.
        """
        p, upper = len(factors) - 1, np.triu(product)
        if self.accumulation is Accumulation.GRAM:
            upper = upper / factors[:, None] / factors
            gram = upper + np.triu(upper, 1).T
            return gram[:p, :p], gram[:p, p], gram[p, p], None
        upper = upper / factors
        is_root = self.accumulation is Accumulation.ROOT
        triangle = upper[:p, :p] if is_root else upper
        if self.accumulation is Accumulation.SCORES:
            triangle[:p, :p] /= factors[p]
        with np.errstate(over="ignore", invalid="ignore"):  # then the sums are not finite
            gram = triangle.T @ triangle
        if is_root:
            return gram, upper[:p, p] / factors[:p], np.nan, triangle
        return gram[:p, :p], gram[:p, p], gram[p, p], triangle


def dense_kernel(
    model: Model,
    batch_rows: int,
    mode: Mode | None = None,
    platforms: tuple[str, ...] = (CPU,),
    loss: Loss | None = None,
    accumulation: Accumulation = Accumulation.GRAM,
    longest_block: int | None = None,
) -> Kernel[NormalEquations]:
    """Trace the kernel that computes a ``DenseReduction`` of a model; see ``Kernel.trace``.

    By default, ``choose_mode`` selects forward or reverse mode for the Jacobian.
    """
    with x64():
        mode = mode or choose_mode(model, model.jaxpr())
    reduction = DenseReduction(mode, (1.0,) * (model.n_params + 1), accumulation)
    return Kernel.trace(reduction, model, batch_rows, platforms, loss, longest_block)


def with_accumulation(
    kernel: Kernel[NormalEquations], accumulation: Accumulation, model: Model
) -> Kernel[NormalEquations]:
    """Return the kernel of the same model with another ``Accumulation``.

    With a robust loss, ``TRIANGLE`` is replaced by ``ROOT``: the scaled residual spans too many
    orders of magnitude to be a column of a QR factorization.
    """
    if accumulation is Accumulation.TRIANGLE and not kernel.loss.is_linear:
        accumulation = Accumulation.ROOT
    reduction = kernel.reduction
    assert isinstance(reduction, DenseReduction)
    if accumulation is reduction.accumulation:
        return kernel
    reduction = replace(reduction, accumulation=accumulation)
    platforms = tuple(kernel.programs)
    sizes = kernel.batch_rows, platforms, kernel.loss, kernel.longest_block
    other = Kernel.trace(reduction, model, *sizes)
    return replace(kernel, reduction=reduction, programs=other.programs)
