"""``SourceGraph``: the caller's Dask graph, rearranged so that one task reads each block group.

A block group is a run of neighboring blocks, each with its y, x and sigma. Dask fuses linear chains
of tasks only, and the tasks that read a group form a tree. Therefore the steps that only one group
needs become its ``GroupReader``, which reads one block after another. Steps that several groups
need, such as a mean or a chunk that is split between groups, remain tasks and run once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import dask.array as da
import numpy as np
import zarr
from dask._task_spec import Alias, DataNode, GraphNode, convert_legacy_graph
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph

from nlsq_dask._text import join_first
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.sources.from_zarr import (
    StoredRegion,
    missing_chunks,
    stored_regions,
)
from nlsq_dask.engine.retries import (
    ReadError,
    ReadPolicy,
    SharedStep,
    run_step,
    unwrap,
)
from nlsq_dask.rows.rows import Layout, Rows

Key = Any
Index = tuple[int, ...]

_SHARED = -1
# Literals up to this size, such as an opened Zarr array or a lock, are copied into each group.
_MAX_INLINE_BYTES = 4096


@dataclass(frozen=True)
class ReadBlock:
    """A block from the source, or the error of reading it."""

    index: int  # flat index in the grid
    block: Rows | None
    read_error: ReadError | None = None
    retries: dict[Key, int] = field(default_factory=dict)  # by step


@dataclass(frozen=True)
class GroupReader:
    """Reads the blocks of one group, one after another, within one task."""

    layout: Layout
    # Flat index of each block, with the keys and shapes of its arrays.
    blocks: tuple[tuple[int, list[Key], list[Index]], ...]
    steps: dict[Key, GraphNode]  # in topological order
    inputs: tuple[Key, ...]  # keys of other tasks
    policy: ReadPolicy

    def count(self, skipped: frozenset[int]) -> int:
        """Return the number of blocks that ``read`` yields."""
        return sum(index not in skipped for index, *_ in self.blocks)

    def read(
        self, inputs: Sequence[Any], skipped: frozenset[int] = frozenset()
    ) -> Iterator[ReadBlock]:
        """Yield each block as soon as it is read; intermediate values are released early.

        Parameters
        ----------
        inputs : sequence
            Results of the tasks in ``inputs``.
        skipped : frozenset of int
            Flat indices of blocks.

        Raises
        ------
        ReadFailedError
            If a block cannot be read and the policy does not skip it.
        """
        blocks = [block for block in self.blocks if block[0] not in skipped]
        steps = self.steps if len(blocks) == len(self.blocks) else self._steps_of(blocks)
        values, retries = unwrap(zip(self.inputs, inputs, strict=True))
        uses = Counter(dep for node in steps.values() for dep in node.dependencies)
        uses.update(key for _, keys, _ in blocks for key in keys)

        def release(keys: Iterable[Key]) -> None:
            for key in keys:
                uses[key] -= 1
                if not uses[key]:
                    del values[key]

        pending = iter(steps.items())
        for index, keys, shapes in blocks:
            while not all(key in values for key in keys):
                key, node = next(pending)
                # Only the failed step is retried; its dependencies are still in memory.
                values[key], n_retries = run_step(node, values, self.policy)
                if n_retries:
                    retries[key] = n_retries
                release(node.dependencies)
            arrays = [values[key] for key in keys]
            release(keys)
            read_error = next((array for array in arrays if isinstance(array, ReadError)), None)
            block = None if read_error else Rows.of_block(arrays, self.layout, shapes)
            del arrays
            yield ReadBlock(index, block, read_error, retries)
            retries = {}

    def _steps_of(
        self, blocks: Sequence[tuple[int, list[Key], list[Index]]]
    ) -> dict[Key, GraphNode]:
        """Return the steps that some blocks need, in topological order."""
        stack = [key for _, keys, _ in blocks for key in keys]
        needed: set[Key] = set()
        while stack:
            key = stack.pop()
            if key not in needed and key in self.steps:
                needed.add(key)
                stack.extend(self.steps[key].dependencies)
        return {key: node for key, node in self.steps.items() if key in needed}


@dataclass(frozen=True)
class MissingChunks:
    """Chunks that a fit reads but a Zarr store does not contain."""

    array: zarr.Array[Any]
    keys: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Warning about the chunks."""
        what = "1 chunk" if len(self.keys) == 1 else f"{len(self.keys):,} chunks"
        listed = join_first(self.keys, 3)
        return (
            f"{self.array.store_path} lacks {what} that the fit reads ({listed}); Zarr returns the "
            f"fill value, {self.array.fill_value}. Chunks of nothing but the fill value are not "
            f"stored by default, so this may be correct. If chunks were deleted, write them again "
            f"or mask their rows."
        )


class SourceGraph:
    """The optimized graph of all blocks of a data set.

    Parameters
    ----------
    blocks : RowBlocks
    policy : ReadPolicy, optional
        How readers handle failed reads.
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
            if key not in self._nodes and getattr(value, "key", None) == key
        }

    @property
    def large_literals(self) -> dict[Key, Any]:
        """Arrays in memory that are part of the graph."""
        return {
            key: node.value
            for key, node in self._nodes.items()
            if isinstance(node, DataNode) and self._is_large_literal(key)
        }

    def replace(self, futures: dict[Key, Any]) -> None:
        """Replace literals, or earlier futures, by futures."""
        for key, future in futures.items():
            before = self._nodes[key]
            if isinstance(before, Alias):
                self._futures.pop(before.target, None)
            self._nodes[key] = Alias(key, future.key)
            self._futures[future.key] = future

    def readers(
        self, groups: Sequence[Sequence[Index]]
    ) -> tuple[list[GroupReader], dict[Key, Any]]:
        """Partition the graph into one reader per group and shared tasks.

        Parameters
        ----------
        groups : sequence of sequences of tuple of int
            Positions of blocks.

        Returns
        -------
        readers : list of GroupReader
        shared : dict
            Graph of shared tasks and the caller's futures.
        """
        owners = self._owners(groups)
        shared = {key: self._nodes[key] for key, owner in owners.items() if owner == _SHARED}
        needed = {dep for node in shared.values() for dep in node.dependencies}
        shared |= {key: self._nodes[key] for key in needed if key in self._nodes}
        shared = {key: SharedStep.wrap(node, self._policy) for key, node in shared.items()}
        readers = [self._reader(group, owners) for group in groups]
        return readers, {**shared, **self._futures}

    def arrays_needing(self, key: Key, block: Index) -> list[int]:
        """Return the indices of the arrays of a block that depend on a step."""
        return [
            i for i, own in enumerate(self._blocks.keys(block)) if key in self._steps_towards([own])
        ]

    def first_block_needing(self, key: Key) -> Index:
        """Return the first block that depends on a step."""
        blocks = np.ndindex(self._blocks.grid)
        return next(block for block in blocks if self.arrays_needing(key, block))

    def _steps_towards(self, keys: Iterable[Key]) -> set[Key]:
        stack, steps = list(keys), set[Key]()
        while stack:
            key = stack.pop()
            if key not in steps and key in self._nodes:
                steps.add(key)
                stack.extend(self._nodes[key].dependencies)
        return steps

    def chunk_of(self, key: Key, position: Index, shape: Index) -> str | None:
        """Return the stored chunk that contains an element of a block, if it is known.

        Parameters
        ----------
        key : key
            Key of the block of one array.
        position : tuple of int
            Position of the element in that block.
        shape : tuple of int
            Shape of that block.
        """
        node = self._nodes.get(key)
        regions = [] if node is None else list(stored_regions(node, self._literals))
        return regions[0].chunk_at(position, shape) if len(regions) == 1 else None

    @property
    def _literals(self) -> dict[Key, Any]:
        return {key: n.value for key, n in self._nodes.items() if isinstance(n, DataNode)}

    def missing_chunks(self) -> Iterator[MissingChunks]:
        """Yield the Zarr arrays with missing chunks, which a fit would read as fill values.

        Zarr does not store chunks of nothing but the fill value, so that deleted chunks look the
        same. Each store is listed once.
        """
        literals = self._literals
        by_array: defaultdict[int, list[StoredRegion]] = defaultdict(list)
        for node in self._nodes.values():
            for stored in stored_regions(node, literals):
                by_array[id(stored.array)].append(stored)
        for regions in by_array.values():
            missing = missing_chunks(regions)
            if missing:
                yield MissingChunks(regions[0].array, missing)

    def _owners(self, groups: Sequence[Sequence[Index]]) -> dict[Key, int]:
        """Return the only group that needs each task, or ``_SHARED``."""
        owners: dict[Key, int] = {}

        def claim(keys: Iterable[Key], owner: int) -> None:
            stack = list(keys)
            while stack:
                key = stack.pop()
                if key not in self._nodes or self._is_literal(key):
                    continue
                known = owners.get(key)
                if known in (owner, _SHARED):
                    continue
                # Needed by a second group: it and its dependencies become shared.
                new = owner if known is None and not self._is_large_literal(key) else _SHARED
                owners[key] = new
                if new == _SHARED and owner != _SHARED:
                    claim(self._nodes[key].dependencies, _SHARED)
                else:
                    stack.extend(self._nodes[key].dependencies)

        for i, group in enumerate(groups):
            for block in group:
                claim(self._blocks.keys(block), i)
        return owners

    def _is_literal(self, key: Key) -> bool:
        node = self._nodes[key]
        if isinstance(node, Alias):
            return node.target in self._futures
        return isinstance(node, DataNode) and not self._is_large_literal(key)

    def _is_large_literal(self, key: Key) -> bool:
        node = self._nodes[key]
        if not isinstance(node, DataNode) or not isinstance(node.value, np.ndarray):
            return False
        return bool(node.value.nbytes > _MAX_INLINE_BYTES)

    def _reader(self, group: Sequence[Index], owners: dict[Key, int]) -> GroupReader:
        steps: dict[Key, GraphNode] = {}
        inputs: dict[Key, None] = {}

        def add(key: Key) -> None:
            """Add the steps for a key, dependencies first, without recursion."""
            stack = [(key, False)]
            while stack:
                key, dependencies_done = stack.pop()
                if key in steps or key in inputs:
                    continue
                if key not in self._nodes or owners.get(key) == _SHARED:
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
        return GroupReader(self._blocks.layout, tuple(blocks), steps, tuple(inputs), self._policy)
