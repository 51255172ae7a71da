"""The errors of the library: each is also the built-in error that a caller would expect."""

from __future__ import annotations


class ModelError(ValueError):
    """The model cannot be used: wrong shape, not row-wise, or not written in jax.numpy."""


class DataError(ValueError):
    """The data cannot be used: shapes, chunks, dtypes or labels that do not fit together."""


class NonFiniteDataError(DataError):
    """The data hold NaN or infinity and ``nan_policy`` is "raise".

    Attributes
    ----------
    n_rows : int
        Number of rows with a NaN or infinity in y, x or sigma.
    first_block : tuple of int
        Position of the first block that has such a row, in the grid of blocks.
    """

    def __init__(self, message: str, n_rows: int, first_block: tuple[int, ...]) -> None:
        super().__init__(message)
        self.n_rows = n_rows
        self.first_block = first_block

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.n_rows, self.first_block)


class FitInProgressError(RuntimeError):
    """A second fit was started on an optimizer that is still running one."""


class ClusterLostError(RuntimeError):
    """The cluster that a fit ran on is gone, or loses its workers again and again."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, of another version, or of another fit."""
