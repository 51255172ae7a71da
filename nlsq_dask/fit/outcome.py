"""``Outcome``: end point and statistics of a fit."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.engine.block_sums import BlockSums
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers.covariance import Covariance
from nlsq_dask.status import Status

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class ReadCounts:
    """Amount of data read, and number of passes."""

    n_passes: int = 0
    rows_read: int = 0
    bytes_read: int = 0
    rows_cached: int = 0  # rows in the memory of the workers from an earlier pass
    retries: int = 0

    def __add__(self, other: ReadCounts) -> ReadCounts:
        return ReadCounts(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Outcome:
    """End of a fit, created by phase 2 and completed by later phases."""

    params: Vector
    stop: Status
    sums: Sums | None = None  # over all rows; None without a pass
    sums_at: Vector | None = None  # parameters of ``sums``, the last iterate
    blocks: BlockSums | None = None  # per block, at ``sums_at``
    iterations: int = 0  # of Gauss-Newton over all rows
    covariance: Covariance | None = None
    # Standard errors and non-identifiable parameters, if not from the covariance.
    errors: Vector | None = None
    non_identifiable: NDArray[np.bool_] | None = None
    counts: ReadCounts = ReadCounts()
    checkpoint: str | None = None  # path to resume from
    diagnostics: dict[str, Any] = field(default_factory=dict)
    sample: tuple[Rows, Vector] | None = None  # usable rows and the model values, for plots
