"""``Passes``: reductions over all rows, counted, reported, checked and kept in the journal."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.engine.dataset import DataSet
from nlsq_dask.engine.execution import Parts
from nlsq_dask.engine.retries import BadBlock, ReadReport
from nlsq_dask.engine.tasks import PassRequest, PassResult
from nlsq_dask.errors import ClusterLostError, RowsChangedError
from nlsq_dask.events import (
    BlocksFinished,
    BlocksLeftOut,
    BlocksMeasured,
    Event,
    Observer,
    PassFinished,
    SampleRead,
)
from nlsq_dask.fit.interruption import Interruption
from nlsq_dask.fit.row_checks import are_unusable, check_rows, check_same, check_share
from nlsq_dask.kernels.dense_kernel import NormalEquationsKernel
from nlsq_dask.kernels.kernel import RowKernel
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.kernels.sums import Moments, Sums
from nlsq_dask.rows.rows import Rows
from nlsq_dask.storage.codec import encode

S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class RowsInUse:
    """The rows that sums are over.

    Attributes
    ----------
    left_out : dict of int to BadBlock
        Blocks that could not be read, by their flat index.
    moments : tuple of float, or None
        Sums over these rows that depend on the data alone; None if there were none yet.
    """

    left_out: dict[int, BadBlock]
    moments: Moments | None


@dataclass(frozen=True)
class _Sample:
    """What sampling has found: rows if there are any, and blocks that could not be read."""

    rows: Rows | None
    n_blocks: int
    lost: dict[int, BadBlock]


@dataclass(frozen=True)
class _Pass(Generic[S]):
    """What a pass has found: sums, perhaps rows, and blocks that could not be read."""

    sums: S
    rows: Rows | None
    lost: dict[int, BadBlock]


@dataclass(frozen=True)
class _Cut(Generic[S]):
    """What was finished of a pass that was cut.

    Attributes
    ----------
    seconds : float
        That it took.
    retries : int
        How often reading these parts was tried again.
    parts : list of (int, int, PassResult)
        Each with its level and position in the tree.
    """

    seconds: float = 0.0
    retries: int = 0
    parts: list[tuple[int, int, PassResult[S]]] = field(default_factory=list)


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
    journal : Journal
    interruption : Interruption
        May end a pass.

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
        min_share: float,
        journal: Journal,
        interruption: Interruption,
    ) -> None:
        self._data = data
        self._omits_nan = omits_nan
        self._penalty = penalty
        self._emit = emit
        self._min_share = min_share
        self._journal = journal
        self._interruption = interruption
        self.n_passes = 0
        self.rows_read = 0
        self.bytes_read = 0
        self.rows_cached = 0
        self.n_retries = 0
        self.left_out: dict[int, BadBlock] = {}
        self._moments: Moments | None = None

    def count(self, event: Event) -> None:
        """Count what was read, now or before the fit was resumed."""
        if isinstance(event, PassFinished):
            self.n_passes += 1
            self.rows_cached += event.rows_cached
            self.rows_read += event.rows
            self.bytes_read += event.bytes
            self.n_retries += event.retries
        elif isinstance(event, SampleRead):
            self.rows_read += event.rows_read
            self.bytes_read += event.bytes
            self.n_retries += event.retries

    def _report(self, event: PassFinished | SampleRead) -> None:
        self.count(event)
        self._emit(event)

    @property
    def rows_in_use(self) -> RowsInUse:
        """The rows that the next sums are over."""
        return RowsInUse(self.left_out, self._moments)

    @rows_in_use.setter
    def rows_in_use(self, rows: RowsInUse) -> None:
        self.left_out, self._moments = dict(rows.left_out), rows.moments

    @property
    def n_rows(self) -> int:
        """Number of rows, without those left out."""
        return self._data.blocks.n_rows - sum(bad.rows for bad in self.left_out.values())

    def sample(self, wanted: int, seed: int) -> tuple[Rows, int]:
        """Read a few blocks and take rows from each; return them, and of how many blocks.

        Where a block cannot be read, others are read as if it were not there.

        Raises
        ------
        CheckpointError
            If the sample that was taken before the fit was resumed is not of these data.
        """
        was_taken = any(isinstance(event, SampleRead) for event in self._journal.events)
        while True:
            left_out = frozenset(self.left_out)
            make = partial(self._make_sample, wanted, seed, left_out)
            sample = self._journal.step("sample", _Sample, make)
            if not self._leave_out(sample.lost) and sample.rows is not None:
                break
        if was_taken:
            again = self._data.sample(wanted, seed, left_out, self._watch)
            if again.rows is not None and not again.reading.lost:
                check_same(sample.rows, again.rows)
        return sample.rows, sample.n_blocks

    def _make_sample(self, wanted: int, seed: int, left_out: frozenset[int]) -> _Sample:
        read = self._data.sample(wanted, seed, left_out, self._watch)
        n_rows = 0 if read.rows is None else len(read.rows)
        retries = read.reading.n_retries
        self._report(SampleRead(n_rows, read.n_blocks, read.rows_read, read.bytes_read, retries))
        return _Sample(read.rows, read.n_blocks, self._named(read.reading))

    def first(
        self, kernel: RowKernel[S], params: NDArray[np.float64], sample_rows: int, seed: int
    ) -> tuple[S, Rows | None]:
        """Sum over all rows as ``reduce_anew`` does, and bring back rows from all blocks."""
        share = min(1.0, sample_rows / self.n_rows)
        sums, rows, _ = self._run(kernel, self._penalty, params, sample_share=share, seed=seed)
        self._moments = sums.moments
        return sums, rows

    def reduce_anew(self, kernel: RowKernel[S], params: NDArray[np.float64]) -> S:
        """Sum over all rows as ``reduce`` does, for sums that are compared with none from before.

        Blocks may be left out in this pass.
        """
        sums, _, _ = self._run(kernel, self._penalty, params)
        self._moments = sums.moments
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
            is_first=self._moments is None,
        )
        if has_changed:
            raise RowsChangedError
        if self._moments is None:
            self._moments = sums.moments
        return sums.with_moments(self._moments)

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
        """Return sums, rows, and whether blocks were left out that were not before.

        They come from the journal if they are there.
        """
        request = PassRequest(params, left_out=frozenset(self.left_out), **wanted)
        name = "pass"
        if self._journal.is_kept:
            what = hashlib.sha256(kernel.makes.encode() + encode(request))
            name = f"pass {what.hexdigest()[:16]}"
        kind: Any = _Pass
        found: _Pass[S] = self._journal.step(
            name,
            kind[kernel.sums_type],
            partial(self._make, kernel, request, penalty),
            saves=True,
        )
        has_changed = self._leave_out(found.lost)
        return found.sums, found.rows, has_changed

    def _make(self, kernel: RowKernel[S], request: PassRequest, penalty: GroupVariance) -> _Pass[S]:
        """Run the pass, from where it was cut."""
        self._interruption.check()
        kind: Any = _Cut
        cut: _Cut[S] = self._journal.noted(kind[kernel.sums_type]) or _Cut()
        began = time.perf_counter() - cut.seconds
        result = self._reduce(kernel, request, began, cut)
        lost = self._named(result.reading)
        # Before it is remembered: it may be repaired, and then read again.
        self._check_share(lost)
        assert result.sums is not None  # it is an error to leave out all rows
        n_rows = self.n_rows - sum(bad.rows for bad in lost.values())  # not left out so far
        check_rows(result.sums, self._omits_nan, self._data, n_rows)
        sums = result.sums.penalized(
            penalty, request.params, request.candidates, request.directions
        )
        if (of := sums.blocks) is not None:
            number = self.n_passes + 1
            self._emit(BlocksMeasured(number, of.index, of.chi2, of.n_used, of.largest))
        self._report(
            PassFinished(
                self.n_passes + 1,
                request.params.copy(),
                sums.cost if sums.is_finite else np.inf,
                time.perf_counter() - began,
                sums.rows_read,
                sums.bytes_read,
                sums.rows_cached,
                cut.retries + result.reading.n_retries,
            )
        )
        return _Pass(sums, result.sample, lost)

    def _reduce(
        self,
        kernel: RowKernel[S],
        request: PassRequest,
        began: float,
        cut: _Cut[S],
    ) -> PassResult[S]:
        """Reduce, and keep what is finished from time to time."""
        latest: list[Parts] = []

        def keep(parts: Parts) -> None:
            began_to_keep = time.monotonic()
            good = {  # the others are read again
                node: part for node, part in parts.collect().items() if self._is_good(part)
            }
            retries = cut.retries + sum(part.reading.n_retries for part in good.values())
            found = [(*node, replace(part, reading=ReadReport())) for node, part in good.items()]
            self._journal.note(_Cut(time.perf_counter() - began, retries, found))
            self._journal.save(began_to_keep)

        def tell(parts: Parts) -> None:
            done, all_of_it, seconds = parts.finished, parts.total, time.perf_counter() - began
            number, n_blocks, n_rows = self.n_passes + 1, all_of_it.blocks, all_of_it.rows
            self._emit(
                BlocksFinished(
                    number, done.blocks, n_blocks, done.rows, n_rows, done.bytes, seconds
                )
            )

        def watch(parts: Parts) -> None:
            latest[:] = [parts]
            tell(parts)
            self._interruption.check()
            if self._journal.is_due:
                keep(parts)

        known = {(level, i): part for level, i, part in cut.parts}
        try:
            return self._data.reduce(kernel, request, known, watch)
        except ClusterLostError:
            raise  # what the workers held is lost
        except (Exception, KeyboardInterrupt):
            if latest and self._journal.is_saving:
                keep(*latest)
            raise
        finally:
            for parts_left in latest:
                parts_left.release()

    def _is_good(self, part: PassResult[S]) -> bool:
        return not part.reading.lost and part.sums is not None and not self.must_report(part.sums)

    def must_report(self, sums: Sums) -> bool:
        """Whether sums over a part of the rows show that the data cannot be used as they are."""
        return are_unusable(sums, self._omits_nan)

    def _watch(self, parts: Parts) -> None:
        self._interruption.check()

    def _named(self, reading: ReadReport) -> dict[int, BadBlock]:
        """Return what could not be read, in the caller's terms."""
        return {i: self._data.bad_block(i, reading.lost[i]) for i in sorted(reading.lost)}

    def _check_share(self, new: dict[int, BadBlock]) -> None:
        bad = list((self.left_out | new).values())
        check_share(bad, self._data.blocks.n_rows, self._min_share)

    def _leave_out(self, new: dict[int, BadBlock]) -> bool:
        """Take note of what could not be read; return whether it is more than before.

        Raises
        ------
        BlockReadError
            If too few rows are left.
        """
        if not new:
            return False
        self._check_share(new)
        self.left_out |= new
        self._moments = None
        missing = self._data.blocks.n_rows - self.n_rows
        event = BlocksLeftOut(tuple(bad.sentence for bad in new.values()), missing)
        self._journal.once("leaving out", partial(self._emit, event))
        return True
