"""Errors, each of which is also the built-in one that a caller would expect, and warnings."""

from __future__ import annotations

import os
import sys
import warnings

_PACKAGE = os.path.dirname(__file__) + os.sep  # a module beside it may begin alike


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn in the name of the line outside the package that called it, however far up that is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


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


class BlockReadError(DataError):
    """A block of the data could not be read, and ``min_success_rate`` does not let it be left out.

    The error of the store, of the codec or of the caller's own function is its ``__cause__``.

    Attributes
    ----------
    array : str
        Which arrays it is, as messages call them, such as "y_data" or "x_data[0]".
    block : tuple of int
        Position of the first such block in the grid of blocks.
    chunk : str or None
        Where the store holds what could not be read, as far as that can be told.
    """

    def __init__(
        self, message: str, array: str, block: tuple[int, ...], chunk: str | None = None
    ) -> None:
        super().__init__(message)
        self.array = array
        self.block = block
        self.chunk = chunk

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.array, self.block, self.chunk)


class DataWarning(UserWarning):
    """The fit goes on, but perhaps not over what the data seem to hold."""


class MissingChunksWarning(DataWarning):
    """Chunks are not in their Zarr store, which gives their fill value instead."""


class RowsChangedError(Exception):
    """Blocks were left out in a pass whose sums would have been compared with those of another.

    It stays inside the library: whoever compares makes the other sums anew.
    """


class FitInProgressError(RuntimeError):
    """A second fit was started on an optimizer that is still running one."""


class ClusterLostError(RuntimeError):
    """The cluster that a fit ran on is gone, or loses its workers again and again."""


class RecordError(ValueError):
    """Bytes are not the record that they should be.

    It stays inside the library: whoever reads them says which file it is.
    """


class ResultFileError(ValueError):
    """A file cannot be used as a result: damaged, of another version, or something else."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, of another version, or of another fit."""
