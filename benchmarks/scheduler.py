"""What a pass over 10 TB costs a real distributed scheduler: its tasks, without their work.

    python -m benchmarks.scheduler

A pass over 10 TB is cut into 8192 groups, whose sums combine in a tree of width 16: 8739 tasks.
Here they do nothing, on 100 workers. Scheduler, workers (all 100 in one process) and client have a
process each, so that the processor time of the scheduler alone can be read: on a real cluster the
workers' share is spread over 100 machines, and here it is what the wall time mostly consists of.
The graph is the one that the package's engine makes: groups and kernel are held on the workers, a
pass sends parameters and takes sums back.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import numpy as np
from dask._task_spec import TaskRef
from dask.local import SynchronousExecutor
from distributed import Client, Worker, wait

from benchmarks import common
from nlsq_dask.engine.execution import PartialResults, execute
from nlsq_dask.engine.reduction_tree import TREE_WIDTH, TaskGraph, pin
from nlsq_dask.engine.waiting import WorkerMonitor
from nlsq_dask.engine.workers import Workers

_P = 10


def leaf(group: bytes, kernel: bytes, params: np.ndarray) -> np.ndarray:
    """Return sums as a group's task does, at once."""
    return np.zeros((_P + 1, _P + 1))


def combine(*sums: np.ndarray) -> np.ndarray:
    """Add sums up."""
    return np.sum(sums, axis=0)


class EmptyDataSet:
    """Groups held on the workers, and passes over them, as the package's engine makes them."""

    def __init__(self, n_groups: int) -> None:
        self._workers = Workers.active()
        self._groups = pin("group", [bytes(100)] * n_groups, self._workers)
        (self._kernel,) = pin("kernel", [bytes(50_000)], self._workers)
        wait(self._groups)

    def reduce(self) -> int:
        """Run a pass and return its number of tasks."""
        from benchmarks import scheduler as importable  # by name, not by value as from __main__

        graph = TaskGraph({})
        constants = (
            graph.constant("kernel", self._kernel),
            graph.constant("params", np.zeros(_P)),
        )

        def add_leaf(i: int) -> TaskRef:
            group = graph.constant(f"group-{i}", self._groups[i])
            return graph.task("leaf", i, importable.leaf, group, *constants)

        n_groups = len(self._groups)
        tree = graph.tree(n_groups, add_leaf, importable.combine, {})
        parts = PartialResults(np.ones((n_groups, 3), np.int64))
        monitor = WorkerMonitor(lambda event: None)
        execute(tree, self._workers, parts, lambda parts: None, monitor)
        parts.release()
        return len(tree.nodes)


@contextmanager
def cluster(n_workers: int) -> Iterator[Client]:
    """Start a scheduler in one process and all workers in another."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "scheduler.json")
        scheduler = "distributed.cli.dask_scheduler --port 0 --no-dashboard --host 127.0.0.1"
        commands = [
            [*f"{scheduler} --no-show --scheduler-file".split(), file],
            ["benchmarks.scheduler", "--work", str(n_workers), file],
        ]
        processes = []
        try:
            for command in commands:
                process = subprocess.Popen(
                    [sys.executable, "-m", *command], stderr=subprocess.DEVNULL
                )
                processes.append(process)
            with Client(scheduler_file=file, timeout=60) as client:
                client.wait_for_workers(n_workers, timeout=120)
                yield client
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()


async def work(n_workers: int, file: str) -> None:
    """Be so many workers, until this process is ended."""
    while not Path(file).exists():
        await asyncio.sleep(0.1)
    # A hundred profilers, monitors and threads in one interpreter would stand in each other's way.
    quiet = {"worker.profile.enabled": False, "admin.system-monitor.interval": "60s"}
    dask.config.set({f"distributed.{name}": value for name, value in quiet.items()})
    options: dict[str, Any] = {"nthreads": 1, "memory_limit": 0, "executor": SynchronousExecutor()}
    workers = [
        Worker(scheduler_file=file, name=i, dashboard=False, **options) for i in range(n_workers)
    ]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))


def measure(client: Client, n_groups: int, later: int) -> dict[str, Any]:
    """Time passes: on the wall, and in processor time of scheduler and client."""
    placing = time.perf_counter()
    data = EmptyDataSet(n_groups)
    placing = time.perf_counter() - placing
    runs = []
    for _ in range(1 + later):
        began = [client.run_on_scheduler(time.process_time), time.process_time()]
        wall = time.perf_counter()
        n_tasks = data.reduce()
        wall = time.perf_counter() - wall
        ended = [client.run_on_scheduler(time.process_time), time.process_time()]
        runs.append((wall, ended[0] - began[0], ended[1] - began[1]))
    columns = ("wall", "scheduler", "client")
    timings = {
        name: common.Timing(values[0], list(values[1:])).record()
        for name, values in zip(columns, zip(*runs, strict=True), strict=True)
    }
    return {"n_tasks": n_tasks, "placing_groups": placing, **timings}


def main() -> None:
    """Measure, print and save; with ``--work``, be the workers."""
    parser = common.arguments(__doc__)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        asyncio.run(work(int(args.work[0]), args.work[1]))
        return
    n_workers, n_groups, later = (10, 512, 1) if args.quick else (100, 8192, 1)
    with cluster(n_workers) as client:
        found = measure(client, n_groups, later)
    busy, n_tasks = found["scheduler"]["median"], found["n_tasks"]
    common.Report(
        "scheduler",
        f"A pass of {n_groups} groups on {n_workers} workers, without its work",
        settings={
            "n_workers": n_workers,
            "n_groups": n_groups,
            "width": TREE_WIDTH,
            "later": later,
        },
        figures=found,
        headlines=[
            (
                f"scheduler, a pass of {n_tasks:,} empty tasks on {n_workers} workers",
                f"{busy:.1f} s of its processor, {busy / n_tasks * 1e3:.2f} ms a task "
                f"({found['wall']['median']:.1f} s with all workers in one process)",
            )
        ],
        header=["what", "s", "first, s", "ms a task"],
        rows=[
            [
                what,
                f"{found[what]['median']:.2f}",
                f"{found[what]['first']:.2f}",
                f"{found[what]['median'] / n_tasks * 1e3:.3f}",
            ]
            for what in ("scheduler", "client", "wall")
        ],
    ).save(args)


if __name__ == "__main__":
    main()
