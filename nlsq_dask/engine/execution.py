"""A reduction whose partial results can be seen, kept and given back while it runs.

A part is a node of the tree in which sums combine: a leaf, or what finished leaves were combined
to. The tree is fixed, so a reduction that is given results of an earlier one has the same bits as
if it had made them itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import dask.multiprocessing
import numpy as np
from dask.base import get_scheduler
from dask.callbacks import Callback
from dask.delayed import Delayed
from dask.local import get_async, get_sync
from dask.threaded import get as get_threaded
from distributed import Client, Future, as_completed, rejoin, secede
from distributed.utils import thread_state  # type: ignore[attr-defined]
from numpy.typing import NDArray

from nlsq_dask.engine.reduction_tree import TREE_WIDTH, Node, Tree
from nlsq_dask.engine.serialization import to_opaque_graph
from nlsq_dask.engine.workers import Workers

_PATIENCE = 5.0  # seconds, and more each time, for a result to be sent
_GATHER_INTERVAL = 1.0  # seconds between questions whether what is gathered is still there
# Dask's own schedulers without a cluster, which tell of every task that has finished.
_LOCAL = (None, get_sync, get_threaded, dask.multiprocessing.get)


class Amount(NamedTuple):
    """How much data there is in some blocks."""

    blocks: int
    rows: int
    bytes: int


@dataclass
class PartialResults:
    """The partial results of a reduction, without those that a larger finished one contains.

    Attributes
    ----------
    sizes : ndarray of int, shape (n, 3)
        ``Amount`` of each leaf of the tree.
    values : dict of Node to result
        On a cluster, to a future of it.
    """

    sizes: NDArray[np.int64]
    values: dict[Node, Any] = field(default_factory=dict)
    _sums: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._sums = np.concatenate([np.zeros((1, 3), np.int64), self.sizes.cumsum(axis=0)])

    def add(self, node: Node, value: Any) -> None:
        """Add a part that has just finished; those inside it go."""
        level, i = node
        inside = [
            (lower, j)
            for lower, j in self.values
            if lower < level and j // TREE_WIDTH ** (level - lower) == i
        ]
        for inner in inside:
            smaller = self.values.pop(inner)
            if isinstance(smaller, Future):
                smaller.release()
        self.values[node] = value

    def drop_missing(self) -> None:
        """Forget what the workers that had it have lost."""
        missing = [
            n for n, v in self.values.items() if isinstance(v, Future) and v.status != "finished"
        ]
        for node in missing:
            del self.values[node]

    def release(self) -> None:
        """Let workers forget what is still with them."""
        for value in self.values.values():
            if isinstance(value, Future):
                value.release()

    @property
    def total(self) -> Amount:
        """What there is."""
        return Amount(*map(int, self._sums[-1]))

    @property
    def finished(self) -> Amount:
        """What is in the partial results."""
        total = np.zeros(3, np.int64)
        for level, i in self.values:
            width = TREE_WIDTH**level
            end = min((i + 1) * width, len(self.sizes))
            total += self._sums[end] - self._sums[i * width]
        return Amount(*map(int, total))

    def collect(self) -> dict[Node, Any]:
        """Return the partial results themselves, fetched from the workers where they are there."""
        futures = {n: v for n, v in self.values.items() if isinstance(v, Future)}
        if not futures:
            return dict(self.values)
        client = next(iter(futures.values())).client
        # Of those alone that a worker has: for what was lost, it would wait until a worker comes.
        keys = client.sync(_held_keys, client, list(futures.values()))
        held = {n: future for n, future in futures.items() if future.key in keys}
        results = client.sync(_gather_if_held, client, list(held.values()))
        if len(results) == len(held):
            self.values.update(zip(held, results, strict=True))
        return {n: v for n, v in self.values.items() if not isinstance(v, Future)}


async def _held_keys(client: Client, futures: list[Future[Any]]) -> set[Any]:
    """Return the keys of what a worker has."""
    assert client.scheduler is not None
    holders = await client.scheduler.who_has(keys=[future.key for future in futures])
    return {key for key, workers in holders.items() if workers}


async def _gather_if_held(client: Client, futures: list[Future[Any]]) -> list[Any]:
    """Return results that were there, or nothing if one of them goes before it is sent.

    The gathering would wait until a worker comes. It is not cancelled, because others that gather
    at the same time wait for the same answer; it ends when the futures are released.
    """
    gathering = asyncio.ensure_future(client.gather(futures, errors="skip", asynchronous=True))
    while True:
        done, _ = await asyncio.wait([gathering], timeout=_GATHER_INTERVAL)
        if done:
            return list(await gathering)
        if len(await _held_keys(client, futures)) < len(futures):
            return []


Watch = Callable[[PartialResults], None]


_REPLACED = "all workers were replaced"


class WorkersReplacedError(Exception):
    """None of the workers that a fit had placed something on is there, but others are."""


def execute(tree: Tree, workers: Workers, partials: PartialResults, watch: Watch) -> Any:
    """Run on the active scheduler, calling ``watch`` whenever a part has finished.

    On a cluster, where tasks may wait for a worker, it is called every second in any case.

    Parameters
    ----------
    tree : Tree
    workers : Workers
    partials : PartialResults
        Receives what has finished.
    watch : callable
        May raise, which ends the reduction.
    """
    if workers.client is not None:
        with _secede():
            return _run_on_cluster(tree, workers, workers.client, partials, watch)

    def finished(key: Any, result: Any, *_: Any) -> None:
        if key in tree.nodes:
            partials.add(tree.nodes[key], result)
            watch(partials)

    options: dict[str, Any] = {}
    get = get_scheduler()
    if get in _LOCAL or (isinstance(get, partial) and get.func is get_async):  # of an executor
        # Given as an argument: the global set of callbacks would be shared by concurrent fits.
        options["callbacks"] = [*Callback.active, (None, None, None, finished, None)]
    return Delayed(tree.root.key, tree.tasks).compute(optimize_graph=False, **options)


def _run_on_cluster(
    tree: Tree, workers: Workers, client: Client, partials: PartialResults, watch: Watch
) -> Any:
    futures: list[Future[Any]] = client.get(
        to_opaque_graph(tree.tasks), list(tree.nodes), sync=False
    )
    finished = as_completed(futures)
    try:
        while True:
            watched = time.monotonic()
            while not finished.has_ready():
                with finished.thread_condition:
                    finished.thread_condition.wait(timeout=0.1)
                if time.monotonic() - watched > 1.0:
                    watch(partials)
                    # A scheduler leaves tasks that asked for a lost worker waiting, even if they
                    # allowed others, when there was none at all for a while.
                    if workers.are_replaced:
                        raise WorkersReplacedError(_REPLACED)
                    watched = time.monotonic()
            future: Future[Any] = next(finished)
            if future.status != "finished":
                future.result()  # raises
            partials.add(tree.nodes[future.key], future)
            watch(partials)
            if future.key == tree.root.key:
                return _fetch(future, workers, partials, watch)
    finally:
        # One by one, because an error that is raised from a future keeps it, and this frame.
        kept = {value.key for value in partials.values.values() if isinstance(value, Future)}
        for future in futures:
            if future.key not in kept:
                future.release()


def _fetch(future: Future[Any], workers: Workers, partials: PartialResults, watch: Watch) -> Any:
    """Return a result that was there; the workers that had it may have gone since.

    Then it is computed again, which those that took their place may never be asked to do.
    """
    patience = _PATIENCE
    while True:
        try:
            return future.result(timeout=patience)
        except TimeoutError:
            if future.status == "error":
                raise
            watch(partials)
            if workers.are_replaced:
                raise WorkersReplacedError(_REPLACED) from None
        patience *= 2


@contextmanager
def _secede() -> Iterator[None]:
    """Make room for the tasks of a fit that runs in a task itself, as Dask's own compute does."""
    inside = bool(getattr(thread_state, "key", False))
    if inside:
        try:
            secede()
        except KeyError:  # it has, as in ``distributed.worker_client``
            inside = False
    try:
        yield
    finally:
        if inside:
            rejoin()
