"""``Passes``: reductions over all rows, with counting, reporting, checks and the journal."""

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
OptionalSums = TypeVar("OptionalSums", bound=Sums | None)


@dataclass(frozen=True)
class RowsInUse:
    """Which rows the sums are computed over: all but those of skipped blocks."""

    skipped: dict[int, SkippedBlock]  # blocks that could not be read, by flat index
    moments: Moments | None  # sums of the data alone; None before the first pass


@dataclass(frozen=True)
class Reduced(Generic[OptionalSums]):
    """Result of a pass, or of sampling, which has no sums."""

    sums: OptionalSums
    rows: Rows | None = None
    blocks: BlockSums | None = None  # per block
    n_blocks: int = 0  # read
    skipped: dict[int, SkippedBlock] = field(default_factory=dict)  # not read by this pass


@dataclass(frozen=True)
class _PartialPass(Generic[S]):
    """Completed part of an interrupted pass."""

    seconds: float = 0.0  # elapsed time
    retries: int = 0  # of reading these parts
    # Level and position in the tree, and result.
    parts: list[tuple[int, int, PassResult[S]]] = field(default_factory=list)


class Passes:
    """Runs passes over the data set and counts them.

    A block that could not be read is left out from then on, if so many rows may be missing. Then
    sums from before are over other rows than those that follow, and must not be compared with them:
    ``n_skipped`` tells.

    Parameters
    ----------
    problem : FitProblem
        Defines the NaN policy, the required share of readable rows and the penalty.
    data : DataSet
    emit : callable
        Receives a ``PassFinished`` per pass.
    journal : Journal
    interruption : Interruption
        Can end a pass.

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
        """Count an event of reading, current or from before the fit was resumed."""
        if isinstance(event, PassFinished):
            self.counts += ReadCounts(1, event.rows, event.bytes, event.rows_cached, event.retries)
        elif isinstance(event, SampleRead):
            self.counts += ReadCounts(0, event.rows_read, event.bytes, 0, event.retries)

    def _report(self, event: PassFinished | SampleRead) -> None:
        self.count(event)
        self._emit(event)

    @property
    def rows_in_use(self) -> RowsInUse:
        """Set of rows of the next sums."""
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

    def sample(self, sample_rows: int, seed: int) -> tuple[Rows, int]:
        """Return a sample of rows from a few blocks, and the number of blocks.

        Blocks that cannot be read are replaced by others.

        Raises
        ------
        CheckpointError
            If the sample from before the fit was resumed differs from these data.
        """
        was_taken = any(isinstance(event, SampleRead) for event in self._journal.events)
        while True:
            skipped = frozenset(self.skipped)
            read = partial(self._read_sample, sample_rows, seed, skipped)
            sample = self._journal.step("sample", Reduced[None], read)
            if not self._skip(sample.skipped) and sample.rows is not None:
                break
        if was_taken:
            reread = self._data.sample(sample_rows, seed, skipped, self._watch)
            if reread.rows is not None and not reread.reading.errors:
                check_same(sample.rows, reread.rows)
        return sample.rows, sample.n_blocks

    def _read_sample(self, sample_rows: int, seed: int, skipped: frozenset[int]) -> Reduced[None]:
        sampled = self._data.sample(sample_rows, seed, skipped, self._watch)
        n_rows, read = 0 if sampled.rows is None else len(sampled.rows), sampled.reading
        self._report(
            SampleRead(n_rows, read.n_blocks, read.rows_read, read.bytes_read, read.n_retries)
        )
        return Reduced(
            None, sampled.rows, n_blocks=read.n_blocks, skipped=self._describe_skipped(read)
        )

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
            If it is fresh, the sums of the data alone are computed again.
        is_penalized : bool
        sample_rows, seed : int
            Number of rows to sample from all blocks, and the seed.
        """
        wants_moments = request.is_fresh or self._moments is None
        share = min(1.0, sample_rows / self.n_rows)
        pass_request = PassRequest(request, wants_moments, share, seed, frozenset(self.skipped))
        name = "pass"
        if self._journal.is_enabled:
            digest = hashlib.sha256(kernel.reduction.name.encode() + encode(pass_request))
            name = f"pass {digest.hexdigest()[:16]}"
        penalty = self._penalty if is_penalized else GroupVariance()
        kind: Any = Reduced
        reduced: Reduced[S] = self._journal.step(
            name,
            kind[kernel.reduction.sums_type],
            partial(self._run_pass, kernel, pass_request, penalty),
            saves=True,
        )
        self._skip(reduced.skipped)
        if wants_moments:
            self._moments = reduced.sums.moments
        elif self._moments is not None:
            return replace(reduced, sums=reduced.sums.with_moments(self._moments))
        return reduced

    def run_beside(
        self, kernel: Kernel[S], request: Request, known: Request, known_pass: Reduced[S]
    ) -> tuple[Reduced[S], Reduced[S]]:
        """Return the pass of a request, and that of a known one over the same rows.

        The latter is run again if blocks are skipped in the former.
        """
        while True:
            before = self.n_skipped
            new_pass = self.run(kernel, request)
            if self.n_skipped == before:
                return new_pass, known_pass
            known_pass = self.run(kernel, replace(known, is_fresh=True))

    def _run_pass(
        self, kernel: Kernel[S], request: PassRequest, penalty: GroupVariance
    ) -> Reduced[S]:
        """Run the pass, or the rest of an interrupted one."""
        self._interruption.check()
        kind: Any = _PartialPass
        partial_pass: _PartialPass[S] = (
            self._journal.load_state(kind[kernel.reduction.sums_type]) or _PartialPass()
        )
        started = time.perf_counter() - partial_pass.seconds
        result = self._reduce(kernel, request, started, partial_pass)
        read = result.reading
        skipped = self._describe_skipped(read)
        # Checked before it is recorded, because the block may be repaired and read later.
        self._check_share(skipped)
        assert result.sums is not None  # it is an error to leave out all rows
        assert result.blocks is not None
        n_rows = self.n_rows - sum(bad.rows for bad in skipped.values())  # not left out so far
        check_rows(result.sums, self._omits_nan, self._data, n_rows, result.first_bad_block)
        at = request.sums
        sums = result.sums.penalized(penalty, at.params, at.candidates, at.directions)
        number = self.counts.n_passes + 1
        blocks = result.blocks
        self._emit(BlocksMeasured(number, blocks.index, blocks.chi2, blocks.n_used, blocks.largest))
        self._report(
            PassFinished(
                number,
                at.params.copy(),
                sums.cost if sums.is_finite else np.inf,
                time.perf_counter() - started,
                read.rows_read,
                read.bytes_read,
                read.rows_cached,
                partial_pass.retries + read.n_retries,
            )
        )
        return Reduced(sums, result.rows, result.blocks, skipped=skipped)

    def _reduce(
        self,
        kernel: Kernel[S],
        request: PassRequest,
        started: float,
        partial_pass: _PartialPass[S],
    ) -> PassResult[S]:
        """Reduce all rows and save partial results from time to time."""
        latest: list[PartialResults] = []

        def save(parts: PartialResults) -> None:
            saving_since = time.monotonic()
            good = {  # others are read again
                node: result for node, result in parts.collect().items() if self._is_good(result)
            }
            retries = partial_pass.retries + sum(r.reading.n_retries for r in good.values())
            partials = [
                (*node, replace(result, reading=replace(result.reading, retries={})))
                for node, result in good.items()
            ]
            self._journal.save_state(_PartialPass(time.perf_counter() - started, retries, partials))
            self._journal.save(saving_since)

        def report(parts: PartialResults) -> None:
            done, total, seconds = parts.finished, parts.total, time.perf_counter() - started
            number, n_blocks, n_rows = self.counts.n_passes + 1, total.blocks, total.rows
            self._emit(
                BlocksFinished(
                    number, done.blocks, n_blocks, done.rows, n_rows, done.bytes, seconds
                )
            )

        def watch(parts: PartialResults) -> None:
            latest[:] = [parts]
            report(parts)
            self._interruption.check()
            if self._journal.is_due:
                save(parts)

        known = {(level, i): result for level, i, result in partial_pass.parts}
        try:
            return self._data.reduce(kernel, request, known, watch)
        except ClusterLostError:
            raise  # the results on the workers are lost
        except (Exception, KeyboardInterrupt):
            if latest and self._journal.is_saving:
                save(*latest)
            raise
        finally:
            for partial_results in latest:
                partial_results.release()

    def _is_good(self, result: PassResult[S]) -> bool:
        return (
            not result.reading.errors
            and result.sums is not None
            and not self.must_report(result.sums)
        )

    def must_report(self, sums: Sums) -> bool:
        """Whether sums over some of the rows show that the data are invalid."""
        return are_unusable(sums, self._omits_nan)

    def _watch(self, parts: PartialResults) -> None:
        self._interruption.check()

    def _describe_skipped(self, reading: ReadReport) -> dict[int, SkippedBlock]:
        """Return the unreadable blocks, described in terms of the caller's arrays."""
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
