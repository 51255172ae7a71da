"""``WorkerMonitor``: wait while no worker of a cluster runs tasks, and report such workers."""

from __future__ import annotations

import math
import operator
import time
import uuid
from collections.abc import Callable
from typing import Any

from dask.utils import format_bytes, key_split
from distributed import Client, SpecCluster

from nlsq_dask._text import join_first
from nlsq_dask.engine.workers import Infos, Workers, is_connected, query_workers
from nlsq_dask.errors import ClusterLostError, warn_caller
from nlsq_dask.events import Observer, WaitingForWorkers, WorkersPaused

_POLL_INTERVAL = 0.25  # seconds between queries of the scheduler while a fit waits
_FIRST_REPORT = 1.0  # seconds without a worker that runs tasks until that is reported
_REPORT_INTERVAL = 30.0
_PAUSE = 10.0  # seconds until a paused worker is reported; most pauses are short
_MAX_STALL = 60.0  # seconds without progress during which all workers are paused
_MAX_STEP = 5.0  # seconds between two queries that count as time in which workers were paused
_FULL = 0.8  # of the memory limit of a worker, where Dask pauses it
_MAX_LISTED = 3
_WAIT = "nlsq-wait"  # name of a task

_REMEDY = (
    "Use workers with more memory, fewer threads per worker, smaller chunks or a smaller `cache`."
)
DISCONNECTED = (
    "the connection to the Dask scheduler was lost. Start a new cluster and client, then fit again."
)


class WorkersReplacedError(Exception):
    """All workers that held the data of a fit are gone, and new workers have joined."""


class NoWorkersError(Exception):
    """Data could not be sent to the cluster, because none of its workers runs tasks."""


class WorkerMonitor:
    """Watches the workers of a cluster during a fit.

    Parameters
    ----------
    emit : callable
        Called with ``WaitingForWorkers`` and ``WorkersPaused`` events.
    """

    def __init__(self, emit: Observer) -> None:
        self._emit = emit
        self._idle_since: float | None = None  # time since when no worker runs tasks
        self._reported_at = -math.inf
        self._all_left = False  # whether there were no workers since data were sent to them
        self._was_empty = False  # whether there were none at the last query
        self._paused_since: dict[str, float] = {}  # by address
        self._reported: set[str] = set()  # addresses of workers reported as paused
        self._infos: Infos = {}  # as of the last query
        self._stalled = 0.0  # seconds during which all workers were paused, since the last progress
        self._progress: Any = None
        self._looked_at = time.monotonic()

    def wait(self, check: Callable[[], None]) -> Workers:
        """Return the active workers as soon as one of them runs tasks.

        Parameters
        ----------
        check : callable
            Called without arguments while there is none. An exception that it raises ends the wait.

        Raises
        ------
        ClusterLostError
            If the connection to the scheduler is lost, or all workers stay paused.
        """
        workers = Workers.active()
        client = workers.client
        if client is not None and not is_connected(client):
            raise ClusterLostError(DISCONNECTED)
        if client is not None and not workers.is_running:
            # An adaptive cluster requests workers only for tasks.
            key = f"{_WAIT}-{uuid.uuid4().hex}"
            task = client.submit(operator.not_, True, key=key)
            try:
                while not workers.is_running:
                    if not is_connected(client):
                        raise ClusterLostError(DISCONNECTED)
                    check()
                    workers = Workers.of(client, self.look(client))
                    time.sleep(_POLL_INTERVAL)
            finally:
                task.release()
        self._all_left = False
        return workers

    def check(self, workers: Workers, progress: Any) -> None:
        """Report workers that run no tasks, and raise if the fit cannot continue with those it had.

        Parameters
        ----------
        workers : Workers
            The workers to which data were sent.
        progress : Any
            A value that changes if the fit makes progress.

        Raises
        ------
        WorkersReplacedError
            If all workers were replaced. After a time without workers, a scheduler may never run
            tasks that prefer a lost worker, even if they allow other workers.
        ClusterLostError
            If all workers stay paused, without progress.
        """
        if workers.client is None or not is_connected(workers.client):
            return
        infos = self.look(workers.client, progress)
        if infos and (self._all_left or not infos.keys() & workers.threads.keys()):
            raise WorkersReplacedError("all workers were replaced")

    def look(self, client: Client, progress: Any = None) -> Infos:
        """Report workers that run no tasks; return what the scheduler knows of the workers.

        Raises
        ------
        ClusterLostError
            If all workers stay paused, while ``progress`` does not change.
        """
        infos = query_workers(client)
        now = time.monotonic()
        # Two queries, because an answer may be lost.
        self._all_left |= not infos and self._was_empty
        self._was_empty = not infos
        paused = {a: info for a, info in infos.items() if info["status"] == "paused"}
        is_idle = not any(map(_is_working, infos.values()))
        self._report_paused(paused, now)
        self._report_left(infos)
        if is_idle:
            self._report_wait(client, len(paused), now)
        else:
            self._idle_since = None
        if progress is not None and progress != self._progress:
            self._progress, self._stalled = progress, 0.0
        elif is_idle and paused:
            self._stalled += min(now - self._looked_at, _MAX_STEP)
        self._looked_at = now
        if self._stalled >= _MAX_STALL:
            raise ClusterLostError(_stall_message(paused))
        return infos

    def _report_wait(self, client: Client, n_paused: int, now: float) -> None:
        if self._idle_since is None:
            self._idle_since, self._reported_at = now, -math.inf
        seconds = now - self._idle_since
        if seconds < _FIRST_REPORT or now - self._reported_at < _REPORT_INTERVAL:
            return
        self._reported_at = now
        cluster, scheduler = client.cluster, client.scheduler
        n_requested = len(cluster.plan) if isinstance(cluster, SpecCluster) else None
        n_tasks = sum(
            state.status == "pending" and key_split(key) != _WAIT
            for key, state in list(client.futures.items())
        )
        assert scheduler is not None
        self._emit(
            WaitingForWorkers(seconds, str(scheduler.address), n_paused, n_requested, n_tasks)
        )

    def _report_paused(self, paused: Infos, now: float) -> None:
        self._paused_since = {a: self._paused_since.get(a, now) for a in paused}
        new = [a for a in paused.keys() - self._reported if now - self._paused_since[a] >= _PAUSE]
        if not new:
            return
        self._reported.update(new)
        sentences = tuple(_memory_sentence(a, paused[a]) for a in sorted(new))
        self._emit(WorkersPaused(sentences))
        listed = join_first(sentences, _MAX_LISTED, "; ", "workers")
        warn_caller(
            f"Dask has paused workers because their memory is almost full: {listed}. The fit is "
            f"slower, or waits. {_REMEDY}"
        )

    def _report_left(self, infos: Infos) -> None:
        before, self._infos = self._infos, infos
        left = [a for a, info in before.items() if a not in infos and _is_full(info)]
        new = [a for a in left if a not in self._reported]
        if not new:
            return
        self._reported.update(new)
        listed = join_first([_memory_sentence(a, before[a]) for a in new], _MAX_LISTED, "; ")
        warn_caller(
            f"Workers left the cluster when their memory was almost full: {listed}, when last "
            f"seen. Dask restarts a worker above 95 % of its limit. {_REMEDY}"
        )


def _is_full(info: dict[str, Any]) -> bool:
    """Return whether a worker is paused, or soon will be, because its memory is almost full."""
    used, limit = info["metrics"].get("memory", 0), info["memory_limit"] or math.inf
    return info["status"] == "paused" or bool(used > _FULL * limit)


def _is_working(info: dict[str, Any]) -> bool:
    """Return whether a worker begins tasks, or at least completes those that it runs."""
    counts = info["metrics"].get("task_counts", {})
    return info["status"] == "running" or bool(counts.get("executing", 0))


def _memory_sentence(address: str, info: dict[str, Any]) -> str:
    used, limit = info["metrics"].get("memory", 0), info["memory_limit"]
    return f"worker {address} uses {format_bytes(used)} of its {format_bytes(limit or 0)}"


def _stall_message(paused: Infos) -> str:
    sentences = [_memory_sentence(*item) for item in paused.items()]
    listed = join_first(sentences, _MAX_LISTED, "; ", "workers")
    return (
        f"all workers of the cluster are paused, because their memory is almost full, and the fit "
        f"has made no progress for {_MAX_STALL:.0f} s: {listed}. Dask pauses a worker at 80 % of "
        f"its limit. {_REMEDY}"
    )
