"""The Dask graph of a result that the caller computes: a task per group of blocks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from dask._task_spec import GraphNode, Task, TaskRef

from nlsq_dask.engine.serialization import OpaqueWhenPickled
from nlsq_dask.engine.source_graph import Index, SourceGraph

Key = Any


def tile_graph(
    source: SourceGraph,
    groups: Sequence[Sequence[Index]],
    keys: Sequence[Key],
    function: Callable[..., Any],
    arguments: Sequence[Any],
    token: str,
) -> dict[Key, Any]:
    """Return a graph with a task per group: ``function((reader, argument), *inputs)``.

    A scheduler that receives the graph needs neither this package nor JAX.

    Parameters
    ----------
    source : SourceGraph
    groups : sequence of sequences of tuple of int
        Positions in the grid of the blocks of each group.
    keys : sequence
        Keys of the tasks.
    function : callable
        Sent to each worker once. It is called with the ``GroupReader`` of the group and the
        argument of the group, as a pair, and the results of the tasks that the reader needs.
    arguments : sequence
        One for each group.
    token : str
        Part of the names of the other tasks.
    """
    readers, shared = source.readers(groups)
    # Other names than in the caller's own graph, in which these tasks have no retries.
    renamed: dict[Key, Key] = {
        key: (f"nlsq-input-{token}", i)
        for i, (key, node) in enumerate(shared.items())
        if isinstance(node, GraphNode)
    }
    names: list[list[Any]] = [[renamed.get(k, k) for k in reader.inputs] for reader in readers]
    inputs = [[TaskRef(name) for name in own] for own in names]
    pairs = list(zip(readers, arguments, strict=True))
    return {
        **{renamed.get(key, key): _renamed(node, renamed) for key, node in shared.items()},
        **calls(function, keys, pairs, token, inputs),
    }


def calls(
    function: Callable[..., Any],
    keys: Sequence[Key],
    arguments: Sequence[Any],
    token: str,
    inputs: Sequence[Sequence[TaskRef]] = (),
) -> dict[Key, Any]:
    """Return a graph with a task per key: ``function(argument, *inputs)``.

    A scheduler that receives it needs neither this package nor JAX. The parameters are those of
    ``tile_graph``; ``inputs`` has references to other tasks for each key.
    """
    common = f"nlsq-fit-each-{token}"
    graph: dict[Key, Any] = {common: Task(common, operator.call, OpaqueWhenPickled(function))}
    for key, argument, own in zip_longest(keys, arguments, inputs, fillvalue=()):
        graph[key] = Task(key, operator.call, TaskRef(common), _opaque(argument), *own)
    return graph


def _opaque(value: Any) -> Task:
    return Task(None, operator.call, OpaqueWhenPickled(value))


def _renamed(node: Any, renamed: Mapping[Key, Key]) -> Any:
    """Return a node under its new name; a future is not changed."""
    if not isinstance(node, GraphNode):
        return node
    if not isinstance(node, Task):
        return node.substitute(dict(renamed), key=renamed[node.key])
    inputs = (TaskRef(renamed.get(ref.key, ref.key)) for ref in node.args)
    return Task(renamed[node.key], operator.call, _opaque(node.func), *inputs)
