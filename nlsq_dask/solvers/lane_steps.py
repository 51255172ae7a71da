"""Damped Gauss-Newton within bounds for many lanes at once: ``propose`` and ``update``.

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
from nlsq_dask.solvers.lane_algebra import sweep
from nlsq_dask.solvers.lanes import LaneStatus

ACTIVE = 9  # status of a lane that has not ended
_ACCEPT = 1e-4  # minimum ratio of actual to predicted reduction of an accepted step
_POOR, _GOOD = 0.25, 0.75  # ratios that change the damping
_FIRST_DAMPING = 1e-3  # relative to the curvature
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 1e15  # smaller damping is none; with more, a lane ends
_DECREASE, _GROWTH = 0.1, 4.0  # factors of the damping; that after failures doubles each time
_SCALE_MEMORY = 0.1  # a column's scale falls at most by this factor per iteration
_FAST = 0.1  # contraction below which a last step is taken without evaluating it
_SHRINKING = 0.5  # contraction that is progress where rounding hides that of the cost
_NEGLIGIBLE = 1e-3  # of a standard error; shorter steps do not matter
_LAST_STEP = 1e-5  # standard errors; the covariance is that before the last step
_MAX_TOLERANCE = 1e-5  # of the scaled gradient at a solution


class Problem(NamedTuple):
    """What stays the same while c lanes are solved."""

    low: Any  # bounds, (p, c); equal ones fix a parameter
    high: Any
    n_points: Any  # points in use, (c,)
    signal: Any  # sum of (y / sigma)^2, (c,), which bounds rounding errors


class State(NamedTuple):
    """The last accepted point of each lane, and the trial point to be evaluated next."""

    params: Any  # (p, c)
    trial: Any  # (p, c)
    scale: Any  # of the columns of J at ``params``, (p, c)
    gram: Any  # as in ``LaneSums``
    cost: Any  # (c,), infinite before the first evaluation
    chi2: Any  # (c,)
    damping: Any  # (c,), relative to the curvature
    growth: Any  # (c,), factor of the damping after the next failure
    predicted: Any  # (c,), reduction of the cost at ``trial``
    decrement: Any  # (c,), relative change of the residuals by a full step from ``params``
    step_kind: Any  # (c,), how ``params`` was reached, see ``_FULL`` and ``_NOISY``
    iterations: Any  # (c,), trial points evaluated
    status: Any  # (c,), a ``LaneStatus`` or ``ACTIVE``


# Kinds of an accepted step: rejected or short; full; full, with a change of the cost that is only
# rounding.
_OTHER, _FULL, _NOISY = 0, 1, 2


@dataclass(frozen=True)
class StepSettings:
    """Options of ``propose`` and ``update``."""

    tolerance: float
    max_iterations: int
    epsilon: float  # machine epsilon of the dtype in which the model is evaluated

    @property
    def least_pivot(self) -> float:
        """Pivots of the scaled J^T J below this value are rounding errors."""
        return 4.0 * self.epsilon


def initial_state(params: Any, n_sums: int) -> State:
    """Return the state of lanes at their starts, float64 NumPy arrays, shape (p, c)."""
    n_params, n_lanes = params.shape
    zeros, matrix = np.zeros(n_lanes), np.zeros((n_params, n_lanes))
    return State(
        params=params,
        trial=params,
        scale=matrix,
        gram=np.zeros((n_sums, n_lanes)),
        cost=np.full(n_lanes, np.inf),
        chi2=zeros,
        damping=np.full(n_lanes, _FIRST_DAMPING),
        growth=np.full(n_lanes, _GROWTH),
        predicted=zeros,
        decrement=np.full(n_lanes, np.inf),
        step_kind=zeros,
        iterations=np.full(n_lanes, -1.0),
        status=np.full(n_lanes, float(ACTIVE)),
    )


def update(state: State, sums: LaneSums, problem: Problem, settings: StepSettings) -> State:
    """Accept or reject the trial points given the sums there."""
    is_active = state.status == ACTIVE
    is_first = state.iterations < 0
    is_finite = sums.is_finite
    gain = jnp.where(is_finite, state.cost - sums.cost, -jnp.inf)
    epsilon = settings.epsilon
    noise = 32 * epsilon * state.cost + epsilon * jnp.sqrt(2 * state.cost * problem.signal)
    reduces = state.predicted > 0  # not so where bounds leave no step
    is_noisy = ~is_first & (state.predicted <= noise) & (gain >= -2 * noise) & reduces
    is_better = (gain >= _ACCEPT * state.predicted) & reduces
    accepts = is_active & is_finite & (is_first | is_better | is_noisy)
    damping, growth = _next_damping(state, gain, accepts, is_first)
    is_full = accepts & (state.damping == 0) & ~is_first
    kind = jnp.where(is_full, jnp.where(is_noisy, _NOISY, _FULL), _OTHER)
    fails = is_active & is_first & ~is_finite

    def choose(new: Any, old: Any) -> Any:
        return jnp.where(accepts, new, old)

    return state._replace(
        params=choose(state.trial, state.params),
        gram=choose(sums.gram, state.gram),
        cost=choose(sums.cost, state.cost),
        chi2=choose(sums.chi2, state.chi2),
        damping=jnp.where(is_active, damping, state.damping),
        growth=jnp.where(is_active, growth, state.growth),
        step_kind=jnp.where(is_active, kind, state.step_kind).astype(jnp.float64),
        iterations=state.iterations + is_active,
        status=jnp.where(fails, float(LaneStatus.NON_FINITE), state.status),
    )


def _next_damping(state: State, gain: Any, accepts: Any, is_first: Any) -> tuple[Any, Any]:
    ratio = gain / jnp.where(state.predicted > 0, state.predicted, 1.0)
    factor = jnp.where(ratio > _GOOD, _DECREASE, jnp.where(ratio > _POOR, 0.5, 2.0))
    lower = state.damping * factor
    lower = jnp.where(lower < _LEAST_DAMPING, 0.0, lower)
    higher = jnp.maximum(state.damping, 0.25 * _FIRST_DAMPING) * state.growth
    damping = jnp.where(is_first, state.damping, jnp.where(accepts, lower, higher))
    growth = jnp.where(accepts, _GROWTH, 2 * state.growth)
    return damping, growth


class _Quadratic(NamedTuple):
    """The quadratic model of the cost in scaled variables, parameters times ``scale``."""

    matrix: Any  # [[A, g], [g^T, c]], (k, k, c)
    scale: Any  # (p, c)
    free: Any  # (p, c), parameters that are not fixed, and not held by an active bound
    full_step: Any  # (p, c), to the minimum over the free ones
    decrement: Any  # (c,), sqrt(reduction / cost) of ``full_step``
    null_slope: Any  # (c,), largest slope along a direction that ``full_step`` leaves out


def _quadratic(state: State, problem: Problem, least_pivot: float) -> _Quadratic:
    p = len(state.params)
    gram = state.gram[triangle_indices(p + 1)]
    norms = jnp.sqrt(jnp.stack([gram[i, i] for i in range(p)]))
    scale = jnp.maximum(norms, _SCALE_MEMORY * state.scale)
    scale = jnp.where(scale > 0, scale, 1.0)
    inverse = jnp.concatenate([1 / scale, jnp.ones_like(scale[:1])])
    matrix = gram * inverse[:, None] * inverse
    gradient = matrix[:p, p]
    is_held = ((state.params <= problem.low) & (gradient >= 0)) | (
        (state.params >= problem.high) & (gradient <= 0)
    )
    free = ~is_held & (problem.low < problem.high)
    swept, is_swept = sweep(matrix, free, least_pivot)
    full_step = jnp.where(is_swept, -swept[:p, p], 0.0)
    reduction = jnp.maximum(-0.5 * (gradient * full_step).sum(axis=0), 0.0)
    decrement = jnp.sqrt(reduction / jnp.where(state.cost > 0, state.cost, 1.0))
    null_slope = jnp.where(free & ~is_swept, jnp.abs(swept[:p, p]), 0.0).max(axis=0)
    return _Quadratic(matrix, scale, free, full_step, decrement, null_slope)


def _damped_trial(
    state: State, problem: Problem, quadratic: _Quadratic, settings: StepSettings
) -> Any:
    """Return the minimum of the damped quadratic model within the bounds, about: (p, c).

    A parameter whose step would cross a bound is placed on it, and the step of the others is
    computed again.
    """
    p = len(state.params)
    diagonal = jnp.eye(p + 1)[..., None].at[p].set(0.0)
    damped = quadratic.matrix + state.damping * diagonal
    low, high, scale = problem.low, problem.high, quadratic.scale

    def solve(carry: Any) -> Any:
        n_rounds, free, anchor, _, _ = carry
        shift = jnp.where(free, 0.0, (anchor - state.params) * scale)
        slope = (quadratic.matrix[:p, :p] * shift).sum(axis=1)
        column = damped[:, p] + jnp.concatenate([slope, jnp.zeros_like(slope[:1])])
        column = column.at[p].set(damped[p, p])
        system = damped.at[:, p].set(column).at[p].set(column)
        swept, is_swept = sweep(system, free, settings.least_pivot)
        step = jnp.where(is_swept, -swept[:p, p], 0.0)
        trial = jnp.where(free, state.params + step / scale, anchor)
        inside = jnp.clip(trial, low, high)
        crosses = free & (inside != trial)
        return n_rounds + 1, free & ~crosses, jnp.where(crosses, inside, anchor), inside, crosses

    def repeats(carry: Any) -> Any:
        n_rounds, _, _, _, crosses = carry
        return (n_rounds < p) & (crosses & (state.status == ACTIVE)).any()

    free = quadratic.free
    start = solve((0, free, state.params, state.params, jnp.zeros(free.shape, bool)))
    return lax.while_loop(repeats, solve, start)[3]


def propose(state: State, problem: Problem, settings: StepSettings, dtype: str) -> State:
    """Compute the next trial points, and end the lanes that have converged or cannot improve.

    ``dtype`` is that of the model, to which trial points are rounded.
    """
    p = len(state.params)
    quadratic = _quadratic(state, problem, settings.least_pivot)
    trial = _damped_trial(state, problem, quadratic, settings)
    trial = jnp.clip(trial.astype(dtype).astype(jnp.float64), problem.low, problem.high)
    trial = jnp.where(jnp.isfinite(trial).all(axis=0), trial, state.params)
    shift = (trial - state.params) * quadratic.scale
    curvature = (quadratic.matrix[:p, :p] * shift).sum(axis=1)
    predicted = -(shift * (quadratic.matrix[:p, p] + 0.5 * curvature)).sum(axis=0)
    is_still = (trial == state.params).all(axis=0)
    status, takes_step = _verdict(state, problem, quadratic, is_still, settings)
    last = jnp.clip(state.params + quadratic.full_step / quadratic.scale, problem.low, problem.high)
    is_active = state.status == ACTIVE
    return state._replace(
        params=jnp.where(is_active & takes_step, last, state.params),
        trial=jnp.where(is_active, trial, state.trial),
        scale=jnp.where(is_active, quadratic.scale, state.scale),
        predicted=jnp.where(is_active, predicted, state.predicted),
        decrement=jnp.where(is_active, quadratic.decrement, state.decrement),
        status=jnp.where(is_active, status, state.status),
    )


def _verdict(
    state: State,
    problem: Problem,
    quadratic: _Quadratic,
    is_still: Any,
    settings: StepSettings,
) -> tuple[Any, Any]:
    """Return the status of each lane, and which lanes end with a last step."""
    epsilon, decrement = settings.epsilon, quadratic.decrement
    is_fixed = problem.low >= problem.high
    dof = jnp.maximum(problem.n_points - (~is_fixed).sum(axis=0), 1)
    errors = decrement * jnp.sqrt(dof)  # length of the full step in standard errors
    norm = jnp.sqrt(2 * state.cost)
    noise = epsilon * (1 + jnp.sqrt(problem.signal) / jnp.where(norm > 0, norm, 1.0))
    tolerance = jnp.minimum(jnp.maximum(settings.tolerance, 4 * noise), _MAX_TOLERANCE)
    rounding = 0.5 * (8 * epsilon) ** 2 * problem.signal
    is_exact = state.cost <= rounding
    is_small = (errors <= _NEGLIGIBLE) | is_exact
    is_flat = quadratic.null_slope <= _MAX_TOLERANCE * norm
    contraction = jnp.where(state.step_kind > 0, decrement / state.decrement, jnp.inf)
    is_last = (
        (contraction <= _FAST) & (contraction * decrement <= tolerance) & (errors <= _LAST_STEP)
    )
    is_rounding = decrement**2 * state.cost * problem.n_points <= rounding * len(state.params)
    converged = is_flat & ((decrement <= tolerance) | is_last | (is_rounding & is_small))
    # Rounding hides further progress.
    is_stuck = (is_still & ((state.damping >= 1) | is_small)) | (state.damping > _MOST_DAMPING)
    is_over = is_stuck | ((state.step_kind == _NOISY) & (contraction > _SHRINKING))
    is_solution = is_flat & is_small & ((decrement <= 10 * _MAX_TOLERANCE) | is_exact)
    status = jnp.where(is_over, float(LaneStatus.STALLED), float(ACTIVE))
    is_at_limit = state.iterations >= settings.max_iterations
    status = jnp.where((status == ACTIVE) & is_at_limit, float(LaneStatus.ITERATION_LIMIT), status)
    ends_well = converged | (is_over & is_solution)
    status = jnp.where(ends_well, float(LaneStatus.CONVERGED), status)
    return status, converged & ~is_over
