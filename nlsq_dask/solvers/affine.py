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
    # Halfway as well: a model may be affine in each half of its parameters.
    for point in (params, 0.5 * (start + params)):
        new = reduce(point)
        change = np.abs(new.jtj - sums.jtj) / np.outer(iterate.scale, iterate.scale)
        if not (new.is_finite and (change <= _CONSTANT).all()):
            return None
    return params
