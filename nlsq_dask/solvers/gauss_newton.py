"""``GaussNewton``: Gauss-Newton steps in a trust region, from p-by-p matrices.

An iteration proposes a trial point, requests cost, J^T r and J^T J over all rows there, and accepts
or rejects it. After acceptance, the next step is computed from these sums.

Parameters are not normalized: each step is scaled by the column norms of the Jacobian, which makes
it independent of the units of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_terms import Accumulation
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.iterate import Iterate, Settings, column_scale
from nlsq_dask.solvers.scaled_svd import ScaledSVD
from nlsq_dask.solvers.solver import may_resume
from nlsq_dask.solvers.trust_region import Vector, restricted_step
from nlsq_dask.status import Status

_ACCEPT = 1e-4  # minimum ratio of actual to predicted reduction of an accepted step
_SHRINK_BELOW, _GROW_ABOVE = 0.25, 0.75  # ratios that change the trust radius
_SCALE_MEMORY = 0.1  # a column's scale falls at most by this factor per iteration
_FAST = 0.1  # contraction below which the error is extrapolated
_STAGNATING = 0.9  # contraction above which full steps in a flat valley make no progress
_COST_PROGRESS = 0.9  # ratio of costs that is progress
# Ratios of costs, and of relative decrements, that are slow progress; larger ones are none.
_SLOW_COST, _SLOW_DECREMENT = 1.0 - 1e-5, 0.9
_SHRINKING = 0.5  # contraction below which another step improves the iterate
# Tolerated change of the covariance, relative to the variances, for a last step without a pass:
_COVARIANCE_RTOL = 1e-7
_CARRIED_RTOL = 5e-6  # if a sample predicts it to a few percent
# Tolerated error of a last step after the first pass, estimated with a sample: in standard errors,
# per ``tol`` and at most; and that of the covariance, relative to the variances.
_ERROR_PER_TOL, _MAX_ONE_STEP_ERROR = 1e5, 1e-3
_COVARIANCE_PER_TOL, _MAX_COVARIANCE_ERROR = 200.0, 1e-5
_MAX_EARLIER = 3  # earlier iterates to keep
_MAX_ERROR = 1e-6  # of a standard error, tolerated in addition to tol |p|
# The change of the covariance, extrapolated from the previous step with another direction, was
# measured to be up to 5 times too small.
_EXTRAPOLATION_FACTOR = 5.0
# Status values that more accurate sums would not change.
_ENDED = {Status.ITERATION_LIMIT, Status.SLOW_PROGRESS, Status.STUCK, Status.USER_STOP}
_FACTORS = (0.25, 0.0625, 0.015625), (2.0, 4.0, 8.0)  # of the step: shorter, longer


@dataclass(frozen=True)
class Proposal:
    """A trial point, with what the quadratic model of the cost predicts for it."""

    params: Vector
    step: Vector  # from the last accepted point, times the column norms of the Jacobian
    reduction: float  # of the cost, predicted by the quadratic model
    full: bool  # the trust region does not restrict the step
    # Predicted change of the covariance along the step, relative to the variances; inf if unknown.
    covariance_change: float = np.inf
    # J^T J at the trial point, predicted with a sample of rows; None if no sample was used.
    jtj: NDArray[np.float64] | None = None
    factors: tuple[float, ...] = ()  # the cost is also evaluated at these multiples of the step
    # Estimated distance from the solution, the largest of all parameters in standard errors, and
    # estimated error of ``jtj`` as that of an element of the covariance; see ``one_step``.
    error: float | None = None
    covariance_error: float = np.inf

    @property
    def is_forecast(self) -> bool:
        """Whether the step was computed with a sample of the rows, see ``surrogate.forecast``."""
        return self.jtj is not None


@dataclass(frozen=True)
class State:
    """The last accepted point, the trust radius, and the history of the solve."""

    iterate: Iterate
    radius: float
    iteration: int = 0  # proposals evaluated
    # Of the last step: ratio of the relative decrements after and before it, infinite if the trust
    # region restricted it; change of the covariance; and whether it was computed with a sample of
    # the rows (a forecast, see ``surrogate.forecast``).
    contraction: float = np.inf
    covariance_change: float = np.inf
    was_forecast: bool = False
    earlier: tuple[Iterate, ...] = ()  # previous iterates, newest first
    # Iteration, cost and relative decrement of the last iterate with progress.
    progress: tuple[int, float, float] = (0, np.inf, np.inf)
    rejected: int = 0  # number of proposals since the last accepted one
    forecasts_rejected: int = 0  # in total, including those with hardly any progress
    stop: Status | None = None
    # Parameters at the end, beyond the iterate after a last step without a pass; and J^T J there,
    # predicted by a forecast.
    solution: Vector | None = None
    carried_jtj: NDArray[np.float64] | None = None
    # If the step was the first one: its estimated error, and the reduction of the cost by it.
    last_error: float | None = None
    last_reduction: float = 0.0
    proposal: Proposal | None = None  # evaluated next
    restart_at: Vector | None = None  # where fresh sums are needed next, if any
    accumulation: Accumulation = Accumulation.GRAM  # how rows are summed: J^T J or QR

    @property
    def params(self) -> Vector:
        """Parameters that were accepted last."""
        return self.iterate.params

    @property
    def sums(self) -> NormalEquations:
        """Sums over the rows at ``params``."""
        return self.iterate.sums

    @property
    def sums_at_solution(self) -> NormalEquations:
        """``sums`` with cost and J^T J at ``solution``, predicted if there was no pass there."""
        sums, reduction = self.iterate.sums, self.last_reduction
        jtj = sums.jtj if self.carried_jtj is None else self.carried_jtj
        # With the linear loss and no penalty, the sum of squares is twice the cost.
        is_sum = sums.chi2 == 2.0 * sums.cost
        chi2 = sums.chi2 - 2.0 * reduction if is_sum else sums.chi2
        return replace(sums, jtj=jtj, cost=sums.cost - reduction, chi2=chi2)


@dataclass(frozen=True)
class GaussNewton:
    """Gauss-Newton in a trust region; implements ``Solver``."""

    settings: Settings
    accumulation: Accumulation = Accumulation.GRAM  # how rows are summed at first: J^T J or QR
    # Switch to QR factorizations if J^T J loses half of the digits.
    may_factorize: bool = False
    # Returns a proposal that was computed with a sample of the rows, or None.
    forecast: Callable[[State], Proposal | None] = lambda state: None

    def init(self, params: Vector, sums: NormalEquations) -> State:
        """Return the state at the start, with a first proposal."""
        return self._propose_next(
            replace(init_state(params, sums, self.settings), accumulation=self.accumulation)
        )

    def ask(self, state: State) -> Request:
        """Return a request for the sums at the proposed point, or at ``state.restart_at``."""
        if state.restart_at is not None:
            return Request(state.restart_at, None, None, state.accumulation, False, True)
        proposal = state.proposal
        assert proposal is not None
        return Request(proposal.params, candidates(state, proposal), None, state.accumulation)

    def tell(self, state: State, sums: NormalEquations) -> State:
        """Accept or reject the proposed point given its sums, and propose the next one."""
        if state.restart_at is None:
            assert state.proposal is not None
            return self._propose_next(update(state, state.proposal, sums))
        iteration = state.iteration
        initial = init_state(state.restart_at, sums, self.settings)
        progress = (iteration, *initial.progress[1:])
        return self._propose_next(
            replace(
                initial, iteration=iteration, progress=progress, accumulation=state.accumulation
            )
        )

    def restart(self, state: State, params: Vector) -> State:
        """Return a state that requests fresh sums at ``params`` and continues from there."""
        return replace(state, restart_at=params, proposal=None, stop=None, solution=None)

    def resume(self, state: State) -> State:
        """Prepare a state that was read from a checkpoint for the resumed fit.

        It gets the settings of this solver. A solve continues if the callback ended it, or an
        iteration limit that is higher now.
        """
        state = replace(state, iterate=replace(state.iterate, settings=self.settings))
        if may_resume(state.stop, state.iteration, self.settings.max_iterations):
            return self._propose_next(replace(state, stop=None, solution=None))
        return state

    def end(self, state: State, stop: Status) -> State:
        """Return the state, ended at the iterate with status ``stop``."""
        return replace(
            state,
            stop=stop,
            solution=state.params,
            carried_jtj=None,
            last_error=None,
            last_reduction=0.0,
            proposal=None,
            restart_at=None,
        )

    def _propose_next(self, state: State) -> State:
        """Propose the next point, or request a QR factorization if J^T J is too inaccurate."""
        if self.may_factorize and loses_digits(state):
            return self.restart(replace(state, accumulation=Accumulation.TRIANGLE), state.params)
        if state.stop is not None:
            return state
        proposal = self.forecast(state) or propose(state)
        return replace(take_last_step(state, proposal), proposal=proposal)


def init_state(params: Vector, sums: NormalEquations, settings: Settings) -> State:
    """Return the state at the start, without a proposal; stopped if already converged."""
    if not sums.is_finite:
        iterate = Iterate(params, sums, np.ones_like(params), settings)
        return State(iterate, 0.0, stop=Status.NON_FINITE_START, solution=params)
    iterate = Iterate.of(params, sums, settings)
    length = float(np.linalg.norm(iterate.scale * params)) or float(np.linalg.norm(iterate.scale))
    return _check_convergence(State(iterate, settings.initial_radius * length))


def loses_digits(state: State) -> bool:
    """Whether J^T J has lost half of the digits of J, so that a QR factorization is needed."""
    iterate = state.iterate
    if state.stop in _ENDED or not iterate.sums.is_finite or iterate.sums.triangle is not None:
        return False
    return iterate.is_ill_conditioned


def propose(state: State) -> Proposal:
    """Propose the minimizer of the quadratic model within bounds and trust region."""
    iterate = state.iterate
    step, full = restricted_step(iterate.quadratic, *iterate.room, state.radius)
    factors: tuple[float, ...] = ()
    if state.rejected or not full:
        shorter, longer = _FACTORS
        factors = shorter if state.rejected else longer
    return Proposal(
        iterate.moved(step),
        step,
        iterate.quadratic.reduction(step),
        full,
        _EXTRAPOLATION_FACTOR * state.contraction * state.covariance_change,
        factors=factors,
    )


def candidates(state: State, proposal: Proposal) -> Vector:
    """Return points along the proposed step, shorter or longer than it, shape (k, p).

    Their costs are evaluated in the same pass as the proposed point.
    """
    points = [state.iterate.moved(factor * proposal.step) for factor in proposal.factors]
    return np.array(points).reshape(len(points), len(proposal.params))


def take_last_step(state: State, proposal: Proposal) -> State:
    """Return the state ended at the proposed point, without a pass there, if its error is small.

    Otherwise the state is returned unchanged. The distance of the proposed point from the solution
    is that of the proposal, or estimated as the step times the ratio of the last two steps. It must
    be negligible for the residual norm and for each parameter.
    """
    iterate, tol = state.iterate, state.iterate.settings.tol
    if proposal.error is not None:
        is_safe = (
            proposal.error <= min(_ERROR_PER_TOL * tol, _MAX_ONE_STEP_ERROR)
            and proposal.covariance_error <= min(_COVARIANCE_PER_TOL * tol, _MAX_COVARIANCE_ERROR)
            and not iterate.quadratic.is_flat
        )
        if is_safe:
            return replace(
                state,
                stop=iterate.verdict(Status.LAST_STEP),
                solution=proposal.params,
                carried_jtj=proposal.jtj,
                last_error=proposal.error,
                last_reduction=proposal.reduction,
            )
    # The contraction of forecasts does not apply to a step without one.
    is_comparable = proposal.is_forecast or not state.was_forecast
    if not (proposal.full and is_comparable and state.contraction <= _FAST):
        return state
    error = state.contraction * np.abs(proposal.params - iterate.params)
    dof = max(iterate.sums.n_used - len(iterate.params), 1)
    # A predicted J^T J would be less accurate than a triangle.
    jtj = proposal.jtj if iterate.sums.triangle is None else None
    # Conditional standard deviation, a lower bound of the standard error.
    deviation = float(np.sqrt(2.0 * iterate.sums.cost / dof)) / iterate.scale
    is_safe = (
        not iterate.quadratic.is_flat
        and state.contraction * iterate.relative_decrement <= tol
        and bool((error <= tol * np.abs(proposal.params) + _MAX_ERROR * deviation).all())
        and proposal.covariance_change <= (_COVARIANCE_RTOL if jtj is None else _CARRIED_RTOL)
    )
    if not is_safe:
        return state
    reason = iterate.verdict(Status.LAST_STEP)
    return replace(state, stop=reason, solution=proposal.params, carried_jtj=jtj)


def update(state: State, proposal: Proposal, sums: NormalEquations) -> State:
    """Accept or reject a proposed point given its sums, and check convergence."""
    state = replace(state, iteration=state.iteration + 1)
    length = float(np.linalg.norm(proposal.step))
    if not sums.is_finite:
        if not state.iterate.settings.recovers:
            params = state.iterate.params
            return replace(state, stop=Status.NON_FINITE_STEP, solution=params)
        return _reject(state, proposal, sums, Status.NON_FINITE_STEP)
    old = state.iterate
    new = Iterate(
        proposal.params, sums, column_scale(sums.jtj, _SCALE_MEMORY * old.scale), old.settings
    )
    gain = old.sums.cost - sums.cost
    if proposal.reduction <= old.cost_noise:
        # The costs differ by rounding only, the gradients may still differ.
        if new.relative_decrement <= 0.5 * old.relative_decrement:
            return _accept(state, proposal, new, state.radius)
        better = new if new.relative_decrement < old.relative_decrement else old
        is_sure = better.is_negligible or better.reduction <= better.rounding_cost
        if proposal.is_forecast and better.reduction > better.rounding_cost:
            return _reject(state, proposal, sums, Status.STALLED)
        reason = better.verdict(Status.FLOOR if is_sure else Status.STALLED)
        is_by_jtj = better.sums.triangle is None
        if is_by_jtj and better.quadratic.is_flat and reason is Status.FLOOR:
            reason = Status.ILL_CONDITIONED  # J^T J does not resolve the remaining error
        return replace(state, iterate=better, stop=reason, solution=better.params)
    if gain < _ACCEPT * proposal.reduction:
        return _reject(state, proposal, sums, Status.STALLED)
    radius = state.radius
    if gain < _SHRINK_BELOW * proposal.reduction:
        radius = 0.5 * length
    elif gain > _GROW_ABOVE * proposal.reduction:
        radius = max(radius, 2.0 * length, _largest_factor(state, proposal, sums) * length)
    return _accept(state, proposal, new, radius)


def _largest_factor(state: State, proposal: Proposal, sums: NormalEquations) -> float:
    """Return the largest tried multiple of the step at which the cost fell about as predicted.

    It is 0 if there is none.
    """
    factors = [0.0]
    for factor, cost in zip(proposal.factors, sums.candidate_costs, strict=False):
        predicted = state.iterate.quadratic.reduction(factor * proposal.step)
        if np.isfinite(cost) and state.iterate.sums.cost - cost > _SHRINK_BELOW * predicted > 0.0:
            factors.append(factor)
    return max(factors)


def _reject(state: State, proposal: Proposal, sums: NormalEquations, if_exhausted: Status) -> State:
    iterate = state.iterate
    if proposal.is_forecast:  # a rejected forecast does not change the radius
        forecasts_rejected = state.forecasts_rejected + 1
        rejected = state.rejected + 1
        return _check_limits(
            replace(state, rejected=rejected, forecasts_rejected=forecasts_rejected)
        )
    evaluated = proposal.factors[: len(sums.candidate_costs)]
    shorter = _largest_factor(state, proposal, sums) or min((0.25, *evaluated))
    radius = shorter * float(np.linalg.norm(proposal.step))
    state = replace(state, radius=radius, rejected=state.rejected + 1)
    size = float(np.linalg.norm(iterate.scale * iterate.params)) or float(
        np.linalg.norm(iterate.scale)
    )
    if radius <= iterate.settings.epsilon * size:
        return replace(state, stop=if_exhausted, solution=iterate.params)
    state = _check_limits(state)
    if state.stop is Status.STUCK and state.rejected >= iterate.settings.patience:
        return replace(state, stop=if_exhausted)
    return state


def _accept(state: State, proposal: Proposal, new: Iterate, radius: float) -> State:
    old = state.iterate
    contraction = change = np.inf
    if proposal.full and old.relative_decrement > 0.0:
        contraction = new.relative_decrement / old.relative_decrement
        change = covariance_change(old.sums, new.sums, new)
    return _check_convergence(
        replace(
            state,
            iterate=new,
            radius=radius,
            contraction=contraction,
            covariance_change=change,
            was_forecast=proposal.is_forecast,
            # A forecast with hardly any progress wastes a pass like a rejected one.
            forecasts_rejected=state.forecasts_rejected
            + (
                proposal.is_forecast
                and new.relative_decrement > _SHRINKING * old.relative_decrement
            ),
            earlier=(old, *state.earlier)[:_MAX_EARLIER],
            rejected=0,
        )
    )


def covariance_change(old: NormalEquations, new: NormalEquations, iterate: Iterate) -> float:
    """Return the largest change of an element of the covariance matrix between two sums.

    It is relative to the variances of the two parameters. ``iterate`` provides the scaling of the
    columns and the machine epsilon.
    """
    scale, epsilon = iterate.scale, iterate.settings.epsilon
    roots = [ScaledSVD.of(sums, scale, epsilon).inverse_root for sums in (old, new)]
    if not np.isfinite(roots).all():
        return np.inf
    before, after = (root @ root.T for root in roots)
    deviation = np.sqrt(np.diag(after))
    return float(np.abs((after - before) / np.outer(deviation, deviation)).max())


def _check_convergence(state: State) -> State:
    """Return the state, ended if a convergence criterion is met."""
    iterate = state.iterate
    reason = iterate.converged()
    if reason is not None:
        # The step is known; taking it is free and improves the solution if steps shrink.
        shrinks = state.contraction <= _SHRINKING
        solution = iterate.moved(iterate.full_step) if shrinks else iterate.params
        return replace(state, stop=iterate.verdict(reason), solution=solution)
    if _STAGNATING <= state.contraction < np.inf and iterate.is_in_a_valley:
        return replace(state, stop=Status.ILL_CONDITIONED, solution=iterate.params)
    return _check_limits(state)


def _check_limits(state: State) -> State:
    iterate, settings = state.iterate, state.iterate.settings
    since, cost, decrement = state.progress
    if (
        iterate.sums.cost < _COST_PROGRESS * cost
        or iterate.relative_decrement < _SHRINKING * decrement
    ):
        state = replace(
            state, progress=(state.iteration, iterate.sums.cost, iterate.relative_decrement)
        )
    elif state.iteration - since >= settings.patience:
        is_slow = (
            iterate.sums.cost <= _SLOW_COST * cost
            or iterate.relative_decrement <= _SLOW_DECREMENT * decrement
        )
        stop = Status.SLOW_PROGRESS if is_slow else Status.STUCK
        return replace(state, stop=stop, solution=iterate.params)
    if state.iteration < settings.max_iterations:
        return state
    return replace(state, stop=Status.ITERATION_LIMIT, solution=iterate.params)
