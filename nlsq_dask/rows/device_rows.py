"""``PlacedRows``: rows kept in the memory of the devices that compute them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax


class Piece(NamedTuple):
    """What one call of a kernel's program is given.

    Attributes
    ----------
    arrays, offsets : tuple
        y, x, sigma and mask as in a ``Window``.
    n_rows : int
    """

    arrays: Any
    offsets: Any
    n_rows: int


@dataclass(frozen=True)
class PlacedRows:
    """Rows cut into pieces, each on the device whose turn it is.

    Attributes
    ----------
    shape : tuple of int
        Its entries are the rows.
    pieces : tuple of Piece
        With arrays of JAX.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(array.nbytes for piece in self.pieces for array in jax.tree.leaves(piece.arrays))
