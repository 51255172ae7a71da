"""``BlockSums``: statistics of the residuals of each block of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockSums:
    """Statistics of the residuals r of m blocks. Each field is an array of shape (m,)."""

    index: NDArray[np.int64]  # flat index of the block in the grid
    # Sum of r^2 over the block; not finite if the model or its derivative is not.
    chi2: NDArray[np.float64]
    n_used: NDArray[np.int64]  # number of rows that are neither masked nor omitted for a NaN
    largest: NDArray[np.float64]  # largest |r| in the block

    @classmethod
    def of(cls, index: int, chi2: float, n_used: int, largest: float) -> Self:
        """Return the statistics of one block, as arrays of length 1."""
        return cls(np.array([index]), np.array([chi2]), np.array([n_used]), np.array([largest]))

    @classmethod
    def concatenate(cls, records: Sequence[Self]) -> Self:
        """Return one ``BlockSums`` with the blocks of several ones, in order."""
        return cls(*(np.concatenate([getattr(r, f.name) for r in records]) for f in fields(cls)))
