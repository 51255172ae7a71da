"""``Passes``: reductions over all rows, counted, reported, checked and kept in the journal."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.checkpoints.codec import encode
from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.core.kernel import RowKernel
from nlsq_dask.core.normal_equations import NormalEquationsKernel
from nlsq_dask.core.penalty import GroupVariance
from nlsq_dask.core.sums import Sums
from nlsq_dask.engine.parts import Parts
from nlsq_dask.engine.reduce import DataSet, PassRequest, PassResult, Sample
from nlsq_dask.errors import CheckpointError, ClusterLostError, DataError, NonFiniteDataError
from nlsq_dask.events import Event, Observer, PassFinished, SampleRead
from nlsq_dask.interruption import Interruption

S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class _Cut(Generic[S]):
    """What was finished of a pass that was cut.

    Attributes
    ----------
    seconds : float
        That it took.
    parts : list of (int, int, PassResult)
        Each with its level and position in the tree.
    """

    seconds: float
    parts: list[tuple[int, int, PassResult[S]]]


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
    journal : Journal
    interruption : Interruption
        May end a pass.

    Attributes
    ----------
    n_passes, rows_read, bytes_read, rows_cached : int
    """

    def __init__(
        self,
        data: DataSet,
        omits_nan: bool,
        penalty: GroupVariance,
        emit: Observer,
        journal: Journal,
        interruption: Interruption,
    ) -> None:
        self._data = data
        self._omits_nan = omits_nan
        self._penalty = penalty
        self._emit = emit
        self._journal = journal
        self._interruption = interruption
        self.n_passes = 0
        self.rows_read = 0
        self.bytes_read = 0
        self.rows_cached = 0
        self._first: Sums | None = None

    def count(self, event: Event) -> None:
        """Count what was read, now or before the fit was resumed."""
        if isinstance(event, PassFinished):
            self.n_passes += 1
            self.rows_cached += event.rows_cached
            self.rows_read += event.rows
            self.bytes_read += event.bytes
        elif isinstance(event, SampleRead):
            self.rows_read += event.rows_read
            self.bytes_read += event.bytes

    def sample(self, rows: int, seed: int) -> Sample:
        """Read a few blocks and take rows from each.

        Raises
        ------
        CheckpointError
            If the sample that was taken before the fit was resumed is not of these data.
        """

        def make() -> Sample:
            sample = self._data.sample(rows, seed)
            self._report(
                SampleRead(len(sample.rows), sample.n_blocks, sample.rows_read, sample.bytes_read)
            )
            return sample

        sample = self._journal.step("sample", Sample, make)
        if any(isinstance(event, SampleRead) for event in self._journal.events):
            self._compare(sample, self._data.sample(rows, seed, n_blocks=1))
        return sample

    def _compare(self, sample: Sample, again: Sample) -> None:
        """Raise a CheckpointError if rows of the first block are not what they were."""
        before = sample.rows.take(slice(0, len(again.rows)))
        for one, other in zip(before.arrays, again.rows.arrays, strict=True):
            if one is not None and other is not None and one.tobytes() != other.tobytes():
                raise CheckpointError(
                    "the checkpoint is of other data: some rows were read again, and their values "
                    "are not what they were. Fit again without resume_from_checkpoint."
                )

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
        """Return what the pass brings, with the penalty; from the journal if it is there."""
        kind: Any = PassResult
        what = hashlib.sha256(kernel.makes.encode() + encode(request)).hexdigest()[:16]
        result: PassResult[S] = self._journal.step(
            f"pass {what}",
            kind[kernel.sums_type],
            partial(self._make, kernel, request, penalty),
            saves=True,
        )
        self._check(result.sums)
        return result

    def _make(
        self, kernel: RowKernel[S], request: PassRequest, penalty: GroupVariance
    ) -> PassResult[S]:
        """Run the pass, from where it was cut."""
        self._interruption.check()
        kind: Any = _Cut
        cut: _Cut[S] | None = self._journal.noted(kind[kernel.sums_type])
        began = time.perf_counter() - (0.0 if cut is None else cut.seconds)
        latest: list[Parts] = []

        def keep(parts: Parts) -> None:
            found = [(*node, result) for node, result in parts.collect().items()]
            self._journal.note(_Cut(time.perf_counter() - began, found))
            self._journal.save()

        def watch(parts: Parts) -> None:
            latest[:] = [parts]
            self._interruption.check()
            if self._journal.is_due:
                keep(parts)

        known = {} if cut is None else {(level, i): part for level, i, part in cut.parts}
        try:
            result = self._data.reduce(
                kernel, request, known, watch, self._interruption.seconds_left
            )
        except ClusterLostError:
            raise  # what the workers held is lost
        except (Exception, KeyboardInterrupt):
            if latest and self._journal.is_saving:
                keep(*latest)
            raise
        sums = result.sums.penalized(
            penalty, request.params, request.candidates, request.directions
        )
        self._report(
            PassFinished(
                self.n_passes + 1,
                request.params.copy(),
                sums.cost if sums.is_finite else np.inf,
                time.perf_counter() - began,
                sums.rows_read,
                sums.bytes_read,
                sums.rows_cached,
            )
        )
        return replace(result, sums=sums)

    def _report(self, event: PassFinished | SampleRead) -> None:
        self.count(event)
        self._emit(event)

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
