"""Checks of the values in the data, with their error messages."""

from __future__ import annotations

from collections.abc import Sequence

from nlsq_dask._text import join_first
from nlsq_dask.engine.dataset import DataSet
from nlsq_dask.engine.retries import SkippedBlock
from nlsq_dask.errors import BlockReadError, CheckpointError, DataError, NonFiniteDataError
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.rows.rows import Rows

_MAX_LISTED = 10  # blocks in a message


def are_unusable(sums: Sums, omits_nan: bool) -> bool:
    """Whether some rows have an invalid sigma, or NaN or infinity that may not be omitted."""
    return bool(sums.n_bad_sigma or (sums.n_bad and not omits_nan))


def check_rows(
    sums: Sums, omits_nan: bool, data: DataSet, n_rows: int, first_bad_block: int | None
) -> None:
    """Raise a DataError if sigma or other values are invalid, or no row can be used.

    Parameters
    ----------
    sums : Sums
        Sums over all rows, which count the invalid rows.
    omits_nan : bool
        Whether rows with NaN or infinity are omitted.
    data : DataSet
        Finds the first NaN or infinity, for the message.
    n_rows : int
        Number of rows.
    first_bad_block : int or None
        Flat index of the first block with NaN or infinity.
    """
    if sums.n_bad_sigma:
        raise DataError(
            f"sigma is zero or negative at {sums.n_bad_sigma:,} of {n_rows:,} rows; it must be "
            f"positive. To omit rows, set their y_data to NaN and use nan_policy='omit'."
        )
    if first_bad_block is not None and not omits_nan:
        block, where = data.first_not_finite(first_bad_block)
        raise NonFiniteDataError(
            f"{sums.n_bad:,} of {n_rows:,} rows hold NaN or infinity in y_data, x_data or sigma; "
            f"the first of them are in block {block} of the grid {data.blocks.grid}{where}. Use "
            f"nan_policy='omit' to omit these rows.",
            sums.n_bad,
            block,
        )
    if not sums.n_used:
        raise DataError(
            f"none of the {n_rows:,} rows can be used: each is masked, or holds NaN or infinity in "
            f"y_data, x_data or sigma. Check these arrays and the mask one by one: an array "
            f"without finite values, or an inverted mask, excludes all rows."
        )


def check_share(bad: Sequence[SkippedBlock], n_all: int, min_share: float) -> None:
    """Raise a BlockReadError if too few rows can be read.

    Parameters
    ----------
    bad : sequence of SkippedBlock
        The blocks that cannot be read.
    n_all : int
        Number of rows of all blocks.
    min_share : float
        Fraction of the rows that must be readable.
    """
    n_rows = n_all - sum(block.rows for block in bad)
    if n_rows and n_rows >= min_share * n_all:
        return
    listed = join_first([block.sentence for block in bad], _MAX_LISTED, "; ", "blocks")
    raise BlockReadError(
        f"{n_rows:,} of {n_all:,} rows can be read, less than min_success_rate={min_share:g}. "
        f"{listed}. Repair or replace the stored data, or lower min_success_rate.",
        bad[0].array,
        bad[0].block,
        bad[0].chunk,
    )


def check_same(before: Rows, reread: Rows) -> None:
    """Raise a CheckpointError if rows, read again, differ from those of the checkpoint."""
    for one, other in zip(before.arrays, reread.arrays, strict=True):
        if one is not None and other is not None and one.tobytes() != other.tobytes():
            raise CheckpointError(
                "the checkpoint belongs to other data: some rows were read again, and their values "
                "have changed. Restore the data, or fit again without resume_from_checkpoint."
            )
