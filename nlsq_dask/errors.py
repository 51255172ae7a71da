"""Errors and warnings of the package; each error is also a ValueError or a RuntimeError."""

from __future__ import annotations

import os
import sys
import warnings

_PACKAGE = os.path.dirname(__file__) + os.sep  # the separator excludes neighbors of similar name


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that shows the line of the caller's code, not a line of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class ModelError(ValueError):
    """Invalid model, such as one with a wrong output shape or not written with jax.numpy."""


class DataError(ValueError):
    """Invalid data: shapes, chunks, dtypes or labels that do not match."""


class NonFiniteDataError(DataError):
    """NaN or infinity in the data while ``nan_policy`` is "raise".

    Attributes
    ----------
    n_rows : int
        Number of rows with a NaN or infinity in y, x or sigma.
    first_block : tuple of int
        Index of the first block with such a row, along each dimension of y.
    """

    def __init__(self, message: str, n_rows: int, first_block: tuple[int, ...]) -> None:
        super().__init__(message)
        self.n_rows = n_rows
        self.first_block = first_block

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.n_rows, self.first_block)


class BlockReadError(DataError):
    """A block of the data could not be read, and ``min_success_rate`` does not allow skipping it.

    ``__cause__`` is the original error of the store, the codec or the caller's own function.

    Attributes
    ----------
    array : str
        Name of the unreadable array, such as "y_data" or "x_data[0]".
    block : tuple of int
        Index of the unreadable block, along each dimension of y; the first one of several.
    chunk : str or None
        Key of the unreadable chunk in the store; None if it is not known.
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
    """Warning that the data may not mean what the caller intends; the fit continues."""


class MissingChunksWarning(DataWarning):
    """Warning that a Zarr store lacks chunks, whose elements are read as the fill value."""


class PixelFitError(RuntimeError):
    """Fits of some pixels failed, and ``errors`` is "raise"."""


class FitInProgressError(RuntimeError):
    """``fit`` was called on an optimizer that is already running a fit."""


class ClusterLostError(RuntimeError):
    """The Dask cluster shut down during a fit, repeatedly lost its workers, or runs no tasks.

    A worker whose memory is almost full is paused and begins no tasks. A fit ends if all workers
    stay paused.
    """


class DeviceMemoryError(RuntimeError):
    """A GPU has too little free memory, even for the smallest number of rows at a time."""


class RecordError(ValueError):
    """Invalid content of a result file or checkpoint.

    Internal: it is converted to a ``ResultFileError`` or ``CheckpointError`` that names the file.
    """


class ResultFileError(ValueError):
    """Invalid result file: damaged, of another format version, or not a result at all."""


class CheckpointError(ValueError):
    """Invalid checkpoint: damaged, of another format version, or written by a different fit."""
