"""Sums over rows: the result of a pass, and how the sums of two sets of rows combine."""

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
    """Declare a field with the function that combines its values over two sets of rows."""
    return field(metadata={"combine": combine}, **options)


def _merge(
    one: NDArray[np.float64] | None, other: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    return None if one is None or other is None else tsqr.merge(one, other)


@dataclass(frozen=True, kw_only=True)
class Sums(ABC):
    """Sums over rows, all in float64, that every solver needs.

    The residuals are ``r = (model - y) / sigma`` and their Jacobian is ``J``.
    """

    jtr: NDArray[np.float64] = combined(add)  # J^T r, the gradient of the cost, shape (p,)
    cost: float = combined(add)  # 1/2 sum C^2 rho((r / C)^2), or 1/2 sum r^2, plus the penalty
    chi2: float = combined(add, default=0.0)  # sum r^2
    penalty: float = combined(add, default=0.0)  # part of the cost, see ``GroupVariance``
    largest: float = combined(max, default=0.0)  # max |r|
    # Sums of w, w (y - y0) and w (y - y0)^2 with w = 1 / sigma^2; the reference y0 avoids
    # cancellation in the variance.
    weight: float = combined(add, default=0.0)
    y_sum: float = combined(add, default=0.0)
    y_square: float = combined(add, default=0.0)
    signal: float = combined(add, default=0.0)  # sum of w y^2, which bounds rounding errors
    n_used: int = combined(add, default=0)  # rows in the sums
    n_masked: int = combined(add, default=0)  # rows masked by the caller
    n_bad: int = combined(add, default=0)  # rows with NaN or infinity in y, x or sigma
    n_nonfinite: int = combined(add, default=0)  # rows with a non-finite model or Jacobian
    n_bad_sigma: int = combined(add, default=0)  # rows with sigma <= 0
    # The cost at the candidates, shape (k,).
    candidate_costs: NDArray[np.float64] = combined(add, default_factory=lambda: np.zeros(0))

    def combine(self, other: Self) -> Self:
        """Return the sums over the rows of both operands."""
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
        """Return the sums with the penalty for ``n_used`` rows added.

        Parameters
        ----------
        penalty : GroupVariance
        params : ndarray, shape (p,)
            Parameters of the sums.
        candidates, directions : ndarray, each of shape (k, p), optional
            Points of the candidate costs; vectors of the products.
        """

    @property
    def moments(self) -> Moments:
        """Sums of the data alone."""
        return self.weight, self.y_sum, self.y_square, self.signal

    def with_moments(self, moments: Moments) -> Self:
        """Return the sums with the given moments, computed earlier over the same rows."""
        weight, y_sum, y_square, signal = moments
        return replace(self, weight=weight, y_sum=y_sum, y_square=y_square, signal=signal)

    def variance(self, n_params: int) -> float:
        """Return the residual variance; infinite without degrees of freedom."""
        dof = self.n_used - n_params
        return 2.0 * max(self.cost - self.penalty, 0.0) / dof if dof > 0 else np.inf

    @property
    def mean_square(self) -> float:
        """Mean squared weighted residual, including the penalty."""
        return 2.0 * self.cost / max(self.n_used, 1)

    def relative_slope(self, scales: NDArray[np.float64]) -> float:
        """Return the norm of the gradient of the relative loss in normalized parameters."""
        size = self.total_variation or float(max(self.n_used, 1))
        with np.errstate(over="ignore"):  # infinity is a valid result
            return 2.0 / size * float(np.linalg.norm(self.jtr * scales))

    def cost_noise(self, epsilon: float) -> float:
        """Return the rounding error of a difference of costs for machine epsilon ``epsilon``."""
        return 32 * epsilon * self.cost + epsilon * float(np.sqrt(2 * self.cost * self.signal))

    @property
    def n_omitted(self) -> int:
        """Number of rows excluded from the sums: masked or not finite."""
        return self.n_masked + self.n_bad

    @property
    def is_finite(self) -> bool:
        """Whether model and Jacobian are finite at all rows used."""
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
    """Sums that determine a Gauss-Newton step."""

    jtj: NDArray[np.float64] = combined(add)  # J^T J, shape (p, p)
    # R of the QR factorization of [J r], shape (p + 1, p + 1), if requested; with a robust loss,
    # that of J, shape (p, p).
    triangle: NDArray[np.float64] | None = combined(_merge, default=None)

    def penalized(
        self,
        penalty: GroupVariance,
        params: NDArray[np.float64],
        candidates: NDArray[np.float64] | None = None,
        directions: NDArray[np.float64] | None = None,
    ) -> Self:
        """Return the sums with the penalty for ``n_used`` rows added."""
        if not penalty.groups:
            return self
        n = self.n_used
        sums = self.with_rows(penalty.jacobian(len(params), n), penalty.residuals(params, n))
        if candidates is None:
            return sums
        return replace(sums, candidate_costs=self.candidate_costs + penalty.costs(candidates, n))

    def with_rows(self, jacobian: NDArray[np.float64], residuals: NDArray[np.float64]) -> Self:
        """Return the sums with additional rows, which count as penalty and not as data.

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
        """Whether model and Jacobian are finite at all rows used."""
        return super().is_finite and bool(np.isfinite(self.jtj).all())


@dataclass(frozen=True, kw_only=True)
class GradientSums(Sums):
    """Sums for many parameters, without p-by-p matrices."""

    products: NDArray[np.float64] = combined(add)  # J^T J v for each of k directions, (k, p)

    def penalized(
        self,
        penalty: GroupVariance,
        params: NDArray[np.float64],
        candidates: NDArray[np.float64] | None = None,
        directions: NDArray[np.float64] | None = None,
    ) -> Self:
        """Return the sums with the penalty for ``n_used`` rows added."""
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
        """Whether model and derivatives are finite at all rows used."""
        return super().is_finite and bool(np.isfinite(self.products).all())
