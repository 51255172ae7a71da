"""``Request``: which sums over all rows a solver needs next, and at which parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_terms import Accumulation

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Request:
    """Which sums over all rows a solver needs next, and at which parameters."""

    params: Vector
    candidates: Matrix | None = None  # (k, p), points at which only the cost is needed
    directions: Matrix | None = None  # (k, p), vectors v of the products J^T J v
    accumulation: Accumulation = Accumulation.GRAM  # used by dense solvers
    is_trial: bool = True  # counts as an iteration; False for sums at a known point
    # The sums are not compared with those of earlier passes, so that blocks that cannot be read may
    # be skipped even if earlier passes contain them.
    is_fresh: bool = False
