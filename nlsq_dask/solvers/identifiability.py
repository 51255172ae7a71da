"""``confounded_groups``: parameters of which the data determine combinations only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from nlsq_dask.solvers.scaled_svd import ScaledSVD

Vector = NDArray[np.float64]
Flags = NDArray[np.bool_]

_MIN_PART = 1e-3  # of a null direction, for a parameter that takes part in it
_MIN_INFLATION = 100.0  # error of a parameter, relative to its error with all others fixed
_MIN_ERROR = 10.0  # error of a parameter, relative to the parameter


def in_null_directions(svd: ScaledSVD) -> Flags:
    """Return which parameters take part in null directions, shape (p,)."""
    return np.asarray((np.abs(svd.vectors[:, svd.is_null]) > _MIN_PART).any(axis=1))


def confounded_groups(svd: ScaledSVD, errors: Vector, params: Vector) -> list[tuple[int, ...]]:
    """Return groups of parameters that the data cannot tell apart, such as factors of a product.

    The parameters of a group can change together with hardly any effect on the residuals: along a
    null direction, or along one that inflates their standard errors to many times their values. A
    parameter that has no effect by itself forms no group.

    Parameters
    ----------
    svd : ScaledSVD
        Of the Jacobian at the solution.
    errors : ndarray, shape (p,)
        Standard error of each parameter if all others were fixed; NaN if it is not known.
    params : ndarray, shape (p,)
        The solution.
    """
    is_null, is_confounded = svd.is_null, in_null_directions(svd)
    null = svd.vectors[:, is_null]
    groups = _groups(null @ null.T, is_confounded)
    weak = ~is_null & (_MIN_INFLATION * svd.values <= svd.values.max())
    inflated = svd.vectors[:, weak] / svd.values[weak]
    inflation = np.linalg.norm(inflated, axis=1)
    is_large = (inflation >= _MIN_INFLATION) & (inflation * errors > _MIN_ERROR * np.abs(params))
    return groups + _groups(inflated @ inflated.T, is_large & ~is_confounded)


def _groups(similarity: NDArray[np.float64], members: Flags) -> list[tuple[int, ...]]:
    """Return the indices of members in groups of at least two that are linked by similarity."""
    sizes = np.sqrt(np.diag(similarity))
    links = np.abs(similarity) > _MIN_PART * np.outer(sizes, sizes)
    indices = np.flatnonzero(members)
    n_groups, labels = connected_components(links[np.ix_(indices, indices)], directed=False)
    groups = [tuple(indices[labels == label].tolist()) for label in range(n_groups)]
    return [group for group in groups if len(group) > 1]
