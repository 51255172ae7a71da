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

_ACCEPT = 1e-4  # share of the promised reduction that an accepted step brings at least
_SHORTER = (0.25, 0.0625, 0.015625)  # of a step, where its length is in doubt
_DOUBTFUL = 0.1  # of the residual: from here on a step may be too long for the quadratic
_LOOSEST = 0.1  # residual of a step's solve, relative to the first one
_SHRINK_BELOW, _GROW_ABOVE = 0.25, 0.75  # shares of the promise that change the damping
# Multiples of the diagonal that are added to J^T J (Levenberg-Marquardt): the first after a step
# that was too long, the least that is not zero, and one at which no step is left.
_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-2, 1e-6, 1e12
_SQUARES_MEMORY = 0.01  # the diagonal by which is damped falls by at most this factor a step
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
    squares : ndarray, shape (p,)
        Diagonal of J^T J, with a short memory, by which steps are damped.
    touched : ndarray of bool, shape (p,)
        Parameters on which some row has been seen to depend.
    damping : float
        Multiple of ``squares`` that is added to J^T J.
    share : float or None
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
    squares: Vector
    touched: NDArray[np.bool_]
    damping: float = 0.0
    share: float | None = None
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
        if self.share is None:
            nowhere = np.empty((0, len(self.params)))
            return Request(self.params, nowhere, self.linear.direction[None], is_trial=False)
        is_long = self.linear.reduction > _DOUBTFUL**2 * self.sums.cost
        shares = np.array(_SHORTER if is_long or self.share < 1.0 else ()) * self.share
        candidates = self.params + shares[:, None] * self.linear.step
        return Request(self.params + self.share * self.linear.step, candidates)

    @property
    def length(self) -> float:
        """Length of the step so far, in units of the residual."""
        cost = self.sums.cost
        return float(np.sqrt(self.linear.reduction / cost)) if cost else 0.0

    @property
    def left(self) -> float:
        """What the step still leaves of the quadratic's reduction, by the least eigenvalue seen."""
        least = max(self.least_eigenvalue, self.settings.epsilon)
        return _MARGIN * 0.5 * self.linear.square / least

    def promised(self, share: float) -> float:
        """Return by how much the quadratic, without damping, falls along a share of the step."""
        step = self.linear.step
        # Conjugate gradients end at the least of the damped quadratic along their step.
        damped = self.linear.reduction * share * (2.0 - share)
        return damped + 0.5 * share**2 * self.damping * float(self.squares @ step**2)

    @property
    def noise(self) -> float:
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
        return begin(params, sums, self.settings, self.precondition, self.damping)

    def ask(self, state: CgState) -> Request:
        """Return the sums that are needed next."""
        return state.request

    def tell(self, state: CgState, sums: GradientSums) -> CgState:
        """Go on with a product, judge a trial, or begin again at a point with fresh sums."""
        if state.restart_at is None:
            return told(state, sums, self.precondition)
        begun = begin(state.restart_at, sums, self.settings, self.precondition)
        return replace(begun, iteration=state.iteration, n_products=state.n_products)

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


def begin(
    params: Vector,
    sums: GradientSums,
    settings: CgSettings,
    precondition: MakePreconditioner,
    damping: float = 0.0,
) -> CgState:
    """Begin at parameters whose sums are known; ``damping`` is that of the first step."""
    nowhere = LinearSolve.begin(np.zeros_like(params), lambda vector: vector)
    state = CgState(params, sums, settings, nowhere, np.ones_like(params), sums.jtr != 0.0)
    if not sums.is_finite:
        return replace(state, stop=Status.NON_FINITE_START, solution=params)
    squares = precondition(params).diagonal
    return _solved(_begun(replace(state, squares=squares), damping, precondition), precondition)


def _begun(state: CgState, damping: float, precondition: MakePreconditioner) -> CgState:
    """Begin to solve for a step from the accepted point."""
    apply = partial(precondition(state.params), damping=damping)
    linear = LinearSolve.begin(state.sums.jtr, apply)
    return replace(state, linear=linear, damping=damping, share=None)


def told(state: CgState, sums: GradientSums, precondition: MakePreconditioner) -> CgState:
    """Go on with the sums that the state has asked for."""
    touched = state.touched | (sums.jtr != 0.0) | (sums.products != 0.0).any(axis=0)
    state = replace(state, touched=touched)
    if state.share is not None:
        return _judged(state, sums, precondition)
    state = replace(state, n_products=state.n_products + 1)
    product = sums.products[0] + state.damping * state.squares * state.linear.direction
    apply = partial(precondition(state.params), damping=state.damping)
    linear = state.linear.continued(product, apply)
    if linear is None:
        return _tried(state)
    state = replace(state, linear=linear)
    if not state.damping:
        least = min(state.least_eigenvalue, linear.least_ritz_value)
        state = replace(state, least_eigenvalue=least)
    return _solved(state, precondition)


def _solved(state: CgState, precondition: MakePreconditioner) -> CgState:
    """Stop if the step is known well enough to be taken as the last, or else go on with it."""
    linear, settings = state.linear, state.settings
    promised = linear.reduction + state.left
    if state.damping:
        if promised <= settings.tol**2 * state.sums.cost:  # a step without damping says more
            return _solved(_begun(state, 0.0, precondition), precondition)
    elif promised <= settings.tol**2 * state.sums.cost:
        return replace(state, stop=Status.REDUCTION, solution=state.params + linear.step)
    elif promised <= state.noise * settings.epsilon:
        return replace(state, stop=Status.FLOOR, solution=state.params + linear.step)
    length = state.length
    # Better solved than this a step is no better, and where steps have been shrinking fast enough
    # another trial would tell nothing.
    if linear.lengths and state.left <= (0.5 * settings.tol) ** 2 * state.sums.cost:
        if not state.damping and length**2 <= 0.5 * settings.tol * state.last_length:
            solution = state.params + linear.step
            return replace(state, stop=Status.LAST_STEP, solution=solution)
        return _tried(state)
    # Far from the solution the quadratic itself is off by about the length of the step.
    relative = max(settings.cg_relative, min(length, _LOOSEST))
    enough = max(relative * float(np.sqrt(linear.first_square)), settings.cg_absolute)
    is_enough = bool(linear.lengths) and float(np.sqrt(linear.square)) <= enough
    if is_enough or len(linear.lengths) >= settings.cg_max_iterations:
        return _tried(state)
    return state


def _tried(state: CgState) -> CgState:
    """Try the step, or stop where there is none."""
    if not state.linear.step.any():  # no direction has any curvature
        stop = Status.FLOOR if state.linear.square <= state.noise else Status.STALLED
        return replace(state, stop=stop, solution=state.params)
    return replace(state, share=1.0)


def _judged(state: CgState, sums: GradientSums, precondition: MakePreconditioner) -> CgState:
    """Accept or reject the trial."""
    asked, share = state.request, state.share
    assert share is not None
    state = replace(state, iteration=state.iteration + 1)
    if not sums.is_finite and not state.settings.recovers:
        return replace(state, stop=Status.NON_FINITE_STEP, solution=state.params)
    promised, gain = state.promised(share), state.sums.cost - sums.cost
    is_below_noise = promised + state.left <= state.noise
    if sums.is_finite and (gain >= _ACCEPT * promised or promised <= state.noise):
        squares = precondition(asked.params).diagonal
        following = replace(
            state,
            params=asked.params,
            sums=sums,
            squares=np.maximum(squares, _SQUARES_MEMORY * state.squares),
            last_length=share * state.length,
        )
        damping = state.damping
        if share < 1.0 or gain < _SHRINK_BELOW * promised:
            damping = max(4.0 * damping, _DAMPING)
        elif gain > _GROW_ABOVE * promised:
            damping = 0.1 * damping if damping > _LEAST_DAMPING else 0.0
        if is_below_noise:
            damping = 0.0
        following = _begun(following, damping, precondition)
        # The costs cannot be told apart any more, but the gradients still can.
        is_nearer = following.linear.square <= 0.25 * state.linear.first_square
        if is_below_noise and not is_nearer:
            return replace(state, stop=Status.FLOOR, solution=state.params)
        return _limited(_solved(following, precondition))
    good = [
        factor
        for factor, cost in zip(_SHORTER, sums.candidate_costs, strict=False)
        if state.sums.cost - cost >= _SHRINK_BELOW * state.promised(factor * share) > 0.0
    ]
    if good:
        return _limited(replace(state, share=max(good) * share))
    damping = max(10.0 * state.damping, _DAMPING)
    if damping > _MOST_DAMPING:
        stop = Status.STALLED if sums.is_finite else Status.NON_FINITE_STEP
        return replace(state, stop=stop, solution=state.params)
    return _limited(_solved(_begun(state, damping, precondition), precondition))


def _limited(state: CgState) -> CgState:
    if state.stop is None and state.iteration >= state.settings.max_iterations:
        return replace(state, stop=Status.ITERATION_LIMIT, solution=state.params)
    return state
