"""``PlacedRows``: rows that were copied to GPU memory, where later passes use them again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax


class Batch(NamedTuple):
    """Rows for one call of a ``Kernel``'s program."""

    arrays: Any  # y, x, sigma and mask as in a ``Window``
    offsets: Any  # index in each array at which the batch begins
    n_rows: int  # without padding


@dataclass(frozen=True)
class PlacedRows:
    """Rows in GPU memory, split into batches; with several GPUs, each holds some batches."""

    shape: tuple[int, ...]  # of y; its elements are the rows
    batches: tuple[Batch, ...]  # with JAX arrays

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory."""
        return sum(
            array.nbytes for batch in self.batches for array in jax.tree.leaves(batch.arrays)
        )
