"""Gauss-Newton in a trust region, for many lanes at once: ``propose`` and ``update``.

Both are pure functions of arrays whose last axis is the lanes, for a traced program. ``propose``
computes a trial point from the sums at the last accepted point, or ends a lane; ``update`` accepts
or rejects the trial point given the sums there. A lane that has ended no longer changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.kernels.lane_sums import LaneSums, triangle_indices
from nlsq_dask.solvers.lanes.records import LaneStatus, rounding_chi2
from nlsq_dask.solvers.lanes.trust_region import Quadratic, restricted_step

ACTIVE = 9  # status of a lane that has not ended
_ACCEPT = 1e-4  # minimum ratio of actual to predicted reduction of an accepted step
_SHRINK_BELOW, _GROW_ABOVE = 0.25, 0.75  # ratios that change the trust radius
_SCALE_MEMORY = 0.1  # a column's scale falls at most by this factor per iteration
_FAST = 0.1  # contraction below which a last step is taken without evaluating it
_SHRINKING = 0.5  # contraction that is progress where rounding hides that of the cost
_NEGLIGIBLE = 1e-3  # of a standard error; shorter steps do not matter
# Standard errors; the covariance is that before the last step.
_LAST_STEP = {"float64": 1e-5, "float32": 1e-3}
_MAX_TOLERANCE = 1e-5  # of the relative decrement at a solution
_MAX_SLOPE = 5e-5  # of the scaled gradient where rounding hides further progress
_EPSILON = float(np.finfo(np.float64).eps)  # of sums


class Problem(NamedTuple):
    """Constants of the solution of c lanes."""

    low: Any  # bounds, (p, c); equal ones fix a parameter
    high: Any
    n_points: Any  # points in use, (c,)
    signal: Any  # sum of (y / sigma)^2, (c,), which bounds rounding errors


class State(NamedTuple):
    """The last accepted point of each lane, and the trial point to be evaluated next.

    Scaled variables are parameters times ``scale``.
    """

    params: Any  # (p, c)
    trial: Any  # (p, c)
    scale: Any  # of the columns of J at ``params``, (p, c)
    gram: Any  # as in ``LaneSums``
    cost: Any  # (c,), infinite before the first evaluation
    chi2: Any  # (c,)
    slope: Any  # (c,), the largest scaled gradient at ``params``, see ``_largest_slope``
    radius: Any  # (c,), of the trust region; infinite before the first step
    length: Any  # (c,), of the step to ``trial``
    predicted: Any  # (c,), reduction of the cost at ``trial``
    is_full: Any  # (c,), whether the trust region does not restrict the step to ``trial``
    decrement: Any  # (c,), relative change of the residuals by a full step from ``params``
    step_kind: Any  # (c,), see ``_FULL`` and ``_NOISY``
    probe: Any  # (c,), number of the probe that ``trial`` is; 0 if it is none
    is_exact: Any  # (c,), whether the residuals at ``params`` are rounding errors
    iterations: Any  # (c,), trial points evaluated; -1 before the first evaluation
    status: Any  # (c,), a ``LaneStatus`` or ``ACTIVE``


# Kinds of the last step: rejected or short; accepted and full; any, with a change of the cost that
# is only rounding.
_OTHER, _FULL, _NOISY = 0, 1, 2

# Where J^T J is singular, a point without gradient may be a saddle point. Probes along a null
# direction, of these sizes relative to a parameter, tell it from a minimum.
_PROBES = (0.1, -0.1, 1e-3, -1e-3)


@dataclass(frozen=True)
class StepSettings:
    """Options of ``propose`` and ``update``."""

    tolerance: float
    max_iterations: int
    dtype: str  # of the model, to which trial points are rounded

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the model."""
        return float(np.finfo(self.dtype).eps)

    @property
    def least_pivot(self) -> float:
        """Pivots of the scaled J^T J below this value are rounding errors."""
        return 4.0 * self.epsilon


def initial_state(params: Any, n_sums: int) -> State:
    """Return the state of lanes at their starts, float64 NumPy arrays, shape (p, c)."""
    n_params, n_lanes = params.shape
    zeros, infinite = np.zeros(n_lanes), np.full(n_lanes, np.inf)
    return State(
        params=params,
        trial=params,
        scale=np.zeros((n_params, n_lanes)),
        gram=np.zeros((n_sums, n_lanes)),
        cost=infinite,
        chi2=zeros,
        slope=infinite,
        radius=infinite,
        length=zeros,
        predicted=zeros,
        is_full=zeros,
        decrement=infinite,
        step_kind=zeros,
        probe=zeros,
        is_exact=zeros,
        iterations=np.full(n_lanes, -1.0),
        status=np.full(n_lanes, float(ACTIVE)),
    )


def _where(condition: Any, new: State, old: State) -> State:
    pairs = zip(new, old, strict=True)
    return State(*(jnp.where(condition, a, b).astype(jnp.float64) for a, b in pairs))


def update(state: State, sums: LaneSums, problem: Problem, settings: StepSettings) -> State:
    """Accept or reject the trial points given the sums there."""
    is_first = state.iterations < 0
    is_finite = sums.is_finite
    gain = jnp.where(is_finite, state.cost - sums.cost, -jnp.inf)
    epsilon = settings.epsilon
    noise = epsilon * (4 * state.cost + jnp.sqrt(2 * state.cost * problem.signal))
    noise += 32 * _EPSILON * state.cost
    reduces = state.predicted > 0  # not so where bounds leave no step
    is_noisy = reduces & (state.predicted <= noise) & (gain >= -2 * noise) & is_finite
    # Where rounding hides the change of the cost, the gradient has to fall.
    slope = _largest_slope(sums, state.trial, problem)
    is_better = jnp.where(
        is_noisy, slope < state.slope, reduces & (gain >= _ACCEPT * state.predicted)
    )
    is_probe = state.probe > 0
    accepts = is_finite & (is_first | is_better | (is_probe & (gain > 2 * noise)))
    accepted = state._replace(
        params=state.trial,
        gram=sums.gram,
        cost=sums.cost,
        chi2=sums.chi2,
        slope=slope,
        step_kind=jnp.where(is_first | (state.is_full == 0), _OTHER, _FULL),
    )
    fails = is_first & ~is_finite
    new = _where(accepts, accepted, state._replace(step_kind=jnp.full_like(gain, _OTHER)))
    new = new._replace(
        step_kind=jnp.where(is_noisy, _NOISY, new.step_kind),
        radius=_next_radius(state, gain, accepts, is_noisy),
        probe=jnp.where(accepts, 0, state.probe),
        iterations=state.iterations + 1,
        status=jnp.where(fails, float(LaneStatus.NON_FINITE), state.status),
    )
    return _where(state.status == ACTIVE, new, state)


def _largest_slope(sums: LaneSums, params: Any, problem: Problem) -> Any:
    """Return the largest ``|J_j^T r| / (|J_j| |r|)``, (c,), of parameters that may move."""
    p, gram, cost = len(params), sums.gram, sums.cost
    where = triangle_indices(p + 1)
    norms = jnp.sqrt(jnp.stack([gram[where[i, i]] for i in range(p)]))
    slopes = gram[where[p, :p]] / jnp.where(norms > 0, norms, 1.0)
    free = ~_is_held(params, slopes, problem)
    largest = jnp.where(free, jnp.abs(slopes), 0.0).max(axis=0)
    return largest / jnp.where(cost > 0, jnp.sqrt(2 * cost), 1.0)


def _is_held(params: Any, gradient: Any, problem: Problem) -> Any:
    """Return which parameters are fixed, or would move out of an active bound, (p, c)."""
    at_low, at_high = params <= problem.low, params >= problem.high
    return (at_low & (gradient >= 0)) | (at_high & (gradient <= 0)) | (at_low & at_high)


def _next_radius(state: State, gain: Any, accepts: Any, is_noisy: Any) -> Any:
    ratio = gain / jnp.where(state.predicted > 0, state.predicted, 1.0)
    longer = jnp.maximum(state.radius, 2 * state.length)
    radius = jnp.where(ratio > _GROW_ABOVE, longer, state.radius)
    radius = jnp.where((ratio < _SHRINK_BELOW) & ~is_noisy, 0.5 * state.length, radius)
    radius = jnp.where(accepts, radius, 0.25 * state.length)
    keeps = (state.iterations < 0) | (state.probe > 0)
    return jnp.where(keeps, state.radius, radius)


def propose(state: State, problem: Problem, settings: StepSettings) -> State:
    """Compute the next trial points, and end the lanes that have converged or cannot improve."""
    low, high, params = problem.low, problem.high, state.params
    is_active = state.status == ACTIVE
    quadratic = _quadratic(state, problem, settings.least_pivot)
    scale = quadratic.scale
    size = _norm(scale * params)
    size = jnp.where(size > 0, size, _norm(scale))
    radius = jnp.where(jnp.isfinite(state.radius), state.radius, size)
    room = (low - params) * scale, (high - params) * scale
    step, is_full = restricted_step(quadratic, *room, radius, is_active, settings.least_pivot)
    trial = (params + step * quadratic.unit).astype(settings.dtype).astype(jnp.float64)
    trial = jnp.clip(trial, low, high)
    # A parameter that reaches a bound is on it, whatever rounding does.
    trial = jnp.where(step <= room[0], low, jnp.where(step >= room[1], high, trial))
    trial = jnp.where(jnp.isfinite(trial).all(axis=0), trial, params)
    step = (trial - params) * scale
    reduction = jnp.maximum(quadratic.reduction(quadratic.full_step), 0.0)
    decrement = jnp.sqrt(reduction / jnp.where(state.cost > 0, state.cost, 1.0))
    is_stuck = radius <= settings.epsilon * size
    status, takes_step, is_exact = _verdict(
        state, problem, quadratic, decrement, is_stuck, settings
    )
    length = _norm(step)
    # Where bounds leave no step, a shorter one may be possible.
    length = jnp.where(length > 0, length, jnp.minimum(radius, _norm(quadratic.full_step)))
    is_unsure = is_active & (status == LaneStatus.CONVERGED) & quadratic.is_singular
    is_unsure &= state.probe < len(_PROBES)
    last = jnp.clip(params + quadratic.full_step * quadratic.unit, low, high)
    proposed = state._replace(
        params=jnp.where(takes_step & ~is_unsure, last, params),
        trial=trial,
        scale=scale,
        radius=radius,
        length=length,
        predicted=quadratic.reduction(step),
        is_full=is_full,
        decrement=decrement,
        is_exact=is_exact,
        status=status,
    )
    proposed = _where(is_active, proposed, state)

    def probes() -> State:
        return _where(is_unsure, _probing(proposed, quadratic, problem), proposed)

    # Hardly ever needed.
    result: State = lax.cond(is_unsure.any(), probes, lambda: proposed)
    return result


def _probing(state: State, quadratic: Quadratic, problem: Problem) -> State:
    """Return the state with the next probe as trial point."""
    direction = quadratic.null_vector * quadratic.unit
    # Relative to the parameter that the others compensate, which has the largest share.
    share = jnp.abs(direction) / jnp.where(state.params != 0, jnp.abs(state.params), 1.0)
    unit = direction / jnp.maximum(share.max(axis=0), np.finfo(np.float64).tiny)
    size = jnp.asarray(_PROBES)[jnp.clip(state.probe, 0, len(_PROBES) - 1).astype(jnp.int32)]
    return state._replace(
        trial=jnp.clip(state.params + size * unit, problem.low, problem.high),
        predicted=jnp.zeros_like(state.predicted),
        is_full=jnp.zeros_like(state.is_full),
        probe=state.probe + 1,
        status=jnp.full_like(state.status, ACTIVE),
    )


def _norm(array: Any) -> Any:
    return jnp.sqrt((array**2).sum(axis=0))


def _quadratic(state: State, problem: Problem, least_pivot: float) -> Quadratic:
    p = len(state.params)
    gram = state.gram[triangle_indices(p + 1)]
    norms = jnp.sqrt(jnp.stack([gram[i, i] for i in range(p)]))
    scale = jnp.maximum(norms, _SCALE_MEMORY * state.scale)
    scale = jnp.where(scale > 0, scale, 1.0)
    unit = 1 / scale
    factors = jnp.concatenate([unit, jnp.ones_like(unit[:1])])
    matrix = gram * factors[:, None] * factors
    gradient = matrix[:p, p]
    free = ~_is_held(state.params, gradient, problem)
    return Quadratic.of(matrix, scale, unit, free, least_pivot)


def _verdict(
    state: State,
    problem: Problem,
    quadratic: Quadratic,
    decrement: Any,
    is_stuck: Any,
    settings: StepSettings,
) -> tuple[Any, Any, Any]:
    """Return the status of each lane, which lanes end with a last step, and which fits are exact.

    The residuals of an exact fit are rounding errors.
    """
    epsilon, norm = settings.epsilon, jnp.sqrt(2 * state.cost)
    n_free = (problem.low < problem.high).sum(axis=0)
    dof = jnp.maximum(problem.n_points - n_free, 1)
    errors = decrement * jnp.sqrt(dof)  # length of the full step in standard errors
    noise = epsilon * (1 + jnp.sqrt(problem.signal) / jnp.where(norm > 0, norm, 1.0))
    tolerance = jnp.minimum(jnp.maximum(settings.tolerance, 4 * noise), _MAX_TOLERANCE)
    rounding = 0.5 * rounding_chi2(problem.signal, problem.n_points, settings.dtype)
    is_exact = state.cost <= rounding
    is_small = (errors <= _NEGLIGIBLE) | is_exact
    is_flat = (quadratic.null_slope <= _MAX_TOLERANCE * norm) | is_exact
    contraction = jnp.where(state.step_kind > 0, decrement / state.decrement, jnp.inf)
    is_last = (contraction <= _FAST) & (contraction * decrement <= tolerance)
    is_last &= errors <= _LAST_STEP[settings.dtype]
    is_rounding = decrement**2 * state.cost * problem.n_points <= rounding * len(state.params)
    converged = is_flat & ((decrement <= tolerance) | is_last | (is_rounding & is_small))
    # Where rounding hides the changes of the cost, further steps may not be progress.
    is_solution = is_flat & is_small & ((state.slope <= _MAX_SLOPE) | is_exact)
    is_over = is_stuck | ((state.step_kind == _NOISY) & (contraction > _SHRINKING) & is_solution)
    status = jnp.where(is_stuck, float(LaneStatus.STALLED), float(ACTIVE))
    is_at_limit = state.iterations >= settings.max_iterations
    status = jnp.where((status == ACTIVE) & is_at_limit, float(LaneStatus.ITERATION_LIMIT), status)
    ends_well = converged | (is_over & is_solution)
    status = jnp.where(ends_well, float(LaneStatus.CONVERGED), status)
    return status, converged & ~is_over, is_exact
