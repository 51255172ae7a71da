"""``DenseReduction``: sums for steps that are solved with dense matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_loops import Accumulation, DenseLoops, add_gram, n_gram_lanes
from nlsq_dask.kernels.kernel import Kernel, Totals
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.strip_loops import MakeLoops, lanes_for, strip_rows_for
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.kernels.tsqr import merge, panel_rows
from nlsq_dask.model.jacobian import Mode, choose_mode
from nlsq_dask.model.jax_scope import CPU, x64
from nlsq_dask.model.model import Model

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class DenseReduction:
    """Products of Jacobian and residual, or their QR factorization.

    With ``SCORES``, R is the factor of ``r J``: ``R^T R = sum r^2 J^T J`` is the middle of a
    sandwich covariance. With a robust loss, r is replaced by ``rho' r``.
    """

    mode: Mode  # forward or reverse, for the Jacobian
    # Powers of two that scale the columns of the Jacobian and the residual before the products are
    # summed, which avoids overflow and underflow in float32.
    factors: tuple[float, ...]
    accumulation: Accumulation = Accumulation.GRAM

    sums_type = NormalEquations

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that changes the program."""
        return self.accumulation, self.mode

    @property
    def name(self) -> str:
        """Name of the sums."""
        return self.accumulation.value

    @property
    def combine(self) -> tuple[Any, ...]:
        """Functions that combine matrix and residuals over two sets of rows."""
        return self._combine_matrix, add

    def _combine_matrix(self, one: Matrix, other: Matrix) -> Matrix:
        total = np.asarray(add_gram(np, one, other))
        if self.accumulation.is_factorized:
            end = -1 if self.accumulation is Accumulation.ROOT else None
            largest = total[-1, 0, 0]
            total[:end, :end, 0] = merge(one[:end, :end, 0], other[:end, :end, 0])
            total[-1, 0, 0] = largest
        return total

    def zero(self, n_params: int, batch_rows: int, platform: str) -> Totals:
        """Return zero totals: matrix and residuals."""
        n_lanes = lanes_for(batch_rows, platform)
        n_matrix_lanes = n_gram_lanes(n_params, n_lanes, self.accumulation)
        return np.zeros((n_params + 1, n_params + 1, n_matrix_lanes)), np.zeros((2, n_lanes))

    def strip_rows(self, n_params: int, batch_rows: int, platform: str) -> int:
        """Return the number of rows per strip."""
        return strip_rows_for(batch_rows, platform)

    def loops(self, model: Model, loss: str, batch_rows: int, platform: str) -> MakeLoops:
        """Return a factory of the loops that add rows to the totals."""
        n_rows = strip_rows_for(batch_rows, platform)
        n_panel_rows = panel_rows(model.n_params + 1, n_rows) if platform == CPU else n_rows
        make_loops = partial(DenseLoops, accumulation=self.accumulation, mode=self.mode)
        return partial(make_loops, model, loss, n_rows, panel_rows=n_panel_rows)

    def point(self, request: Request) -> tuple[NDArray[np.float64], ...]:
        """Return parameters and scaling factors."""
        return request.params, np.array(self.factors)

    def finish(self, totals: Totals, loss: Loss, **common: Any) -> NormalEquations:
        """Return the sums with the scaling removed."""
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
        """Return ``J^T J``, ``J^T r``, ``r^T r`` and R (or None) with the scaling removed."""
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
) -> Kernel[NormalEquations]:
    """Trace a kernel with a ``DenseReduction``; ``mode`` defaults to that of ``choose_mode``."""
    with x64():
        mode = mode or choose_mode(model, model.jaxpr())
    reduction = DenseReduction(mode, (1.0,) * (model.n_params + 1), accumulation)
    return Kernel.trace(reduction, model, batch_rows, platforms, loss)


def with_accumulation(
    kernel: Kernel[NormalEquations], accumulation: Accumulation, model: Model
) -> Kernel[NormalEquations]:
    """Return a kernel of the same model that makes other products; see ``Accumulation``.

    With a robust loss, ``ROOT`` takes the place of ``TRIANGLE``: the scaled residual spans too many
    orders of magnitude for a column of a QR factorization.
    """
    if accumulation is Accumulation.TRIANGLE and not kernel.loss.is_linear:
        accumulation = Accumulation.ROOT
    reduction = kernel.reduction
    assert isinstance(reduction, DenseReduction)
    if accumulation is reduction.accumulation:
        return kernel
    reduction = replace(reduction, accumulation=accumulation)
    platforms = tuple(kernel.programs)
    other = Kernel.trace(reduction, model, kernel.batch_rows, platforms, kernel.loss)
    return replace(kernel, reduction=reduction, programs=other.programs)
