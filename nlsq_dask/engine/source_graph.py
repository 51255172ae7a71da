"""``SourceGraph``: the caller's Dask graph, rearranged so that one task reads a group of blocks.

A block is a chunk of y with its x and sigma; a group is a run of neighboring blocks. Dask can fuse
linear chains of tasks, but the tasks that read a group form a tree. Therefore the tasks that only
one group needs are moved into a ``GroupReader``, which runs them inside one task, block after
block. Tasks that several groups need, such as a mean or a chunk that is split between groups, stay
in the graph and run once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np
import zarr
from dask._task_spec import Alias, DataNode, GraphNode, Task, convert_legacy_graph
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph

from nlsq_dask._text import join_first
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.sources.from_zarr import (
    StoredRegion,
    is_remote_read,
    is_store_read,
    missing_chunks,
    stored_regions,
)
from nlsq_dask.engine.retries import (
    ReadError,
    ReadPolicy,
    SharedStep,
    run_step,
    separate_retries,
)
from nlsq_dask.rows.rows import Layout, Rows

Key = Any
Index = tuple[int, ...]

_SHARED = -1
# Literals up to this size, such as an opened Zarr array or a lock, are copied into each group.
_MAX_INLINE_BYTES = 4096


StepResult = tuple[Any, int]  # value, or a ``ReadError`` if it failed, and number of retries
Ahead = Callable[[int], dict[Key, Future[StepResult]]]


@dataclass(frozen=True)
class ReadBlock:
    """A block that was read, or the error if it could not be read."""

    index: int  # flat index in the grid
    block: Rows | None
    read_error: ReadError | None = None
    retries: dict[Key, int] = field(default_factory=dict)  # number by key of the repeated task


@dataclass(frozen=True)
class GroupReader:
    """Reads neighboring blocks, one after another, within one Dask task."""

    layout: Layout
    # Flat index of each block, with the keys and shapes of its arrays.
    blocks: tuple[tuple[int, list[Key], list[Index]], ...]
    steps: dict[Key, GraphNode]  # tasks of the caller's graph to run here, in a possible order
    inputs: tuple[Key, ...]  # keys of needed results of other Dask tasks
    policy: ReadPolicy
    grid: Index  # number of blocks along each dimension of y

    def count(self, skipped: frozenset[int]) -> int:
        """Return the number of blocks that are not in ``skipped``."""
        return sum(index not in skipped for index, *_ in self.blocks)

    @cached_property
    def _reads(self) -> list[list[Key]]:
        order = {key: i for i, key in enumerate(self.steps)}
        owned: set[Key] = set()
        reads = []
        for _, keys, _ in self.blocks:
            needed = needed_keys(keys, self.steps) - owned
            owned |= needed
            reads.append(sorted(filter(self._is_read, needed), key=order.__getitem__))
        return reads

    @cached_property
    def has_sources(self) -> bool:
        """Whether a step reads or makes data, not only from results of other tasks."""
        nodes = self.steps.values()
        return any(map(self._is_source, self.steps)) or any(
            True for node in nodes for _ in stored_regions(node, self._literals(node))
        )

    def _is_source(self, key: Key) -> bool:
        node = self.steps[key]
        return isinstance(node, Task) and len(self._literals(node)) == len(node.dependencies)

    def _is_read(self, key: Key) -> bool:
        node = self.steps[key]
        return self._is_source(key) and is_store_read(node, self._literals(node))

    def _literals(self, node: GraphNode) -> dict[Key, Any]:
        """Return the values in the graph that a step needs, by key."""
        needed = {key: self.steps.get(key) for key in node.dependencies}
        return {key: dep.value for key, dep in needed.items() if isinstance(dep, DataNode)}

    def reads(self, position: int) -> list[Key]:
        """Return the keys of the steps that can be run ahead for a block, in any thread.

        These are steps that read a store and need no result of another step. Other ones may compute
        Dask arrays, which a worker allows in the thread of a task alone, and may need any amount of
        memory. Steps that an earlier block of the group needs as well are not returned.

        Parameters
        ----------
        position : int
            Position of the block in the group.
        """
        return self._reads[position]

    @cached_property
    def is_remote(self) -> bool:
        """Whether a step reads a Zarr store that is not on a file system or in memory."""
        sources = (self.steps[key] for key in self.steps if self._is_source(key))
        return any(is_remote_read(node, self._literals(node)) for node in sources)

    def run_read(self, key: Key) -> StepResult:
        """Run one of the steps that ``reads`` returns."""
        node = self.steps[key]
        return run_step(node, self._literals(node), self.policy)

    def read(
        self,
        inputs: Sequence[Any],
        skipped: frozenset[int] = frozenset(),
        ahead: Ahead = lambda position: {},
    ) -> Iterator[ReadBlock]:
        """Yield each block as soon as it is read.

        Intermediate results are deleted as soon as no further block needs them.

        Parameters
        ----------
        inputs : sequence
            Results of the tasks ``self.inputs``, in that order.
        skipped : frozenset of int
            Flat indices of blocks that are not read.
        ahead : callable, optional
            Called with the position of each block in the group before it is read; returns the
            steps that other threads run, by key.

        Raises
        ------
        ReadFailedError
            If a block cannot be read and the policy does not skip it.
        """
        blocks = [(i, *block) for i, block in enumerate(self.blocks) if block[0] not in skipped]
        needed = needed_keys((key for _, _, keys, _ in blocks for key in keys), self.steps)
        steps = {key: node for key, node in self.steps.items() if key in needed}
        values, retries = separate_retries(zip(self.inputs, inputs, strict=True))
        uses = Counter(dep for node in steps.values() for dep in node.dependencies)
        uses.update(key for _, _, keys, _ in blocks for key in keys)

        def release(keys: Iterable[Key]) -> None:
            for key in keys:
                uses[key] -= 1
                if not uses[key]:
                    del values[key]

        pending = iter(steps.items())
        running: dict[Key, Future[StepResult]] = {}
        for position, index, keys, shapes in blocks:
            running |= ahead(position)
            while not all(key in values for key in keys):
                key, node = next(pending)
                future = running.pop(key, None)
                # Only the failed step is retried; its dependencies are still in memory.
                result = future.result() if future else run_step(node, values, self.policy)
                values[key], n_retries = result
                if n_retries:
                    retries[key] = n_retries
                del future, result
                release(node.dependencies)
            arrays = [values[key] for key in keys]
            release(keys)
            read_error = next((array for array in arrays if isinstance(array, ReadError)), None)
            block = None
            if read_error is None:
                block = Rows.of_block(arrays, self.layout, shapes, self._describe(index))
            del arrays
            yield ReadBlock(index, block, read_error, retries)
            del block
            retries = {}

    def read_at_once(self, inputs: Sequence[Any]) -> Iterator[ReadBlock]:
        """Yield the blocks as ``read`` does; the arrays of a block are requested together."""
        if not self.is_remote:
            yield from self.read(inputs)
            return
        with ThreadPoolExecutor(len(self.layout.array_names), "nlsq-read") as pool:

            def ahead(position: int) -> dict[Key, Future[StepResult]]:
                return {key: pool.submit(self.run_read, key) for key in self.reads(position)}

            yield from self.read(inputs, ahead=ahead)

    def needing(self, key: Key) -> tuple[int, list[str]]:
        """Return the first block that depends on a step, and the names of its arrays that do."""
        for index, keys, _ in self.blocks:
            pairs = zip(self.layout.array_names, keys, strict=True)
            names = [name for name, own in pairs if key in needed_keys([own], self.steps)]
            if names:
                return index, names
        raise KeyError(key)

    def _describe(self, index: int) -> str:
        position = tuple(map(int, np.unravel_index(index, self.grid)))
        return f"block {position} of the grid {self.grid}"


def needed_keys(keys: Iterable[Key], nodes: Mapping[Key, Any]) -> set[Key]:
    """Return the keys of all ``nodes`` that must be computed to get the values of ``keys``.

    A node is a task, or a future, which needs no other nodes.
    """
    stack, needed = list(keys), set[Key]()
    while stack:
        key = stack.pop()
        if key not in needed and key in nodes:
            needed.add(key)
            stack.extend(getattr(nodes[key], "dependencies", ()))
    return needed


def _is_large(literal: Any) -> bool:
    return isinstance(literal, np.ndarray) and literal.nbytes > _MAX_INLINE_BYTES


def _missing_chunks_warning(array: zarr.Array[Any], keys: Sequence[str]) -> str:
    what = "1 chunk" if len(keys) == 1 else f"{len(keys):,} chunks"
    return (
        f"{array.store_path} lacks {what} that the fit reads ({join_first(keys, 3)}); Zarr returns "
        f"the fill value, {array.fill_value}. By default, Zarr does not store chunks that hold "
        f"only the fill value, so this may be correct. If chunks were deleted, write them again or "
        f"mask their rows."
    )


class SourceGraph:
    """The optimized Dask graph of the caller's arrays.

    Parameters
    ----------
    blocks : RowBlocks
        The arrays.
    policy : ReadPolicy, optional
        How failed reads are handled. By default, the first one is an error.
    """

    def __init__(self, blocks: RowBlocks, policy: ReadPolicy | None = None) -> None:
        self._blocks = blocks
        self._policy = ReadPolicy() if policy is None else policy
        # Optimized together: dask.optimize handles arrays one by one, so that an array computed
        # from another, such as sigma from y, would read it a second time.
        graph = HighLevelGraph.merge(*(array.__dask_graph__() for array in blocks.arrays))
        keys = list(flatten([array.__dask_keys__() for array in blocks.arrays]))
        optimized = da.Array.__dask_optimize__(graph, keys)
        self._nodes: dict[Key, GraphNode] = convert_legacy_graph(dict(optimized))
        # Persisted arrays: their keys are futures.
        self._futures = {
            key: value
            for array in blocks.arrays
            for key, value in array.__dask_graph__().items()
            if not isinstance(value, GraphNode) and getattr(value, "key", None) == key
        }

    @property
    def large_literals(self) -> dict[Key, Any]:
        """NumPy arrays that the graph contains, except small ones, by key."""
        return {key: value for key, value in self._literals.items() if _is_large(value)}

    def replace(self, futures: dict[Key, Any]) -> None:
        """Replace arrays in the graph, or earlier futures of them, by futures on a cluster."""
        for key, future in futures.items():
            before = self._nodes[key]
            if isinstance(before, Alias):
                self._futures.pop(before.target, None)
            self._nodes[key] = Alias(key, future.key)
            self._futures[future.key] = future

    def readers(
        self, groups: Sequence[Sequence[Index]]
    ) -> tuple[list[GroupReader], dict[Key, Any]]:
        """Split the graph into a reader per group, and the tasks that several groups need.

        Parameters
        ----------
        groups : sequence of sequences of tuple of int
            Positions in the grid of the blocks of each group.

        Returns
        -------
        readers : list of GroupReader
        shared : dict
            Graph of the tasks that several groups need, and of futures.
        """
        shared = {key: self._nodes[key] for key in self._shared_keys(groups)}
        readers = [self._reader(group, shared) for group in groups]
        inline = {dep for node in shared.values() for dep in node.dependencies} - shared.keys()
        shared |= {key: self._nodes[key] for key in inline if key in self._nodes}
        tasks = {key: SharedStep.wrap(node, self._policy) for key, node in shared.items()}
        return readers, {**tasks, **self._futures}

    def is_held(self, keys: Sequence[Key]) -> bool:
        """Return whether the results of these tasks are in memory before a pass begins.

        They are if they are arrays in the graph, or persisted on the cluster.
        """
        nodes = [self._nodes.get(key) for key in keys if key not in self._futures]
        return all(node is not None and self._is_stored(node) for node in nodes)

    def _is_stored(self, node: GraphNode) -> bool:
        if isinstance(node, Alias):
            return node.target in self._futures
        return isinstance(node, DataNode)

    def arrays_needing(self, key: Key, block: Index) -> list[int]:
        """Return which arrays of a block depend on a task, given by its key.

        The result holds indices in the order y, x..., sigma.
        """
        return [
            i
            for i, own in enumerate(self._blocks.keys(block))
            if key in needed_keys([own], self._nodes)
        ]

    def first_block_needing(self, key: Key) -> Index:
        """Return the position of the first block that depends on a task, given by its key."""
        blocks = np.ndindex(self._blocks.grid)
        return next(block for block in blocks if self.arrays_needing(key, block))

    def chunk_of(self, key: Key, position: Index, shape: Index) -> str | None:
        """Return the name of the stored chunk that contains an element; None if unknown.

        Parameters
        ----------
        key : key
            Key of the task that returns the block of one array.
        position : tuple of int
            Position of the element in this block.
        shape : tuple of int
            Shape of this block.
        """
        node = self._nodes.get(key)
        regions = [] if node is None else list(stored_regions(node, self._literals))
        return regions[0].chunk_at(position, shape) if len(regions) == 1 else None

    @property
    def _literals(self) -> dict[Key, Any]:
        return {key: n.value for key, n in self._nodes.items() if isinstance(n, DataNode)}

    def missing_chunks(self) -> Iterator[str]:
        """Yield a warning for each Zarr array that lacks chunks.

        Zarr reads missing chunks as fill values. It does not store chunks that hold only the fill
        value, so those look like deleted chunks.
        """
        literals = self._literals
        by_array: defaultdict[int, list[StoredRegion]] = defaultdict(list)
        for node in self._nodes.values():
            for stored in stored_regions(node, literals):
                by_array[id(stored.array)].append(stored)
        for regions in by_array.values():
            missing = missing_chunks(regions)
            if missing:
                yield _missing_chunks_warning(regions[0].array, missing)

    def _shared_keys(self, groups: Sequence[Sequence[Index]]) -> list[Key]:
        """Return the keys of the tasks that several groups need, and of large arrays."""
        owners: dict[Key, int] = {}  # the only group that needs a key so far, or _SHARED
        for i, group in enumerate(groups):
            stack = [key for block in group for key in self._blocks.keys(block)]
            while stack:
                key = stack.pop()
                node = self._nodes.get(key)
                if node is None or self._is_inline(node) or owners.get(key) in (i, _SHARED):
                    continue
                is_shared = key in owners or isinstance(node, DataNode)
                owners[key] = _SHARED if is_shared else i
                stack.extend(node.dependencies)
        return [key for key, owner in owners.items() if owner == _SHARED]

    def _is_inline(self, node: GraphNode) -> bool:
        """Return whether each group gets a copy of a node: a small value, or a key of a future."""
        if isinstance(node, Alias):
            return node.target in self._futures
        return isinstance(node, DataNode) and not _is_large(node.value)

    def _reader(self, group: Sequence[Index], shared: Mapping[Key, GraphNode]) -> GroupReader:
        steps: dict[Key, GraphNode] = {}
        inputs: dict[Key, None] = {}

        def add(key: Key) -> None:
            """Add a key and all that it depends on, dependencies first."""
            stack = [(key, False)]
            while stack:
                key, dependencies_done = stack.pop()
                if key in steps or key in inputs:
                    continue
                if key not in self._nodes or key in shared:
                    inputs[key] = None
                elif dependencies_done:
                    steps[key] = self._nodes[key]
                else:
                    stack.append((key, True))
                    stack.extend((dep, False) for dep in self._nodes[key].dependencies)

        blocks = []
        for block in group:
            keys = self._blocks.keys(block)
            for key in keys:
                add(key)
            index = int(np.ravel_multi_index(block, self._blocks.grid))
            blocks.append((index, keys, self._blocks.shapes(block)))
        grid = self._blocks.grid
        return GroupReader(
            self._blocks.layout, tuple(blocks), steps, tuple(inputs), self._policy, grid
        )
