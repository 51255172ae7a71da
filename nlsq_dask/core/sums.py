"""``NormalEquations``: what one pass over rows brings back, and how two of them combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core import triangle
from nlsq_dask.core.block_sums import BlockSums

NO_BLOCK = -1


def _joined(one: BlockSums | None, other: BlockSums | None) -> BlockSums | None:
    return one.combine(other) if one and other else one or other


@dataclass(frozen=True)
class NormalEquations:
    """Sums over rows that determine a Gauss-Newton step, all in float64.

    With residuals ``r = (model - y) / sigma`` and their Jacobian ``J``.

    Attributes
    ----------
    jtj : ndarray, shape (p, p)
        ``J^T J``.
    jtr : ndarray, shape (p,)
        ``J^T r``, the gradient of the cost.
    triangle : ndarray, shape (p + 1, p + 1), or None
        R of the QR factorization of ``[J r]``, where that was asked for; with a robust loss that of
        J alone, shape (p, p).
    cost : float
        ``1/2 sum C^2 rho((r / C)^2)``, which is ``1/2 sum r^2`` with the linear loss, and the
        penalty.
    chi2 : float
        ``sum r^2``.
    penalty : float
        What of the cost does not come from rows, see ``with_rows``.
    blocks : BlockSums or None
        Of the residuals of each block; None where rows are in no block.
    weight, y_sum, y_square : float
        Sums of ``w``, ``w (y - y0)`` and ``w (y - y0)^2`` with ``w = 1 / sigma^2`` and a reference
        value y0 that keeps the variance free of cancellation.
    signal : float
        Sum of ``w y^2``: together with the machine's epsilon it says what rounding can hide.
    n_used, n_masked, n_bad : int
        Rows in the sums; rows masked by the caller; rows with a NaN or infinity in y, x or sigma.
    n_nonfinite : int
        Rows of finite data at which model or Jacobian are not finite.
    n_bad_sigma : int
        Rows whose sigma is not positive.
    first_bad_block : int
        Flat index of the first block with a bad row, or ``NO_BLOCK``.
    rows_read, bytes_read : int
        What was read from the source to make these sums.
    rows_cached : int
        What was in a worker's memory from an earlier pass.
    candidate_costs : ndarray, shape (k,)
        The cost at further points.
    """

    jtj: NDArray[np.float64]
    jtr: NDArray[np.float64]
    cost: float
    triangle: NDArray[np.float64] | None = None
    chi2: float = 0.0
    penalty: float = 0.0
    blocks: BlockSums | None = None
    weight: float = 0.0
    y_sum: float = 0.0
    y_square: float = 0.0
    signal: float = 0.0
    n_used: int = 0
    n_masked: int = 0
    n_bad: int = 0
    n_nonfinite: int = 0
    n_bad_sigma: int = 0
    first_bad_block: int = NO_BLOCK
    rows_read: int = 0
    bytes_read: int = 0
    rows_cached: int = 0
    candidate_costs: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def combine(self, other: Self) -> Self:
        """Return the sums over the rows of both."""
        blocks = [b for b in (self.first_bad_block, other.first_bad_block) if b != NO_BLOCK]
        joined = None
        if self.triangle is not None and other.triangle is not None:
            joined = triangle.merged(self.triangle, other.triangle)
        return type(self)(
            jtj=self.jtj + other.jtj,
            jtr=self.jtr + other.jtr,
            triangle=joined,
            cost=self.cost + other.cost,
            chi2=self.chi2 + other.chi2,
            penalty=self.penalty + other.penalty,
            blocks=_joined(self.blocks, other.blocks),
            weight=self.weight + other.weight,
            y_sum=self.y_sum + other.y_sum,
            y_square=self.y_square + other.y_square,
            signal=self.signal + other.signal,
            n_used=self.n_used + other.n_used,
            n_masked=self.n_masked + other.n_masked,
            n_bad=self.n_bad + other.n_bad,
            n_nonfinite=self.n_nonfinite + other.n_nonfinite,
            n_bad_sigma=self.n_bad_sigma + other.n_bad_sigma,
            first_bad_block=min(blocks, default=NO_BLOCK),
            rows_read=self.rows_read + other.rows_read,
            bytes_read=self.bytes_read + other.bytes_read,
            rows_cached=self.rows_cached + other.rows_cached,
            candidate_costs=self.candidate_costs + other.candidate_costs,
        )

    def with_rows(
        self,
        jacobian: NDArray[np.float64],
        residuals: NDArray[np.float64],
        further_costs: Sequence[float] = (),
    ) -> Self:
        """Return the sums with a penalty added, which is a sum of squares as well.

        Parameters
        ----------
        jacobian : ndarray, shape (k, p)
        residuals : ndarray, shape (k,)
        further_costs : sequence of float
            The penalty at the points of ``candidate_costs``.
        """
        joined = None
        if self.triangle is not None:
            rows = np.column_stack([jacobian, residuals])[:, : self.triangle.shape[1]]
            joined = triangle.with_rows(self.triangle, rows)
        penalty = 0.5 * float(residuals @ residuals)
        costs = self.candidate_costs
        return replace(
            self,
            triangle=joined,
            jtj=self.jtj + jacobian.T @ jacobian,
            jtr=self.jtr + jacobian.T @ residuals,
            cost=self.cost + penalty,
            penalty=self.penalty + penalty,
            candidate_costs=costs + np.asarray(further_costs) if len(further_costs) else costs,
        )

    def with_moments_of(self, other: Self) -> Self:
        """Return these sums with those of the data alone taken from others over the same rows."""
        return replace(
            self,
            weight=other.weight,
            y_sum=other.y_sum,
            y_square=other.y_square,
            signal=other.signal,
        )

    @property
    def n_omitted(self) -> int:
        """Rows that are not in the sums, masked or bad."""
        return self.n_masked + self.n_bad

    @property
    def is_finite(self) -> bool:
        """Whether the model and its Jacobian were finite at every row that counts."""
        return (
            self.n_nonfinite == 0
            and bool(np.isfinite(self.cost))
            and bool(np.isfinite(self.jtr).all())
            and bool(np.isfinite(self.jtj).all())
        )

    @property
    def total_variation(self) -> float:
        """Weighted sum of squares of y about its weighted mean."""
        if self.weight == 0.0:
            return 0.0
        return max(self.y_square - self.y_sum * (self.y_sum / self.weight), 0.0)
