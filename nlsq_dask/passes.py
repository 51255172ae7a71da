"""``Passes``: reductions over all rows, counted, reported and checked."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.kernel import RowKernel
from nlsq_dask.core.normal_equations import NormalEquationsKernel
from nlsq_dask.core.penalty import GroupVariance
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.sums import Sums
from nlsq_dask.engine.faults import BadBlock
from nlsq_dask.engine.reduce import DataSet, PassRequest, PassResult, ReadReport
from nlsq_dask.errors import BlockReadError, DataError, NonFiniteDataError, RowsChangedError
from nlsq_dask.events import BlocksLeftOut, Observer, PassFinished

S = TypeVar("S", bound=Sums)


class Passes:
    """Reads the data set for a fit and keeps count of it.

    A block that could not be read is left out from then on, if so many rows may be missing. Then
    sums from before are over other rows than those that follow, and must not be compared with them.

    Parameters
    ----------
    data : DataSet
    omits_nan : bool
        Whether rows with NaN or infinity are left out; if not, they are an error.
    penalty : GroupVariance
        Added to the sums.
    emit : callable
        Receives a ``PassFinished`` a pass.
    min_share : float
        Of the rows, that must be readable.

    Attributes
    ----------
    n_passes, rows_read, bytes_read, rows_cached, n_retries : int
    left_out : dict of int to BadBlock
        Blocks that could not be read, by their flat index.
    """

    def __init__(
        self,
        data: DataSet,
        omits_nan: bool,
        penalty: GroupVariance,
        emit: Observer,
        min_share: float = 1.0,
    ) -> None:
        self._data = data
        self._omits_nan = omits_nan
        self._penalty = penalty
        self._emit = emit
        self._min_share = min_share
        self.n_passes = 0
        self.rows_read = 0
        self.bytes_read = 0
        self.rows_cached = 0
        self.n_retries = 0
        self.left_out: dict[int, BadBlock] = {}
        self._first: Sums | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows, without those left out."""
        return self._data.blocks.n_rows - sum(bad.rows for bad in self.left_out.values())

    def sample(self, wanted: int, seed: int) -> tuple[Rows, int]:
        """Read a few blocks and take rows from each; return them, and of how many blocks.

        Where a block cannot be read, others are read as if it were not there.
        """
        while True:
            sample = self._data.sample(wanted, seed, frozenset(self.left_out))
            self.rows_read += sample.rows_read
            self.bytes_read += sample.bytes_read
            if not self._leave_out(sample.reading) and sample.rows is not None:
                return sample.rows, sample.n_blocks

    def first(
        self, kernel: RowKernel[S], params: NDArray[np.float64], sample_rows: int, seed: int
    ) -> tuple[S, Rows | None]:
        """Sum over all rows as ``reduce_anew`` does, and bring back rows from all blocks."""
        share = min(1.0, sample_rows / self.n_rows)
        sums, rows, _ = self._run(kernel, self._penalty, params, sample_share=share, seed=seed)
        self._first = sums
        return sums, rows

    def reduce_anew(self, kernel: RowKernel[S], params: NDArray[np.float64]) -> S:
        """Sum over all rows as ``reduce`` does, for sums that are compared with none from before.

        Blocks may be left out in this pass.
        """
        sums, _, _ = self._run(kernel, self._penalty, params)
        self._first = sums
        return sums

    def reduce(
        self,
        kernel: RowKernel[S],
        params: NDArray[np.float64],
        candidates: NDArray[np.float64] | None = None,
        directions: NDArray[np.float64] | None = None,
    ) -> S:
        """Sum over all rows, and raise a DataError if they cannot be used.

        Parameters
        ----------
        kernel : RowKernel
        params : ndarray, shape (p,)
        candidates : ndarray, shape (k, p), optional
            Points at which the cost is wanted, too.
        directions : ndarray, shape (k, p), optional
            Where products are wanted, of a kernel that makes them.

        Raises
        ------
        RowsChangedError
            If blocks had to be left out that are in the sums of earlier passes.
        """
        sums, _, has_changed = self._run(
            kernel,
            self._penalty,
            params,
            candidates=candidates,
            directions=directions,
            is_first=self._first is None,
        )
        if has_changed:
            raise RowsChangedError
        if self._first is None:
            self._first = sums
        return sums.with_moments_of(self._first)

    def reduce_beside(
        self, kernel: RowKernel[S], params: NDArray[np.float64], known: tuple[Any, S]
    ) -> tuple[S, S]:
        """Return the sums at ``params``, and those of a known point over the same rows.

        Parameters
        ----------
        kernel : RowKernel
        params : ndarray, shape (p,)
        known : (ndarray, Sums)
            A point with its sums, which are made anew if blocks had to be left out.
        """
        point, sums = known
        while True:
            try:
                return self.reduce(kernel, params), sums
            except RowsChangedError:
                sums = self.reduce_anew(kernel, point)

    def scores(
        self, kernel: NormalEquationsKernel, params: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return a root of ``sum r^2 J^T J`` over all rows, shape (p, p), with no penalty in it.

        Raises
        ------
        RowsChangedError
            If blocks had to be left out that are in the sums of earlier passes.
        """
        sums, _, has_changed = self._run(kernel, GroupVariance(), params, is_first=False)
        if has_changed:
            raise RowsChangedError
        assert sums.triangle is not None
        return sums.triangle[:, : len(params)]

    def _run(
        self,
        kernel: RowKernel[S],
        penalty: GroupVariance,
        params: NDArray[np.float64],
        **wanted: Any,
    ) -> tuple[S, Rows | None, bool]:
        """Return sums, rows, and whether blocks were left out that were not before."""
        began = time.perf_counter()
        request = PassRequest(params, left_out=frozenset(self.left_out), **wanted)
        result: PassResult[S] = self._data.reduce(kernel, request)
        has_changed = self._leave_out(result.reading)
        assert result.sums is not None  # it is an error to leave out all rows
        sums = result.sums.penalized(penalty, params, request.candidates, request.directions)
        self.n_passes += 1
        self.rows_read += sums.rows_read
        self.bytes_read += sums.bytes_read
        self.rows_cached += sums.rows_cached
        self._emit(
            PassFinished(
                self.n_passes,
                params.copy(),
                sums.cost if sums.is_finite else np.inf,
                time.perf_counter() - began,
                sums.rows_read,
                sums.bytes_read,
                sums.rows_cached,
                result.reading.n_retries,
            )
        )
        self._check(sums)
        return sums, result.sample, has_changed

    def _leave_out(self, reading: ReadReport) -> bool:
        """Take note of what could not be read; return whether it is more than before.

        Raises
        ------
        BlockReadError
            If too few rows are left.
        """
        self.n_retries += reading.n_retries
        new = {i: self._data.bad_block(i, reading.lost[i]) for i in sorted(reading.lost)}
        if not new:
            return False
        self.left_out |= new
        self._first = None
        n_all, n_rows = self._data.blocks.n_rows, self.n_rows
        if n_rows < self._min_share * n_all:
            raise _too_few(list(self.left_out.values()), n_rows, n_all, self._min_share)
        self._emit(BlocksLeftOut(tuple(bad.sentence for bad in new.values()), n_all - n_rows))
        return True

    def must_report(self, sums: Sums) -> bool:
        """Whether sums over a part of the rows show that the data cannot be used as they are."""
        return bool(sums.n_bad_sigma or (sums.n_bad and not self._omits_nan))

    def _check(self, sums: Sums) -> None:
        n_rows, grid = self.n_rows, self._data.blocks.grid
        if sums.n_bad_sigma:
            raise DataError(
                f"sigma is zero or negative at {sums.n_bad_sigma:,} of {n_rows:,} rows; it must be "
                f"positive. To leave rows out, set their y_data to NaN and use nan_policy='omit'."
            )
        if sums.n_bad and not self._omits_nan:
            block, where = self._data.first_not_finite(sums.first_bad_block)
            raise NonFiniteDataError(
                f"{sums.n_bad:,} of {n_rows:,} rows hold NaN or infinity in y_data, x_data or "
                f"sigma; the first of them are in block {block} of the grid {grid}{where}. Use "
                f"nan_policy='omit' to leave such rows out.",
                sums.n_bad,
                block,
            )
        if not sums.n_used:
            raise DataError(f"none of the {n_rows:,} rows can be used: all are masked or NaN.")


_MOST_LISTED = 10  # blocks in a message


def _too_few(bad: list[BadBlock], n_rows: int, n_all: int, min_share: float) -> BlockReadError:
    listed = "; ".join(block.sentence for block in bad[:_MOST_LISTED])
    further = f"; and {len(bad) - _MOST_LISTED} blocks more" if len(bad) > _MOST_LISTED else ""
    first = bad[0]
    return BlockReadError(
        f"{n_rows:,} of {n_all:,} rows can be read, less than min_success_rate={min_share:g} of "
        f"them. {listed}{further}. Repair or replace what is stored there, or lower "
        f"min_success_rate.",
        first.array,
        first.block,
        first.chunk,
    )
