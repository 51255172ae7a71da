"""``affine_minimum``: the solution of a model that is affine in its parameters, in one step.

A trust region lets a start that is too small by many orders of magnitude take no step that changes
the residuals beyond rounding. Where the Jacobian is constant, no trust region is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.iterate import Iterate, Settings
from nlsq_dask.solvers.trust_region import Vector

Reduce = Callable[[Vector], NormalEquations]

_FAR = 1e6  # length of a step that a trust region would delay, relative to the start
_CONSTANT_COST = 1e-6  # tolerated error of the cost of the linear model, relative to the start's
_CONSTANT = 1e-10  # tolerated change of elements of J^T J, relative to the norms of the columns


def affine_minimum(reduce: Reduce, start: Vector, settings: Settings) -> Vector | None:
    """Return the minimum if it is far from ``start`` and the Jacobian is the same at both.

    Otherwise None, as in most fits, for which nothing but the sums at ``start`` is evaluated.

    Parameters
    ----------
    reduce : callable
        Returns the sums over the rows at given parameters.
    start : ndarray, shape (p,)
    settings : Settings
    """
    sums = reduce(start)
    if not sums.is_finite:
        return None
    iterate = Iterate.of(start, sums, settings)
    sizes = iterate.scale * np.maximum(np.abs(start), settings.sizes)
    if np.linalg.norm(iterate.full_step) <= _FAR * np.linalg.norm(sizes):
        return None
    params = iterate.moved(iterate.full_step)
    step = params - start
    slope, curvature = float(sums.jtr @ step), float(step @ sums.jtj @ step)
    # Halfway as well: a model may be affine in each half of its parameters.
    for share in (1.0, 0.5):
        new = reduce(start + share * step)
        change = np.abs(new.jtj - sums.jtj) / np.outer(iterate.scale, iterate.scale)
        expected = sums.cost + share * slope + 0.5 * share**2 * curvature
        error = abs(new.cost - expected)
        is_affine = (change <= _CONSTANT).all() and error <= _CONSTANT_COST * sums.cost
        if not (new.is_finite and is_affine):
            return None
    return params
