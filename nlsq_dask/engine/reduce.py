"""``DataSet``: the two things that are ever done with the rows, reducing them and sampling them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count, zip_longest
from typing import Any, Generic, TypeVar

import numpy as np
from dask._task_spec import TaskRef
from distributed import KilledWorker
from distributed.client import FutureCancelledError, FuturesCancelledError
from numpy.typing import NDArray

from nlsq_dask.core.kernel import RowKernel
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.sums import Sums
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.block import Block
from nlsq_dask.data.sampling import SamplePlan, plan_sample, thin_out
from nlsq_dask.engine.faults import BadBlock, Fault, ReadFailedError, ReadPolicy, ReadReport
from nlsq_dask.engine.group import CacheBudget, Group, Kept, ReadAhead
from nlsq_dask.engine.memory import MemoryPlan
from nlsq_dask.engine.parts import Parts, Watch, WorkersReplacedError, run_tree
from nlsq_dask.engine.scheduling import Node, TaskGraph, Tree, group_blocks, hold, send_once
from nlsq_dask.engine.source_graph import GroupReader, Index, ReadBlock, SourceGraph
from nlsq_dask.engine.workers import Workers
from nlsq_dask.errors import BlockReadError, ClusterLostError

_MOST_ATTEMPTS = 4  # of a pass whose workers or data on them were lost


@dataclass(frozen=True)
class Sample:
    """Rows taken from a few blocks, and what it took to read them.

    Attributes
    ----------
    rows : Rows or None
        None if no block could be read.
    rows_read, bytes_read : int
    n_blocks : int
    reading : ReadReport
    """

    rows: Rows | None
    rows_read: int
    bytes_read: int
    n_blocks: int
    reading: ReadReport


@dataclass(frozen=True)
class PassRequest:
    """What is wanted of a pass.

    Attributes
    ----------
    params : ndarray, shape (p,)
        Where the sums are wanted.
    candidates : ndarray, shape (k, p), or None
        Where the cost alone is wanted.
    directions : ndarray, shape (k, p), or None
        Where products are wanted, of a kernel that makes them.
    is_first : bool
        Whether to sum what depends on the data alone.
    sample_share : float
        Share of the rows to bring back, taken evenly from all blocks.
    seed : int
    left_out : frozenset of int
        Flat indices of blocks that are not wanted.
    """

    params: NDArray[np.float64]
    candidates: NDArray[np.float64] | None = None
    directions: NDArray[np.float64] | None = None
    is_first: bool = True
    sample_share: float = 0.0
    seed: int = 0
    left_out: frozenset[int] = frozenset()


S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class PassResult(Generic[S]):
    """What a pass, or a part of one, brings back.

    Attributes
    ----------
    sums : Sums or None
        None if no block could be read.
    sample : Rows or None
    reading : ReadReport
    """

    sums: S | None
    sample: Rows | None
    reading: ReadReport


class DataSet:
    """Row blocks, ready to be reduced and sampled on the active Dask scheduler.

    The graph is analysed once; a pass adds little more than its names and the parameters.

    It holds its groups on the workers until it is closed.

    Parameters
    ----------
    blocks : RowBlocks
    cache : int or "auto"
        Bytes of blocks that may stay in the workers' memory between passes.
    policy : ReadPolicy, optional
        What happens where reading fails.

    Raises
    ------
    DataError
        If a block is too large for the memory of a worker.
    """

    def __init__(
        self, blocks: RowBlocks, cache: int | str, policy: ReadPolicy | None = None
    ) -> None:
        self.blocks = blocks
        self._block_rows = blocks.block_rows()
        self._workers = Workers.active()
        groups = group_blocks(self._block_rows)
        self.memory = MemoryPlan.of(blocks, groups, self._workers, cache)
        self.memory.check()
        self._source = SourceGraph(blocks, policy)
        self._literals = self._source.large_literals
        self._block_groups = groups
        self._budget = CacheBudget(uuid.uuid4().hex, self.memory.cache_bytes)
        self._place()
        self._read_ahead: ReadAhead | None = None
        if self._workers.shares_memory and not blocks.in_memory:
            self._read_ahead = ReadAhead(self._workers.most_threads)
        self._kernel: tuple[RowKernel[Any], Any] | None = None

    def _place(self) -> None:
        """Put groups, and arrays that are in memory, on the workers."""
        self._source.replace(send_once(self._literals, self._workers.client))
        readers, self._shared = self._source.readers(self._block_groups)
        self._inputs = [reader.inputs for reader in readers]
        self._members = [{index for index, *_ in reader.blocks} for reader in readers]
        held = [
            Group(reader, n_bytes, self._budget, self.memory.all_fits)
            for reader, n_bytes in zip(readers, self.memory.group_bytes, strict=True)
        ]
        self._groups = hold("group", held, self._workers)

    def close(self) -> None:
        """Let go of what is held on the workers."""
        if self._read_ahead is not None:
            self._read_ahead.close()
        self._groups, self._kernel, self._shared = [], None, {}
        del self._source

    @property
    def longest_block(self) -> int:
        """Rows of the largest block."""
        return int(self._block_rows.max())

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platforms of the processes that will run kernels."""
        return self._workers.platforms()

    def reduce(
        self,
        kernel: RowKernel[S],
        request: PassRequest,
        known: Mapping[Node, PassResult[S]] | None = None,
        watch: Watch = lambda parts: None,
    ) -> PassResult[S]:
        """Sum over all rows but those of blocks left out: one pass.

        Parameters
        ----------
        kernel : RowKernel
        request : PassRequest
        known : mapping of Node to PassResult, optional
            Finished parts of an earlier pass with the same kernel and request.
        watch : callable, optional
            Called with the ``Parts`` at the start and whenever one has finished; may raise to end
            the pass.

        Raises
        ------
        BlockReadError
            If a block cannot be read, and the policy does not let it be left out.
        ClusterLostError
            If the scheduler is lost, or workers again and again.
        """
        parts = Parts(self._sizes(request), dict(known or {}))
        watch(parts)
        for attempt in count(1):
            try:
                tree = self._tree(kernel, request, parts.values)
                result: PassResult[S] = run_tree(tree, self._workers, parts, watch)
                break
            except ReadFailedError as failed:
                raise self._block_error(failed.fault) from failed.cause
            except (
                FutureCancelledError,
                FuturesCancelledError,
                KilledWorker,
                WorkersReplacedError,
            ) as error:
                self._recover(error, attempt)
                parts.drop_lost()
        return result

    def _recover(self, error: Exception, attempt: int) -> None:
        """Make another attempt possible after workers were lost, or raise what is to be done.

        A scheduler computes anew what a lost worker held, but it cannot do so with data that were
        sent to it; those are sent once more.
        """
        client = self._workers.client
        if client is None or client.status != "running":
            raise ClusterLostError(
                "the connection to the Dask scheduler was lost in the middle of a pass. Start a "
                "cluster and a client again, and fit again."
            ) from error
        if attempt == _MOST_ATTEMPTS:
            raise ClusterLostError(
                f"workers were lost again and again ({error}). If they ran out of memory, give "
                f"them more, or use smaller chunks; the workers' logs say why they ended."
            ) from error
        self._workers = Workers.active()
        self._kernel = None
        try:
            self._place()
        except TimeoutError as timeout:
            raise ClusterLostError(
                "all workers were lost, and none came that arrays in memory could be sent to. "
                "Start a cluster again, and fit again."
            ) from timeout

    def _tree(self, kernel: RowKernel[S], request: PassRequest, known: Mapping[Node, Any]) -> Tree:
        graph = TaskGraph(self._shared)
        if self._kernel is None or self._kernel[0] is not kernel:
            self._kernel = kernel, hold("kernel", [kernel], self._workers)[0]
        constants = (
            graph.constant("kernel", self._kernel[1]),
            graph.constant("request", request),
        )

        wanted = self._wanted(request)

        def leaf(i: int) -> TaskRef:
            number = wanted[i]
            group = graph.constant(f"group-{number}", self._groups[number])
            inputs = self._inputs[number]
            return graph.task(
                "normal-equations", number, _reduce_group, group, *constants, inputs=inputs
            )

        tree = graph.tree(len(wanted), leaf, _combine, known)
        if self._read_ahead is not None:
            # When a thread is done with its group, the one so many places further on is its next.
            positions = list(tree.leaves)
            order = graph.order_of(list(tree.leaves.values()))
            turns = [self._groups[wanted[positions[i]]] for i in order]
            following = turns[self._workers.most_threads :]
            for group, other in zip_longest(turns, following):
                group.read_ahead_of(other, self._read_ahead, request.left_out)
        return tree

    def _wanted(self, request: PassRequest) -> list[int]:
        """Return the groups of which not all blocks are left out."""
        return [i for i, own in enumerate(self._members) if not own <= request.left_out]

    def _sizes(self, request: PassRequest) -> NDArray[np.int64]:
        """Return the ``Amount`` of each wanted group."""
        sizes = []
        for i in self._wanted(request):
            blocks = list(self._members[i] - request.left_out)
            rows = self._block_rows.flat[blocks].sum()
            share = len(blocks) / len(self._members[i])
            sizes.append((len(blocks), rows, share * self.memory.group_bytes[i]))
        return np.array(sizes, np.int64).reshape(-1, 3)

    def sample(
        self,
        sample_rows: int,
        seed: int,
        left_out: frozenset[int] = frozenset(),
        watch: Watch = lambda parts: None,
    ) -> Sample:
        """Read a few blocks and take rows from each, as if those left out were not there.

        ``watch`` may raise to end that, as in ``reduce``.
        """
        block_rows = self._block_rows.copy()
        block_rows.flat[list(left_out)] = 0
        plan = plan_sample(block_rows, sample_rows, seed, self.blocks.in_memory)
        readers, shared = self._source.readers([[block] for block in plan.blocks])
        graph = TaskGraph(shared)
        leaves = [
            graph.task("sample", i, _sample_block, reader, plan, i, inputs=reader.inputs)
            for i, reader in enumerate(readers)
        ]
        joined = graph.task("sample-join", 0, _join_samples, *leaves)
        sample: Sample = self._run(graph, joined, watch)
        return sample

    def _run(self, graph: TaskGraph, result: TaskRef, watch: Watch = lambda parts: None) -> Any:
        try:
            parts = Parts(np.zeros((1, 3), np.int64))
            return run_tree(graph.of_one(result), self._workers, parts, watch)
        except ReadFailedError as failed:
            raise self._block_error(failed.fault) from failed.cause

    def _block_error(self, fault: Fault) -> BlockReadError:
        block = self._source.first_block_needing(fault.key)
        bad = self.bad_block(int(np.ravel_multi_index(block, self.blocks.grid)), fault)
        return BlockReadError(
            f"{bad.sentence}. Repair or replace what is stored there, or let blocks that stay "
            f"unreadable be left out with HybridStreamingConfig(min_success_rate=...) below 1.",
            bad.array,
            bad.block,
            bad.chunk,
        )

    def bad_block(self, index: int, fault: Fault) -> BadBlock:
        """Say in the caller's terms which block could not be read."""
        block = tuple(map(int, np.unravel_index(index, self.blocks.grid)))
        names = self.blocks.layout.array_names
        arrays = [names[i] for i in self._source.arrays_needing(fault.key, block)]
        return BadBlock(
            block=block,
            grid=self.blocks.grid,
            rows=int(self._block_rows[block]),
            part=tuple((part.start, part.stop) for part in self.blocks.part(block)),
            array=" and ".join(arrays),
            chunk=fault.chunk,
            error=fault.error,
            tries=fault.tries,
        )

    def first_not_finite(self, index: int) -> tuple[Index, str]:
        """Return the position of a block, and in words which of its arrays is not finite and where.

        The block is read once more. The words are none if it is finite now.

        Parameters
        ----------
        index : int
            Flat index of the block.
        """
        block = tuple(map(int, np.unravel_index(index, self.blocks.grid)))
        ((reader,), shared) = self._source.readers([[block]])
        graph = TaskGraph(shared)
        task = graph.task("not-finite", 0, _not_finite, reader, inputs=reader.inputs)
        found: tuple[int, Index, Index] | None = self._run(graph, task)
        if found is None:
            return block, ""
        i, position, shape = found
        starts = [part.start for part in self.blocks.part(block)]
        row = ", ".join(str(start + at) for start, at in zip(starts, position, strict=False))
        name = self.blocks.layout.array_names[i]
        where = f", beginning with {'' if name == 'y_data' else f'{name} at '}y_data[{row}]"
        where += "".join(f", column {at}" for at in position[len(starts) :])
        chunk = self._source.chunk_of(self.blocks.keys(block)[i], position, shape)
        return block, where if chunk is None else f"{where}, in {chunk}"

    def missing_chunks(self) -> list[str]:
        """Return sentences on chunks that a Zarr store does not hold and reads as values."""
        return [missing.sentence for missing in self._source.missing_chunks()]


def _reduce_group(
    group: Group, kernel: RowKernel[S], request: PassRequest, *inputs: Any
) -> PassResult[S]:
    blocks = group.blocks(inputs, request.left_out, kernel.placed)
    parts = (_reduce_block(kernel, request, *block) for block in blocks)
    return reduce(_combine, parts)


def _reduce_block(
    kernel: RowKernel[S],
    request: PassRequest,
    index: int,
    rows: Kept | None,
    read: ReadBlock | None,
) -> PassResult[S]:
    if rows is None:
        return PassResult(None, None, _report(read))
    further = {} if request.directions is None else {"directions": request.directions}
    sums = kernel(
        rows,
        request.params,
        index,
        candidates=request.candidates,
        wants_moments=request.is_first,
        **further,
    )
    block = rows if read is None else read.block
    if read is None:
        sums = replace(sums, rows_cached=len(rows))
    elif read.block is not None:
        sums = replace(sums, rows_read=len(read.block), bytes_read=read.block.nbytes)
    taken = thin_out(len(rows), request.sample_share, request.seed, index)
    # Nothing is taken from a GPU's memory; the sample comes from the first pass, which reads.
    sample = block.take(taken) if isinstance(block, Block) and len(taken) else None
    return PassResult(sums, sample, _report(read))


def _report(read: ReadBlock | None) -> ReadReport:
    """Return what went wrong while a block was read; None stands for one that was there."""
    return ReadReport() if read is None else ReadReport.of(read.index, read.fault, read.retries)


def _combine(*parts: PassResult[S]) -> PassResult[S]:
    sums = [part.sums for part in parts if part.sums is not None]
    rows = [part.sample for part in parts if part.sample is not None]
    return PassResult(
        reduce(lambda one, other: one.combine(other), sums) if sums else None,
        Rows.concatenate(rows) if rows else None,
        ReadReport.joined(part.reading for part in parts),
    )


def _sample_block(reader: GroupReader, plan: SamplePlan, i: int, *inputs: Any) -> Sample:
    (read,) = reader.read(inputs)
    block, report = read.block, _report(read)
    if block is None:
        return Sample(None, 0, 0, 0, report)
    return Sample(block.take(plan.rows_of(i, len(block))), len(block), block.nbytes, 1, report)


def _not_finite(reader: GroupReader, *inputs: Any) -> tuple[int, Index, Index] | None:
    """Return which array of a block is not finite, where first, and that array's shape."""
    (read,) = reader.read(inputs)
    if read.block is None:
        return None
    *arrays, mask = read.block.arrays
    for i, array in enumerate(array for array in arrays if array is not None):
        bad = np.asarray(~np.isfinite(array))
        if mask is not None:
            bad = bad & ~mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
        if bad.any():
            # Where an array does not vary, an entry belongs to all rows along that dimension.
            repeated = tuple(i for i, n in enumerate(array.shape) if n < bad.shape[i])
            bad = np.asarray(bad.any(axis=repeated, keepdims=True))
            position = np.unravel_index(int(bad.argmax()), bad.shape)
            return i, tuple(map(int, position)), array.shape
    return None


def _join_samples(*parts: Sample) -> Sample:
    rows = [part.rows for part in parts if part.rows is not None]
    return Sample(
        Rows.concatenate(rows) if rows else None,
        sum(part.rows_read for part in parts),
        sum(part.bytes_read for part in parts),
        sum(part.n_blocks for part in parts),
        ReadReport.joined(part.reading for part in parts),
    )
