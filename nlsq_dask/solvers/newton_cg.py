"""``NewtonCg``: Gauss-Newton for many parameters, whose steps conjugate gradients solve.

No p-by-p matrix is needed: each iteration of conjugate gradients requests one product ``J^T J v``,
which costs a pass over the rows, as each trial of a step does. If the cost does not decrease as the
quadratic model predicts, the step is shortened and the next step is damped.

References
----------
J. Nocedal and S. J. Wright, "Numerical Optimization", 2nd edition, chapter 7 (2006).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import GradientSums
from nlsq_dask.solvers.conjugate_gradients import LinearSolve
from nlsq_dask.solvers.solver import may_resume
from nlsq_dask.status import Status

Vector = NDArray[np.float64]


class Preconditioner(Protocol):
    """Approximate inverse of J^T J."""

    @property
    def diagonal(self) -> Vector:
        """Approximate diagonal of J^T J, shape (p,), with zeros replaced by positive values."""

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Multiply a vector by the approximate inverse of ``J^T J + damping * diagonal``."""


MakePreconditioner = Callable[[Vector], Preconditioner]

_ACCEPT = 1e-4  # minimum ratio of actual to predicted reduction of an accepted step
_FRACTIONS = (0.25, 0.0625, 0.015625)  # of a step, evaluated if it may be too long
_MIN_FRACTION = 1e-6  # of a step, below which a trial that is not finite ends the solve
_LONG_STEP = 0.1  # relative to the residual; longer steps may leave the quadratic region
_MAX_RTOL = 0.1  # maximum relative tolerance of the solve for a step
_SHRINK_BELOW, _GROW_ABOVE = 0.25, 0.75  # ratios of the reduction that change the damping
# Multiples of the diagonal that are added to J^T J (Levenberg-Marquardt): after the first step that
# was too long, the minimum other than zero, and the maximum.
_FIRST_DAMPING, _MIN_DAMPING, _MAX_DAMPING = 1e-2, 1e-6, 1e12
_DIAGONAL_MEMORY = 0.01  # the damping diagonal falls at most by this factor per step
_MARGIN = 2.0  # safety factor of the remaining reduction


@dataclass(frozen=True)
class CgSettings:
    """Settings of ``NewtonCg``."""

    tol: float  # of the change of the residuals by a step, relative to their norm
    max_iterations: int  # trials
    cg_max_iterations: int  # products per step
    # Norm of the residual of the linear system at which the solve for a step ends: relative to the
    # initial norm, and absolute. The relative one is looser for long steps (Nocedal and Wright,
    # section 7.1).
    cg_relative: float
    cg_absolute: float
    epsilon: float  # machine epsilon of the dtype in which the model is evaluated
    recovers: bool  # retry with a shorter step after a non-finite trial


@dataclass(frozen=True)
class CgState:
    """The last accepted point, with the step that is being solved for or tried."""

    params: Vector
    sums: GradientSums
    linear: LinearSolve
    diagonal: Vector  # of J^T J, at least 0.01 times the previous one; used for damping
    sensitive: NDArray[np.bool_]  # (p,), parameters on which any row depends
    damping: float = 0.0  # multiple of ``diagonal`` added to J^T J
    fraction: float | None = None  # of the step that is tried; None during the linear solve
    least_eigenvalue: float = 1.0  # smallest Ritz value of the preconditioned J^T J
    last_length: float = 0.0  # change of the residuals by the last accepted step, over their norm
    iteration: int = 0  # trials evaluated
    n_products: int = 0
    stop: Status | None = None
    # Parameters at the end, beyond ``params`` after a last step without a trial.
    solution: Vector | None = None
    restart_at: Vector | None = None  # where fresh sums are needed next, if any

    @property
    def radius(self) -> float:
        """NaN, because steps are damped instead of restricted to a radius."""
        return np.nan

    @property
    def request(self) -> Request:
        """The sums that are needed next: a product, a trial of the step, or fresh sums."""
        if self.restart_at is not None:
            return Request(self.restart_at, is_trial=False, is_fresh=True)
        if self.fraction is None:
            no_candidates = np.empty((0, len(self.params)))
            return Request(self.params, no_candidates, self.linear.direction[None], is_trial=False)
        is_long = self.linear.reduction > _LONG_STEP**2 * self.sums.cost
        fractions = np.array(_FRACTIONS if is_long or self.fraction < 1.0 else ()) * self.fraction
        candidates = self.params + fractions[:, None] * self.linear.step
        return Request(self.params + self.fraction * self.linear.step, candidates)

    @property
    def length(self) -> float:
        """Length of the current step: the change of the residuals over the norm of them."""
        cost = self.sums.cost
        return float(np.sqrt(self.linear.reduction / cost)) if cost else 0.0

    def predicted_reduction(self, fraction: float) -> float:
        """Return the reduction of the cost that the quadratic model predicts.

        ``fraction`` multiplies the step.
        """
        step = self.linear.step
        # The step minimizes the damped quadratic along itself.
        damped = self.linear.reduction * fraction * (2.0 - fraction)
        return damped + 0.5 * fraction**2 * self.damping * float(self.diagonal @ step**2)

    def ended(self, stop: Status) -> CgState:
        """Return the state, ended with status ``stop`` at the last accepted point."""
        return replace(self, stop=stop, solution=self.params, restart_at=None)

    def ended_after_step(self, stop: Status) -> CgState:
        """Return the state, ended with status ``stop`` after the current step, without a trial."""
        return replace(self, stop=stop, solution=self.params + self.linear.step)


@dataclass(frozen=True)
class NewtonCg:
    """Gauss-Newton with conjugate gradients; implements ``Solver``."""

    settings: CgSettings
    precondition: MakePreconditioner
    damping: float = 0.0  # of the first step

    def init(self, params: Vector, sums: GradientSums) -> CgState:
        """Return the state at the start, before the first product."""
        zero_step = LinearSolve.init(np.zeros_like(params), lambda vector: vector)
        state = CgState(params, sums, zero_step, np.ones_like(params), sums.jtr != 0.0)
        if not sums.is_finite:
            return state.ended(Status.NON_FINITE_START)
        state = replace(state, diagonal=self.precondition(params).diagonal)
        return self._check_step(self._init_step(state, self.damping))

    def ask(self, state: CgState) -> Request:
        """Return the sums that are needed next."""
        return state.request

    def tell(self, state: CgState, sums: GradientSums) -> CgState:
        """Continue with the requested sums: a product, a trial, or fresh sums after a restart."""
        if state.restart_at is not None:
            initial = replace(self, damping=0.0).init(state.restart_at, sums)
            return replace(initial, iteration=state.iteration, n_products=state.n_products)
        sensitive = state.sensitive | (sums.jtr != 0.0) | (sums.products != 0.0).any(axis=0)
        state = replace(state, sensitive=sensitive)
        if state.fraction is None:
            return self._continue_solve(state, sums.products[0])
        return self._check_limit(self._update_trial(state, sums))

    def restart(self, state: CgState, params: Vector) -> CgState:
        """Return a state that requests fresh sums at ``params`` and continues from there."""
        return replace(state, restart_at=params, stop=None, solution=None)

    def resume(self, state: CgState) -> CgState:
        """Prepare a state that was read from a checkpoint for the resumed fit.

        A solve continues if the callback ended it, or an iteration limit that is higher now;
        otherwise the state is returned unchanged.
        """
        if may_resume(state.stop, state.iteration, self.settings.max_iterations):
            return replace(state, stop=None, solution=None)
        return state

    def end(self, state: CgState, stop: Status) -> CgState:
        """Return the state, ended with status ``stop`` at the last accepted point."""
        return state.ended(stop)

    def _remaining_reduction(self, state: CgState) -> float:
        """Return an upper limit of the cost reduction that a more accurate solve would add.

        It follows from the smallest eigenvalue of the preconditioned J^T J, which conjugate
        gradients estimate.
        """
        least = max(state.least_eigenvalue, self.settings.epsilon)
        return _MARGIN * 0.5 * state.linear.square / least

    def _cost_noise(self, state: CgState) -> float:
        return state.sums.cost_noise(self.settings.epsilon)

    def _init_step(self, state: CgState, damping: float) -> CgState:
        """Begin to solve for a step from the last accepted point."""
        apply = partial(self.precondition(state.params), damping=damping)
        linear = LinearSolve.init(state.sums.jtr, apply)
        return replace(state, linear=linear, damping=damping, fraction=None)

    def _continue_solve(self, state: CgState, product: Vector) -> CgState:
        """Run one iteration of conjugate gradients, given the product that it needs."""
        state = replace(state, n_products=state.n_products + 1)
        product = product + state.damping * state.diagonal * state.linear.direction
        apply = partial(self.precondition(state.params), damping=state.damping)
        linear = state.linear.update(product, apply)
        if linear is None:
            return self._try_step(state)
        state = replace(state, linear=linear)
        if not state.damping:
            least = min(state.least_eigenvalue, linear.least_ritz_value)
            state = replace(state, least_eigenvalue=least)
        return self._check_step(state)

    def _check_step(self, state: CgState) -> CgState:
        """Decide about the step: take it as the last one, try it, or continue to solve for it."""
        linear, settings, remaining = state.linear, self.settings, self._remaining_reduction(state)
        predicted = linear.reduction + remaining
        is_small = predicted <= settings.tol**2 * state.sums.cost
        if state.damping and is_small:  # an undamped step decides
            return self._check_step(self._init_step(state, 0.0))
        if not state.damping and is_small:
            return state.ended_after_step(Status.REDUCTION)
        if not state.damping and predicted <= self._cost_noise(state) * settings.epsilon:
            return state.ended_after_step(Status.FLOOR)
        length = state.length
        # A more accurate solve does not improve the step; if steps shrink fast, no trial is needed.
        if linear.alphas and remaining <= (0.5 * settings.tol) ** 2 * state.sums.cost:
            if not state.damping and length**2 <= 0.5 * settings.tol * state.last_length:
                return state.ended_after_step(Status.LAST_STEP)
            return self._try_step(state)
        # Far from the solution, the error of the quadratic is about the length of the step.
        relative = max(settings.cg_relative, min(length, _MAX_RTOL))
        threshold = max(relative * float(np.sqrt(linear.initial_square)), settings.cg_absolute)
        is_solved = bool(linear.alphas) and float(np.sqrt(linear.square)) <= threshold
        if is_solved or len(linear.alphas) >= settings.cg_max_iterations:
            return self._try_step(state)
        return state

    def _try_step(self, state: CgState) -> CgState:
        """Try the step, or stop if it is zero."""
        if state.linear.step.any():
            return replace(state, fraction=1.0)
        # No direction has any curvature.
        is_floor = state.linear.square <= self._cost_noise(state)
        return state.ended(Status.FLOOR if is_floor else Status.STALLED)

    def _update_trial(self, state: CgState, sums: GradientSums) -> CgState:
        """Accept the trial, or continue with a shorter or a more damped step."""
        fraction, noise = state.fraction, self._cost_noise(state)
        assert fraction is not None
        state = replace(state, iteration=state.iteration + 1)
        if not sums.is_finite and not self.settings.recovers:
            return state.ended(Status.NON_FINITE_STEP)
        predicted, gain = state.predicted_reduction(fraction), state.sums.cost - sums.cost
        if sums.is_finite and (gain >= _ACCEPT * predicted or predicted <= noise):
            return self._accept(state, sums, predicted, gain)
        costs = zip(_FRACTIONS, sums.candidate_costs, strict=False)
        acceptable = [
            factor
            for factor, cost in costs
            if state.sums.cost - cost
            >= _SHRINK_BELOW * state.predicted_reduction(factor * fraction)
            > 0.0
        ]
        if acceptable and not sums.is_finite and fraction < _MIN_FRACTION:
            # Only costs are known of shorter steps: derivatives are not finite there either.
            return state.ended(Status.NON_FINITE_STEP)
        if acceptable:
            return replace(state, fraction=max(acceptable) * fraction)
        damping = max(10.0 * state.damping, _FIRST_DAMPING)
        if damping > _MAX_DAMPING:
            return state.ended(Status.STALLED if sums.is_finite else Status.NON_FINITE_STEP)
        return self._check_step(self._init_step(state, damping))

    def _accept(self, state: CgState, sums: GradientSums, predicted: float, gain: float) -> CgState:
        """Move to the trial and start the next step, or stop if the trial is no improvement.

        ``predicted`` and ``gain`` are the predicted and the actual reduction of the cost.
        """
        params, fraction, noise = state.request.params, state.fraction, self._cost_noise(state)
        assert fraction is not None
        is_below_noise = predicted + self._remaining_reduction(state) <= noise
        damping = state.damping
        if is_below_noise:
            damping = 0.0
        elif fraction < 1.0 or gain < _SHRINK_BELOW * predicted:
            damping = max(4.0 * damping, _FIRST_DAMPING)
        elif gain > _GROW_ABOVE * predicted:
            damping = 0.1 * damping if damping > _MIN_DAMPING else 0.0
        diagonal = self.precondition(params).diagonal
        accepted = replace(
            state,
            params=params,
            sums=sums,
            diagonal=np.maximum(diagonal, _DIAGONAL_MEMORY * state.diagonal),
            last_length=fraction * state.length,
        )
        accepted = self._init_step(accepted, damping)
        # The costs differ by rounding only, the gradients may still differ.
        is_closer = accepted.linear.square <= 0.25 * state.linear.initial_square
        if is_below_noise and not is_closer:
            return state.ended(Status.FLOOR)
        return self._check_step(accepted)

    def _check_limit(self, state: CgState) -> CgState:
        if state.stop is None and state.iteration >= self.settings.max_iterations:
            return state.ended(Status.ITERATION_LIMIT)
        return state
