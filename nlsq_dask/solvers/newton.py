"""``find_minimum``: Newton's method to a minimum that Gauss-Newton cannot resolve.

Where residuals are large and the model is curved, or the Jacobian is singular, J^T J says little
about the cost near its minimum. The Hessian is made of differences of the exact gradient, which
needs two evaluations per parameter: it is for rows in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.iterate import Settings, column_scale
from nlsq_dask.solvers.trust_region import Vector

Reduce = Callable[[Vector], NormalEquations]

_MAX_PARAMS, _MAX_ITERATIONS = 50, 30
_STEP = 6e-6  # of the differences, relative to a natural length; the cube root of epsilon
_LONGER, _SMOOTH = 8.0, 1e-2  # factor for a second step, and tolerated change of the Hessian
_ASIDE = 1e-2  # distance at which the cost beside a minimum is compared, in natural lengths
_FLAT = 1e-7  # eigenvalues of the scaled Hessian that are rounding errors, relative to the largest


def find_minimum(reduce: Reduce, start: Vector, settings: Settings) -> Vector | None:
    """Return a local minimum near ``start``, or None if none is found.

    At the minimum, the gradient of the cost is zero within ``settings.tol``, and no second
    derivative is negative. The cost must be smooth there.

    Parameters
    ----------
    reduce : callable
        Returns the sums over all rows at given parameters.
    start : ndarray, shape (p,)
    settings : Settings
    """
    if len(start) > _MAX_PARAMS:
        return None
    params, sums = start, reduce(start)
    for _ in range(_MAX_ITERATIONS):
        is_free = ~settings.is_held(params, sums.jtr)
        steps = _steps(params, sums, settings)
        hessian = _hessian(reduce, params, steps, is_free)
        if hessian is None:
            return None
        step = _newton_step(hessian, sums.jtr[is_free])
        if step is None:
            return None
        moved = params.copy()
        moved[is_free] += step
        reduction = -0.5 * float(sums.jtr[is_free] @ step)
        is_minimum = reduction <= settings.tol**2 * sums.cost
        is_inside = ((settings.low <= moved) & (moved <= settings.high)).all()
        new = reduce(moved) if is_inside else None
        if new is None or not new.is_finite:
            return None
        if is_minimum:
            longer = _hessian(reduce, params, _LONGER * steps, is_free)
            is_smooth = longer is not None and _are_close(hessian, longer)
            lies_low = is_smooth and _lies_low(reduce, moved, new, hessian, is_free, settings)
            return moved if lies_low else None
        if new.cost > sums.cost + sums.cost_noise(settings.epsilon):
            return None
        params, sums = moved, new
    return None


def _steps(params: Vector, sums: NormalEquations, settings: Settings) -> Vector:
    """Return steps for differences: of the parameters, or of what changes the residuals."""
    lengths = np.sqrt(2.0 * sums.cost) / column_scale(sums.jtj)
    sizes = np.where(params != 0.0, np.abs(params), settings.sizes)
    return np.asarray(_STEP * np.minimum(sizes, lengths))


def _hessian(
    reduce: Reduce, params: Vector, steps: Vector, is_free: NDArray[np.bool_]
) -> NDArray[np.float64] | None:
    """Return the Hessian of the cost, by central differences of the gradient, or None."""
    columns = []
    for index in np.flatnonzero(is_free):
        ends = params + np.outer((1.0, -1.0), np.eye(len(params))[index] * steps)
        above, below = map(reduce, ends)
        distance = ends[0, index] - ends[1, index]
        if not (above.is_finite and below.is_finite and distance > 0.0):
            return None
        columns.append((above.jtr - below.jtr)[is_free] / distance)
    hessian = np.array(columns).reshape(len(columns), -1)
    return np.asarray(0.5 * (hessian + hessian.T))


def _newton_step(hessian: NDArray[np.float64], gradient: Vector) -> Vector | None:
    """Return the step to the minimum of the quadratic, or None if it has none."""
    if not (np.diag(hessian) > 0.0).all():
        return None
    scale = np.sqrt(np.diag(hessian))
    values, vectors = np.linalg.eigh(hessian / np.outer(scale, scale))
    least = _FLAT * values.max(initial=0.0)
    if (values < -least).any():
        return None
    slopes = vectors.T @ (gradient / scale)
    return np.asarray(-(vectors @ (slopes / np.maximum(values, least))) / scale)


def _lies_low(
    reduce: Reduce,
    params: Vector,
    sums: NormalEquations,
    hessian: NDArray[np.float64],
    is_free: NDArray[np.bool_],
    settings: Settings,
) -> bool:
    """Return whether the cost is not smaller on both sides along the flattest direction.

    At an inflection, the Hessian has no negative eigenvalue either.
    """
    scale = np.sqrt(np.diag(hessian))
    _, vectors = np.linalg.eigh(hessian / np.outer(scale, scale))
    direction = np.zeros(len(params))
    direction[is_free] = vectors[:, 0] / scale
    lengths = np.sqrt(2.0 * sums.cost) / column_scale(sums.jtj)
    lengths = np.minimum(np.maximum(np.abs(params), settings.sizes), lengths)
    direction *= _ASIDE / np.max(np.abs(direction) / lengths, initial=np.finfo(float).tiny)
    for sign in (1.0, -1.0):
        aside = reduce(np.clip(params + sign * direction, settings.low, settings.high))
        if aside.cost < sums.cost - sums.cost_noise(settings.epsilon):
            return False
    return True


def _are_close(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    scale = np.sqrt(np.diag(one))
    return bool((np.abs(one - other) <= _SMOOTH * np.outer(scale, scale)).all())
