"""Steps of many lanes at once: the minimum of a quadratic model in bounds and trust region."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from nlsq_dask.solvers.lanes.algebra import sweep

_TOO_LONG = 1.2  # length of a step over the radius that is not accepted
_MAX_ROUNDS = 10  # steps that are tried; the last one is cut to the region
_LEAST_DAMPING = 1e-3  # relative to the largest damping that may be needed


class Quadratic(NamedTuple):
    """A quadratic model of the cost in scaled variables, parameters times ``scale``.

    The columns of the Jacobian have at most norm 1 in scaled variables.
    """

    matrix: Any  # [[A, g], [g^T, c]] with A = J^T J and the gradient g, (k, k, c)
    scale: Any  # (p, c)
    unit: Any  # 1 / scale
    free: Any  # (p, c), parameters that are not fixed, and not held by an active bound
    full_step: Any  # (p, c), to the minimum over the free parameters
    inverse: Any  # inverse of A for the free parameters, zero for others, (p, p, c)
    # Sum of the directions along which A is zero, about, and the largest slope along one of them.
    null_vector: Any  # (p, c)
    null_slope: Any  # (c,)

    @classmethod
    def of(cls, matrix: Any, scale: Any, unit: Any, free: Any, least_pivot: float) -> Quadratic:
        """Solve the normal equations; smaller pivots than ``least_pivot`` are rounding errors."""
        p = len(scale)
        swept, is_swept = sweep(matrix, free, least_pivot)
        is_left_out = free & ~is_swept
        coefficients = jnp.where(is_left_out, swept[:p, :p], 0.0).sum(axis=1)
        return cls(
            matrix,
            scale,
            unit,
            free,
            *_solution(swept, is_swept, jnp.zeros_like(scale)),
            jnp.where(is_swept, -coefficients, is_left_out),
            jnp.abs(jnp.where(is_left_out, swept[:p, p], 0.0)).max(axis=0),
        )

    @property
    def is_singular(self) -> Any:
        """Whether A is singular, (c,)."""
        return (self.null_vector != 0).any(axis=0)

    @property
    def gradient(self) -> Any:
        """Derivatives of the cost by the scaled variables, (p, c)."""
        return self.matrix[:-1, -1]

    def reduction(self, step: Any) -> Any:
        """Return the predicted reduction of the cost by a step in scaled variables, (c,)."""
        curvature = (self.matrix[:-1, :-1] * step).sum(axis=1)
        return -(step * (self.gradient + 0.5 * curvature)).sum(axis=0)


def _minimum(matrix: Any, free: Any, fixed: Any, damping: Any, least_pivot: float) -> Any:
    """Return ``_solution`` over the free variables, given the steps ``fixed`` of the others."""
    p = len(free)
    fixed = jnp.where(free, 0.0, fixed)
    gradient = matrix[:p, p] + (matrix[:p, :p] * fixed).sum(axis=1)
    damped = matrix[:p, :p] + damping * jnp.eye(p)[..., None]
    rows = jnp.concatenate([damped, gradient[:, None]], axis=1)
    last = jnp.concatenate([gradient, matrix[p, p][None]])
    return _solution(*sweep(jnp.concatenate([rows, last[None]]), free, least_pivot), fixed)


def _solution(swept: Any, is_swept: Any, fixed: Any) -> tuple[Any, Any]:
    """Return a step, shape (p, c), and the inverse matrix, (p, p, c), from a swept matrix."""
    p = len(is_swept)
    both = is_swept[:, None] & is_swept
    return jnp.where(is_swept, -swept[:p, p], fixed), jnp.where(both, swept[:p, :p], 0.0)


class _Round(NamedTuple):
    """A step, and how to compute the next one if this one is not allowed."""

    number: Any
    damping: Any  # (c,)
    free: Any  # (p, c)
    fixed: Any  # (p, c), steps of variables that are not free
    step: Any  # (p, c)
    repeats: Any  # (c,)


def restricted_step(
    quadratic: Quadratic, low: Any, high: Any, radius: Any, is_active: Any, least_pivot: float
) -> tuple[Any, Any]:
    """Return a step that nearly minimizes the model in bounds and trust region.

    A variable whose step would cross a bound is placed on the bound, and the step of the others is
    computed again. The damping for a step as long as the radius follows from Newton's method.

    Parameters
    ----------
    quadratic : Quadratic
    low, high : array, shape (p, c)
        Limits of the step.
    radius : array, shape (c,)
    is_active : array of bool, shape (c,)
        Lanes for which the result is used.
    least_pivot : float

    Returns
    -------
    step : array, shape (p, c)
    is_full : array of bool, shape (c,)
        True if only bounds restrict the step.

    References
    ----------
    J. J. More, "The Levenberg-Marquardt algorithm: implementation and theory", Numerical Analysis,
    Lecture Notes in Mathematics 630, 105-116 (1978).
    """
    slope = jnp.sqrt(jnp.where(quadratic.free, quadratic.gradient**2, 0.0).sum(axis=0))
    least_damping = _LEAST_DAMPING * slope / radius

    def judged(number: Any, damping: Any, free: Any, fixed: Any, step: Any, inverse: Any) -> _Round:
        square = (step**2).sum(axis=0)
        excess = jnp.sqrt(square) / radius
        is_long = excess > _TOO_LONG
        curvature = (step * (inverse * step).sum(axis=1)).sum(axis=0)
        more = (excess - 1) * square / jnp.where(curvature > 0, curvature, 1.0)
        damping = jnp.where(is_long, jnp.maximum(damping + more, least_damping), damping)
        inside = jnp.clip(step, low, high)
        crosses = free & (inside != step) & ~is_long
        repeats = is_active & (is_long | crosses.any(axis=0))
        fixed = jnp.where(crosses, inside, fixed)
        return _Round(number + 1, damping, free & ~crosses, fixed, step, repeats)

    def repeat(last: _Round) -> _Round:
        number, damping, free, fixed, _, _ = last
        step, inverse = _minimum(quadratic.matrix, free, fixed, damping, least_pivot)
        return judged(number, damping, free, fixed, step, inverse)

    zeros = jnp.zeros_like(radius)
    first = judged(
        0, zeros, quadratic.free, jnp.zeros_like(low), quadratic.full_step, quadratic.inverse
    )
    last = lax.while_loop(
        lambda state: (state.number < _MAX_ROUNDS) & state.repeats.any(), repeat, first
    )
    length = jnp.sqrt((last.step**2).sum(axis=0))
    factor = jnp.minimum(1.0, _TOO_LONG * radius / jnp.where(length > 0, length, 1.0))
    return jnp.clip(last.step * factor, low, high), last.damping == 0
