"""Opaque serialization: Dask graphs whose functions and values only workers unpickle.

The scheduler of a cluster unpickles graphs, although it may lack this package, JAX or the libraries
that read the caller's arrays. In an opaque graph it sees only keys, dependencies and bytes.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask._task_spec import DataNode, GraphNode, Task, TaskRef
from distributed.protocol.pickle import dumps, loads

from_opaque = loads  # a function that a scheduler has


def to_opaque(value: Any) -> bytes:
    """Return a value as bytes, which ``from_opaque`` restores on a worker."""
    data: bytes = dumps(WithPackageImport(value))
    return data


def to_opaque_graph(tasks: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a graph with the same keys and dependencies, but functions and values as bytes.

    Futures are not changed.
    """
    functions: dict[int, Task] = {}  # by id, each serialized once
    return {
        key: _to_opaque_task(key, node, functions) if isinstance(node, GraphNode) else node
        for key, node in tasks.items()
    }


def _to_opaque_task(key: Any, node: GraphNode, functions: dict[int, Task]) -> Task:
    if isinstance(node, DataNode):
        return Task(key, from_opaque, to_opaque(node.value))
    if isinstance(node, Task) and not node.kwargs and all(type(a) is TaskRef for a in node.args):
        function = id(node.func)
        if function not in functions:
            functions[function] = Task(None, from_opaque, to_opaque(node.func))
        return Task(key, operator.call, functions[function], *node.args)
    needed = tuple(node.dependencies)
    step = Task(None, from_opaque, to_opaque(_Step(node, needed)))
    return Task(key, operator.call, step, *map(TaskRef, needed))


def opaque_call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a function of other packages that unpickles ``function`` when called, and calls it.

    Where this package is missing, the call raises the ImportError.
    """
    call: Callable[[], Any] = Task(
        None, operator.call, Task(None, from_opaque, to_opaque(function)), *args
    )
    return call


@dataclass(frozen=True)
class OpaqueWhenPickled:
    """Function without arguments that returns a value, for graphs that the caller computes.

    In this process it holds the value itself. Pickled, as part of a graph that is sent to a
    scheduler, it becomes a function of other packages that restores the value from bytes.
    """

    value: Any

    def __call__(self) -> Any:
        """Return the value."""
        return self.value

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (from_opaque, to_opaque(self.value))


@dataclass(frozen=True)
class _Step:
    """Function that evaluates a node of a graph, given the results that it needs, in order."""

    node: GraphNode
    needed: tuple[Any, ...]  # keys of the results

    def __call__(self, *results: Any) -> Any:
        return self.node(dict(zip(self.needed, results, strict=True)))


@dataclass(frozen=True)
class WithPackageImport:
    """Wrapper of a value; unpickling it imports the whole package first and returns the value.

    Without it, one thread might import the package while another imports one of its modules. Each
    would wait for the other, and Python would raise an error.
    """

    value: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, ((_PACKAGE, self.value), 1)


class _Package:
    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (__name__.partition(".")[0],)


_PACKAGE = _Package()
