"""``Outcome``: what the phases of a fit found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import Sums
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers.covariance import Covariance
from nlsq_dask.status import Status

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What the phases found.

    Attributes
    ----------
    params : ndarray, shape (p,)
    stop : Status
    sums : Sums or None
        Over all rows, at ``sums_at``; None if there was no pass over them.
    sums_at : ndarray, shape (p,), or None
        The last accepted point.
    iterations : int
        Gauss-Newton iterations over all rows.
    covariance : Covariance or None
    has_covariance : bool
        Whether there would be one after a solve that found something.
    undetermined : ndarray of bool, shape (p,), or None
        Parameters that the data do not determine, where that does not come from the covariance.
    errors : ndarray, shape (p,), or None
        Standard errors, where they do not come from the covariance.
    absolute_sigma : bool
    n_passes, rows_read, bytes_read, rows_cached : int
    checkpoint : str or None
        From which the fit can go on.
    diagnostics : dict
        Of warm-up and sample.
    shown : (Rows, ndarray of shape (n,)), or None
        Some usable rows of the data and the model there, at ``params``.
    """

    params: Vector
    stop: Status
    sums: Sums | None
    sums_at: Vector | None
    iterations: int
    covariance: Covariance | None
    has_covariance: bool
    undetermined: NDArray[np.bool_] | None
    errors: Vector | None
    absolute_sigma: bool
    n_passes: int
    rows_read: int
    bytes_read: int
    rows_cached: int
    checkpoint: str | None
    diagnostics: dict[str, Any]
    shown: tuple[Rows, Vector] | None
