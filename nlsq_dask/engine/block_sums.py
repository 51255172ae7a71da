"""``BlockSums``: what a pass knows of the residuals of each block by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockSums:
    """Numbers for m blocks of the grid.

    Attributes
    ----------
    index : ndarray of int, shape (m,)
        Flat index of each block.
    chi2 : ndarray, shape (m,)
        ``sum r^2`` of its rows.
    n_used : ndarray of int, shape (m,)
        How many these are.
    largest : ndarray, shape (m,)
        Largest ``|r|``.
    """

    index: NDArray[np.int64]
    chi2: NDArray[np.float64]
    n_used: NDArray[np.int64]
    largest: NDArray[np.float64]

    @classmethod
    def of(cls, index: int, chi2: float, n_used: int, largest: float) -> Self:
        """Return the numbers of one block."""
        return cls(np.array([index]), np.array([chi2]), np.array([n_used]), np.array([largest]))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the blocks of all of them."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))
