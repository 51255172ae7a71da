"""``Workers``: the processes that run Dask tasks, with their threads and memory."""

from __future__ import annotations

import os
import socket
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import dask
import psutil
from dask.base import get_scheduler
from dask.local import get_sync
from dask.system import CPU_COUNT
from dask.threaded import get as get_threaded
from distributed import Client, get_worker
from distributed.system import MEMORY_LIMIT

from nlsq_dask._text import join_first
from nlsq_dask.engine.serialization import opaque_call
from nlsq_dask.model.jax_scope import CPU, CUDA, local_platforms

_ASYNCHRONOUS = (
    "the active Dask client is asynchronous; a fit needs a synchronous client. Create it with "
    "Client(...), without asynchronous=True."
)


Infos = dict[str, dict[str, Any]]  # what the scheduler knows of each worker, by address

_MAX_LISTED = 3


class Process(NamedTuple):
    """Facts on a process that runs tasks, after it has imported this package."""

    platforms: tuple[str, ...]  # of JAX
    gpu: str  # name of its first GPU
    pid: int
    n_bytes: int  # memory when it had imported the package, before it computed


def _describe_process(client_process: int) -> tuple[tuple[str, ...], str, int, int]:
    """Return the fields of ``Process`` for this process.

    JAX's preallocation of GPU memory is turned off, except in the process of the client, given by
    its ID.
    """
    if os.getpid() != client_process:  # not in the caller's own process
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    gpu = f"GPU {first or 0} of {socket.gethostname()}"
    return local_platforms(), gpu, os.getpid(), _bytes_after_import()


@cache
def _bytes_after_import() -> int:
    """Return the memory of this process at the first call, without results of tasks, in bytes."""
    used = int(psutil.Process().memory_info().rss)
    try:
        return max(used - int(get_worker().state.nbytes), 0)
    except ValueError:  # not a process of a worker
        return used


def is_connected(client: Client | None) -> bool:
    """Return whether there is a client with a scheduler."""
    return client is not None and client.status == "running"


def query_workers(client: Client) -> Infos:
    """Return what the scheduler knows of each worker."""
    try:
        # Not ``client.scheduler_info``, whose answer the client itself replaces from time to time
        # by one without workers.
        identity = client.sync(client.scheduler.identity, n_workers=-1)  # type: ignore[union-attr]
    except (OSError, AttributeError):  # the connection is lost, perhaps for a moment
        identity = client.scheduler_info(n_workers=-1)
    infos: Infos = identity["workers"]
    return infos


@dataclass(frozen=True)
class Workers:
    """The processes that run Dask tasks."""

    client: Client | None  # None without a cluster
    threads: dict[str, int]  # number by address of the process, "local" without a cluster
    memory_limit: int | None  # of the smallest process, in bytes; None if there is none yet
    is_persistent: bool  # whether objects in memory survive from task to task
    is_running: bool = True  # whether a process accepts tasks

    @classmethod
    def active(cls) -> Workers:
        """Return the workers of the active Dask client, or else of the configured scheduler.

        Raises
        ------
        RuntimeError
            If the client is asynchronous.
        """
        try:
            get = get_scheduler()
        except RuntimeError as error:  # Dask's message names no remedy
            if "asynchronous" not in str(error):
                raise
            raise RuntimeError(_ASYNCHRONOUS) from error
        client = getattr(get, "__self__", None)
        if isinstance(client, Client):
            if client.asynchronous:  # not checked by Dask for a given scheduler
                raise RuntimeError(_ASYNCHRONOUS)
            return cls.of(client, query_workers(client))
        if get is get_sync:
            return cls(None, {"local": 1}, MEMORY_LIMIT, True)
        pool = dask.config.get("pool", None)
        count = dask.config.get("num_workers", None) or getattr(pool, "_max_workers", CPU_COUNT)
        return cls(None, {"local": int(count)}, MEMORY_LIMIT, get in (None, get_threaded))

    @classmethod
    def of(cls, client: Client, infos: Infos) -> Workers:
        """Return the workers of a client, given what the scheduler knows of them."""
        limits = [int(info["memory_limit"] or MEMORY_LIMIT) for info in infos.values()]
        return cls(
            client=client,
            threads={address: int(info["nthreads"]) for address, info in infos.items()},
            memory_limit=min(limits, default=None),
            is_persistent=True,
            is_running=any(info["status"] == "running" for info in infos.values()),
        )

    @property
    def shares_memory(self) -> bool:
        """Whether tasks run in this process, and can use its objects."""
        return self.client is None and self.is_persistent

    @property
    def n_processes(self) -> int:
        """Number of processes, or 1 if the cluster has no workers yet."""
        return max(len(self.threads), 1)

    @property
    def max_threads(self) -> int:
        """Largest number of threads in one process."""
        return max(self.threads.values(), default=1)

    def idle_problem(self, n_tasks: int) -> str:
        """Return a sentence, without a full stop, if there are too few tasks; else ""."""
        n_threads = sum(self.threads.values())
        if n_tasks >= n_threads:
            return ""
        return (
            f"{n_tasks} task{'s' if n_tasks > 1 else ''} for {n_threads} threads: some threads "
            f"stay idle. Use smaller chunks"
        )

    @cached_property
    def _answers(self) -> dict[str, Process | Exception]:
        """Facts on each process, or why it has none, by address."""
        if self.client is None:
            return {"local": Process(local_platforms(), "", os.getpid(), 0)}
        describe = opaque_call(_describe_process, os.getpid())
        answers = self.client.run(describe, on_error="return")
        return {a: Process(*v) if isinstance(v, tuple) else v for a, v in answers.items()}

    @property
    def _processes(self) -> list[Process]:
        # Without workers that leave in the meantime, and do not answer.
        return [answer for answer in self._answers.values() if isinstance(answer, Process)]

    @property
    def import_problem(self) -> str:
        """A sentence, without a full stop, on workers that cannot import this package; else ""."""
        if self.client is None:
            return ""
        failed = {a: e for a, e in self._answers.items() if isinstance(e, ImportError)}
        if not failed:
            return ""
        one = len(failed) == 1
        listed = join_first(list(failed), _MAX_LISTED, noun="workers")
        return (
            f"the worker{'' if one else 's'} {listed} cannot import nlsq_dask: "
            f"{next(iter(failed.values()))}. Install nlsq_dask, in the version of this process, "
            f"and its dependencies in the environment of the workers"
        )

    def check_import(self) -> None:
        """Raise an ImportError if a worker cannot import this package."""
        if problem := self.import_problem:
            raise ImportError(f"{problem}.")

    @property
    def base_bytes(self) -> int:
        """Largest memory of a worker when it had imported this package; 0 without workers."""
        if self.client is None:
            return 0
        return max((process.n_bytes for process in self._processes), default=0)

    @property
    def platforms(self) -> tuple[str, ...]:
        """The JAX platforms, such as "cpu" and "cuda", of all processes."""
        platforms = {platform for process in self._processes for platform in process.platforms}
        return tuple(sorted(platforms)) or (CPU,)

    @property
    def processes_per_device(self) -> int:
        """Largest number of processes that share a GPU; 1 if there is none."""
        processes = {(p.gpu, p.pid) for p in self._processes if CUDA in p.platforms}
        return max(Counter(gpu for gpu, _ in processes).values(), default=1)

    def assign(self, n_items: int) -> dict[str | None, list[int]]:
        """Distribute items over the processes in proportion to their threads.

        Returns
        -------
        dict
            Indices of the items, by address of the process. The address is None, which stands for
            any worker, if the cluster has no workers yet.
        """
        turns: list[str | None] = [a for a, count in self.threads.items() for _ in range(count)]
        turns = turns or [None]
        shares: defaultdict[str | None, list[int]] = defaultdict(list)
        for i in range(n_items):
            shares[turns[i % len(turns)]].append(i)
        return shares


def process_memory() -> tuple[int, int]:
    """Return the memory limit of this process in bytes, and its number of threads for tasks."""
    try:
        worker = get_worker()
    except ValueError:  # not a task of a distributed worker
        pool = dask.config.get("pool", None)
        count = dask.config.get("num_workers", None) or getattr(pool, "_max_workers", CPU_COUNT)
        return int(MEMORY_LIMIT), int(count)
    limit = worker.memory_manager.memory_limit or MEMORY_LIMIT
    return int(limit), int(worker.state.nthreads)
