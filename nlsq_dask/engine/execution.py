"""Compute sums on the Dask scheduler, with access to partial results.

A partial result is the sum over some consecutive blocks: a leaf or an inner node of the tree that
adds the sums. The tree is fixed, so a sum that reuses partial results of an interrupted run has the
same bits.
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
from dask._task_spec import execute_graph
from dask.base import get_scheduler
from dask.callbacks import Callback
from dask.delayed import Delayed
from dask.local import get_async, get_sync
from dask.threaded import get as get_threaded
from distributed import Client, Future, KilledWorker, as_completed, rejoin, secede
from distributed.client import FutureCancelledError, FuturesCancelledError
from distributed.utils import thread_state  # type: ignore[attr-defined]
from numpy.typing import NDArray

from nlsq_dask.engine.reduction_tree import TREE_WIDTH, Node, Tree
from nlsq_dask.engine.serialization import to_opaque_graph
from nlsq_dask.engine.source_graph import needed_keys
from nlsq_dask.engine.waiting import DISCONNECTED, WorkerMonitor, WorkersReplacedError
from nlsq_dask.engine.workers import Workers, is_connected

_CHECK_INTERVAL = 1.0  # seconds between checks while a computation runs
_GATHER_INTERVAL = 1.0  # seconds between checks that gathered results still exist
_IN_PROCESS = (None, get_sync, get_threaded)
_MAX_INLINE = 16  # tasks that are computed without a scheduler
# Dask's local schedulers, which report every finished task.
_LOCAL = (None, get_sync, get_threaded, dask.multiprocessing.get)


class Amount(NamedTuple):
    """An amount of data, as numbers of blocks, rows and bytes."""

    blocks: int
    rows: int
    bytes: int


@dataclass
class PartialResults:
    """Known sums over parts of the data, which do not overlap.

    A part is a node of the tree that adds the sums of block groups; a leaf is the sum of one group.
    """

    sizes: NDArray[np.int64]  # blocks, rows and bytes of each of the n leaves, shape (n, 3)
    values: dict[Node, Any] = field(default_factory=dict)  # results, or futures on a cluster
    _sums: NDArray[np.int64] = field(init=False)  # cumulative sizes, shape (n + 1, 3)

    def __post_init__(self) -> None:
        self._sums = np.concatenate([np.zeros((1, 3), np.int64), self.sizes.cumsum(axis=0)])

    @property
    def futures(self) -> dict[Node, Future[Any]]:
        """The sums that are futures on a cluster, by position in the tree."""
        return {n: v for n, v in self.values.items() if isinstance(v, Future)}

    def add(self, node: Node, value: Any) -> None:
        """Add a partial result, and remove the smaller ones that it contains."""
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
        """Remove the futures of results that were lost with their workers."""
        for node, future in self.futures.items():
            if future.status != "finished":
                del self.values[node]

    def release(self) -> None:
        """Release all futures, so that workers can delete the results."""
        for future in self.futures.values():
            future.release()

    @property
    def total(self) -> Amount:
        """The amount of all data."""
        return Amount(*map(int, self._sums[-1]))

    @property
    def finished(self) -> Amount:
        """The amount of data that the partial results cover."""
        total = np.zeros(3, np.int64)
        for level, i in self.values:
            width = TREE_WIDTH**level
            end = min((i + 1) * width, len(self.sizes))
            total += self._sums[end] - self._sums[i * width]
        return Amount(*map(int, total))

    def collect(self) -> dict[Node, Any]:
        """Fetch the partial results from the workers; lost ones are not returned."""
        futures = self.futures
        if not futures:
            return dict(self.values)
        client = next(iter(futures.values())).client
        # Gathering a lost result would wait until a worker joins.
        keys = client.sync(_held_keys, client, list(futures.values()))
        held = {n: future for n, future in futures.items() if future.key in keys}
        results = client.sync(_gather_if_held, client, list(held.values()))
        if len(results) == len(held):
            self.values.update(zip(held, results, strict=True))
        return {n: v for n, v in self.values.items() if not isinstance(v, Future)}


async def _held_keys(client: Client, futures: list[Future[Any]]) -> set[Any]:
    """Return the keys of the futures whose results exist on a worker."""
    assert client.scheduler is not None
    holders = await client.scheduler.who_has(keys=[future.key for future in futures])
    return {key for key, workers in holders.items() if workers}


async def _gather_if_held(client: Client, futures: list[Future[Any]]) -> list[Any]:
    """Fetch results; return an empty list if one of them is lost in the meantime.

    The transfer is then not canceled, because other transfers may wait for the same answer. It ends
    when the futures are released.
    """
    gathering = asyncio.ensure_future(client.gather(futures, errors="skip", asynchronous=True))
    while True:
        done, _ = await asyncio.wait([gathering], timeout=_GATHER_INTERVAL)
        if done:
            return list(await gathering)
        if len(await _held_keys(client, futures)) < len(futures):
            return []


Watch = Callable[[PartialResults], None]


LOST_WORKERS = (FutureCancelledError, FuturesCancelledError, KilledWorker, WorkersReplacedError)


MAX_ATTEMPTS = 4  # to compute with other workers if some are lost, without progress


def lost_message(client: Client | None, error: Exception) -> str:
    """Return the text of a ClusterLostError, given the error of distributed."""
    if not is_connected(client):
        return DISCONNECTED
    return (
        f"workers were lost in each of {MAX_ATTEMPTS} attempts to read the data ({error}). See the "
        f"workers' logs for the reason. If they ran out of memory, use smaller chunks or workers "
        f"with more memory."
    )


def execute(
    tree: Tree,
    workers: Workers,
    partials: PartialResults,
    watch: Watch,
    monitor: WorkerMonitor,
) -> Any:
    """Compute a tree on the active Dask scheduler and return the result of its root.

    Parameters
    ----------
    tree : Tree
    workers : Workers
        The processes of the active scheduler.
    partials : PartialResults
        Each finished node of the tree is added to it.
    watch : callable
        Called with ``partials`` after each finished node, and every second on a cluster. An
        exception that it raises ends the computation.
    monitor : WorkerMonitor
        Watches the workers of a cluster.
    """
    if workers.client is not None:

        def check() -> None:
            watch(partials)
            monitor.check(workers, partials.finished)

        with _secede():
            return _run_on_cluster(tree, workers.client, partials, watch, check)

    def finished(key: Any, result: Any, *_: Any) -> None:
        if key in tree.nodes:
            partials.add(tree.nodes[key], result)
            watch(partials)

    get = get_scheduler()
    is_small = len(tree.nodes) == 1 and len(tree.tasks) <= _MAX_INLINE
    if is_small and get in _IN_PROCESS and not Callback.active:
        # A scheduler would take longer than many a task.
        root = tree.root.key
        tasks = {key: tree.tasks[key] for key in needed_keys([root], tree.tasks)}
        result = execute_graph(tasks)[root]
        finished(tree.root.key, result)
        return result
    options = callback_options(get, finished)
    return Delayed(tree.root.key, tree.tasks).compute(optimize_graph=False, **options)


def callback_options(get: Any, finished: Callable[..., None]) -> dict[str, Any]:
    """Return the options for a local scheduler that let it call ``finished`` after each task."""
    if get in _LOCAL or (isinstance(get, partial) and get.func is get_async):  # of an executor
        # As an argument, because concurrent fits share the global set of callbacks.
        return {"callbacks": [*Callback.active, (None, None, None, finished, None)]}
    return {}


def next_finished(results: as_completed, check: Callable[[], None]) -> Any:
    """Return the next of some futures that is done; meanwhile, call ``check`` every second."""
    checked = time.monotonic()
    while not results.has_ready():
        with results.thread_condition:
            results.thread_condition.wait(timeout=0.1)
        if time.monotonic() - checked > _CHECK_INTERVAL:
            check()
            checked = time.monotonic()
    return next(results)


def _run_on_cluster(
    tree: Tree,
    client: Client,
    partials: PartialResults,
    watch: Watch,
    check: Callable[[], None],
) -> Any:
    futures: list[Future[Any]] = client.get(
        to_opaque_graph(tree.tasks), list(tree.nodes), sync=False
    )
    finished = as_completed(futures)
    try:
        while True:
            future: Future[Any] = next_finished(finished, check)
            if future.status != "finished":
                future.result()  # raises
            partials.add(tree.nodes[future.key], future)
            watch(partials)
            if future.key == tree.root.key:
                return _fetch(future, client, check)
    finally:
        # Explicitly, because an exception from a future keeps it and this frame alive.
        kept = {future.key for future in partials.futures.values()}
        for future in futures:
            if future.key not in kept:
                future.release()


def _fetch(future: Future[Any], client: Client, check: Callable[[], None]) -> Any:
    """Return the result of a finished task; meanwhile, call ``check`` every second.

    If the result is lost with its worker, the scheduler recomputes it. A transfer that ``check``
    interrupts ends when the future is released.
    """
    loop: Any = client.loop
    gathering: Any = client.gather(future, asynchronous=True)
    transfer = asyncio.run_coroutine_threadsafe(gathering, loop.asyncio_loop)
    while True:
        try:
            return transfer.result(timeout=_CHECK_INTERVAL)
        except TimeoutError:
            if transfer.done():  # in the meantime, or with the TimeoutError of a task
                return transfer.result()
        check()


def is_inside_task() -> bool:
    """Return whether the calling thread runs a task of a distributed worker."""
    return bool(getattr(thread_state, "key", False))


@contextmanager
def _secede() -> Iterator[None]:
    """Context in which the worker runs other tasks, if this fit itself runs inside a Dask task."""
    inside = is_inside_task()
    if inside:
        try:
            secede()
        except KeyError:  # already seceded, as in ``distributed.worker_client``
            inside = False
    try:
        yield
    finally:
        if inside:
            rejoin()
