"""What one pass over rows brings back, and how the sums of two parts of the rows combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from operator import add
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels import tsqr
from nlsq_dask.kernels.penalty import GroupVariance

Moments = tuple[float, float, float, float]  # weight, y_sum, y_square and signal


def combined(combine: Callable[[Any, Any], Any], **options: Any) -> Any:
    """Declare a field of sums, with how its values over two parts of the rows combine."""
    return field(metadata={"combine": combine}, **options)


def _merge(
    one: NDArray[np.float64] | None, other: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    return None if one is None or other is None else tsqr.merge(one, other)


@dataclass(frozen=True, kw_only=True)
class Sums(ABC):
    """Sums over rows, all in float64, without what a step is solved from.

    With residuals ``r = (model - y) / sigma`` and their Jacobian ``J``.

    Attributes
    ----------
    jtr : ndarray, shape (p,)
        ``J^T r``, the gradient of the cost.
    cost : float
        ``1/2 sum C^2 rho((r / C)^2)``, which is ``1/2 sum r^2`` with the linear loss, and the
        penalty.
    chi2 : float
        ``sum r^2``.
    penalty : float
        What of the cost does not come from rows, see ``GroupVariance``.
    largest : float
        Largest ``|r|``.
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
    candidate_costs : ndarray, shape (k,)
        The cost at further points.
    """

    jtr: NDArray[np.float64] = combined(add)
    cost: float = combined(add)
    chi2: float = combined(add, default=0.0)
    penalty: float = combined(add, default=0.0)
    largest: float = combined(max, default=0.0)
    weight: float = combined(add, default=0.0)
    y_sum: float = combined(add, default=0.0)
    y_square: float = combined(add, default=0.0)
    signal: float = combined(add, default=0.0)
    n_used: int = combined(add, default=0)
    n_masked: int = combined(add, default=0)
    n_bad: int = combined(add, default=0)
    n_nonfinite: int = combined(add, default=0)
    n_bad_sigma: int = combined(add, default=0)
    candidate_costs: NDArray[np.float64] = combined(add, default_factory=lambda: np.zeros(0))

    def combine(self, other: Self) -> Self:
        """Return the sums over the rows of both."""
        return type(self)(
            **{
                f.name: f.metadata["combine"](getattr(self, f.name), getattr(other, f.name))
                for f in fields(self)
            }
        )

    @abstractmethod
    def penalized(
        self,
        penalty: GroupVariance,
        params: NDArray[np.float64],
        candidates: NDArray[np.float64] | None = None,
        directions: NDArray[np.float64] | None = None,
    ) -> Self:
        """Return the sums with a penalty for as many rows added.

        Parameters
        ----------
        penalty : GroupVariance
        params : ndarray, shape (p,)
            Where the sums were taken.
        candidates : ndarray, shape (k, p), optional
            Where the further costs were.
        directions : ndarray, shape (k, p), optional
            Of which the products are.
        """

    @property
    def moments(self) -> Moments:
        """The sums of the data alone."""
        return self.weight, self.y_sum, self.y_square, self.signal

    def with_moments(self, moments: Moments) -> Self:
        """Return these sums with those of the data alone taken from others over the same rows."""
        weight, y_sum, y_square, signal = moments
        return replace(self, weight=weight, y_sum=y_sum, y_square=y_square, signal=signal)

    def variance(self, n_params: int) -> float:
        """Return the variance of a residual; infinite without degrees of freedom."""
        dof = self.n_used - n_params
        return 2.0 * max(self.cost - self.penalty, 0.0) / dof if dof > 0 else np.inf

    @property
    def mean_square(self) -> float:
        """The mean squared weighted residual, with the penalty."""
        return 2.0 * self.cost / max(self.n_used, 1)

    def relative_slope(self, scales: NDArray[np.float64]) -> float:
        """Return the norm of the gradient of the relative loss in normalized parameters."""
        size = self.total_variation or float(max(self.n_used, 1))
        with np.errstate(over="ignore"):  # infinite says enough
            return 2.0 / size * float(np.linalg.norm(self.jtr * scales))

    def cost_noise(self, epsilon: float) -> float:
        """Return the difference of costs below which it is rounding, in such an arithmetic."""
        return 32 * epsilon * self.cost + epsilon * float(np.sqrt(2 * self.cost * self.signal))

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
        )

    @property
    def total_variation(self) -> float:
        """Weighted sum of squares of y about its weighted mean."""
        if self.weight == 0.0:
            return 0.0
        return max(self.y_square - self.y_sum * (self.y_sum / self.weight), 0.0)


@dataclass(frozen=True, kw_only=True)
class NormalEquations(Sums):
    """Sums that determine a Gauss-Newton step.

    Attributes
    ----------
    jtj : ndarray, shape (p, p)
        ``J^T J``.
    triangle : ndarray, shape (p + 1, p + 1), or None
        R of the QR factorization of ``[J r]``, where that was asked for; with a robust loss that of
        J alone, shape (p, p).
    """

    jtj: NDArray[np.float64] = combined(add)
    triangle: NDArray[np.float64] | None = combined(_merge, default=None)

    def penalized(
        self,
        penalty: GroupVariance,
        params: NDArray[np.float64],
        candidates: NDArray[np.float64] | None = None,
        directions: NDArray[np.float64] | None = None,
    ) -> Self:
        """Return the sums with a penalty for as many rows added."""
        if not penalty.groups:
            return self
        n = self.n_used
        sums = self.with_rows(penalty.jacobian(len(params), n), penalty.residuals(params, n))
        if candidates is None:
            return sums
        return replace(sums, candidate_costs=self.candidate_costs + penalty.costs(candidates, n))

    def with_rows(self, jacobian: NDArray[np.float64], residuals: NDArray[np.float64]) -> Self:
        """Return the sums with further rows, which count as a penalty and not as data.

        Parameters
        ----------
        jacobian : ndarray, shape (k, p)
        residuals : ndarray, shape (k,)
        """
        triangle = None
        if self.triangle is not None:
            rows = np.column_stack([jacobian, residuals])[:, : self.triangle.shape[1]]
            triangle = tsqr.with_rows(self.triangle, rows)
        penalty = 0.5 * float(residuals @ residuals)
        return replace(
            self,
            triangle=triangle,
            jtj=self.jtj + jacobian.T @ jacobian,
            jtr=self.jtr + jacobian.T @ residuals,
            cost=self.cost + penalty,
            penalty=self.penalty + penalty,
        )

    @property
    def is_finite(self) -> bool:
        """Whether the model and its Jacobian were finite at every row that counts."""
        return super().is_finite and bool(np.isfinite(self.jtj).all())


@dataclass(frozen=True, kw_only=True)
class GradientSums(Sums):
    """Sums for many parameters: nothing is larger than a vector of them.

    Attributes
    ----------
    products : ndarray, shape (k, p)
        ``J^T J v`` for each of k directions.
    """

    products: NDArray[np.float64] = combined(add)

    def penalized(
        self,
        penalty: GroupVariance,
        params: NDArray[np.float64],
        candidates: NDArray[np.float64] | None = None,
        directions: NDArray[np.float64] | None = None,
    ) -> Self:
        """Return the sums with a penalty for as many rows added."""
        if not penalty.groups:
            return self
        n, p = self.n_used, len(params)
        vectors = np.empty((0, p)) if directions is None else directions
        points = np.empty((0, p)) if candidates is None else candidates
        cost = float(penalty.costs(params[None], n)[0])
        added = [penalty.product(vector, n) for vector in vectors]
        return replace(
            self,
            jtr=self.jtr + penalty.product(params, n),
            products=self.products + np.array(added) if added else self.products,
            cost=self.cost + cost,
            penalty=self.penalty + cost,
            candidate_costs=self.candidate_costs + penalty.costs(points, n),
        )

    @property
    def is_finite(self) -> bool:
        """Whether the model and its derivatives were finite at every row that counts."""
        return super().is_finite and bool(np.isfinite(self.products).all())
