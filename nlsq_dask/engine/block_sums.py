"""``BlockSums``: statistics of the residuals of each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockSums:
    """Statistics of m blocks; arrays of shape (m,)."""

    index: NDArray[np.int64]  # flat index in the grid
    chi2: NDArray[np.float64]  # sum of r^2
    n_used: NDArray[np.int64]  # rows used
    largest: NDArray[np.float64]  # largest |r|

    @classmethod
    def of(cls, index: int, chi2: float, n_used: int, largest: float) -> Self:
        """Return the statistics of one block."""
        return cls(np.array([index]), np.array([chi2]), np.array([n_used]), np.array([largest]))

    @classmethod
    def concatenate(cls, records: Sequence[Self]) -> Self:
        """Concatenate the blocks of several records."""
        return cls(*(np.concatenate([getattr(r, f.name) for r in records]) for f in fields(cls)))
