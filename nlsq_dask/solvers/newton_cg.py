"""Gauss-Newton for many parameters: each step by preconditioned conjugate gradients.

As in ``gauss_newton``, a state asks for sums and is told them; here they are ``GradientSums``, with
the product ``J^T J v`` for one direction, and every product is a reduction over the rows as a trial
is. Nothing is larger than a vector of parameters.

Where the cost does not fall as the quadratic promises, a step is shortened, and the next one
damped.

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
    """Something like the inverse of J^T J."""

    @property
    def diagonal(self) -> Vector:
        """About the diagonal of J^T J, shape (p,), none of its entries zero."""

    def __call__(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Apply what the inverse of J^T J and a multiple of its diagonal would do."""


MakePreconditioner = Callable[[Vector], Preconditioner]

_ACCEPT = 1e-4  # share of the predicted reduction that an accepted step brings at least
_FRACTIONS = (0.25, 0.0625, 0.015625)  # of a step, where its length is in doubt
_LONG_STEP = 0.1  # of the residual: from here on a step may be too long for the quadratic
_MAX_RTOL = 0.1  # residual of a step's solve, relative to the first one
_SHRINK_BELOW, _GROW_ABOVE = 0.25, 0.75  # shares of the promise that change the damping
# Multiples of the diagonal that are added to J^T J (Levenberg-Marquardt): the first after a step
# that was too long, the least that is not zero, and one at which no step is left.
_FIRST_DAMPING, _MIN_DAMPING, _MAX_DAMPING = 1e-2, 1e-6, 1e12
_DIAGONAL_MEMORY = 0.01  # the diagonal by which is damped falls by at most this factor a step
_MARGIN = 2.0  # times what the Ritz values say that conjugate gradients leave out


@dataclass(frozen=True)
class CgSettings:
    """What stays the same during a solve.

    Attributes
    ----------
    tol : float
        Of the step as a whole.
    max_iterations : int
        Trials.
    cg_max_iterations : int
        Products a step.
    cg_relative, cg_absolute : float
        Norms of the residual of a step that end its solve, relative to the first one or not. The
        relative one is looser where the step is long (Nocedal and Wright, section 7.1).
    epsilon : float
        Machine epsilon of the arithmetic in which the model is evaluated.
    recovers : bool
        Whether a trial that is not finite is followed by a shorter one.
    """

    tol: float
    max_iterations: int
    cg_max_iterations: int
    cg_relative: float
    cg_absolute: float
    epsilon: float
    recovers: bool


@dataclass(frozen=True)
class CgState:
    """An accepted point, with a step from it that is being solved or tried.

    Attributes
    ----------
    params : ndarray, shape (p,)
    sums : GradientSums
    settings : CgSettings
    linear : LinearSolve
    diagonal : ndarray, shape (p,)
        Diagonal of J^T J, with a short memory, by which steps are damped.
    sensitive : ndarray of bool, shape (p,)
        Parameters on which some row has been seen to depend.
    damping : float
        Multiple of ``diagonal`` that is added to J^T J.
    fraction : float or None
        Of the step that is tried; None while it is being solved.
    least_eigenvalue : float
        Of J^T J times the preconditioner, as Ritz values have shown.
    last_length : float
        Of the last accepted step, in units of the residual; 0 if there was none.
    iteration : int
        Trials judged so far.
    n_products : int
        Products so far.
    stop : Status or None
    solution : ndarray, shape (p,), or None
        Where the solve ended; a last step beyond ``params`` if one was taken without a trial.
    restart_at : ndarray, shape (p,), or None
        Where fresh sums are needed next, to begin there again.
    """

    params: Vector
    sums: GradientSums
    settings: CgSettings
    linear: LinearSolve
    diagonal: Vector
    sensitive: NDArray[np.bool_]
    damping: float = 0.0
    fraction: float | None = None
    least_eigenvalue: float = 1.0
    last_length: float = 0.0
    iteration: int = 0
    n_products: int = 0
    stop: Status | None = None
    solution: Vector | None = None
    restart_at: Vector | None = None

    @property
    def radius(self) -> float:
        """NaN: steps are damped."""
        return np.nan

    @property
    def request(self) -> Request:
        """The sums that are needed next."""
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
        """Length of the step so far, in units of the residual."""
        cost = self.sums.cost
        return float(np.sqrt(self.linear.reduction / cost)) if cost else 0.0

    @property
    def remaining_reduction(self) -> float:
        """What the step still leaves of the quadratic's reduction, by the least eigenvalue seen."""
        least = max(self.least_eigenvalue, self.settings.epsilon)
        return _MARGIN * 0.5 * self.linear.square / least

    def predicted_reduction(self, fraction: float) -> float:
        """Return by how much the quadratic, without damping, falls along a share of the step."""
        step = self.linear.step
        # Conjugate gradients end at the least of the damped quadratic along their step.
        damped = self.linear.reduction * fraction * (2.0 - fraction)
        return damped + 0.5 * fraction**2 * self.damping * float(self.diagonal @ step**2)

    @property
    def cost_noise(self) -> float:
        """Differences of the cost below this are rounding."""
        return self.sums.cost_noise(self.settings.epsilon)


@dataclass(frozen=True)
class NewtonCg:
    """The method as a ``Solver``."""

    settings: CgSettings
    precondition: MakePreconditioner
    damping: float = 0.0  # of the first step

    def init(self, params: Vector, sums: GradientSums) -> CgState:
        """Begin at parameters whose sums are known."""
        return init_state(params, sums, self.settings, self.precondition, self.damping)

    def ask(self, state: CgState) -> Request:
        """Return the sums that are needed next."""
        return state.request

    def tell(self, state: CgState, sums: GradientSums) -> CgState:
        """Go on with a product, judge a trial, or begin again at a point with fresh sums."""
        if state.restart_at is None:
            return update(state, sums, self.precondition)
        initial = init_state(state.restart_at, sums, self.settings, self.precondition)
        return replace(initial, iteration=state.iteration, n_products=state.n_products)

    def restart(self, state: CgState, params: Vector) -> CgState:
        """Ask for fresh sums at parameters, to begin there again."""
        return replace(state, restart_at=params, stop=None, solution=None)

    def resume(self, state: CgState) -> CgState:
        """Go on with a state of another process, which may have had other limits."""
        state = replace(state, settings=self.settings)
        if may_resume(state.stop, state.iteration, self.settings.max_iterations):
            return replace(state, stop=None, solution=None)
        return state

    def end(self, state: CgState, stop: Status) -> CgState:
        """End at the accepted point, for a reason that comes from outside."""
        return replace(state, stop=stop, solution=state.params, restart_at=None)


def init_state(
    params: Vector,
    sums: GradientSums,
    settings: CgSettings,
    precondition: MakePreconditioner,
    damping: float = 0.0,
) -> CgState:
    """Begin at parameters whose sums are known; ``damping`` is that of the first step."""
    zero_step = LinearSolve.init(np.zeros_like(params), lambda vector: vector)
    state = CgState(params, sums, settings, zero_step, np.ones_like(params), sums.jtr != 0.0)
    if not sums.is_finite:
        return replace(state, stop=Status.NON_FINITE_START, solution=params)
    diagonal = precondition(params).diagonal
    return _check_step(
        _init_step(replace(state, diagonal=diagonal), damping, precondition), precondition
    )


def _init_step(state: CgState, damping: float, precondition: MakePreconditioner) -> CgState:
    """Begin to solve for a step from the accepted point."""
    apply = partial(precondition(state.params), damping=damping)
    linear = LinearSolve.init(state.sums.jtr, apply)
    return replace(state, linear=linear, damping=damping, fraction=None)


def update(state: CgState, sums: GradientSums, precondition: MakePreconditioner) -> CgState:
    """Go on with the sums that the state has asked for."""
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
    """Stop if the step is known well enough to be taken as the last, or else go on with it."""
    linear, settings = state.linear, state.settings
    predicted = linear.reduction + state.remaining_reduction
    if state.damping:
        if predicted <= settings.tol**2 * state.sums.cost:  # a step without damping says more
            return _check_step(_init_step(state, 0.0, precondition), precondition)
    elif predicted <= settings.tol**2 * state.sums.cost:
        return replace(state, stop=Status.REDUCTION, solution=state.params + linear.step)
    elif predicted <= state.cost_noise * settings.epsilon:
        return replace(state, stop=Status.FLOOR, solution=state.params + linear.step)
    length = state.length
    # Better solved than this a step is no better, and where steps have been shrinking fast enough
    # another trial would tell nothing.
    if linear.alphas and state.remaining_reduction <= (0.5 * settings.tol) ** 2 * state.sums.cost:
        if not state.damping and length**2 <= 0.5 * settings.tol * state.last_length:
            solution = state.params + linear.step
            return replace(state, stop=Status.LAST_STEP, solution=solution)
        return _try_step(state)
    # Far from the solution the quadratic itself is off by about the length of the step.
    relative = max(settings.cg_relative, min(length, _MAX_RTOL))
    threshold = max(relative * float(np.sqrt(linear.initial_square)), settings.cg_absolute)
    is_solved = bool(linear.alphas) and float(np.sqrt(linear.square)) <= threshold
    if is_solved or len(linear.alphas) >= settings.cg_max_iterations:
        return _try_step(state)
    return state


def _try_step(state: CgState) -> CgState:
    """Try the step, or stop where there is none."""
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
        # The costs cannot be told apart any more, but the gradients still can.
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
