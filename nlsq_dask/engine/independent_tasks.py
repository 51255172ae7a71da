"""``execute_each``: compute tasks on Dask, and hand over each result when it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from dask.base import get_scheduler
from dask.local import get_sync
from dask.threaded import get as get_threaded
from distributed import Client, Future, as_completed

from nlsq_dask.engine.execution import (
    LOST_WORKERS,
    MAX_ATTEMPTS,
    callback_options,
    is_inside_task,
    lost_message,
    next_finished,
)
from nlsq_dask.engine.waiting import NoWorkersError, WorkerMonitor
from nlsq_dask.engine.workers import Workers, is_connected
from nlsq_dask.errors import ClusterLostError
from nlsq_dask.events import Observer

T = TypeVar("T")
Key = Any
Tasks = tuple[Mapping[Key, Any], Sequence[Key]]  # a graph, and the keys to compute


class Gate:
    """Lets tasks of this process begin; once closed, none begins and those that run are awaited.

    A copy in another process stays open: its scheduler cancels tasks itself.
    """

    def __init__(self, is_copy: bool = False) -> None:
        self._is_copy = is_copy
        self._changed = threading.Condition()
        self._n_running = 0
        self._is_open = True
        self._results: dict[Any, Any] = {}  # that were not taken, by name

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, (True,)

    def run(self, name: Any, task: Callable[[], T]) -> T | None:
        """Return what ``task`` returns; None if the gate is closed."""
        if self._is_copy:
            return task()
        with self._changed:
            if not self._is_open:
                return None
            self._n_running += 1
        try:
            result = self._results[name] = task()
            return result
        finally:
            with self._changed:
                self._n_running -= 1
                self._changed.notify_all()

    def take(self, name: Any) -> None:
        """Forget the result of a task, which the caller has."""
        self._results.pop(name, None)

    def close(self) -> dict[Any, Any]:
        """Let no further task begin, wait for the running ones, and return what was not taken."""
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: not self._n_running)
        results, self._results = self._results, {}
        return results


def execute_each(
    make_tasks: Callable[[Client | None], Tasks],
    finished: Callable[[Key, Any], None],
    check: Callable[[], None],
    emit: Observer = lambda event: None,
) -> None:
    """Compute independent tasks on the active Dask scheduler; wait while no worker runs tasks.

    Within a task of a cluster, they are computed one after another in the same thread, because
    other tasks could only wait for that one.

    Parameters
    ----------
    make_tasks : callable
        Returns a graph and the keys of the tasks that are not finished, given the client of the
        cluster, or None. It is called again if workers are lost with data that were sent to them.
    finished : callable
        Called with key and result of each task when it is done, in this thread. An exception that
        it raises ends the computation.
    check : callable
        Called without arguments after each of them, and every second on a cluster. An exception
        that it raises ends the computation.
    emit : callable, optional
        Called with events on the workers.

    Raises
    ------
    ClusterLostError
        If the connection to the scheduler is lost, workers are lost repeatedly without progress, or
        all workers stay paused.
    ImportError
        If a worker cannot import this package.
    """
    client = None if is_inside_task() else Workers.active().client
    if client is None:
        _each_here(*make_tasks(None), finished, check)
        return
    monitor = WorkerMonitor(emit)
    n_losses = n_finished = n_before = 0

    def take(key: Key, result: Any) -> None:
        nonlocal n_finished
        finished(key, result)
        n_finished += 1

    def watch() -> None:
        check()
        if is_connected(client):
            monitor.look(client, n_finished)

    while True:
        monitor.wait(check)
        try:
            _each_on_cluster(*make_tasks(client), client, take, check, watch)
        except NoWorkersError:
            continue
        except ImportError:
            Workers.active().check_import()
            raise
        except LOST_WORKERS as error:
            n_losses = 1 if n_finished > n_before else n_losses + 1
            n_before = n_finished
            if not is_connected(client) or n_losses == MAX_ATTEMPTS:
                raise ClusterLostError(lost_message(client, error)) from error
        else:
            return


def _each_here(
    tasks: Mapping[Key, Any],
    keys: Sequence[Key],
    finished: Callable[[Key, Any], None],
    check: Callable[[], None],
) -> None:
    """Compute tasks on a scheduler of this machine."""
    missing = set(keys)

    def done(key: Key, result: Any, *_: Any) -> None:
        if key in missing:
            missing.remove(key)
            finished(key, result)
            check()

    get = get_sync if is_inside_task() else get_scheduler() or get_threaded
    results = get(tasks, list(keys), **callback_options(get, done))
    for key, result in zip(keys, results, strict=True):  # of a scheduler without callbacks
        done(key, result)


def _each_on_cluster(
    tasks: Mapping[Key, Any],
    keys: Sequence[Key],
    client: Client,
    finished: Callable[[Key, Any], None],
    check: Callable[[], None],
    watch: Callable[[], None],
) -> None:
    futures: list[Future[Any]] = client.get(dict(tasks), list(keys), sync=False)
    try:
        results = as_completed(futures, with_results=True, raise_errors=False)
        for _ in futures:
            future, result = next_finished(results, watch)
            if future.status != "finished":
                future.result()  # raises
            finished(future.key, result)
            check()
            future.release()
    finally:
        for future in futures:
            future.release()
