"""``Outcome``: where a fit has ended, and what its phases know of that point."""

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
    """How much of the source was read, and how often."""

    n_passes: int = 0
    rows_read: int = 0
    bytes_read: int = 0
    rows_cached: int = 0  # in the workers' memory from an earlier pass
    retries: int = 0

    def __add__(self, other: ReadCounts) -> ReadCounts:
        return ReadCounts(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Outcome:
    """Where a fit has ended; phase 2 makes it, and what follows adds to it."""

    params: Vector
    stop: Status
    sums: Sums | None = None  # over all rows; None if there was no pass over them
    sums_at: Vector | None = None  # the last accepted point
    blocks: BlockSums | None = None  # of the residuals of each block there
    iterations: int = 0  # of Gauss-Newton over all rows
    covariance: Covariance | None = None
    # Standard errors, and the parameters that the data do not determine, where they do not come
    # from the covariance.
    errors: Vector | None = None
    non_identifiable: NDArray[np.bool_] | None = None
    counts: ReadCounts = ReadCounts()
    checkpoint: str | None = None  # from which the fit can be resumed
    diagnostics: dict[str, Any] = field(default_factory=dict)
    sample: tuple[Rows, Vector] | None = None  # some usable rows, and the model there
