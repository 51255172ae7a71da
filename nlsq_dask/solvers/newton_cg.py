"""Gauss-Newton for many parameters, with steps by preconditioned conjugate gradients.

The sums are ``GradientSums`` with the product ``J^T J v`` for one direction. Each product is a
reduction over the rows, as each trial is. No array is larger than a vector of parameters.

If the cost does not decrease as the quadratic model predicts, the step is shortened and the next
step is damped.

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
        """Approximate diagonal of J^T J, shape (p,), without zeros."""

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Apply the approximate inverse of J^T J + damping times its diagonal."""


MakePreconditioner = Callable[[Vector], Preconditioner]

_ACCEPT = 1e-4  # minimum ratio of actual to predicted reduction of an accepted step
_FRACTIONS = (0.25, 0.0625, 0.015625)  # of a step, evaluated if it may be too long
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

    tol: float  # of the step norm
    max_iterations: int  # trials
    cg_max_iterations: int  # products per step
    # Norms of the residual at which the solve for a step ends, relative to the initial one and
    # absolute. The relative one is looser for long steps (Nocedal and Wright, section 7.1).
    cg_relative: float
    cg_absolute: float
    epsilon: float  # machine epsilon of the dtype in which the model is evaluated
    recovers: bool  # retry with a shorter step after a non-finite trial


@dataclass(frozen=True)
class CgState:
    """Iterate with a step that is being solved for or tried."""

    params: Vector
    sums: GradientSums
    settings: CgSettings
    linear: LinearSolve
    diagonal: Vector  # of J^T J, with a short memory, used for damping
    sensitive: NDArray[np.bool_]  # (p,), parameters on which any row depends
    damping: float = 0.0  # multiple of ``diagonal`` added to J^T J
    fraction: float | None = None  # of the step that is tried; None during the linear solve
    least_eigenvalue: float = 1.0  # smallest Ritz value of the preconditioned J^T J
    last_length: float = 0.0  # of the last accepted step, in units of the residual
    iteration: int = 0  # trials evaluated
    n_products: int = 0
    stop: Status | None = None
    # Parameters at the end, beyond ``params`` after a last step without a trial.
    solution: Vector | None = None
    restart_at: Vector | None = None  # parameters of the fresh sums needed next

    @property
    def radius(self) -> float:
        """NaN: steps are damped."""
        return np.nan

    @property
    def request(self) -> Request:
        """Request for the next sums."""
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
        """Length of the current step, in units of the residual."""
        cost = self.sums.cost
        return float(np.sqrt(self.linear.reduction / cost)) if cost else 0.0

    @property
    def remaining_reduction(self) -> float:
        """Bound on the reduction that the current step misses, from the smallest Ritz value."""
        least = max(self.least_eigenvalue, self.settings.epsilon)
        return _MARGIN * 0.5 * self.linear.square / least

    def predicted_reduction(self, fraction: float) -> float:
        """Return the reduction of the undamped quadratic by a fraction of the step."""
        step = self.linear.step
        # The step minimizes the damped quadratic along itself.
        damped = self.linear.reduction * fraction * (2.0 - fraction)
        return damped + 0.5 * fraction**2 * self.damping * float(self.diagonal @ step**2)

    @property
    def cost_noise(self) -> float:
        """Rounding error of a difference of costs."""
        return self.sums.cost_noise(self.settings.epsilon)


@dataclass(frozen=True)
class NewtonCg:
    """Gauss-Newton with conjugate gradients, a ``Solver``."""

    settings: CgSettings
    precondition: MakePreconditioner
    damping: float = 0.0  # of the first step

    def init(self, params: Vector, sums: GradientSums) -> CgState:
        """Return the initial state at ``params``."""
        return init_state(params, sums, self.settings, self.precondition, self.damping)

    def ask(self, state: CgState) -> Request:
        """Return the request for the next sums."""
        return state.request

    def tell(self, state: CgState, sums: GradientSums) -> CgState:
        """Process a product, accept or reject a trial, or restart with fresh sums."""
        if state.restart_at is None:
            return update(state, sums, self.precondition)
        initial = init_state(state.restart_at, sums, self.settings, self.precondition)
        return replace(initial, iteration=state.iteration, n_products=state.n_products)

    def restart(self, state: CgState, params: Vector) -> CgState:
        """Return a state that requests fresh sums at ``params`` and continues from there."""
        return replace(state, restart_at=params, stop=None, solution=None)

    def resume(self, state: CgState) -> CgState:
        """Return a state of an earlier process with the settings of this solver."""
        state = replace(state, settings=self.settings)
        if may_resume(state.stop, state.iteration, self.settings.max_iterations):
            return replace(state, stop=None, solution=None)
        return state

    def end(self, state: CgState, stop: Status) -> CgState:
        """Return the state, ended at the iterate with status ``stop``."""
        return replace(state, stop=stop, solution=state.params, restart_at=None)


def init_state(
    params: Vector,
    sums: GradientSums,
    settings: CgSettings,
    precondition: MakePreconditioner,
    damping: float = 0.0,
) -> CgState:
    """Return the initial state at ``params``; ``damping`` is that of the first step."""
    zero_step = LinearSolve.init(np.zeros_like(params), lambda vector: vector)
    state = CgState(params, sums, settings, zero_step, np.ones_like(params), sums.jtr != 0.0)
    if not sums.is_finite:
        return replace(state, stop=Status.NON_FINITE_START, solution=params)
    diagonal = precondition(params).diagonal
    return _check_step(
        _init_step(replace(state, diagonal=diagonal), damping, precondition), precondition
    )


def _init_step(state: CgState, damping: float, precondition: MakePreconditioner) -> CgState:
    """Start the linear solve for a step from the iterate."""
    apply = partial(precondition(state.params), damping=damping)
    linear = LinearSolve.init(state.sums.jtr, apply)
    return replace(state, linear=linear, damping=damping, fraction=None)


def update(state: CgState, sums: GradientSums, precondition: MakePreconditioner) -> CgState:
    """Return the next state given the requested sums."""
    sensitive = state.sensitive | (sums.jtr != 0.0) | (sums.products != 0.0).any(axis=0)
    state = replace(state, sensitive=sensitive)
    if state.fraction is not None:
        return _update_trial(state, sums, precondition)
    state = replace(state, n_products=state.n_products + 1)
    product = sums.products[0] + state.damping * state.diagonal * state.linear.direction
    apply = partial(precondition(state.params), damping=state.damping)
    linear = state.linear.update(product, apply)
    if linear is None:
        return _try_step(state)
    state = replace(state, linear=linear)
    if not state.damping:
        least = min(state.least_eigenvalue, linear.least_ritz_value)
        state = replace(state, least_eigenvalue=least)
    return _check_step(state, precondition)


def _check_step(state: CgState, precondition: MakePreconditioner) -> CgState:
    """Take the step as the last one, try it, or continue its linear solve."""
    linear, settings = state.linear, state.settings
    predicted = linear.reduction + state.remaining_reduction
    if state.damping:
        if predicted <= settings.tol**2 * state.sums.cost:  # an undamped step decides
            return _check_step(_init_step(state, 0.0, precondition), precondition)
    elif predicted <= settings.tol**2 * state.sums.cost:
        return replace(state, stop=Status.REDUCTION, solution=state.params + linear.step)
    elif predicted <= state.cost_noise * settings.epsilon:
        return replace(state, stop=Status.FLOOR, solution=state.params + linear.step)
    length = state.length
    # A more accurate solve does not improve the step; if steps shrink fast, no trial is needed.
    if linear.alphas and state.remaining_reduction <= (0.5 * settings.tol) ** 2 * state.sums.cost:
        if not state.damping and length**2 <= 0.5 * settings.tol * state.last_length:
            solution = state.params + linear.step
            return replace(state, stop=Status.LAST_STEP, solution=solution)
        return _try_step(state)
    # Far from the solution, the error of the quadratic is about the length of the step.
    relative = max(settings.cg_relative, min(length, _MAX_RTOL))
    threshold = max(relative * float(np.sqrt(linear.initial_square)), settings.cg_absolute)
    is_solved = bool(linear.alphas) and float(np.sqrt(linear.square)) <= threshold
    if is_solved or len(linear.alphas) >= settings.cg_max_iterations:
        return _try_step(state)
    return state


def _try_step(state: CgState) -> CgState:
    """Try the step, or stop if it is zero."""
    if not state.linear.step.any():  # no direction has any curvature
        stop = Status.FLOOR if state.linear.square <= state.cost_noise else Status.STALLED
        return replace(state, stop=stop, solution=state.params)
    return replace(state, fraction=1.0)


def _update_trial(state: CgState, sums: GradientSums, precondition: MakePreconditioner) -> CgState:
    """Accept or reject the trial."""
    request, fraction = state.request, state.fraction
    assert fraction is not None
    state = replace(state, iteration=state.iteration + 1)
    if not sums.is_finite and not state.settings.recovers:
        return replace(state, stop=Status.NON_FINITE_STEP, solution=state.params)
    predicted, gain = state.predicted_reduction(fraction), state.sums.cost - sums.cost
    is_below_noise = predicted + state.remaining_reduction <= state.cost_noise
    if sums.is_finite and (gain >= _ACCEPT * predicted or predicted <= state.cost_noise):
        diagonal = precondition(request.params).diagonal
        accepted = replace(
            state,
            params=request.params,
            sums=sums,
            diagonal=np.maximum(diagonal, _DIAGONAL_MEMORY * state.diagonal),
            last_length=fraction * state.length,
        )
        damping = state.damping
        if fraction < 1.0 or gain < _SHRINK_BELOW * predicted:
            damping = max(4.0 * damping, _FIRST_DAMPING)
        elif gain > _GROW_ABOVE * predicted:
            damping = 0.1 * damping if damping > _MIN_DAMPING else 0.0
        if is_below_noise:
            damping = 0.0
        accepted = _init_step(accepted, damping, precondition)
        # The costs differ by rounding only, the gradients may still differ.
        is_closer = accepted.linear.square <= 0.25 * state.linear.initial_square
        if is_below_noise and not is_closer:
            return replace(state, stop=Status.FLOOR, solution=state.params)
        return _check_limit(_check_step(accepted, precondition))
    acceptable = [
        factor
        for factor, cost in zip(_FRACTIONS, sums.candidate_costs, strict=False)
        if state.sums.cost - cost
        >= _SHRINK_BELOW * state.predicted_reduction(factor * fraction)
        > 0.0
    ]
    if acceptable:
        return _check_limit(replace(state, fraction=max(acceptable) * fraction))
    damping = max(10.0 * state.damping, _FIRST_DAMPING)
    if damping > _MAX_DAMPING:
        stop = Status.STALLED if sums.is_finite else Status.NON_FINITE_STEP
        return replace(state, stop=stop, solution=state.params)
    return _check_limit(_check_step(_init_step(state, damping, precondition), precondition))


def _check_limit(state: CgState) -> CgState:
    if state.stop is None and state.iteration >= state.settings.max_iterations:
        return replace(state, stop=Status.ITERATION_LIMIT, solution=state.params)
    return state
