"""``Iterate``: accepted parameters with their sums, the Gauss-Newton step, and convergence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.scaled_svd import ScaledSVD
from nlsq_dask.solvers.trust_region import Quadratic, Vector
from nlsq_dask.status import Status

_MIN_REGULARIZATION = 1e-8  # smaller values are ignored; they are rounding in J^T J
_NEGLIGIBLE = 1e-3  # of a standard error; shorter steps do not matter


@dataclass(frozen=True)
class Settings:
    """Settings of ``GaussNewton``."""

    low: Vector  # bounds, infinite if there are none
    high: Vector
    tol: float  # relative tolerance for the reduction of the cost, and for the step
    max_iterations: int
    patience: int  # iterations without progress after which a solve ends
    sizes: Vector  # typical magnitudes, used instead of |p| where p is near 0
    regularization: float  # see ``HybridStreamingConfig.regularization_factor``
    initial_radius: float  # first trust radius, as a multiple of the scaled norm of the start
    epsilon: float  # machine epsilon of the dtype in which the model is evaluated
    recovers: bool  # retry with a shorter step after a non-finite trial

    def is_held(self, params: Vector, gradient: Vector) -> NDArray[np.bool_]:
        """Return which parameters are at a bound beyond which the cost would decrease."""
        at_low, at_high = params <= self.low, params >= self.high
        return np.asarray((at_low & (gradient > 0.0)) | (at_high & (gradient < 0.0)))


def column_scale(jtj: NDArray[np.float64], least: Vector | None = None) -> Vector:
    """Return the column norms of J from J^T J, at least ``least``; 1 where a norm is 0."""
    norms = np.sqrt(np.diag(jtj))
    norms = norms if least is None else np.maximum(norms, least)
    return np.asarray(np.where(norms > 0.0, norms, 1.0))


@dataclass(frozen=True)
class Iterate:
    """Parameters with the sums over the rows there, and what follows from the sums.

    Scaled variables are parameters times ``scale``.
    """

    params: Vector
    sums: NormalEquations
    scale: Vector  # column norms of the Jacobian, at least a tenth of the previous iterate's
    settings: Settings

    @classmethod
    def of(cls, params: Vector, sums: NormalEquations, settings: Settings) -> Self:
        """Build an iterate whose scale is the column norms of its own Jacobian."""
        return cls(params, sums, column_scale(sums.jtj), settings)

    @cached_property
    def svd(self) -> ScaledSVD:
        """Singular value decomposition of the Jacobian with columns divided by ``scale``."""
        return ScaledSVD.of(self.sums, self.scale, self.settings.epsilon)

    @cached_property
    def quadratic(self) -> Quadratic:
        """Quadratic model of the cost in scaled variables."""
        factor = self.settings.regularization
        return Quadratic.of(self.svd, factor if factor >= _MIN_REGULARIZATION else 0.0)

    @property
    def is_ill_conditioned(self) -> bool:
        """Whether a solution by J^T J would have less than half of the digits of the dtype."""
        return self.svd.condition > float(self.settings.epsilon**-0.25)

    @property
    def room(self) -> tuple[Vector, Vector]:
        """Lower and upper limits of the step of each scaled variable, given by the bounds."""
        s = self.settings
        return (s.low - self.params) * self.scale, (s.high - self.params) * self.scale

    def moved(self, step: Vector) -> Vector:
        """Return the parameters after a step in scaled variables, clipped to the bounds."""
        low, high = self.room
        s = self.settings
        params = np.clip(self.params + step / self.scale, s.low, s.high)
        params = np.where(step <= low, s.low, np.where(step >= high, s.high, params))
        return np.asarray(params)

    @cached_property
    def full_step(self) -> Vector:
        """Step to the minimum of ``quadratic`` within the bounds, in scaled variables."""
        return self.quadratic.minimizer(0.0, *self.room)

    @cached_property
    def reduction(self) -> float:
        """Reduction of the cost that ``quadratic`` predicts for ``full_step``."""
        return max(self.quadratic.reduction(self.full_step), 0.0)

    @cached_property
    def relative_decrement(self) -> float:
        """``sqrt(reduction / cost)``: change of the residuals by a full step, over their norm."""
        if self.reduction == 0.0 or self.sums.cost == 0.0:
            return 0.0
        return float(np.sqrt(self.reduction / self.sums.cost))

    @property
    def is_negligible(self) -> bool:
        """Whether ``full_step`` changes no parameter by more than 0.001 standard errors."""
        dof = max(self.sums.n_used - len(self.params), 1)
        return self.relative_decrement * float(np.sqrt(dof)) <= _NEGLIGIBLE

    @property
    def cost_noise(self) -> float:
        """Rounding error of the difference of two costs."""
        return self.sums.cost_noise(self.settings.epsilon)

    @property
    def rounding_cost(self) -> float:
        """Largest cost that rounding errors of the model explain in a perfect fit."""
        return 0.5 * (8 * self.settings.epsilon) ** 2 * self.sums.signal

    @property
    def is_insensitive(self) -> NDArray[np.bool_]:
        """Which parameters change the model by rounding errors only, shape (p,).

        Those at a bound that the gradient holds there are excluded. A gradient of zero does not:
        the cost may be a maximum along that parameter.
        """
        s = self.settings
        norms = np.sqrt(np.diag(self.sums.jtj))
        rounding = s.epsilon * float(np.sqrt(self.sums.signal))
        is_hidden = norms * np.maximum(np.abs(self.params), s.sizes) <= rounding
        is_held = s.is_held(self.params, self.sums.jtr)
        return np.asarray(~is_held & ((norms == 0.0) | is_hidden))

    @property
    def is_in_a_valley(self) -> bool:
        """Whether the cost still decreases along directions in which it is nearly flat."""
        rounding = 64 * len(self.params) * self.settings.epsilon
        if self.quadratic.null_slope > rounding * float(np.sqrt(2 * self.sums.cost)):
            return True
        dof = max(self.sums.n_used - len(self.params), 1)
        shortest = max(
            _NEGLIGIBLE * float(np.sqrt(2 * self.sums.cost / dof)),
            float(np.sqrt(2 * self.rounding_cost)),
        )
        return self.quadratic.damped_residual > shortest

    def verdict(self, reason: Status) -> Status:
        """Return ``reason``, or the status of a failure if the fit cannot count as converged here.

        Failures are an insensitive parameter, and a cost that still decreases along flat
        directions.
        """
        if self.is_insensitive.any():
            return Status.NO_SENSITIVITY
        return Status.ILL_CONDITIONED if self.is_in_a_valley else reason

    def converged(self) -> Status | None:
        """Return the status of the convergence criterion that is met, or None."""
        if self.relative_decrement <= self.settings.tol:
            return Status.REDUCTION
        n = max(self.sums.n_used, 1)
        is_rounding = self.reduction <= self.rounding_cost * len(self.params) / n
        is_small = self.is_negligible or self.sums.cost <= self.rounding_cost
        if is_rounding and is_small:
            return Status.FLOOR
        tol = self.settings.tol
        # Per parameter: a large one must not hide that another still changes.
        small = np.abs(self.full_step / self.scale) <= tol * (tol + np.abs(self.params))
        if small.all() and is_small:
            return Status.STEP
        return None
