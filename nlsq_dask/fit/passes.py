"""``Passes``: run passes over all rows; check, report and count them; save them in the journal."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
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
    SubsetFinished,
    WaitingForWorkers,
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
    """The rows that passes sum: which blocks are skipped, and the moments of y in the others."""

    skipped: dict[int, SkippedBlock]  # blocks that could not be read, by flat index
    moments: Moments | None  # sums of the data alone; None before the first pass


@dataclass(frozen=True)
class Reduced(Generic[OptionalSums]):
    """Result of a pass over all rows, or of reading a sample, for which ``sums`` is None."""

    sums: OptionalSums
    rows: Rows | None = None  # sample of the rows, if requested
    blocks: BlockSums | None = None  # statistics of the residuals of each block
    n_blocks: int = 0  # number of blocks that were read for a sample
    skipped: dict[int, SkippedBlock] = field(default_factory=dict)  # blocks that it could not read


@dataclass(frozen=True)
class Subset:
    """Blocks over which a fit sums before it sums over all rows."""

    number: int  # counted from 1
    n_subsets: int
    blocks: frozenset[int]  # flat indices


@dataclass(frozen=True)
class _PartialPass(Generic[S]):
    """Partial sums of an interrupted pass, as saved in a checkpoint."""

    seconds: float = 0.0  # elapsed time
    retries: int = 0  # of reads for ``parts``
    # Level and position in the tree of additions, and partial sums.
    parts: list[tuple[int, int, PassResult[S]]] = field(default_factory=list)


class Passes:
    """Runs passes over all rows and counts them.

    If ``min_success_rate`` allows it, a block that cannot be read is skipped by this pass and all
    later ones. Their sums must not be compared with those of earlier passes, which contain the
    block; callers notice by a change of ``n_skipped``.

    Parameters
    ----------
    problem : FitProblem
        Provides ``nan_policy``, ``min_success_rate`` and the penalty.
    data : DataSet
    emit : callable
        Called with a ``PassFinished`` event after each pass.
    journal : Journal
    interruption : Interruption
        Checked during a pass; it ends the pass by an exception.

    Attributes
    ----------
    counts : ReadCounts
    skipped : dict of int to SkippedBlock
        Blocks that could not be read, by their flat index.
    has_waited : bool
        Whether the fit has waited for workers.
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
        self._transform = problem.transform
        self._emit = emit
        self._min_share = problem.config.min_success_rate
        self._journal = journal
        self._interruption = interruption
        self.counts = ReadCounts()
        self.skipped: dict[int, SkippedBlock] = {}
        self._moments: Moments | None = None
        self.has_waited = False
        self._is_waiting = False  # whether the fit waits for workers, and has not saved since

    def open(self) -> None:
        """Send the data to the workers; wait while no worker runs tasks."""
        self._data.open(self._report_workers, self._check)

    def _report_workers(self, event: Event) -> None:
        self._emit(event)
        if isinstance(event, WaitingForWorkers):
            self.has_waited = self._is_waiting = True

    def _check(self) -> None:
        """Save a checkpoint if the fit waits for workers; raise if the fit must end."""
        if self._is_waiting:
            self._is_waiting = False
            self._journal.save()
        self._interruption.check()

    def count(self, event: Event) -> None:
        """Add the rows and bytes of an event to ``counts``.

        Events of an earlier process, before the fit was resumed, are counted as well.
        """
        if isinstance(event, PassFinished):
            self.counts += ReadCounts(1, event.rows, event.bytes, event.rows_cached, event.retries)
        elif isinstance(event, SubsetFinished):
            self.counts += ReadCounts(0, event.rows, event.bytes, event.rows_cached, event.retries)
        elif isinstance(event, SampleRead):
            self.counts += ReadCounts(0, event.rows_read, event.bytes, 0, event.retries)

    def _report(self, event: PassFinished | SubsetFinished | SampleRead) -> None:
        self.count(event)
        self._emit(event)

    @property
    def rows_in_use(self) -> RowsInUse:
        """Which rows the next pass sums."""
        return RowsInUse(self.skipped, self._moments)

    @rows_in_use.setter
    def rows_in_use(self, rows: RowsInUse) -> None:
        self.skipped, self._moments = dict(rows.skipped), rows.moments

    @property
    def n_skipped(self) -> int:
        """Number of skipped blocks."""
        return len(self.skipped)

    @property
    def n_rows(self) -> int:
        """Number of rows outside of skipped blocks."""
        return self._data.blocks.n_rows - sum(bad.rows for bad in self.skipped.values())

    def sample(self, sample_rows: int, seed: int) -> tuple[Rows, int]:
        """Return a sample of rows from a few blocks, and the number of blocks.

        Blocks that cannot be read are replaced by other blocks. When a fit is resumed, the sample
        of the checkpoint is returned.

        Raises
        ------
        CheckpointError
            If the data have changed since the checkpoint was written.
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
        is_last: bool = False,
    ) -> Reduced[S]:
        """Sum over all rows; when a fit is resumed, return the pass that the journal has saved.

        Parameters
        ----------
        kernel : Kernel
        request : Request
        is_penalized : bool
            Whether to add the penalty to the sums.
        sample_rows, seed : int
            Number of rows to return as a sample from all blocks, and the seed.
        is_last : bool
            Whether a further pass is unlikely.

        Raises
        ------
        DataError
            If the data are invalid, or too few blocks can be read.
        """
        wants_moments = request.is_fresh or self._moments is None
        share = min(1.0, sample_rows / self.n_rows)
        pass_request = PassRequest(
            request, wants_moments, share, seed, frozenset(self.skipped), is_last
        )
        penalty = self._penalty if is_penalized else GroupVariance()
        kind: Any = Reduced
        reduced: Reduced[S] = self._journal.step(
            self._name("pass", kernel, pass_request),
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

    def _name(self, kind: str, kernel: Kernel[S], request: PassRequest) -> str:
        """Return the name of a pass in the journal, which identifies what it computes."""
        if not self._journal.is_enabled:
            return kind
        digest = hashlib.sha256(kernel.reduction.name.encode() + encode(request))
        return f"{kind} {digest.hexdigest()[:16]}"

    def plan_subsets(self, sample_rows: int, seed: int) -> list[Subset]:
        """Return growing subsets of the blocks; see ``plan_subsets``.

        The arguments are those for which ``sample`` was called, whose blocks are among them.
        """
        subsets = self._data.subsets(sample_rows, seed, frozenset(self.skipped))
        return [Subset(i, len(subsets), blocks) for i, blocks in enumerate(subsets, start=1)]

    def run_on(
        self, subset: Subset, kernel: Kernel[S], request: Request, *, sample_rows: int, seed: int
    ) -> Reduced[S | None]:
        """Sum over the rows of some blocks, as ``run`` does over all.

        The sums are None if the rows are invalid or cannot be used, which a pass over all rows then
        reports.
        """
        skipped = frozenset(self.skipped)
        n_rows = self._data.rows_of(subset.blocks - skipped)
        share = min(1.0, sample_rows / max(n_rows, 1))
        pass_request = PassRequest(request, True, share, seed, skipped)
        kind: Any = Reduced
        reduced: Reduced[S | None] = self._journal.step(
            self._name(f"subset {subset.number}", kernel, pass_request),
            kind[kernel.reduction.sums_type | None],
            partial(self._run_subset, subset, kernel, pass_request),
            saves=True,
        )
        self._skip(reduced.skipped)
        return reduced

    def run_beside(
        self, kernel: Kernel[S], request: Request, known: Request, known_pass: Reduced[S]
    ) -> tuple[Reduced[S], Reduced[S]]:
        """Run a pass to compare with an earlier one; return the new and the earlier one.

        If blocks are skipped in the new pass, the earlier one is run again without these blocks.

        Parameters
        ----------
        kernel : Kernel
        request : Request
        known, known_pass : Request, Reduced
            Request and result of the earlier pass.
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
        """Run a pass, or what remains of it if a checkpoint has partial sums."""
        result, skipped, started, n_retries = self._sum_rows(kernel, request)
        read = result.reading
        assert result.sums is not None  # it is an error to leave out all rows
        assert result.blocks is not None
        n_rows = self.n_rows - sum(bad.rows for bad in skipped.values())  # not skipped so far
        check_rows(result.sums, self._omits_nan, self._data, n_rows, result.first_bad_block)
        at = request.sums
        sums = result.sums.penalized(penalty, at)
        number = self.counts.n_passes + 1
        blocks = result.blocks
        self._emit(BlocksMeasured(number, blocks.index, blocks.chi2, blocks.n_used, blocks.largest))
        self._report(
            PassFinished(
                number,
                self._transform.expand(at.params),
                sums.cost if sums.is_finite else np.inf,
                time.perf_counter() - started,
                read.rows_read,
                read.bytes_read,
                read.rows_cached,
                n_retries,
            )
        )
        return Reduced(sums, result.rows, result.blocks, skipped=skipped)

    def _run_subset(
        self, subset: Subset, kernel: Kernel[S], request: PassRequest
    ) -> Reduced[S | None]:
        """Sum over the blocks of a subset, or those that remain if a checkpoint has sums."""
        others = self._data.other_blocks(subset.blocks)
        of_subset = replace(request, skipped=request.skipped | others)
        result, skipped, started, n_retries = self._sum_rows(kernel, of_subset, subset.number)
        read, sums = result.reading, result.sums
        if sums is not None and (self.must_report(sums) or not sums.n_used):
            sums = None
        if sums is not None:
            sums = sums.penalized(self._penalty, request.sums)
        self._report(
            SubsetFinished(
                subset.number,
                subset.n_subsets,
                len(subset.blocks),
                self._transform.expand(request.sums.params),
                np.inf if sums is None or not sums.is_finite else sums.mean_square,
                time.perf_counter() - started,
                read.rows_read,
                read.bytes_read,
                read.rows_cached,
                n_retries,
            )
        )
        return Reduced(sums, result.rows, skipped=skipped)

    def _sum_rows(
        self, kernel: Kernel[S], request: PassRequest, subset: int = 0
    ) -> tuple[PassResult[S], dict[int, SkippedBlock], float, int]:
        """Compute the sums of a pass, or what remains of it if a checkpoint has partial sums.

        Returns
        -------
        result : PassResult
        skipped : dict of int to SkippedBlock
            Blocks that could not be read.
        started : float
            Time at which the pass began, less the time that it took before an interruption.
        n_retries : int
            Number of reads that were retried.
        """
        self._interruption.check()
        kind: Any = _PartialPass
        partial_pass: _PartialPass[S] = (
            self._journal.load_state(kind[kernel.reduction.sums_type]) or _PartialPass()
        )
        started = time.perf_counter() - partial_pass.seconds
        result = self._reduce(kernel, request, started, partial_pass, subset)
        skipped = self._describe_skipped(result.reading)
        # Checked before it is recorded, because the block may be repaired and read later.
        self._check_share(skipped)
        return result, skipped, started, partial_pass.retries + result.reading.n_retries

    def _reduce(
        self,
        kernel: Kernel[S],
        request: PassRequest,
        started: float,
        partial_pass: _PartialPass[S],
        subset: int,
    ) -> PassResult[S]:
        """Sum over the rows, and save partial sums in the checkpoint from time to time.

        Rows that ``partial_pass`` contains are not read again. ``started`` is the time at which the
        pass began, less the time that it took before an interruption.
        """
        latest: list[PartialResults] = []
        known = {(level, i): result for level, i, result in partial_pass.parts}
        saved = set(known)

        def save(parts: PartialResults) -> None:
            saving_since = time.monotonic()
            good = {  # others are read again
                node: result for node, result in parts.collect().items() if self._is_good(result)
            }
            if good.keys() != saved:
                saved.clear()
                saved.update(good)
                retries = partial_pass.retries + sum(r.reading.n_retries for r in good.values())
                partials = [
                    (*node, replace(result, reading=replace(result.reading, retries={})))
                    for node, result in good.items()
                ]
                seconds = time.perf_counter() - started
                self._journal.save_state(_PartialPass(seconds, retries, partials))
            self._journal.save(saving_since)

        def watch(parts: PartialResults) -> None:
            latest[:] = [parts]
            self._report_blocks(parts, time.perf_counter() - started, subset)
            self._interruption.check()
            self._journal.report()
            if self._journal.is_due or (self._is_waiting and self._journal.is_saving):
                self._is_waiting = False
                save(parts)

        try:
            return self._data.reduce(kernel, request, known, watch)
        except ClusterLostError:
            raise  # the results on the workers are lost
        except (Exception, KeyboardInterrupt):
            if latest and self._journal.is_saving:
                with suppress(Exception):  # of the cluster, for one; it may not hide the first
                    save(*latest)
            raise
        finally:
            for partial_results in latest:
                partial_results.release()

    def _report_blocks(self, parts: PartialResults, seconds: float, subset: int) -> None:
        done, total, number = parts.finished, parts.total, self.counts.n_passes + 1
        rows = done.rows, total.rows
        self._emit(
            BlocksFinished(number, done.blocks, total.blocks, *rows, done.bytes, seconds, subset)
        )

    def _is_good(self, result: PassResult[S]) -> bool:
        return (
            not result.reading.errors
            and result.sums is not None
            and not self.must_report(result.sums)
        )

    def must_report(self, sums: Sums) -> bool:
        """Return whether partial sums show that the data are invalid, so that the fit ends."""
        return are_unusable(sums, self._omits_nan)

    def _watch(self, parts: PartialResults) -> None:
        self._check()

    def _describe_skipped(self, reading: ReadReport) -> dict[int, SkippedBlock]:
        """Return a description of each unreadable block, by its flat index."""
        return {i: self._data.skipped_block(i, reading.errors[i]) for i in sorted(reading.errors)}

    def _check_share(self, new: dict[int, SkippedBlock]) -> None:
        bad = list((self.skipped | new).values())
        check_share(bad, self._data.blocks.n_rows, self._min_share)

    def _skip(self, new: dict[int, SkippedBlock]) -> bool:
        """Skip blocks from now on; return whether there are any.

        Raises
        ------
        BlockReadError
            If fewer rows remain than ``min_success_rate`` requires.
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
