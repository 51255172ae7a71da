"""A reduction that is cut again and again, and goes on from its finished parts."""

from __future__ import annotations

from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from nlsq_dask.engine.execution import PartialResults, execute
from nlsq_dask.engine.reduction_tree import TREE_WIDTH, TaskGraph
from nlsq_dask.engine.waiting import WorkerMonitor
from nlsq_dask.engine.workers import Workers


class CutError(Exception):
    pass


def leaf(i: int) -> tuple[int, ...]:
    return (i,)


def joined(*parts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for part in parts for i in part)


def reduced(n: int, random: np.random.Generator) -> tuple[int, ...]:
    """Reduce n leaves, cut at random moments; check what is kept of each attempt."""
    known: dict[Any, Any] = {}
    while True:
        graph = TaskGraph({})
        tree = graph.tree(n, lambda i: graph.task("leaf", i, leaf, i), joined, known)
        left = int(random.integers(1, n + 20))

        def watch(parts: PartialResults, left: int = left, seen: list[int] = []) -> None:  # noqa: B006
            seen.append(parts.finished.blocks)
            if len(seen) % (left + 1) == left:
                raise CutError

        parts = PartialResults(np.ones((n, 3), np.int64), dict(known))
        try:
            monitor = WorkerMonitor(lambda event: None)
            result: tuple[int, ...] = execute(tree, Workers.active(), parts, watch, monitor)
        except CutError:
            known = parts.collect()
            assert parts.finished.blocks == sum(map(len, known.values()))
            for (level, i), value in known.items():
                width = TREE_WIDTH**level
                assert value == tuple(range(i * width, min((i + 1) * width, n)))
            continue
        parts.release()
        return result


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_whatever_was_kept_is_what_it_says(scheduler: str) -> None:
    random = np.random.default_rng(0)
    with dask.config.set(scheduler=scheduler):
        for n in [1, 2, 16, 17, 256, 257, *random.integers(1, 600, 25)]:
            assert reduced(int(n), random) == tuple(range(n))


@pytest.mark.timeout(60)
def test_parts_whose_workers_go_before_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        LocalCluster(
            n_workers=1, processes=False, dashboard_address=":0", silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        future = client.submit(leaf, 0)
        assert future.result() == (0,)
        gathers = client._gather

        async def too_late(*args: Any, **options: Any) -> Any:
            for worker in cluster.workers.values():
                await worker.close()
            return await gathers(*args, **options)

        monkeypatch.setattr(client, "_gather", too_late)
        parts = PartialResults(np.ones((2, 3), np.int64), {(0, 0): future, (0, 1): (1,)})
        assert parts.collect() == {(0, 1): (1,)}
        parts.release()


def test_on_a_cluster(process_client: Client) -> None:
    random = np.random.default_rng(1)
    with process_client.as_current():
        for n in (1, 18, 300):
            assert reduced(n, random) == tuple(range(n))
