"""Levenberg-Marquardt from many starting points at the same time, on rows in memory.

One JAX program improves a group of candidates (starting points), vectorized with ``vmap``. A
parameter on a bound does not move outward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nlsq_dask.kernels.losses import LINEAR, robust
from nlsq_dask.model.jacobian import residual_and_jacobian
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.rows.rows import STRIP_ROWS

_N_STEPS = 10  # trial steps per candidate
# Initial damping, relative to the curvature, and the factors after a success and a failure. The
# first steps are short, because long ones leave narrow basins.
FIRST_DAMPING, _DECREASE, _INCREASE = 1.0, 0.3, 3.0
_MIN_DAMPING, _MAX_DAMPING = 1e-9, 1e9


class Problem(NamedTuple):
    """Arrays that ``improve_group`` takes: rows, normalization, bounds and penalty.

    Parameters are ``scales * q + offsets`` with normalized parameters q, for which ``low`` and
    ``high`` are the bounds.
    """

    y: Any
    x: Any
    inverse_sigma: Any
    f_scale: Any
    scales: Any
    offsets: Any
    low: Any
    high: Any
    penalty: Any


class Objective(NamedTuple):
    """Loss at a point, with half its gradient and half its Gauss-Newton Hessian.

    The loss is the mean squared weighted residual, or with a robust loss the mean of ``f_scale^2
    rho``, plus a penalty; infinite if the model or its Jacobian is not finite. Derivatives are
    taken by normalized parameters, see ``Problem``.
    """

    loss: Any
    gradient: Any
    curvature: Any


class Candidate(NamedTuple):
    """A starting point, as normalized parameters of shape (p,), with its damping and loss."""

    params: Any
    damping: Any
    loss: Any


def make_objective(
    model: Model, mode: Mode, loss: str, problem: Problem, n_rows: Any
) -> Callable[[Any], Objective]:
    """Return the function from normalized parameters to the ``Objective`` of the first rows.

    It sums over some of the ``n_rows`` rows at a time, so that the Jacobian of all rows is never in
    memory.
    """
    size = min(STRIP_ROWS, problem.y.shape[0])
    linearized = residual_and_jacobian(model, mode)
    factors = jnp.append(problem.scales, 1.0)
    p = model.n_params

    def objective(q: Any) -> Objective:
        params = (q * problem.scales + problem.offsets).astype(model.dtype)

        def add(i: Any, sums: Any) -> Any:
            y, x, inverse_sigma = jax.tree.map(
                lambda array: lax.dynamic_slice_in_dim(array, i * size, size),
                (problem.y, problem.x, problem.inverse_sigma),
            )
            _, stacked = linearized(x, y.astype(model.dtype), params, factors)
            counts = i * size + jnp.arange(size) < n_rows
            stacked = jnp.where(counts, stacked * inverse_sigma, 0.0)
            terms = stacked[-1] ** 2
            if loss != LINEAR:
                terms, jacobian_scale, residual_scale = robust(loss, terms / problem.f_scale**2)
                terms = problem.f_scale**2 * terms
                stacked = stacked * jnp.where(
                    jnp.arange(p + 1)[:, None] < p, jacobian_scale, residual_scale
                )
            return sums[0] + terms.sum(), sums[1] + stacked @ stacked.T

        zeros = jnp.zeros(()), jnp.zeros((p + 1, p + 1))
        n_strips = (n_rows + size - 1) // size
        total, gram = jax.tree.map(
            lambda array: array / n_rows, lax.fori_loop(0, n_strips, add, zeros)
        )
        penalty_rows = jnp.column_stack(
            [problem.penalty * problem.scales, problem.penalty @ params]
        )
        total, gram = total + (penalty_rows[:, p] ** 2).sum(), gram + penalty_rows.T @ penalty_rows
        is_finite = jnp.isfinite(total) & jnp.isfinite(gram).all()
        return Objective(jnp.where(is_finite, total, jnp.inf), gram[:p, p], gram[:p, :p])

    return objective


def _step(problem: Problem, params: Any, damping: Any, current: Objective) -> Any:
    """Return the point after a damped Gauss-Newton step, clipped to the bounds.

    A parameter at a bound that would move outward is held fixed.
    """
    low, high = problem.low, problem.high
    is_blocked = ((params <= low) & (current.gradient > 0)) | (
        (params >= high) & (current.gradient < 0)
    )
    norms = jnp.sqrt(jnp.diag(current.curvature))
    free = ~is_blocked & (norms > 0)
    scale = jnp.where(free, norms, 1.0)
    eye = jnp.eye(len(params))
    curvature = jnp.where(free[:, None] & free, current.curvature / scale[:, None] / scale, eye)
    slope = jnp.where(free, current.gradient / scale, 0.0)
    factor = jax.scipy.linalg.cho_factor(curvature + damping * eye)
    trial = jnp.clip(params - jax.scipy.linalg.cho_solve(factor, slope) / scale, low, high)
    return jnp.where(jnp.isfinite(trial).all(), trial, params)


def _improve(
    problem: Problem, objective: Callable[[Any], Objective], candidate: Candidate
) -> Candidate:
    """Return a candidate after a fixed number of trial steps, each accepted if it is better."""

    def attempt(_: Any, state: Any) -> Any:
        params, damping, current = state
        trial = _step(problem, params, damping, current)
        proposed = objective(trial)
        is_better = proposed.loss < current.loss
        damping = jnp.clip(
            damping * jnp.where(is_better, _DECREASE, _INCREASE), _MIN_DAMPING, _MAX_DAMPING
        )
        kept = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), (trial, proposed), (params, current)
        )
        return kept[0], damping, kept[1]

    start = candidate.params, candidate.damping, objective(candidate.params)
    params, damping, current = lax.fori_loop(0, _N_STEPS, attempt, start)
    return Candidate(params, damping, current.loss)


def improve_group(
    model: Model, mode: Mode, loss: str, problem: Problem, group: Candidate, n_rows: Any
) -> Candidate:
    """Improve starting points by a few trial steps each, on the first ``n_rows`` rows.

    Parameters
    ----------
    model, mode, loss, problem
        As for ``make_objective``.
    group : Candidate
        The starting points, with arrays of shape (points, ...).
    n_rows : int
    """
    objective = make_objective(model, mode, loss, problem, n_rows)
    improved: Candidate = jax.vmap(lambda candidate: _improve(problem, objective, candidate))(group)
    return improved
