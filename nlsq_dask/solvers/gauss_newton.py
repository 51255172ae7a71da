"""``GaussNewton``: steps inside a trust region, solved with matrices of the parameters.

``propose`` a trial, reduce over the rows, ``judge`` it: the sums of an accepted trial are never
computed again.

It works on the parameters themselves, not on normalized ones: the columns' norms scale every step,
which makes it independent of the units of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_loops import Accumulation
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.point import Point, Settings, column_scale
from nlsq_dask.solvers.scaled_svd import Spectrum
from nlsq_dask.solvers.solver import may_resume
from nlsq_dask.solvers.trust_region import Vector, restricted_step
from nlsq_dask.status import Status

_ACCEPT = 1e-4  # share of the predicted reduction that an accepted step brings at least
_SHRINK_BELOW, _GROW_ABOVE = 0.25, 0.75
_SCALE_MEMORY = 0.1  # a column's scale falls by at most this factor an iteration
_FAST = 0.1  # a contraction below this is one to extrapolate from
_CRAWLING = 0.9  # from here on, full steps that lead along a flat valley lead nowhere
_LESS_COST = 0.9  # a fall of the cost that is progress
_SHRINKING = 0.5  # below this, one more step leads closer
# What a last step without a pass may leave out: a change of the covariance, relative to the
# variances.
_COVARIANCE_RTOL = 1e-7
_CARRIED_RTOL = 5e-6  # of which a sample foresees all but a few percent
_MEMORY = 3  # accepted points
_LAST_ERROR = 1e-6  # of a standard error, that a last step may leave beside tol |p|
# The change of the covariance as extrapolated from the step before, which has another direction,
# has been seen 5 times too small.
_EXTRAPOLATION_MARGIN = 5.0
# Ends that better sums would not change.
_ENDED = {Status.ITERATION_LIMIT, Status.SLOW_PROGRESS, Status.USER_STOP}
_FURTHER = (0.25, 0.0625, 0.015625), (2.0, 4.0, 8.0)  # of a trial's step: shorter, longer


@dataclass(frozen=True)
class Trial:
    """A point to evaluate.

    Attributes
    ----------
    params : ndarray, shape (p,)
    step : ndarray, shape (p,)
        Scaled step from the accepted point.
    reduction : float
        Reduction of the cost that the quadratic promises.
    full : bool
        Whether the trust region left the step as long as it wanted to be.
    covariance_change : float
        Change of the covariance along the step, relative to the variances, as far as it can be
        foreseen; else infinity.
    jtj : ndarray, shape (p, p), or None
        ``J^T J`` at the trial, as a sample of the rows foresees it; None for a trial that comes
        from the sums alone.
    further : tuple of float
        Multiples of the step at which the cost alone is worth knowing.
    """

    params: Vector
    step: Vector
    reduction: float
    full: bool
    covariance_change: float = np.inf
    jtj: NDArray[np.float64] | None = None
    further: tuple[float, ...] = ()

    @property
    def is_forecast(self) -> bool:
        """Whether it comes from a sample of the rows, and not from the sums alone."""
        return self.jtj is not None


@dataclass(frozen=True)
class State:
    """An accepted point, the trust radius and what is remembered of the way here.

    Attributes
    ----------
    point : Point
    radius : float
    iteration : int
        Trials judged so far.
    contraction : float
        Ratio of the last two measures if a full step lies between them, else infinity.
    covariance_change : float
        Relative change of the covariance along that step.
    was_forecast : bool
        Whether a forecast led along it.
    earlier : tuple of Point
        The last points accepted before this one, the newest first.
    progress : tuple of int, float, float
        Iteration, cost and measure of the last point that was much better than those before.
    rejected : int
        Trials rejected since the last accepted one.
    forecasts_rejected : int
        Forecasts so far that were rejected or led hardly nearer.
    stop : Status or None
    solution : ndarray, shape (p,), or None
        Where the solve ended; a last step beyond ``point`` if one was taken without a pass.
    carried_jtj : ndarray, shape (p, p), or None
        ``J^T J`` there as it was foreseen.
    trial : Trial or None
        Whose sums are needed next.
    restart_at : ndarray, shape (p,), or None
        Where fresh sums are needed next, to begin there again.
    accumulation : Accumulation
        From which steps are solved.
    """

    point: Point
    radius: float
    iteration: int = 0
    contraction: float = np.inf
    covariance_change: float = np.inf
    was_forecast: bool = False
    earlier: tuple[Point, ...] = ()
    progress: tuple[int, float, float] = (0, np.inf, np.inf)
    rejected: int = 0
    forecasts_rejected: int = 0
    stop: Status | None = None
    solution: Vector | None = None
    carried_jtj: NDArray[np.float64] | None = None
    trial: Trial | None = None
    restart_at: Vector | None = None
    accumulation: Accumulation = Accumulation.GRAM

    @property
    def params(self) -> Vector:
        """The accepted point's parameters."""
        return self.point.params

    @property
    def sums(self) -> NormalEquations:
        """The accepted point's sums."""
        return self.point.sums

    @property
    def sums_at_solution(self) -> NormalEquations:
        """The point's sums, with J^T J carried along a last step where that was foreseen."""
        jtj = self.point.sums.jtj if self.carried_jtj is None else self.carried_jtj
        return replace(self.point.sums, jtj=jtj)


@dataclass(frozen=True)
class GaussNewton:
    """The method as a ``Solver``."""

    settings: Settings
    accumulation: Accumulation = Accumulation.GRAM  # from which steps are solved at first
    # Whether QR factorizations take its place where J^T J loses half of the digits.
    may_factorize: bool = False
    forecast: Callable[[State], Trial | None] = lambda state: None

    def init(self, params: Vector, sums: NormalEquations) -> State:
        """Begin at parameters whose sums are known."""
        return self._following(
            replace(start(params, sums, self.settings), accumulation=self.accumulation)
        )

    def ask(self, state: State) -> Request:
        """Return the sums that are needed next."""
        if state.restart_at is not None:
            return Request(state.restart_at, None, None, state.accumulation, False, True)
        trial = state.trial
        assert trial is not None
        return Request(trial.params, candidates(state, trial), None, state.accumulation)

    def tell(self, state: State, sums: NormalEquations) -> State:
        """Judge the trial, or begin again at a point with fresh sums."""
        if state.restart_at is None:
            assert state.trial is not None
            return self._following(judge(state, state.trial, sums))
        iteration = state.iteration
        begun = start(state.restart_at, sums, self.settings)
        progress = (iteration, *begun.progress[1:])
        return self._following(
            replace(begun, iteration=iteration, progress=progress, accumulation=state.accumulation)
        )

    def restart(self, state: State, params: Vector) -> State:
        """Ask for fresh sums at parameters, to begin there again."""
        return replace(state, restart_at=params, trial=None, stop=None, solution=None)

    def resume(self, state: State) -> State:
        """Go on with a state of another process, which may have had other limits."""
        state = replace(state, point=replace(state.point, settings=self.settings))
        if may_resume(state.stop, state.iteration, self.settings.max_iterations):
            return self._following(replace(state, stop=None, solution=None))
        return state

    def end(self, state: State, stop: Status) -> State:
        """End at the accepted point, for a reason that comes from outside."""
        return replace(
            state, stop=stop, solution=state.params, carried_jtj=None, trial=None, restart_at=None
        )

    def _following(self, state: State) -> State:
        """Return the state with its next trial, or with the better sums that it needs."""
        if self.may_factorize and loses_digits(state):
            return self.restart(replace(state, accumulation=Accumulation.TRIANGLE), state.params)
        if state.stop is not None:
            return state
        trial = self.forecast(state) or propose(state)
        return replace(take_last_step(state, trial), trial=trial)


def start(params: Vector, sums: NormalEquations, settings: Settings) -> State:
    """Begin at parameters whose sums are known."""
    if not sums.is_finite:
        point = Point(params, sums, np.ones_like(params), settings)
        return State(point, 0.0, stop=Status.NON_FINITE_START, solution=params)
    point = Point.of(params, sums, settings)
    length = float(np.linalg.norm(point.scale * params)) or float(np.linalg.norm(point.scale))
    return _check(State(point, settings.initial_radius * length))


def loses_digits(state: State) -> bool:
    """Whether the accepted point's J^T J has lost half of the digits of what it stands for."""
    point = state.point
    if state.stop in _ENDED or not point.sums.is_finite or point.sums.triangle is not None:
        return False
    return point.is_ill_conditioned


def propose(state: State) -> Trial:
    """Return the trial that minimizes the quadratic inside bounds and trust region."""
    point = state.point
    step, full = restricted_step(point.quadratic, *point.room, state.radius)
    further: tuple[float, ...] = ()
    if state.rejected or not full:
        shorter, longer = _FURTHER
        further = shorter if state.rejected else longer
    return Trial(
        point.moved(step),
        step,
        point.quadratic.reduction(step),
        full,
        _EXTRAPOLATION_MARGIN * state.contraction * state.covariance_change,
        further=further,
    )


def candidates(state: State, trial: Trial) -> Vector:
    """Return the points at which the cost alone is wanted, shape (k, p)."""
    points = [state.point.moved(factor * trial.step) for factor in trial.further]
    return np.array(points).reshape(len(points), len(trial.params))


def take_last_step(state: State, trial: Trial) -> State:
    """Stop with the trial as solution if the error that it leaves is surely below the tolerance.

    The error is extrapolated from the contraction that the last step has shown, and must be below
    the tolerance for the residuals as a whole and for each parameter.
    """
    point, tol = state.point, state.point.settings.tol
    # What forecasts have achieved says nothing of a step without one.
    is_comparable = trial.is_forecast or not state.was_forecast
    if not (trial.full and is_comparable and state.contraction <= _FAST):
        return state
    left = state.contraction * np.abs(trial.params - point.params)
    dof = max(point.sums.n_used - len(point.params), 1)
    # A triangle holds more than could be carried along.
    jtj = trial.jtj if point.sums.triangle is None else None
    # Of each parameter with the others held, which is less than its standard error.
    deviation = float(np.sqrt(2.0 * point.sums.cost / dof)) / point.scale
    is_sure = (
        not point.quadratic.is_flat
        and state.contraction * point.measure <= tol
        and bool((left <= tol * np.abs(trial.params) + _LAST_ERROR * deviation).all())
        and trial.covariance_change <= (_COVARIANCE_RTOL if jtj is None else _CARRIED_RTOL)
    )
    if not is_sure:
        return state
    reason = point.verdict(Status.LAST_STEP)
    return replace(state, stop=reason, solution=trial.params, carried_jtj=jtj)


def judge(state: State, trial: Trial, sums: NormalEquations) -> State:
    """Accept or reject a trial whose sums are known, and say whether to go on."""
    state = replace(state, iteration=state.iteration + 1)
    length = float(np.linalg.norm(trial.step))
    if not sums.is_finite:
        if not state.point.settings.recovers:
            params = state.point.params
            return replace(state, stop=Status.NON_FINITE_STEP, solution=params)
        return _rejected(state, trial, sums, Status.NON_FINITE_STEP)
    old = state.point
    new = Point(trial.params, sums, column_scale(sums.jtj, _SCALE_MEMORY * old.scale), old.settings)
    gain = old.sums.cost - sums.cost
    if trial.reduction <= old.cost_noise:
        # The costs cannot be told apart any more, but the gradients still can.
        if new.measure <= 0.5 * old.measure:
            return _accepted(state, trial, new, state.radius)
        better = new if new.measure < old.measure else old
        sure = better.is_negligible or better.reduction <= better.rounding_cost
        if trial.is_forecast and better.reduction > better.rounding_cost:
            return _rejected(state, trial, sums, Status.STALLED)
        reason = better.verdict(Status.FLOOR if sure else Status.STALLED)
        is_by_jtj = better.sums.triangle is None
        if is_by_jtj and better.quadratic.is_flat and reason is Status.FLOOR:
            reason = Status.ILL_CONDITIONED  # what is left of the way cannot be known from J^T J
        return replace(state, point=better, stop=reason, solution=better.params)
    if gain < _ACCEPT * trial.reduction:
        return _rejected(state, trial, sums, Status.STALLED)
    radius = state.radius
    if gain < _SHRINK_BELOW * trial.reduction:
        radius = 0.5 * length
    elif gain > _GROW_ABOVE * trial.reduction:
        radius = max(radius, 2.0 * length, _longest_good(state, trial, sums) * length)
    return _accepted(state, trial, new, radius)


def _longest_good(state: State, trial: Trial, sums: NormalEquations) -> float:
    """Return the largest multiple of the step at which the cost fell as the quadratic promises."""
    good = [0.0]
    for factor, cost in zip(trial.further, sums.candidate_costs, strict=False):
        promised = state.point.quadratic.reduction(factor * trial.step)
        if np.isfinite(cost) and state.point.sums.cost - cost > _SHRINK_BELOW * promised > 0.0:
            good.append(factor)
    return max(good)


def _rejected(state: State, trial: Trial, sums: NormalEquations, if_exhausted: Status) -> State:
    point = state.point
    if trial.is_forecast:  # which says nothing of the radius
        forecasts_rejected = state.forecasts_rejected + 1
        rejected = state.rejected + 1
        return _limit(replace(state, rejected=rejected, forecasts_rejected=forecasts_rejected))
    tried = trial.further[: len(sums.candidate_costs)]
    shorter = _longest_good(state, trial, sums) or min((0.25, *tried))
    radius = shorter * float(np.linalg.norm(trial.step))
    state = replace(state, radius=radius, rejected=state.rejected + 1)
    size = float(np.linalg.norm(point.scale * point.params)) or float(np.linalg.norm(point.scale))
    if radius <= point.settings.epsilon * size:
        return replace(state, stop=if_exhausted, solution=point.params)
    return _limit(state)


def _accepted(state: State, trial: Trial, new: Point, radius: float) -> State:
    old = state.point
    contraction = change = np.inf
    if trial.full and old.measure > 0.0:
        contraction = new.measure / old.measure
        change = covariance_change(old.sums, new.sums, new)
    return _check(
        replace(
            state,
            point=new,
            radius=radius,
            contraction=contraction,
            covariance_change=change,
            was_forecast=trial.is_forecast,
            # One that leads hardly nearer costs a pass as one that is rejected does.
            forecasts_rejected=state.forecasts_rejected
            + (trial.is_forecast and new.measure > _SHRINKING * old.measure),
            earlier=(old, *state.earlier)[:_MEMORY],
            rejected=0,
        )
    )


def covariance_change(old: NormalEquations, new: NormalEquations, point: Point) -> float:
    """Return the largest change of the covariance between two sums, relative to the variances.

    In the scale and with the rounding of ``point``.
    """
    scale, epsilon = point.scale, point.settings.epsilon
    roots = [Spectrum.of(sums, scale, epsilon).inverse_root for sums in (old, new)]
    if not np.isfinite(roots).all():
        return np.inf
    before, after = (root @ root.T for root in roots)
    deviation = np.sqrt(np.diag(after))
    return float(np.abs((after - before) / np.outer(deviation, deviation)).max())


def _check(state: State) -> State:
    """Stop if the accepted point is a solution."""
    point = state.point
    reason = point.converged()
    if reason is not None:
        # The step is known, so taking it costs nothing where the steps have been shrinking.
        shrinks = state.contraction <= _SHRINKING
        solution = point.moved(point.full_step) if shrinks else point.params
        return replace(state, stop=point.verdict(reason), solution=solution)
    if _CRAWLING <= state.contraction < np.inf and point.is_in_a_valley:
        return replace(state, stop=Status.ILL_CONDITIONED, solution=point.params)
    return _limit(state)


def _limit(state: State) -> State:
    point, settings = state.point, state.point.settings
    since, cost, measure = state.progress
    if point.sums.cost < _LESS_COST * cost or point.measure < _SHRINKING * measure:
        state = replace(state, progress=(state.iteration, point.sums.cost, point.measure))
    elif state.iteration - since >= settings.patience:
        return replace(state, stop=Status.SLOW_PROGRESS, solution=point.params)
    if state.iteration < settings.max_iterations:
        return state
    return replace(state, stop=Status.ITERATION_LIMIT, solution=point.params)
