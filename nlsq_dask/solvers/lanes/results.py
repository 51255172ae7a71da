"""``LaneResults``: collects the results of lanes as they end, and computes their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.lane_sums import triangle_indices
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.solvers.lanes.errors import (
    diagonals,
    expand_covariance,
    inverse_gram,
    residual_variance,
    scaled_covariance,
)
from nlsq_dask.solvers.lanes.records import LaneFits, Lanes, LaneSettings, LaneStatus
from nlsq_dask.solvers.lanes.refinement import Refined
from nlsq_dask.solvers.lanes.steps import State

Array = NDArray[np.float64]
Index = NDArray[np.int64]

# Largest diagonal element of the inverse of the scaled J^T J with which the errors have the digits
# asked for, by dtype of the model.
_MAX_INFLATION = {"float64": 1e9, "float32": 1e3}
_HARDLY_ANY = 1e-8  # effect of a parameter, relative to that of others, that may be rounding
_MAX_SLOPE = 1e-4  # of the scaled gradient at a solution
_NEGLIGIBLE = 1e-3  # of a standard error; a longer step does not start at a solution
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
        self._lanes, self._start = lanes, start
        self._params, self._tied = start.copy(), np.full((n_tied, m), np.nan)
        self._errors = np.full((n_all, m), np.nan)
        n_full = n_all if settings.covariance == "full" else 0
        self._covariance = np.full((n_full, n_full, m), np.nan)
        self._chi2, self._cost = np.full(m, np.nan), np.full(m, np.nan)
        self._n_points = np.isfinite(lanes.y).sum(axis=0, dtype=np.int32)
        self._iterations = np.zeros(m, np.int16)
        self._has_hidden = np.zeros(m, bool)
        self._is_unsure, self._needs_steps = np.zeros(m, bool), np.zeros(m, bool)
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
        is_finite = np.isfinite(state.cost)  # infinite if the model is not finite at the start
        self._chi2[index] = np.where(is_finite, state.chi2, np.nan)
        self._cost[index] = np.where(is_finite, state.cost, np.nan)
        self._iterations[index] = np.maximum(state.iterations, 0)
        self._status[index] = state.status.astype(np.int8)
        self._store_params(index, state.params, tied)
        p, free = len(state.params), self._free[:, index]
        gram = state.gram[triangle_indices(p + 1)[:p, :p]]
        inverse = inverse_gram(gram, free, 4.0 * float(np.finfo(self._dtype).eps))
        self._has_hidden[index] = self._find_hidden(index, np.sqrt(np.einsum("iim->im", gram)))
        self._store_covariance(index, inverse.matrix, inverse.is_singular, tied)
        loses_digits = inverse.is_singular | (inverse.inflation > _MAX_INFLATION[self._dtype])
        may_improve = self._status[index] >= LaneStatus.ITERATION_LIMIT
        may_improve |= self._status[index] == LaneStatus.STALLED
        self._needs_steps[index] = loses_digits & may_improve
        is_sandwich = self._settings.cov_type != "nonrobust"
        # Where the fit is exact, errors do not show which parameters it does not determine.
        is_unsure = loses_digits | is_sandwich | (state.is_exact > 0) | self._has_hidden[index]
        self._is_unsure[index] = is_finite & is_unsure

    def _find_hidden(self, index: Index, norms: Array) -> NDArray[np.bool_]:
        """Return in which lanes a parameter changes the model by rounding errors only, (c,).

        ``norms`` are those of the columns of J, shape (p, c).
        """
        effect = norms * self._sizes(index, self._params[:, index])
        largest = np.where(np.isfinite(effect), effect, 0.0).max(axis=0)
        at = np.flatnonzero((effect <= _HARDLY_ANY * largest).any(axis=0))
        has_hidden = np.zeros(len(index), bool)
        if len(at):
            rounding = np.finfo(self._dtype).eps * np.sqrt(self._lanes.signal(index[at]))
            has_hidden[at] = (effect[:, at] <= rounding).any(axis=0)
        return has_hidden

    @property
    def unsure(self) -> Index:
        """Indices of the lanes whose J^T J must be factorized."""
        return np.flatnonzero(self._is_unsure)

    def needs_steps(self, index: Index) -> NDArray[np.bool_]:
        """Return which of these lanes end where J^T J has too few digits."""
        return self._needs_steps[index]

    def params(self, index: Index) -> Array:
        """Return the free parameters of these lanes, shape (p, c)."""
        return self._params[:, index]

    def refine(self, index: Index, refined: Refined) -> None:
        """Store what the QR factorization gives for these lanes."""
        factors, inverse = refined.factors, refined.inverse
        self._cost[index], self._chi2[index] = factors.cost, factors.chi2
        is_stepped, status = self._needs_steps[index], self._status[index]
        is_close = refined.is_exact | (refined.errors <= _NEGLIGIBLE)
        is_solution = np.where(is_stepped & ~refined.is_singular, is_close, status > 0)
        is_wrong = is_stepped & (status > 0) & ~is_solution
        is_sloped = self._largest_slope(index, refined) > _MAX_SLOPE
        is_wrong |= (status > 0) & is_sloped & ~refined.is_exact
        status = np.where(is_solution, LaneStatus.CONVERGED, status)
        self._status[index] = np.where(is_wrong, LaneStatus.STALLED, status)
        self._store_params(index, refined.params, refined.tied)
        self._has_hidden[index] |= self._is_undetermined(index, refined)
        if self._settings.cov_type == "nonrobust":
            covariance = np.einsum("ikm,jkm->ijm", inverse, inverse)
        else:
            middle = np.einsum("ikm,klm->ilm", inverse, factors.scores)
            covariance = np.einsum("ilm,jlm->ijm", middle, inverse)
        self._store_covariance(index, covariance, refined.is_singular, refined.tied)

    def _is_undetermined(self, index: Index, refined: Refined) -> NDArray[np.bool_]:
        """Return in which lanes rounding of exact data leaves a parameter of any size, (c,)."""
        errors = np.sqrt((refined.inverse**2).sum(axis=1) * refined.rounding)
        is_lost = errors > self._sizes(index, refined.params)
        return np.asarray(refined.is_exact & is_lost.any(axis=0))

    def _sizes(self, index: Index, params: Array) -> Array:
        """Return by how much each parameter may be wrong before it is undetermined, (p, c).

        That is its size at the start, 1 for 0, or at the end. It is infinite for parameters that
        are fixed or at a bound, which do not count.
        """
        start = np.abs(self._start[:, index])
        size = np.maximum(np.abs(params), np.where(start > 0, start, 1.0))
        is_inside = (self._low[:, index] < params) & (params < self._high[:, index])
        return np.where(is_inside, size, np.inf)

    def _largest_slope(self, index: Index, refined: Refined) -> Array:
        """Return the largest ``|J_j^T r| / (|J_j| |r|)``, (c,), of parameters that may move.

        Columns may be so small that their squares are zero.
        """
        p, params = len(refined.params), refined.params
        triangle, target = refined.factors.triangle[:p, :p], refined.factors.triangle[:p, p]
        largest = np.abs(triangle).max(axis=0)
        unit = triangle / np.where(largest > 0, largest, 1.0)
        norms = np.sqrt((unit**2).sum(axis=0) * 2 * refined.factors.cost)
        slopes = np.einsum("ijm,im->jm", unit, target) / np.where(norms > 0, norms, 1.0)
        low, high = self._low[:, index], self._high[:, index]
        is_held = ((params <= low) & (slopes > 0)) | ((params >= high) & (slopes < 0))
        result: Array = np.where(is_held, 0.0, np.abs(slopes)).max(axis=0)
        return result

    def _store_params(self, index: Index, params: Array, tied: Any) -> None:
        low, high, free = (a[:, index] for a in (self._low, self._high, self._free))
        self._params[:, index] = params
        if tied is not None:
            self._tied[:, index] = tied[0]
        is_on_bound = (free & ((params == low) | (params == high))).any(axis=0)
        status = self._status[index]
        self._status[index] = np.where((status > 0) & is_on_bound, LaneStatus.AT_BOUND, status)

    def _store_covariance(
        self, index: Index, inverse: Array, is_singular: NDArray[np.bool_], tied: Any
    ) -> None:
        """Store covariance and errors, and the status ``SINGULAR``.

        ``inverse`` is that of ``J^T J``, or for a sandwich the product of its three matrices.
        """
        free, settings = self._free[:, index], self._settings
        n_points = self._n_points[index]
        dof = n_points - free.sum(axis=0)
        factor = np.ones(len(index))
        if settings.cov_type != "nonrobust":
            correction = n_points / np.maximum(dof, 1) if settings.cov_type == "HC1" else factor
            factor = np.where(dof > 0, correction, np.inf)
        elif not settings.absolute_sigma:
            factor = residual_variance(self._cost[index], dof)
        is_singular = is_singular | self._has_hidden[index]
        factor = np.where(is_singular, np.inf, factor)
        status = self._status[index]
        self._status[index] = np.where((status > 0) & is_singular, LaneStatus.SINGULAR, status)
        if settings.covariance is None:
            return
        if settings.covariance == "errors" and self._transform is None:
            inverse = diagonals(inverse)
        covariance = scaled_covariance(inverse, factor, free)
        if self._transform is not None:
            covariance = expand_covariance(
                covariance, self._transform, None if tied is None else tied[1]
            )
        covariance[..., ~np.isfinite(self._cost[index])] = np.nan
        variance = covariance if covariance.ndim == 2 else diagonals(covariance)
        self._errors[:, index] = np.sqrt(np.maximum(variance, 0.0))
        if settings.covariance == "full":
            self._covariance[:, :, index] = covariance

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
