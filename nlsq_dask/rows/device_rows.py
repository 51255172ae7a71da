"""``PlacedRows``: rows in the memory of the devices that process them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax


class Batch(NamedTuple):
    """Arguments of one call of a kernel's program."""

    arrays: Any  # y, x, sigma and mask as in a ``Window``
    offsets: Any
    n_rows: int


@dataclass(frozen=True)
class PlacedRows:
    """Rows split into batches, which are distributed over the devices in turn."""

    shape: tuple[int, ...]  # of y; its elements are the rows
    batches: tuple[Batch, ...]  # with JAX arrays

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in device memory."""
        return sum(
            array.nbytes for batch in self.batches for array in jax.tree.leaves(batch.arrays)
        )
