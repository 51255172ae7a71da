"""``Workers``: the processes that run Dask tasks, with their threads and memory."""

from __future__ import annotations

import os
import socket
from collections import Counter, defaultdict
from dataclasses import dataclass

import dask
from dask.base import get_scheduler
from dask.local import get_sync
from dask.system import CPU_COUNT
from dask.threaded import get as get_threaded
from distributed import Client, get_worker
from distributed.system import MEMORY_LIMIT

from nlsq_dask.engine.serialization import WithPackageImport
from nlsq_dask.model.jax_scope import CPU, CUDA, local_platforms

_ASYNCHRONOUS = (
    "the active Dask client is asynchronous; a fit needs a synchronous client. Create it with "
    "Client(...), without asynchronous=True."
)


def _prepare(client_process: int) -> tuple[tuple[str, ...], str, int]:
    """Return the JAX platforms of this process, a name of its first GPU, and its ID.

    JAX's preallocation of GPU memory is turned off, except in the process of the client, given by
    its ID.
    """
    if os.getpid() != client_process:  # not in the caller's own process
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return local_platforms(), f"GPU {first or 0} of {socket.gethostname()}", os.getpid()


@dataclass(frozen=True)
class Workers:
    """The processes that run Dask tasks."""

    client: Client | None  # None without a cluster
    threads: dict[str, int]  # number by address of the process, "local" without a cluster
    memory_limit: int  # of the smallest process, in bytes
    is_persistent: bool  # whether objects in memory survive from task to task

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
            workers = client.scheduler_info(n_workers=-1)["workers"]
            limits = [info["memory_limit"] or MEMORY_LIMIT for info in workers.values()]
            threads = {address: int(info["nthreads"]) for address, info in workers.items()}
            return cls(client, threads, int(min(limits, default=MEMORY_LIMIT)), True)
        if get is get_sync:
            return cls(None, {"local": 1}, MEMORY_LIMIT, True)
        pool = dask.config.get("pool", None)
        count = dask.config.get("num_workers", None) or getattr(pool, "_max_workers", CPU_COUNT)
        return cls(None, {"local": int(count)}, MEMORY_LIMIT, get in (None, get_threaded))

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

    @property
    def are_replaced(self) -> bool:
        """Whether the cluster has workers now, but none of those in ``threads``."""
        if self.client is None or self.client.status != "running":
            return False
        now = self.client.scheduler_info(n_workers=-1)["workers"]
        return bool(now) and bool(self.threads) and not now.keys() & self.threads.keys()

    def _answers(self) -> list[tuple[tuple[str, ...], str, int]]:
        """Return what ``_prepare`` returns in each process."""
        if self.client is None:
            return [(local_platforms(), "", os.getpid())]
        run = self.client.run(WithPackageImport(_prepare), os.getpid(), on_error="ignore")
        # Workers that leave in the meantime do not answer.
        return [answer for answer in run.values() if answer]

    @property
    def platforms(self) -> tuple[str, ...]:
        """The JAX platforms, such as "cpu" and "cuda", of all processes."""
        platforms = {platform for answer, *_ in self._answers() for platform in answer}
        return tuple(sorted(platforms)) or (CPU,)

    @property
    def processes_per_device(self) -> int:
        """Largest number of processes that share a GPU; 1 if there is none."""
        processes = {answer[1:] for answer in self._answers() if CUDA in answer[0]}
        return max(Counter(device for device, _ in processes).values(), default=1)

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
