"""The Dask graph that sums over all blocks: groups of blocks, and a tree that adds their sums.

Groups and tree depend on the grid of blocks alone, not on the number of workers or the order in
which tasks run, so the sums have the same bits on every cluster.
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
from nlsq_dask.engine.source_graph import needed_keys
from nlsq_dask.engine.waiting import NoWorkersError, WorkersReplacedError
from nlsq_dask.engine.workers import Workers

Node = tuple[int, int]  # level, 0 for leaves, and position in the level

# A task costs a distributed scheduler about a millisecond, so small blocks share one and the number
# of groups is limited.
_MIN_GROUP_ROWS = 2**18
_MIN_GROUP_BLOCKS = 128
_MAX_GROUPS = 8192
TREE_WIDTH = 16
_SCATTER_TIMEOUT = 5.0  # seconds in which a scheduler finds a worker that runs tasks


def group_blocks(block_rows: NDArray[np.int64]) -> list[list[tuple[int, ...]]]:
    """Split the blocks into groups, each of which one task reads.

    Parameters
    ----------
    block_rows : ndarray of int
        Number of rows of each block, in the shape of the grid.

    Returns
    -------
    list of lists of tuple of int
        Positions of the blocks of each group, in C order of the grid, without empty blocks.
    """
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
    """Send large values to a cluster once, instead of with each graph that uses them.

    Returns
    -------
    dict
        A future for each key; empty without a cluster.

    Raises
    ------
    NoWorkersError
        If no worker runs tasks.
    WorkersReplacedError
        If a worker is lost while it receives the values.
    """
    if not values or client is None:
        return {}
    try:
        # New names: the release of an earlier name may still be in progress.
        futures = client.scatter(list(values.values()), hash=False, timeout=_SCATTER_TIMEOUT)
    except TimeoutError as error:
        raise NoWorkersError(str(error)) from error
    except OSError as error:  # the connection to a worker
        raise WorkersReplacedError(str(error)) from error
    return dict(zip(values, futures, strict=True))


def pin(name: str, values: list[Any], workers: Workers) -> list[Any]:
    """Distribute values over the workers.

    Parameters
    ----------
    name : str
        First word of the names of their tasks on the Dask dashboard.
    values : list
    workers : Workers

    Returns
    -------
    list
        Without a cluster, the values. On a cluster, a future for each value, as the result of a
        task, so that the scheduler restores the value if a worker is lost.
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
    """Return the number of tasks that combine the results of ``n_leaves`` tasks in a tree."""
    sizes = _level_sizes(n_leaves)
    # A single node at the end of a level is not combined.
    return sum(above - (below % TREE_WIDTH == 1) for below, above in pairwise(sizes))


def _level_sizes(n_leaves: int) -> list[int]:
    """Return the number of nodes in each level of the tree, from the leaves to the root."""
    sizes = [n_leaves]
    while sizes[-1] > 1:
        sizes.append(-(sizes[-1] // -TREE_WIDTH))
    return sizes


@dataclass(frozen=True)
class Tree:
    """A Dask graph that combines the results of its leaf tasks in order, level by level."""

    tasks: dict[Any, Any]  # the whole graph
    root: TaskRef  # the task of the final result
    leaves: dict[int, TaskRef]  # the leaf tasks to compute, by position in the lowest level
    nodes: dict[Any, Node]  # position in the tree of all tasks to compute, by key

    def leaves_in_order(self) -> list[int]:
        """Return the positions of the leaf tasks, in the order in which Dask runs them."""
        priorities = order(self.tasks)
        return sorted(self.leaves, key=lambda i: priorities[self.leaves[i].key])


class TaskGraph:
    """A Dask graph under construction.

    Each graph has keys of its own, so that the scheduler cannot mistake results of one graph for
    those of another. The Dask dashboard shows the beginning of a key, ``nlsq-`` and the name that
    the methods are given.

    Parameters
    ----------
    shared : dict
        Tasks, or futures, to begin with.
    keys : iterable of key, optional
        If given, only those of them are used that are needed for the results of these keys.
    """

    def __init__(self, shared: dict[Any, Any], keys: Iterable[Any] | None = None) -> None:
        used = shared if keys is None else needed_keys(keys, shared)
        self._tasks: dict[Any, Any] = {key: task for key, task in shared.items() if key in used}
        self._token = uuid.uuid4().hex

    def constant(self, name: str, value: Any) -> TaskRef:
        """Add a value that many tasks use, and that is therefore sent to each worker only once."""
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
        """Add a task that calls ``function(*args, *results)``.

        The results are those of the tasks ``inputs``. An argument that is a ``TaskRef`` is replaced
        by the result of its task as well.

        Parameters
        ----------
        name, index : str, int
            The key of the task consists of both and a unique token.
        function : callable
        *args : Any
        inputs : iterable of key
            Keys of tasks.
        """
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
        """Add tasks that combine the results of leaf tasks in order, ``TREE_WIDTH`` at a time.

        Parameters
        ----------
        n_leaves : int
            Number of leaf tasks.
        leaf : callable
            Adds the i-th leaf task and returns its ``TaskRef``.
        combine : callable
            Called with up to ``TREE_WIDTH`` consecutive results; returns their combination.
        known : mapping of Node to result
            Results from an earlier run, which are used instead of tasks.
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
        """Return the graph as a tree with a single node, the task ``result``."""
        return Tree(self._tasks, result, {}, {result.key: (0, 0)})
