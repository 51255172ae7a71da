"""``Request``: which sums over the rows are needed, and where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_loops import Accumulation

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Request:
    """The sums over the rows that a solver needs next."""

    params: Vector
    candidates: Matrix | None = None  # (k, p), where the cost alone is needed
    directions: Matrix | None = None  # (k, p), along which products J^T J v are needed
    accumulation: Accumulation = Accumulation.GRAM  # where there is a choice
    is_trial: bool = True  # whether ``params`` may become the next iterate
    is_fresh: bool = False  # whether the sums are compared with none from before
