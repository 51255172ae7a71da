"""Records of many small fits that are solved at once: their data, options and results.

A lane is one fit, for instance of one pixel of a map. Arrays have the points of a fit first and the
lanes last, so that a SIMD instruction processes neighboring lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.losses import Loss

Array = NDArray[Any]
SigmaKind = Literal["none", "shared", "varies"]  # whether there is a sigma, and varies over lanes


class LaneStatus(IntEnum):
    """Why the fit of a lane ended; positive if it converged."""

    CONVERGED = 1
    AT_BOUND = 2  # converged, with a parameter at an active bound
    SINGULAR = 3  # converged, but J^T J is rank-deficient
    ITERATION_LIMIT = 0
    NO_DATA = -1
    TOO_FEW_POINTS = -2
    NON_FINITE = -3
    STALLED = -4  # no step reduces the cost, but the gradient is not zero
    BAD_START = -5  # start or bounds are NaN, or low > high
    NOT_READ = -6
    NOT_FITTED = -7  # its tile has not been fitted yet


@dataclass(frozen=True)
class Lanes:
    """Data of m lanes with n points each. A point is used if its y is finite."""

    y: Array  # (n, m)
    # Each (n, m) if it varies over the lanes, else (n,) or, with k columns, (n, k).
    x: tuple[Array, ...]
    # (n, m), or (n,) or (n, 1) if all lanes share it. A lane in which it is not positive at a point
    # in use ends as ``NON_FINITE``.
    sigma: Array | None = None

    x_varies: tuple[bool, ...] | None = None  # which x vary; None: those of shape (n, m)

    def take(self, index: Any) -> Lanes:
        """Return the lanes at ``index``."""
        x_varies = self.x_varies or tuple(map(self._varies, self.x))
        pairs = zip(self.x, x_varies, strict=True)
        x = tuple(leaf[:, index] if varies else leaf for leaf, varies in pairs)
        return Lanes(self.y[:, index], x, self._sigma_of(index), x_varies)

    def signal(self, index: Any) -> NDArray[np.float64]:
        """Return the sum of ``(y / sigma)^2`` over the points in use, per lane at ``index``."""
        y, sigma = self.y[:, index].astype(np.float64), self._sigma_of(index)
        if sigma is not None:
            y = y / sigma.reshape(len(y), -1)
        signal: Array = (np.where(np.isfinite(y), y, 0.0) ** 2).sum(axis=0)
        return signal

    def _sigma_of(self, index: Any) -> Array | None:
        if self.sigma is None or not self._varies(self.sigma):
            return self.sigma
        return self.sigma[:, index]

    def _varies(self, array: Array) -> bool:
        return array.ndim == 2 and array.shape[1] == self.y.shape[1] > 1


def rounding_chi2(signal: Any, n_points: Any, dtype: str) -> Any:
    """Return the ``chi2`` that rounding leaves where the model fits the data exactly, per lane.

    Parameters
    ----------
    signal : array, shape (m,)
        Sum of ``(y / sigma)^2``.
    n_points : array, shape (m,)
        Points in use.
    dtype : str
        That of the model.
    """
    info = np.finfo(dtype)
    return (8.0 * float(info.eps)) ** 2 * signal + n_points * (8.0 * float(info.tiny)) ** 2


@dataclass(frozen=True)
class LaneSettings:
    """Options of the fits, the same for all lanes."""

    tolerance: float = 1e-8  # see ``gauss_newton_tol``
    max_iterations: int = 100  # trial points per lane
    loss: Loss = field(default_factory=Loss)
    absolute_sigma: bool = False
    covariance: str | None = "errors"  # "errors", "full" or None
    cov_type: str = "nonrobust"  # "nonrobust", "HC0" or "HC1"
    min_points: int | None = None  # None: the number of free parameters of the lane


@dataclass(frozen=True)
class LaneFits:
    """Results for m lanes and all P parameters of the function: free, fixed and tied ones."""

    params: NDArray[np.float64]  # (P, m)
    errors: NDArray[np.float64] | None  # standard errors, (P, m)
    covariance: NDArray[np.float64] | None  # (P, P, m)
    chi2: NDArray[np.float64]  # (m,), sum of squared weighted residuals, whatever the loss
    cost: NDArray[np.float64]  # (m,), 1/2 sum f_scale^2 rho
    n_points: NDArray[np.int32]  # (m,), points in use
    n_free: NDArray[np.int32]  # (m,), free parameters
    n_iterations: NDArray[np.int16]  # (m,), trial points evaluated
    status: NDArray[np.int8]  # (m,), a ``LaneStatus``
