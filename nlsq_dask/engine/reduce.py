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
from nlsq_dask.engine.group import CacheBudget, Group, Kept, ReadAhead
from nlsq_dask.engine.memory import MemoryPlan
from nlsq_dask.engine.parts import Parts, Watch, run_tree
from nlsq_dask.engine.scheduling import Node, TaskGraph, Tree, group_blocks, hold, send_once
from nlsq_dask.engine.source_graph import GroupReader, SourceGraph
from nlsq_dask.engine.workers import Workers
from nlsq_dask.errors import ClusterLostError

_MOST_ATTEMPTS = 4  # of a pass whose workers or data on them were lost


@dataclass(frozen=True)
class Sample:
    """Rows taken from a few blocks, and what it took to read them.

    Attributes
    ----------
    rows : Rows
    rows_read, bytes_read : int
    n_blocks : int
    """

    rows: Rows
    rows_read: int
    bytes_read: int
    n_blocks: int


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
    """

    params: NDArray[np.float64]
    candidates: NDArray[np.float64] | None = None
    directions: NDArray[np.float64] | None = None
    is_first: bool = True
    sample_share: float = 0.0
    seed: int = 0


S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class PassResult(Generic[S]):
    """What a pass, or a part of one, brings back: sums, and perhaps some rows."""

    sums: S
    sample: Rows | None


class DataSet:
    """Row blocks, ready to be reduced and sampled on the active Dask scheduler.

    The graph is analysed once; a pass adds little more than its names and the parameters.

    It holds its groups on the workers until it is closed.

    Parameters
    ----------
    blocks : RowBlocks
    cache : int or "auto"
        Bytes of blocks that may stay in the workers' memory between passes.

    Raises
    ------
    DataError
        If a block is too large for the memory of a worker.
    """

    def __init__(self, blocks: RowBlocks, cache: int | str) -> None:
        self.blocks = blocks
        self._block_rows = blocks.block_rows()
        self._workers = Workers.active()
        groups = group_blocks(self._block_rows)
        self.memory = MemoryPlan.of(blocks, groups, self._workers, cache)
        self.memory.check()
        self._source = SourceGraph(blocks)
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
        deadline: float | None = None,
    ) -> PassResult[S]:
        """Sum over all rows: one pass.

        Parameters
        ----------
        kernel : RowKernel
        request : PassRequest
        known : mapping of Node to PassResult, optional
            Finished parts of an earlier pass with the same kernel and request.
        watch : callable, optional
            Called with the ``Parts`` whenever one has finished; may raise to end the pass.
        deadline : float, optional
            Seconds from now after which it is called in any case.
        """
        parts = Parts(len(self._groups), dict(known or {}))
        for attempt in count(1):
            try:
                tree = self._tree(kernel, request, parts.values)
                result: PassResult[S] = run_tree(tree, self._workers.client, parts, watch, deadline)
                break
            except (FutureCancelledError, FuturesCancelledError, KilledWorker) as error:
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
        self._place()

    def _tree(self, kernel: RowKernel[S], request: PassRequest, known: Mapping[Node, Any]) -> Tree:
        graph = TaskGraph(self._shared)
        if self._kernel is None or self._kernel[0] is not kernel:
            self._kernel = kernel, hold("kernel", [kernel], self._workers)[0]
        constants = (
            graph.constant("kernel", self._kernel[1]),
            graph.constant("request", request),
        )

        def leaf(i: int) -> TaskRef:
            group = graph.constant(f"group-{i}", self._groups[i])
            return graph.task(
                "normal-equations", i, _reduce_group, group, *constants, inputs=self._inputs[i]
            )

        tree = graph.tree(len(self._groups), leaf, _combine, known)
        if self._read_ahead is not None:
            # When a thread is done with its group, the one so many places further on is its next.
            positions = list(tree.leaves)
            order = graph.order_of(list(tree.leaves.values()))
            turns = [self._groups[positions[i]] for i in order]
            following = turns[self._workers.most_threads :]
            for group, other in zip_longest(turns, following):
                group.read_ahead_of(other, self._read_ahead)
        return tree

    def sample(self, sample_rows: int, seed: int, n_blocks: int | None = None) -> Sample:
        """Read a few blocks, or the first so many of them, and take rows from each."""
        plan = plan_sample(self._block_rows, sample_rows, seed, self.blocks.in_memory)
        readers, shared = self._source.readers([[block] for block in plan.blocks[:n_blocks]])
        graph = TaskGraph(shared)
        leaves = [
            graph.task("sample", i, _sample_block, reader, plan, i, inputs=reader.inputs)
            for i, reader in enumerate(readers)
        ]
        sample: Sample = graph.run(graph.task("sample-join", 0, _join_samples, *leaves))
        return sample


def _reduce_group(
    group: Group, kernel: RowKernel[S], request: PassRequest, *inputs: Any
) -> PassResult[S]:
    blocks = group.blocks(inputs, kernel.placed)
    parts = (_reduce_block(kernel, request, *block) for block in blocks)
    return reduce(_combine, parts)


def _reduce_block(
    kernel: RowKernel[S],
    request: PassRequest,
    index: int,
    rows: Kept,
    read: Block | None,
) -> PassResult[S]:
    further = {} if request.directions is None else {"directions": request.directions}
    sums = kernel(
        rows,
        request.params,
        index,
        candidates=request.candidates,
        wants_moments=request.is_first,
        **further,
    )
    if read is None:
        sums = replace(sums, rows_cached=len(rows))
    else:
        sums = replace(sums, rows_read=len(read), bytes_read=read.nbytes)
    block = rows if read is None else read
    taken = thin_out(len(block), request.sample_share, request.seed, index)
    # Nothing is taken from a GPU's memory; the sample comes from the first pass, which reads.
    sample = block.take(taken) if isinstance(block, Block) and len(taken) else None
    return PassResult(sums, sample)


def _combine(*parts: PassResult[S]) -> PassResult[S]:
    rows = [part.sample for part in parts if part.sample is not None]
    return PassResult(
        reduce(lambda one, other: one.combine(other), (part.sums for part in parts)),
        Rows.concatenate(rows) if rows else None,
    )


def _sample_block(reader: GroupReader, plan: SamplePlan, i: int, *inputs: Any) -> Sample:
    ((_, block),) = reader.read(inputs)
    rows = block.take(plan.rows_of(i, len(block)))
    return Sample(rows, len(block), block.nbytes, 1)


def _join_samples(*parts: Sample) -> Sample:
    return Sample(
        Rows.concatenate([part.rows for part in parts]),
        sum(part.rows_read for part in parts),
        sum(part.bytes_read for part in parts),
        len(parts),
    )
