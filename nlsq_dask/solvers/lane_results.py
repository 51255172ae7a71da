"""``LaneResults``: collects the results of lanes as they end, and computes their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.lane_sums import triangle_indices
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.solvers.lane_errors import (
    expand_covariance,
    inverse_gram,
    residual_variance,
    scaled_covariance,
    standard_errors,
)
from nlsq_dask.solvers.lane_steps import State
from nlsq_dask.solvers.lanes import LaneFits, Lanes, LaneSettings, LaneStatus

Array = NDArray[np.float64]
Index = NDArray[np.int64]

_WITHOUT_FIT = LaneStatus.NO_DATA, LaneStatus.TOO_FEW_POINTS, LaneStatus.BAD_START


class LaneResults:
    """Results of m lanes, in the order in which the lanes were given.

    Parameters
    ----------
    lanes : Lanes
    start, low, high : ndarray, each of shape (p, m)
        Of the free parameters of the model.
    settings : LaneSettings
    transform : ParameterTransform or None
        That of the model; of its ties, only the names are used.
    dtype : str
        That of the model.
    """

    def __init__(
        self,
        lanes: Lanes,
        start: Array,
        low: Array,
        high: Array,
        settings: LaneSettings,
        transform: ParameterTransform | None,
        dtype: str,
    ) -> None:
        p, m = start.shape
        n_all = p if transform is None else len(transform.names)
        n_tied = 0 if transform is None else len(transform.ties)
        self._settings, self._transform, self._dtype = settings, transform, dtype
        self._low, self._high, self._free = low, high, low < high
        self._params, self._tied = start.copy(), np.full((n_tied, m), np.nan)
        self._errors = np.full((n_all, m), np.nan)
        n_full = n_all if settings.covariance == "full" else 0
        self._covariance = np.full((n_full, n_full, m), np.nan)
        self._chi2, self._cost = np.full(m, np.nan), np.full(m, np.nan)
        self._n_points = np.isfinite(lanes.y).sum(axis=0, dtype=np.int32)
        self._iterations = np.zeros(m, np.int16)
        self._status = self._first_status(lanes, start)

    def _first_status(self, lanes: Lanes, start: Array) -> NDArray[np.int8]:
        """Return the status of the lanes that cannot be fitted, ``NOT_READ`` for the others."""
        low, high, least = self._low, self._high, self._settings.min_points
        is_bad = ~np.isfinite(start) | np.isnan(low) | np.isnan(high) | (low > high)
        n_least = self._free.sum(axis=0) if least is None else least
        status = np.full(start.shape[1], LaneStatus.NOT_READ, np.int8)
        status[_has_bad_values(lanes, self._dtype)] = LaneStatus.NON_FINITE
        status[self._n_points < n_least] = LaneStatus.TOO_FEW_POINTS
        status[is_bad.any(axis=0)] = LaneStatus.BAD_START
        status[self._n_points == 0] = LaneStatus.NO_DATA
        return status

    @property
    def missing(self) -> Index:
        """Indices of the lanes that have no result yet."""
        return np.flatnonzero(self._status == LaneStatus.NOT_READ)

    def store(self, index: Index, state: State, tied: Any) -> None:
        """Store the results of lanes that have ended.

        ``tied`` has the tied parameters and their derivatives by the free ones, or is None.
        """
        low, high, free = (a[:, index] for a in (self._low, self._high, self._free))
        status = state.status.astype(np.int8)
        is_on_bound = free & ((state.params == low) | (state.params == high))
        status[(status > 0) & is_on_bound.any(axis=0)] = LaneStatus.AT_BOUND
        self._params[:, index] = state.params
        is_finite = np.isfinite(state.cost)  # infinite if the model is not finite at the start
        self._chi2[index] = np.where(is_finite, state.chi2, np.nan)
        self._cost[index] = np.where(is_finite, state.cost, np.nan)
        self._iterations[index] = np.maximum(state.iterations, 0)
        if tied is not None:
            self._tied[:, index] = tied[0]
        if self._settings.covariance is not None:
            is_singular = self._store_errors(index, state, None if tied is None else tied[1])
            status[(status > 0) & is_singular] = LaneStatus.SINGULAR
        self._status[index] = status

    def _store_errors(self, index: Index, state: State, rates: Any) -> NDArray[np.bool_]:
        """Compute the covariances and return which are singular."""
        p, free = len(state.params), self._free[:, index]
        gram = state.gram[triangle_indices(p + 1)[:p, :p]]
        inverse = inverse_gram(gram, free, 4.0 * float(np.finfo(self._dtype).eps))
        variance = np.ones(len(index))
        if not self._settings.absolute_sigma:
            variance = residual_variance(state.cost, self._n_points[index] - free.sum(axis=0))
        variance = np.where(inverse.is_singular, np.inf, variance)
        covariance = scaled_covariance(inverse.matrix, variance, free)
        if self._transform is not None:
            covariance = expand_covariance(covariance, self._transform, rates)
        covariance[..., ~np.isfinite(state.cost)] = np.nan
        self._errors[:, index] = standard_errors(covariance)
        if self._settings.covariance == "full":
            self._covariance[:, :, index] = covariance
        return inverse.is_singular

    def fits(self) -> LaneFits:
        """Return the results for all parameters of the function."""
        params, transform = self._params, self._transform
        if transform is not None:
            params = np.repeat(transform.values[:, None], params.shape[1], axis=1)
            params[transform.is_free] = self._params
            params[transform.is_tied] = self._tied
        params[:, np.isin(self._status, _WITHOUT_FIT)] = np.nan
        return LaneFits(
            params=params,
            errors=None if self._settings.covariance is None else self._errors,
            covariance=self._covariance if self._settings.covariance == "full" else None,
            chi2=self._chi2,
            cost=self._cost,
            n_points=self._n_points,
            n_free=self._free.sum(axis=0, dtype=np.int32),
            n_iterations=self._iterations,
            status=self._status,
        )


def _has_bad_values(lanes: Lanes, dtype: str) -> NDArray[np.bool_]:
    """Return which lanes have a sigma <= 0, or a y that ``dtype`` cannot hold, at a point in use.

    Neither can be part of a sum.
    """
    is_used = np.isfinite(lanes.y)
    is_bad = np.zeros(is_used.shape[1], bool)
    if lanes.sigma is not None:
        sigma = lanes.sigma.reshape(len(lanes.y), -1)
        is_bad |= (is_used & ~(sigma > 0)).any(axis=0)
    if np.finfo(dtype).max < np.finfo(lanes.y.dtype).max:
        is_bad |= (is_used & (np.abs(lanes.y) > np.finfo(dtype).max)).any(axis=0)
    return is_bad
