"""Block groups, the reduction tree, and the graph that is sent to the scheduler.

Groups and tree depend on the grid of blocks alone, not on the number of workers or the order of
execution, so the sums have the same bits on every cluster.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from dask._task_spec import DataNode, Task, TaskRef
from dask.order import order
from distributed import Client, Future
from numpy.typing import NDArray

from nlsq_dask.engine.serialization import from_opaque, to_opaque
from nlsq_dask.engine.workers import Workers

Node = tuple[int, int]  # level, 0 for leaves, and position in the level

# A task costs a distributed scheduler about a millisecond, so small blocks share one and the number
# of groups is limited.
_MIN_GROUP_ROWS = 2**18
_MIN_GROUP_BLOCKS = 128
_MAX_GROUPS = 8192
TREE_WIDTH = 16


def group_blocks(block_rows: NDArray[np.int64]) -> list[list[tuple[int, ...]]]:
    """Group consecutive blocks in C order of the grid, without empty blocks."""
    enough_rows = max(_MIN_GROUP_ROWS, -(int(block_rows.sum()) // -_MAX_GROUPS))
    enough_blocks = max(_MIN_GROUP_BLOCKS, -(int((block_rows > 0).sum()) // -_MAX_GROUPS))
    groups: list[list[tuple[int, ...]]] = []
    rows = 0
    for index in np.ndindex(block_rows.shape):
        size = int(block_rows[index])
        if not size:
            continue
        if not groups or rows >= enough_rows or len(groups[-1]) >= enough_blocks:
            groups.append([])
            rows = 0
        groups[-1].append(index)
        rows += size
    return groups


def broadcast(values: dict[Any, Any], client: Client | None) -> dict[Any, Any]:
    """Send large values to a cluster once, instead of in the graph of every pass.

    Returns
    -------
    dict
        A future for each key; empty without a cluster.
    """
    if not values or client is None:
        return {}
    # New names: the release of an earlier name may still be in progress.
    futures = client.scatter(list(values.values()), hash=False)
    return dict(zip(values, futures, strict=True))


def pin(name: str, values: list[Any], workers: Workers) -> list[Any]:
    """Distribute values over the workers.

    They are results of tasks, which a scheduler recomputes if a worker is lost.

    Returns
    -------
    list
        Futures on a cluster, otherwise the values.
    """
    if workers.client is None:
        return values
    token = uuid.uuid4().hex
    futures: dict[int, Any] = {}
    for address, share in workers.assign(len(values)).items():
        placed = workers.client.map(
            from_opaque,
            [to_opaque(values[i]) for i in share],
            key=[f"nlsq-{name}-{token}-{i}" for i in share],
            workers=address,
            allow_other_workers=address is not None,
        )
        futures.update(zip(share, placed, strict=True))
    return [futures[i] for i in range(len(values))]


def count_tree(n_leaves: int) -> int:
    """Return the number of combining tasks for a number of leaves."""
    sizes = _level_sizes(n_leaves)
    # A single node at the end of a level is not combined.
    return sum(above - (below % TREE_WIDTH == 1) for below, above in pairwise(sizes))


def _level_sizes(n_leaves: int) -> list[int]:
    """Return the number of nodes per level, from the leaves to the root."""
    sizes = [n_leaves]
    while sizes[-1] > 1:
        sizes.append(-(sizes[-1] // -TREE_WIDTH))
    return sizes


@dataclass(frozen=True)
class Tree:
    """A graph that reduces leaves in order, in a tree of fixed width."""

    tasks: dict[Any, Any]  # the whole graph
    root: TaskRef
    leaves: dict[int, TaskRef]  # leaves to compute
    nodes: dict[Any, Node]  # nodes to compute, by key

    def leaves_in_order(self) -> list[int]:
        """Return the positions of the leaves to compute, in the order in which Dask runs them."""
        priorities = order(self.tasks)
        return sorted(self.leaves, key=lambda i: priorities[self.leaves[i].key])


class TaskGraph:
    """A graph under construction, with unique keys.

    No two passes share a key, so a scheduler cannot confuse their sums. The first word of a key is
    shown on the dashboard.
    """

    def __init__(self, shared: dict[Any, Any]) -> None:
        self._tasks: dict[Any, Any] = dict(shared)
        self._token = uuid.uuid4().hex

    def constant(self, name: str, value: Any) -> TaskRef:
        """Add a value that many tasks share, sent to each worker once."""
        if isinstance(value, Future):
            self._tasks[value.key] = value
            return TaskRef(value.key)
        key = f"nlsq-{name}-{self._token}"
        self._tasks[key] = DataNode(key, value)
        return TaskRef(key)

    def task(
        self,
        name: str,
        index: int,
        function: Callable[..., Any],
        *args: Any,
        inputs: Iterable[Any] = (),
    ) -> TaskRef:
        """Add a task; results replace ``TaskRef`` arguments and the keys ``inputs``."""
        key = (f"nlsq-{name}-{self._token}", index)
        self._tasks[key] = Task(key, function, *args, *map(TaskRef, inputs))
        return TaskRef(key)

    def tree(
        self,
        n_leaves: int,
        leaf: Callable[[int], TaskRef],
        combine: Callable[..., Any],
        known: Mapping[Node, Any],
    ) -> Tree:
        """Combine leaves in order, in a tree of fixed width.

        Parameters
        ----------
        n_leaves : int
        leaf : callable
            Adds the task of the i-th leaf.
        combine : callable
            Combines results in order.
        known : mapping of Node to result
            Partial results that are not recomputed.
        """
        sizes = _level_sizes(n_leaves)
        levels = range(len(sizes))

        def is_inside_known(level: int, i: int) -> bool:
            above = levels[level + 1 :]
            return any((upper, i // TREE_WIDTH ** (upper - level)) in known for upper in above)

        leaves: dict[int, TaskRef] = {}
        nodes: dict[Any, Node] = {}
        below: list[TaskRef | None] = []
        for level, size in enumerate(sizes):
            nodes_above: list[TaskRef | None] = []
            for i in range(size):
                children = below[i * TREE_WIDTH : (i + 1) * TREE_WIDTH]
                if is_inside_known(level, i):
                    nodes_above.append(None)
                elif (level, i) in known:
                    nodes_above.append(self.constant(f"partial-{level}-{i}", known[level, i]))
                elif len(children) == 1:
                    nodes_above.append(children[0])
                else:
                    number = sum(sizes[1:level]) + i
                    task = self.task("combine", number, combine, *children) if level else leaf(i)
                    if not level:
                        leaves[i] = task
                    nodes[task.key] = level, i
                    nodes_above.append(task)
            below = nodes_above
        (root,) = below
        assert root is not None
        return Tree(self._tasks, root, leaves, nodes)

    def of_one(self, result: TaskRef) -> Tree:
        """Return the tree of a single result."""
        return Tree(self._tasks, result, {}, {result.key: (0, 0)})
