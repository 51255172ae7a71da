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
from nlsq_dask.engine.block_sums import BlockSums
from nlsq_dask.engine.dataset import DataSet
from nlsq_dask.engine.execution import PartialResults
from nlsq_dask.engine.retries import ReadReport, SkippedBlock
from nlsq_dask.engine.tasks import PassRequest, PassResult
from nlsq_dask.errors import ClusterLostError
from nlsq_dask.events import (
    BlocksFinished,
    BlocksMeasured,
    BlocksSkipped,
    Event,
    Observer,
    PassFinished,
    SampleRead,
)
from nlsq_dask.fit.interruption import Interruption
from nlsq_dask.fit.outcome import ReadCounts
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.fit.row_checks import are_unusable, check_rows, check_same, check_share
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import Moments, Sums
from nlsq_dask.rows.rows import Rows
from nlsq_dask.storage.codec import encode

Vector = NDArray[np.float64]
S = TypeVar("S", bound=Sums)
Found = TypeVar("Found", bound=Sums | None)


@dataclass(frozen=True)
class RowsInUse:
    """The rows that sums are over."""

    skipped: dict[int, SkippedBlock]  # blocks that could not be read, by flat index
    moments: Moments | None  # sums of the data alone; None if there were none yet


@dataclass(frozen=True)
class Reduced(Generic[Found]):
    """What a pass found, or sampling, which has no sums."""

    sums: Found
    rows: Rows | None = None
    blocks: BlockSums | None = None  # of the residuals of each block
    n_blocks: int = 0  # read
    skipped: dict[int, SkippedBlock] = field(default_factory=dict)  # not read by this pass


@dataclass(frozen=True)
class _Cut(Generic[S]):
    """What was finished of a pass that was cut."""

    seconds: float = 0.0  # that it took
    retries: int = 0  # of reading these parts
    # Each with its level and position in the tree.
    parts: list[tuple[int, int, PassResult[S]]] = field(default_factory=list)


class Passes:
    """Reads the data set for a fit and keeps count of it.

    A block that could not be read is left out from then on, if so many rows may be missing. Then
    sums from before are over other rows than those that follow, and must not be compared with them:
    ``n_skipped`` tells.

    Parameters
    ----------
    problem : FitProblem
        Says what rows with NaN are, how many must be readable, and which penalty counts.
    data : DataSet
    emit : callable
        Receives a ``PassFinished`` a pass.
    journal : Journal
    interruption : Interruption
        May end a pass.

    Attributes
    ----------
    counts : ReadCounts
    skipped : dict of int to SkippedBlock
        Blocks that could not be read, by their flat index.
    """

    def __init__(
        self,
        problem: FitProblem,
        data: DataSet,
        emit: Observer,
        journal: Journal,
        interruption: Interruption,
    ) -> None:
        self._data = data
        self._omits_nan = problem.nan_policy == "omit"
        self._penalty = problem.penalty
        self._emit = emit
        self._min_share = problem.config.min_success_rate
        self._journal = journal
        self._interruption = interruption
        self.counts = ReadCounts()
        self.skipped: dict[int, SkippedBlock] = {}
        self._moments: Moments | None = None

    def count(self, event: Event) -> None:
        """Count what was read, now or before the fit was resumed."""
        if isinstance(event, PassFinished):
            self.counts += ReadCounts(1, event.rows, event.bytes, event.rows_cached, event.retries)
        elif isinstance(event, SampleRead):
            self.counts += ReadCounts(0, event.rows_read, event.bytes, 0, event.retries)

    def _report(self, event: PassFinished | SampleRead) -> None:
        self.count(event)
        self._emit(event)

    @property
    def rows_in_use(self) -> RowsInUse:
        """The rows that the next sums are over."""
        return RowsInUse(self.skipped, self._moments)

    @rows_in_use.setter
    def rows_in_use(self, rows: RowsInUse) -> None:
        self.skipped, self._moments = dict(rows.skipped), rows.moments

    @property
    def n_skipped(self) -> int:
        """Number of blocks left out; sums from before it grew are over other rows."""
        return len(self.skipped)

    @property
    def n_rows(self) -> int:
        """Number of rows, without those left out."""
        return self._data.blocks.n_rows - sum(bad.rows for bad in self.skipped.values())

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
            skipped = frozenset(self.skipped)
            read = partial(self._read_sample, wanted, seed, skipped)
            sample = self._journal.step("sample", Reduced[None], read)
            if not self._skip(sample.skipped) and sample.rows is not None:
                break
        if was_taken:
            again = self._data.sample(wanted, seed, skipped, self._watch)
            if again.rows is not None and not again.reading.errors:
                check_same(sample.rows, again.rows)
        return sample.rows, sample.n_blocks

    def _read_sample(self, wanted: int, seed: int, skipped: frozenset[int]) -> Reduced[None]:
        found = self._data.sample(wanted, seed, skipped, self._watch)
        n_rows, read = 0 if found.rows is None else len(found.rows), found.reading
        self._report(
            SampleRead(n_rows, read.n_blocks, read.rows_read, read.bytes_read, read.n_retries)
        )
        return Reduced(None, found.rows, n_blocks=read.n_blocks, skipped=self._named(read))

    def run(
        self,
        kernel: Kernel[S],
        request: Request,
        *,
        is_penalized: bool = True,
        sample_rows: int = 0,
        seed: int = 0,
    ) -> Reduced[S]:
        """Sum over all rows, or return what the journal has of that; DataError if they are useless.

        Where ``n_skipped`` has grown, blocks had to be left out that are in the sums of earlier
        passes.

        Parameters
        ----------
        kernel : Kernel
        request : Request
            If it is fresh, what depends on the data alone is summed again.
        is_penalized : bool
        sample_rows, seed : int
            Rows to bring back, from all blocks.
        """
        wants_moments = request.is_fresh or self._moments is None
        share = min(1.0, sample_rows / self.n_rows)
        wanted = PassRequest(request, wants_moments, share, seed, frozenset(self.skipped))
        name = "pass"
        if self._journal.is_enabled:
            what = hashlib.sha256(kernel.reduction.name.encode() + encode(wanted))
            name = f"pass {what.hexdigest()[:16]}"
        penalty = self._penalty if is_penalized else GroupVariance()
        kind: Any = Reduced
        found: Reduced[S] = self._journal.step(
            name,
            kind[kernel.reduction.sums_type],
            partial(self._make, kernel, wanted, penalty),
            saves=True,
        )
        self._skip(found.skipped)
        if wants_moments:
            self._moments = found.sums.moments
        elif self._moments is not None:
            return replace(found, sums=found.sums.with_moments(self._moments))
        return found

    def run_beside(
        self, kernel: Kernel[S], params: Vector, point: Vector, there: Reduced[S]
    ) -> tuple[Reduced[S], Reduced[S]]:
        """Return the pass at ``params``, and that at a known point over the same rows.

        The latter is run again if blocks had to be left out of the former.
        """
        while True:
            before = self.n_skipped
            found = self.run(kernel, Request(params))
            if self.n_skipped == before:
                return found, there
            there = self.run(kernel, Request(point, is_fresh=True))

    def _make(self, kernel: Kernel[S], request: PassRequest, penalty: GroupVariance) -> Reduced[S]:
        """Run the pass, from where it was cut."""
        self._interruption.check()
        kind: Any = _Cut
        cut: _Cut[S] = self._journal.load_state(kind[kernel.reduction.sums_type]) or _Cut()
        began = time.perf_counter() - cut.seconds
        result = self._reduce(kernel, request, began, cut)
        read = result.reading
        skipped = self._named(read)
        # Before it is remembered: it may be repaired, and then read again.
        self._check_share(skipped)
        assert result.sums is not None  # it is an error to leave out all rows
        assert result.blocks is not None
        n_rows = self.n_rows - sum(bad.rows for bad in skipped.values())  # not left out so far
        check_rows(result.sums, self._omits_nan, self._data, n_rows, result.first_bad_block)
        asked = request.sums
        sums = result.sums.penalized(penalty, asked.params, asked.candidates, asked.directions)
        number = self.counts.n_passes + 1
        of = result.blocks
        self._emit(BlocksMeasured(number, of.index, of.chi2, of.n_used, of.largest))
        self._report(
            PassFinished(
                number,
                asked.params.copy(),
                sums.cost if sums.is_finite else np.inf,
                time.perf_counter() - began,
                read.rows_read,
                read.bytes_read,
                read.rows_cached,
                cut.retries + read.n_retries,
            )
        )
        return Reduced(sums, result.rows, result.blocks, skipped=skipped)

    def _reduce(
        self,
        kernel: Kernel[S],
        request: PassRequest,
        began: float,
        cut: _Cut[S],
    ) -> PassResult[S]:
        """Reduce, and keep what is finished from time to time."""
        latest: list[PartialResults] = []

        def keep(parts: PartialResults) -> None:
            began_to_keep = time.monotonic()
            good = {  # the others are read again
                node: part for node, part in parts.collect().items() if self._is_good(part)
            }
            retries = cut.retries + sum(part.reading.n_retries for part in good.values())
            found = [
                (*node, replace(part, reading=replace(part.reading, retries={})))
                for node, part in good.items()
            ]
            self._journal.save_state(_Cut(time.perf_counter() - began, retries, found))
            self._journal.save(began_to_keep)

        def tell(parts: PartialResults) -> None:
            done, all_of_it, seconds = parts.finished, parts.total, time.perf_counter() - began
            number, n_blocks, n_rows = self.counts.n_passes + 1, all_of_it.blocks, all_of_it.rows
            self._emit(
                BlocksFinished(
                    number, done.blocks, n_blocks, done.rows, n_rows, done.bytes, seconds
                )
            )

        def watch(parts: PartialResults) -> None:
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
        return not part.reading.errors and part.sums is not None and not self.must_report(part.sums)

    def must_report(self, sums: Sums) -> bool:
        """Whether sums over a part of the rows show that the data cannot be used as they are."""
        return are_unusable(sums, self._omits_nan)

    def _watch(self, parts: PartialResults) -> None:
        self._interruption.check()

    def _named(self, reading: ReadReport) -> dict[int, SkippedBlock]:
        """Return what could not be read, in the caller's terms."""
        return {i: self._data.skipped_block(i, reading.errors[i]) for i in sorted(reading.errors)}

    def _check_share(self, new: dict[int, SkippedBlock]) -> None:
        bad = list((self.skipped | new).values())
        check_share(bad, self._data.blocks.n_rows, self._min_share)

    def _skip(self, new: dict[int, SkippedBlock]) -> bool:
        """Take note of what could not be read; return whether it is more than before.

        Raises
        ------
        BlockReadError
            If too few rows are left.
        """
        if not new:
            return False
        self._check_share(new)
        self.skipped |= new
        self._moments = None
        missing = self._data.blocks.n_rows - self.n_rows
        event = BlocksSkipped(tuple(bad.sentence for bad in new.values()), missing)
        self._journal.run_once("blocks skipped", partial(self._emit, event))
        return True
