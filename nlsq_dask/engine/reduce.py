"""``DataSet``: the two things that are ever done with the rows, reducing them and sampling them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.kernel import RowKernel
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.sums import Sums
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.block import Block
from nlsq_dask.data.sampling import SamplePlan, plan_sample, thin_out
from nlsq_dask.engine.group import CacheBudget, Group, Kept, ReadAhead
from nlsq_dask.engine.memory import MemoryPlan
from nlsq_dask.engine.scheduling import TaskGraph, group_blocks, hold, send_once
from nlsq_dask.engine.source_graph import GroupReader, SourceGraph
from nlsq_dask.engine.workers import Workers


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
        self._source.replace(send_once(self._source.large_literals, self._workers.client))
        readers, self._shared = self._source.readers(groups)
        budget = CacheBudget(uuid.uuid4().hex, self.memory.cache_bytes)
        self._inputs = [reader.inputs for reader in readers]
        held = [
            Group(reader, n_bytes, budget, self.memory.all_fits)
            for reader, n_bytes in zip(readers, self.memory.group_bytes, strict=True)
        ]
        self._read_ahead: ReadAhead | None = None
        if self._workers.shares_memory and not blocks.in_memory:
            self._read_ahead = ReadAhead(self._workers.most_threads)
        self._groups = hold("group", held, self._workers)
        self._kernel: tuple[RowKernel[Any], Any] | None = None

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

    def reduce(self, kernel: RowKernel[S], request: PassRequest) -> PassResult[S]:
        """Sum over all rows: one pass."""
        graph = TaskGraph(self._shared)
        if self._kernel is None or self._kernel[0] is not kernel:
            self._kernel = kernel, hold("kernel", [kernel], self._workers)[0]
        constants = (
            graph.constant("kernel", self._kernel[1]),
            graph.constant("request", request),
        )
        leaves = [
            graph.task(
                "normal-equations",
                i,
                _reduce_group,
                graph.constant(f"group-{i}", group),
                *constants,
                inputs=inputs,
            )
            for i, (group, inputs) in enumerate(zip(self._groups, self._inputs, strict=True))
        ]
        combined = graph.tree("combine", leaves, _combine)
        if self._read_ahead is not None:
            # When a thread is done with its group, the one so many places further on is its next.
            turns = [self._groups[i] for i in graph.order_of(leaves)]
            following = turns[self._workers.most_threads :]
            for group, other in zip_longest(turns, following):
                group.read_ahead_of(other, self._read_ahead)
        result: PassResult[S] = graph.run(combined)
        return result

    def sample(self, sample_rows: int, seed: int) -> Sample:
        """Read a few blocks and take rows from each."""
        plan = plan_sample(self._block_rows, sample_rows, seed, self.blocks.in_memory)
        readers, shared = self._source.readers([[block] for block in plan.blocks])
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
