"""``Iterate``: parameters with their sums, and the convergence criteria."""

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

_MIN_REGULARIZATION = 1e-8  # of regularization; J^T J loses what is below, which QR would keep
_NEGLIGIBLE = 1e-3  # of a standard error: a step this short changes nothing that matters


@dataclass(frozen=True)
class Settings:
    """What stays the same during a solve.

    Attributes
    ----------
    low, high : ndarray, shape (p,)
        Bounds of the parameters, infinite where there are none.
    tol : float
    max_iterations : int
    patience : int
        Iterations without progress after which a solve ends.
    sizes : ndarray, shape (p,)
        A change of each parameter that is worth something, whatever its value.
    regularization : float
        See ``HybridStreamingConfig.regularization_factor``.
    initial_radius : float
        As a multiple of the scaled length of the start.
    epsilon : float
        Machine epsilon of the arithmetic in which the model is evaluated.
    recovers : bool
        Whether a trial that is not finite is followed by a shorter one.
    """

    low: Vector
    high: Vector
    tol: float
    max_iterations: int
    patience: int
    sizes: Vector
    regularization: float
    initial_radius: float
    epsilon: float
    recovers: bool


def column_scale(jtj: NDArray[np.float64], least: Vector | None = None) -> Vector:
    """Return the norms of the Jacobian's columns, raised to ``least``; 1 for columns of zeros."""
    norms = np.sqrt(np.diag(jtj))
    norms = norms if least is None else np.maximum(norms, least)
    return np.asarray(np.where(norms > 0.0, norms, 1.0))


@dataclass(frozen=True)
class Iterate:
    """Parameters with their sums, and what these say of the way still to go.

    Attributes
    ----------
    params : ndarray, shape (p,)
    sums : NormalEquations
    scale : ndarray, shape (p,)
        Norms of the Jacobian's columns (with a short memory); lengths are measured by them.
    settings : Settings
    """

    params: Vector
    sums: NormalEquations
    scale: Vector
    settings: Settings

    @classmethod
    def of(cls, params: Vector, sums: NormalEquations, settings: Settings) -> Self:
        """Return the iterate with its own column norms as scale."""
        return cls(params, sums, column_scale(sums.jtj), settings)

    @cached_property
    def svd(self) -> ScaledSVD:
        """The singular values of the scaled Jacobian."""
        return ScaledSVD.of(self.sums, self.scale, self.settings.epsilon)

    @cached_property
    def quadratic(self) -> Quadratic:
        """The quadratic model of the cost in scaled variables."""
        factor = self.settings.regularization
        return Quadratic.of(self.svd, factor if factor >= _MIN_REGULARIZATION else 0.0)

    @property
    def is_ill_conditioned(self) -> bool:
        """Whether squaring the condition number costs half of the digits or more."""
        return self.svd.condition > float(self.settings.epsilon**-0.25)

    @property
    def room(self) -> tuple[Vector, Vector]:
        """How far the scaled variables may move to either side."""
        s = self.settings
        return (s.low - self.params) * self.scale, (s.high - self.params) * self.scale

    def moved(self, step: Vector) -> Vector:
        """Return the parameters a scaled step away; one that meets a bound lies on it exactly."""
        low, high = self.room
        s = self.settings
        params = np.clip(self.params + step / self.scale, s.low, s.high)
        params = np.where(step <= low, s.low, np.where(step >= high, s.high, params))
        return np.asarray(params)

    @cached_property
    def full_step(self) -> Vector:
        """The step that minimizes the quadratic inside the bounds."""
        return self.quadratic.minimizer(0.0, *self.room)

    @cached_property
    def reduction(self) -> float:
        """The reduction of the cost that the full step promises."""
        return max(self.quadratic.reduction(self.full_step), 0.0)

    @cached_property
    def relative_decrement(self) -> float:
        """``sqrt(reduction / cost)``: the step in units of the residual; 0 for a perfect fit."""
        if self.reduction == 0.0 or self.sums.cost == 0.0:
            return 0.0
        return float(np.sqrt(self.reduction / self.sums.cost))

    @property
    def is_negligible(self) -> bool:
        """Whether the full step is a small fraction of a standard error."""
        dof = max(self.sums.n_used - len(self.params), 1)
        return self.relative_decrement * float(np.sqrt(dof)) <= _NEGLIGIBLE

    @property
    def cost_noise(self) -> float:
        """Differences of the cost below this are rounding."""
        return self.sums.cost_noise(self.settings.epsilon)

    @property
    def rounding_cost(self) -> float:
        """The cost that rounding of the model alone would give, at most."""
        return 0.5 * (8 * self.settings.epsilon) ** 2 * self.sums.signal

    @property
    def has_insensitive_parameters(self) -> bool:
        """Whether the model reacts to some parameter inside its bounds by rounding alone."""
        s = self.settings
        is_free = (s.low < self.params) & (self.params < s.high)
        norms = np.sqrt(np.diag(self.sums.jtj))
        rounding = s.epsilon * float(np.sqrt(self.sums.signal))
        is_hidden = norms * np.maximum(np.abs(self.params), s.sizes) <= rounding
        return bool((is_free & ((norms == 0.0) | is_hidden)).any())

    @property
    def is_in_a_valley(self) -> bool:
        """Whether the cost still falls along directions that are too flat for a step."""
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
        """Return the reason to stop here, or why it is no success."""
        if self.has_insensitive_parameters:
            return Status.NO_SENSITIVITY
        return Status.ILL_CONDITIONED if self.is_in_a_valley else reason

    def converged(self) -> Status | None:
        """Return the convergence criterion that the iterate meets, if any."""
        if self.relative_decrement <= self.settings.tol:
            return Status.REDUCTION
        n = max(self.sums.n_used, 1)
        is_rounding = self.reduction <= self.rounding_cost * len(self.params) / n
        is_small = self.is_negligible or self.sums.cost <= self.rounding_cost
        if is_rounding and is_small:
            return Status.FLOOR
        tol = self.settings.tol
        # Parameter by parameter: one large contribution must not hide that another still moves.
        small = np.abs(self.full_step / self.scale) <= tol * (tol + np.abs(self.params))
        if small.all() and is_small:
            return Status.STEP
        return None
