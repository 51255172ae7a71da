"""The graph that makes the blocks, cut so that one task reads and computes a whole block group.

Dask's own fusion joins tasks along a line; a group of blocks of several arrays is a tree. So the
tasks that only one group needs are put into that group's task, as a ``GroupReader``, and run there
one block after another. What several groups need (a mean that was subtracted, a chunk that was
split) stays a task of its own and runs once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import Alias, DataNode, GraphNode, convert_legacy_graph
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph

from nlsq_dask.core.rows import Layout
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.block import Block

Key = Any
Index = tuple[int, ...]

_SHARED = -1
# A literal up to this size (an opened Zarr array, a lock) is written into every group.
_MAX_INLINE_BYTES = 4096


@dataclass(frozen=True)
class GroupReader:
    """Reads the blocks of one group, one after the other; what one task holds.

    Attributes
    ----------
    layout : Layout
    blocks : tuple of (int, list of key, list of shape)
        Flat index of each block, with the keys and shapes of its arrays.
    steps : dict of key to GraphNode
        What to run, in topological order.
    inputs : tuple of key
        What has to come from other tasks.
    """

    layout: Layout
    blocks: tuple[tuple[int, list[Key], list[Index]], ...]
    steps: dict[Key, GraphNode]
    inputs: tuple[Key, ...]

    def read(self, inputs: Sequence[Any]) -> Iterator[tuple[int, Block]]:
        """Yield the blocks, each as soon as it is read; nothing is kept longer than needed."""
        values: dict[Key, Any] = dict(zip(self.inputs, inputs, strict=True))
        uses = Counter(dep for node in self.steps.values() for dep in node.dependencies)
        uses.update(key for _, keys, _ in self.blocks for key in keys)

        def release(keys: Iterable[Key]) -> None:
            for key in keys:
                uses[key] -= 1
                if not uses[key]:
                    del values[key]

        pending = iter(self.steps.items())
        for index, keys, shapes in self.blocks:
            while not all(key in values for key in keys):
                key, node = next(pending)
                values[key] = node(values)
                release(node.dependencies)
            block = Block.of([values[key] for key in keys], self.layout, shapes)
            release(keys)
            yield index, block


class SourceGraph:
    """The optimized graph of all blocks of a data set, from which readers are cut.

    Parameters
    ----------
    blocks : RowBlocks
    """

    def __init__(self, blocks: RowBlocks) -> None:
        self._blocks = blocks
        # All arrays at once: dask.optimize would do it one by one, and what is made from another of
        # them (a sigma that is a share of y) would read that a second time.
        graph = HighLevelGraph.merge(*(array.__dask_graph__() for array in blocks.arrays))
        keys = list(flatten([array.__dask_keys__() for array in blocks.arrays]))
        optimized = da.Array.__dask_optimize__(graph, keys)
        self._nodes: dict[Key, GraphNode] = convert_legacy_graph(dict(optimized))
        # Arrays that the caller has persisted: their keys are futures of the cluster.
        self._futures = {
            key: value
            for array in blocks.arrays
            for key, value in array.__dask_graph__().items()
            if key not in self._nodes and getattr(value, "key", None) == key
        }

    @property
    def large_literals(self) -> dict[Key, Any]:
        """Arrays in memory that stand in the graph itself."""
        return {
            key: node.value
            for key, node in self._nodes.items()
            if isinstance(node, DataNode) and self._is_large_literal(key)
        }

    def replace(self, futures: dict[Key, Any]) -> None:
        """Let these futures stand for the literals of the given keys, or for earlier futures."""
        for key, future in futures.items():
            before = self._nodes[key]
            if isinstance(before, Alias):
                self._futures.pop(before.target, None)
            self._nodes[key] = Alias(key, future.key)
            self._futures[future.key] = future

    def readers(
        self, groups: Sequence[Sequence[Index]]
    ) -> tuple[list[GroupReader], dict[Key, Any]]:
        """Cut the graph into one reader a group and the tasks that stand on their own.

        Parameters
        ----------
        groups : sequence of sequences of block positions

        Returns
        -------
        readers : list of GroupReader
        shared : dict
            Graph of the tasks that several readers need, with the caller's futures.
        """
        owners = self._owners(groups)
        shared = {key: self._nodes[key] for key, owner in owners.items() if owner == _SHARED}
        needed = {dep for node in shared.values() for dep in node.dependencies}
        shared |= {key: self._nodes[key] for key in needed if key in self._nodes}
        readers = [self._reader(group, i, owners) for i, group in enumerate(groups)]
        return readers, {**shared, **self._futures}

    def _owners(self, groups: Sequence[Sequence[Index]]) -> dict[Key, int]:
        """Return, for each task, the group that alone needs it, or ``_SHARED``."""
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
                # A second group wants it: it and all that it needs become shared.
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

    def _reader(self, group: Sequence[Index], i: int, owners: dict[Key, int]) -> GroupReader:
        steps: dict[Key, GraphNode] = {}
        inputs: dict[Key, None] = {}

        def add(key: Key) -> None:
            """Add what is needed for a key, dependencies first (a walk without recursion)."""
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
        return GroupReader(self._blocks.layout, tuple(blocks), steps, tuple(inputs))
