"""``Outcome``: what the phases of a fit found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.covariance import Covariance
from nlsq_dask.core.point import Point
from nlsq_dask.stopping import StopReason

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What the phases found.

    Attributes
    ----------
    params : ndarray, shape (p,)
    stop : StopReason
    point : Point or None
        The last accepted point over all rows; None if there was no pass over them.
    iterations : int
        Gauss-Newton iterations over all rows.
    covariance : Covariance or None
    absolute_sigma : bool
    n_passes, rows_read, bytes_read, rows_cached : int
    diagnostics : dict
        Of warm-up and sample.
    """

    params: Vector
    stop: StopReason
    point: Point | None
    iterations: int
    covariance: Covariance | None
    absolute_sigma: bool
    n_passes: int
    rows_read: int
    bytes_read: int
    rows_cached: int
    diagnostics: dict[str, Any]
