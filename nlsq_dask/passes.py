"""``Passes``: reductions over all rows, counted, reported and checked."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.kernel import RowKernel
from nlsq_dask.core.normal_equations import NormalEquationsKernel
from nlsq_dask.core.penalty import GroupVariance
from nlsq_dask.core.sums import Sums
from nlsq_dask.engine.reduce import DataSet, PassRequest, PassResult, Sample
from nlsq_dask.errors import DataError, NonFiniteDataError
from nlsq_dask.events import Observer, PassFinished

S = TypeVar("S", bound=Sums)


class Passes:
    """Reads the data set for a fit and keeps count of it.

    Parameters
    ----------
    data : DataSet
    omits_nan : bool
        Whether rows with NaN or infinity are left out; if not, they are an error.
    penalty : GroupVariance
        Added to the sums.
    emit : callable
        Receives a ``PassFinished`` a pass.

    Attributes
    ----------
    n_passes, rows_read, bytes_read, rows_cached : int
    """

    def __init__(
        self, data: DataSet, omits_nan: bool, penalty: GroupVariance, emit: Observer
    ) -> None:
        self._data = data
        self._omits_nan = omits_nan
        self._penalty = penalty
        self._emit = emit
        self.n_passes = 0
        self.rows_read = 0
        self.bytes_read = 0
        self.rows_cached = 0
        self._first: Sums | None = None

    def sample(self, rows: int, seed: int) -> Sample:
        """Read a few blocks and take rows from each."""
        sample = self._data.sample(rows, seed)
        self.rows_read += sample.rows_read
        self.bytes_read += sample.bytes_read
        return sample

    def first(
        self, kernel: RowKernel[S], params: NDArray[np.float64], sample_rows: int, seed: int
    ) -> PassResult[S]:
        """Sum over all rows as ``reduce`` does, and bring back rows from all blocks."""
        share = min(1.0, sample_rows / self._data.blocks.n_rows)
        request = PassRequest(params, sample_share=share, seed=seed)
        result = self._run(kernel, request, self._penalty)
        self._first = result.sums
        return result

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
        """
        request = PassRequest(params, candidates, directions, is_first=self._first is None)
        sums = self._run(kernel, request, self._penalty).sums
        if self._first is None:
            self._first = sums
        return sums.with_moments_of(self._first)

    def scores(
        self, kernel: NormalEquationsKernel, params: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return a root of ``sum r^2 J^T J`` over all rows, shape (p, p), with no penalty in it."""
        request = PassRequest(params, is_first=False)
        triangle = self._run(kernel, request, GroupVariance()).sums.triangle
        assert triangle is not None
        return triangle[:, : len(params)]

    def _run(
        self, kernel: RowKernel[S], request: PassRequest, penalty: GroupVariance
    ) -> PassResult[S]:
        began = time.perf_counter()
        result = self._data.reduce(kernel, request)
        sums = result.sums.penalized(
            penalty, request.params, request.candidates, request.directions
        )
        self.n_passes += 1
        self.rows_read += sums.rows_read
        self.bytes_read += sums.bytes_read
        self.rows_cached += sums.rows_cached
        self._emit(
            PassFinished(
                self.n_passes,
                request.params.copy(),
                sums.cost if sums.is_finite else np.inf,
                time.perf_counter() - began,
                sums.rows_read,
                sums.bytes_read,
                sums.rows_cached,
            )
        )
        self._check(sums)
        return replace(result, sums=sums)

    def must_report(self, sums: Sums) -> bool:
        """Whether sums over a part of the rows show that the data cannot be used as they are."""
        return bool(sums.n_bad_sigma or (sums.n_bad and not self._omits_nan))

    def _check(self, sums: Sums) -> None:
        n_rows, grid = self._data.blocks.n_rows, self._data.blocks.grid
        if sums.n_bad_sigma:
            raise DataError(
                f"sigma is zero or negative at {sums.n_bad_sigma:,} of {n_rows:,} rows; it must be "
                f"positive. To leave rows out, set their y_data to NaN and use nan_policy='omit'."
            )
        if sums.n_bad and not self._omits_nan:
            block = tuple(map(int, np.unravel_index(sums.first_bad_block, grid)))
            raise NonFiniteDataError(
                f"{sums.n_bad:,} of {n_rows:,} rows hold NaN or infinity in y_data, x_data or "
                f"sigma; the first of them is in block {block} of the grid {grid}. Use "
                f"nan_policy='omit' to leave such rows out.",
                sums.n_bad,
                block,
            )
        if not sums.n_used:
            raise DataError(f"none of the {n_rows:,} rows can be used: all are masked or NaN.")
