"""``Sums`` over rows, the result of a pass; sums of two sets of rows combine to those of both."""

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
from nlsq_dask.kernels.request import Request

Moments = tuple[float, float, float, float]  # weight, y_sum, y_square and signal


def combined(combine: Callable[[Any, Any], Any], **options: Any) -> Any:
    """Declare a dataclass field and how its values for two sets of rows combine, e.g. ``add``."""
    return field(metadata={"combine": combine}, **options)


def _merge(
    one: NDArray[np.float64] | None, other: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    return None if one is None or other is None else tsqr.merge(one, other)


@dataclass(frozen=True, kw_only=True)
class Sums(ABC):
    """Sums over rows that every solver needs, in float64.

    The residuals are ``r = (model - y) / sigma``, with Jacobian J by the parameters.
    """

    jtr: NDArray[np.float64] = combined(add)  # J^T r, the gradient of the cost, shape (p,)
    # 1/2 sum C^2 rho((r / C)^2) with rho and C of the ``Loss``, plus the penalty.
    cost: float = combined(add)
    chi2: float = combined(add, default=0.0)  # sum r^2
    penalty: float = combined(add, default=0.0)  # part of the cost, see ``GroupVariance``
    largest: float = combined(max, default=0.0)  # max |r|
    # Sums of w, w (y - y0) and w (y - y0)^2 with w = 1 / sigma^2; ``Kernel.y_reference`` y0 avoids
    # cancellation in the variance.
    weight: float = combined(add, default=0.0)
    y_sum: float = combined(add, default=0.0)
    y_square: float = combined(add, default=0.0)
    signal: float = combined(add, default=0.0)  # sum of w y^2, which bounds rounding errors
    n_used: int = combined(add, default=0)  # rows in the sums
    n_masked: int = combined(add, default=0)  # rows masked by the caller
    n_bad: int = combined(add, default=0)  # rows with NaN or infinity in y, x or sigma
    n_nonfinite: int = combined(add, default=0)  # rows with a non-finite model
    n_bad_sigma: int = combined(add, default=0)  # rows with sigma <= 0
    # The cost at the candidates, shape (k,).
    candidate_costs: NDArray[np.float64] = combined(add, default_factory=lambda: np.zeros(0))

    def combine(self, other: Self) -> Self:
        """Return the sums over the rows of both ``self`` and ``other``."""
        return type(self)(
            **{
                f.name: f.metadata["combine"](getattr(self, f.name), getattr(other, f.name))
                for f in fields(self)
            }
        )

    def penalized(self, penalty: GroupVariance, request: Request) -> Self:
        """Return the sums with a penalty added, which is proportional to ``n_used``.

        Parameters
        ----------
        penalty : GroupVariance
        request : Request
            The request that these sums answer.
        """
        if not penalty.groups:
            return self
        sums = self._with_penalty(penalty, request)
        if request.candidates is None:
            return sums
        costs = self.candidate_costs + penalty.costs(request.candidates, self.n_used)
        return replace(sums, candidate_costs=costs)

    @abstractmethod
    def _with_penalty(self, penalty: GroupVariance, request: Request) -> Self:
        """Return the sums with the penalty added to the cost and its derivatives.

        ``candidate_costs`` are left unchanged.
        """

    @property
    def moments(self) -> Moments:
        """Sums that do not depend on the parameters: of the weights and of weighted y."""
        return self.weight, self.y_sum, self.y_square, self.signal

    def with_moments(self, moments: Moments) -> Self:
        """Return the sums with moments that an earlier pass computed over the same rows."""
        weight, y_sum, y_square, signal = moments
        return replace(self, weight=weight, y_sum=y_sum, y_square=y_square, signal=signal)

    def variance(self, n_params: int) -> float:
        """Return ``2 cost / (n_used - n_params)``, the cost without the penalty.

        Infinite if there are no more rows than parameters.
        """
        dof = self.n_used - n_params
        return 2.0 * max(self.cost - self.penalty, 0.0) / dof if dof > 0 else np.inf

    @property
    def mean_square(self) -> float:
        """``2 cost / n_used``, the mean squared weighted residual if the loss is linear."""
        return 2.0 * self.cost / max(self.n_used, 1)

    def relative_slope(self, scales: NDArray[np.float64]) -> float:
        """Return the norm of the gradient of ``2 cost / total_variation``.

        The gradient is taken by the parameters divided by ``scales``.
        """
        size = self.total_variation or float(max(self.n_used, 1))
        with np.errstate(over="ignore"):  # infinity is a valid result
            return 2.0 / size * float(np.linalg.norm(self.jtr * scales))

    def cost_noise(self, epsilon: float) -> float:
        """Return the rounding error of a difference of two costs close to this one.

        ``epsilon`` is the machine epsilon of the dtype in which the model is evaluated.
        """
        return 32 * epsilon * self.cost + epsilon * float(np.sqrt(2 * self.cost * self.signal))

    @property
    def n_omitted(self) -> int:
        """Number of rows excluded from the sums: masked or not finite."""
        return self.n_masked + self.n_bad

    @property
    def is_finite(self) -> bool:
        """Whether model and Jacobian are finite at all rows that are summed."""
        return (
            self.n_nonfinite == 0
            and bool(np.isfinite(self.cost))
            and bool(np.isfinite(self.jtr).all())
        )

    @property
    def lacks_derivatives(self) -> bool:
        """Whether only derivatives are not finite: the model and the sum of r^2 are."""
        bound = self.n_used * self.largest * self.largest
        return self.n_nonfinite == 0 and bool(np.isfinite(bound)) and not self.is_finite

    @property
    def total_variation(self) -> float:
        """Weighted sum of squared differences of y from its weighted mean."""
        if self.weight == 0.0:
            return 0.0
        return max(self.y_square - self.y_sum * (self.y_sum / self.weight), 0.0)


@dataclass(frozen=True, kw_only=True)
class NormalEquations(Sums):
    """Sums with ``J^T J``, from which a Gauss-Newton step is solved directly."""

    jtj: NDArray[np.float64] = combined(add)  # J^T J, shape (p, p)
    # R of the QR factorization of [J r], shape (p + 1, p + 1), if requested; with a robust loss,
    # that of J, shape (p, p).
    triangle: NDArray[np.float64] | None = combined(_merge, default=None)

    def _with_penalty(self, penalty: GroupVariance, request: Request) -> Self:
        n, params = self.n_used, request.params
        return self.with_rows(penalty.jacobian(len(params), n), penalty.residuals(params, n))

    def with_rows(self, jacobian: NDArray[np.float64], residuals: NDArray[np.float64]) -> Self:
        """Add the rows of a penalty to cost, ``penalty``, ``J^T r``, ``J^T J`` and R.

        Sums that describe the data, such as chi2 and the number of rows, do not change.

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
    """Sums for conjugate gradients: products with ``J^T J`` take the place of the matrix."""

    products: NDArray[np.float64] = combined(add)  # J^T J v for each of k directions, (k, p)

    def _with_penalty(self, penalty: GroupVariance, request: Request) -> Self:
        n, params = self.n_used, request.params
        cost = float(penalty.costs(params[None], n)[0])
        products = self.products
        if request.directions is not None:
            products = products + np.array([penalty.product(v, n) for v in request.directions])
        return replace(
            self,
            jtr=self.jtr + penalty.product(params, n),
            products=products,
            cost=self.cost + cost,
            penalty=self.penalty + cost,
        )

    @property
    def is_finite(self) -> bool:
        """Whether model and derivatives are finite at all rows used."""
        return super().is_finite and bool(np.isfinite(self.products).all())
