"""Errors and warnings; each error also derives from the built-in one that a caller expects."""

from __future__ import annotations

import os
import sys
import warnings

_PACKAGE = os.path.dirname(__file__) + os.sep  # the separator excludes neighbors of similar name


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points to the nearest caller outside the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class ModelError(ValueError):
    """Invalid model: wrong output shape, not row-wise, or not written with jax.numpy."""


class DataError(ValueError):
    """Invalid data: shapes, chunks, dtypes or labels that do not match."""


class NonFiniteDataError(DataError):
    """NaN or infinity in the data while ``nan_policy`` is "raise".

    Attributes
    ----------
    n_rows : int
        Number of rows with a NaN or infinity in y, x or sigma.
    first_block : tuple of int
        Position in the grid of blocks of the first block with such a row.
    """

    def __init__(self, message: str, n_rows: int, first_block: tuple[int, ...]) -> None:
        super().__init__(message)
        self.n_rows = n_rows
        self.first_block = first_block

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.n_rows, self.first_block)


class BlockReadError(DataError):
    """Unreadable block of the data that ``min_success_rate`` does not allow to be skipped.

    Its ``__cause__`` is the error of the store, of the codec or of the caller's own function.

    Attributes
    ----------
    array : str
        Name of the array in messages, such as "y_data" or "x_data[0]".
    block : tuple of int
        Position in the grid of blocks of the first such block.
    chunk : str or None
        Chunk of the store that could not be read, if known.
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
    """Data that may not be fitted as intended; the fit continues."""


class MissingChunksWarning(DataWarning):
    """Chunks missing from their Zarr store, which are read as the fill value."""


class FitInProgressError(RuntimeError):
    """Second fit started on an optimizer that is still running one."""


class ClusterLostError(RuntimeError):
    """Cluster that no longer exists or repeatedly loses its workers."""


class RecordError(ValueError):
    """Bytes that do not encode the expected record.

    Internal: the caller adds the name of the file.
    """


class ResultFileError(ValueError):
    """File that is not a valid result: damaged, of another format version, or of another kind."""


class CheckpointError(ValueError):
    """Invalid checkpoint: damaged, of another format version, or of another fit."""
