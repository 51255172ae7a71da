"""Clusters whose workers are missing, leave together, are paused, or lack the package."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import nlsq_dask as nd
from nlsq_dask.engine import dataset, waiting
from nlsq_dask.engine.execution import PartialResults
from nlsq_dask.engine.waiting import WorkersReplacedError
from nlsq_dask.events import BlocksFinished, Event, WaitingForWorkers, WorkersPaused
from tests import problems
from tests.clusters import cluster, later, once
from tests.problems import NO_WARMUP, decay_data, exponential

N, BLOCK = 80_000, 10_000
X, Y = decay_data(N)
START = [1.0, 1.0, 0.1]
OPTIONS: dict[str, Any] = {
    **NO_WARMUP,
    "sample_rows": 200,
    "gauss_newton_tol": 1e-12,
    "cache": 0,  # workers of this process that left would hold it for a while
}


def slowly(y: np.ndarray) -> np.ndarray:
    time.sleep(0.05)
    return y


def fit(observers: Any = (), **options: Any) -> nd.FitResult:
    """Fit with a large x in the graph; each block is a group, whose reading takes a moment."""
    y = da.from_array(Y, chunks=BLOCK).map_blocks(slowly, dtype=float)
    return problems.fit(exponential, X, y, START, observers=observers, **{**OPTIONS, **options})


@pytest.fixture(autouse=True)
def many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlsq_dask.engine.reduction_tree._MIN_GROUP_ROWS", BLOCK)


@pytest.fixture(scope="module")
def undisturbed() -> nd.FitResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlsq_dask.engine.reduction_tree._MIN_GROUP_ROWS", BLOCK)
        return fit()


def is_equal(result: nd.FitResult, other: nd.FitResult) -> bool:
    return np.array_equal(result.popt, other.popt) and np.array_equal(result.pcov, other.pcov)


@pytest.mark.parametrize("way", ["scale", "adapt"])
def test_a_cluster_that_is_still_starting(
    way: str, undisturbed: nd.FitResult, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Event] = []
    with cluster(0) as (local, _):
        if way == "adapt":  # it starts workers only if there are tasks
            local.adapt(minimum=0, maximum=1, interval="50ms", wait_count=100)
            result = fit()
        else:
            with later(1.6, lambda: local.scale(1)):
                result = fit([seen.append], verbose=1)
            waits = [event for event in seen if isinstance(event, WaitingForWorkers)]
            assert [(event.n_paused, event.n_requested, event.n_tasks) for event in waits] == [
                (0, 0, 0)
            ]
            out = capfd.readouterr().out
            assert f"waiting for workers: the cluster at {local.scheduler_address} has none" in out
    assert is_equal(result, undisturbed)


def test_all_workers_leave_in_a_pass_and_others_join(
    undisturbed: nd.FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_FIRST_REPORT", 0.0)
    saved: list[int] = []

    def come_back() -> None:
        saved.append(len(list(tmp_path.glob("*.nlsq"))))
        local.scale(1)

    with cluster() as (local, client):
        result = fit(
            [
                once(BlocksFinished, lambda: local.scale(0), after=3),
                once(WaitingForWorkers, lambda: threading.Timer(1.5, come_back).start()),
            ],
            checkpoint_dir=tmp_path,
            checkpoint_interval=1000,
        )
        deadline = time.monotonic() + 10  # futures are released in another thread
        while client.futures and time.monotonic() < deadline:
            gc.collect()  # the error that was survived refers to what it came from
            time.sleep(0.05)
        assert not client.futures
    assert saved == [1]
    assert is_equal(result, undisturbed)


def test_max_walltime_while_a_fit_waits(tmp_path: Path) -> None:
    with cluster(0):
        began = time.monotonic()
        result = fit(max_walltime=1.0, checkpoint_dir=tmp_path / "time")
        assert "`max_walltime` was reached" in result.message
        np.testing.assert_array_equal(result.popt, START)
        assert time.monotonic() - began < 10.0
        assert list((tmp_path / "time").glob("*.nlsq"))


def test_ctrl_c_while_a_fit_waits(tmp_path: Path, undisturbed: nd.FitResult) -> None:
    def interrupt() -> None:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    with cluster() as (local, _):
        leave = once(BlocksFinished, lambda: local.scale(0), after=3)
        with pytest.raises(KeyboardInterrupt) as info:
            fit(
                [leave, once(WaitingForWorkers, interrupt)],
                checkpoint_dir=tmp_path / "key",
                checkpoint_interval=1000,
            )
    assert "resume_from_checkpoint=" in info.value.__notes__[-1]
    assert is_equal(fit(resume_from_checkpoint=tmp_path / "key"), undisturbed)


def test_losses_with_progress_between_them(
    undisturbed: nd.FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, losses = dataset.execute, []

    def lossy(tree: Any, workers: Any, partials: PartialResults, watch: Any, monitor: Any) -> Any:
        n_known = partials.finished.blocks

        def lose(partials: PartialResults) -> None:
            watch(partials)
            if partials.finished.blocks > n_known and len(losses) < 6:
                partials.collect()
                losses.append(partials.finished.blocks)
                raise WorkersReplacedError("all workers were replaced")

        return runs(tree, workers, partials, lose, monitor)

    monkeypatch.setattr(dataset, "execute", lossy)
    with cluster():
        result = fit()
    assert len(losses) == 6
    assert is_equal(result, undisturbed)


def test_memory_that_stays_full(
    undisturbed: nd.FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_PAUSE", 0.5)
    monkeypatch.setattr(waiting, "_MAX_STALL", 2.5)
    seen: list[Event] = []

    def fill(dask_worker: Any) -> None:
        dask_worker.memory_manager.memory_pause_fraction = 1e-6

    with cluster() as (_, client):
        with (
            pytest.warns(UserWarning, match="paused workers because their memory is almost full"),
            pytest.raises(nd.ClusterLostError) as info,
        ):
            fit(
                [seen.append, once(BlocksFinished, lambda: client.run(fill), after=3)],
                checkpoint_dir=tmp_path,
                checkpoint_interval=1000,
            )
        address = next(iter(client.scheduler_info()["workers"]))
        # At the start of a fit as well.
        with (
            pytest.warns(UserWarning, match="paused workers"),
            pytest.raises(nd.ClusterLostError, match="all workers of the cluster are paused"),
        ):
            fit()
    assert f"worker {address} uses " in str(info.value)
    assert "Use workers with more memory" in str(info.value)
    assert "resume_from_checkpoint=" in str(info.value)
    assert any(isinstance(event, WorkersPaused) for event in seen)
    assert next(event.n_paused for event in seen if isinstance(event, WaitingForWorkers)) == 1
    result = fit(resume_from_checkpoint=tmp_path)
    assert is_equal(result, undisturbed)
    assert result.rows_read < undisturbed.rows_read + N  # the finished blocks were not read again


def test_workers_that_leave_when_their_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"status": "running", "memory_limit": 1000, "metrics": {"memory": 900}}
    queries = iter([{"tcp://a:1": full, "tcp://b:1": {**full, "metrics": {}}}, {}])
    monkeypatch.setattr(waiting, "query_workers", lambda client: next(queries))
    monitor, client = waiting.WorkerMonitor(lambda event: None), Mock()
    monitor.look(client)
    with pytest.warns(UserWarning, match=r"left .* full: worker tcp://a:1 uses 900 B of "):
        monitor.look(client)


def decay(t: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-b * t)


T = np.linspace(0.0, 3.0, 30)
CUBE = xr.DataArray(np.ones((30, 24, 40)), {"t": T}, dims=("t", "row", "col"))


def test_a_plan_does_not_wait() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
    with cluster(0):
        plans = [
            optimizer.plan(exponential, X, Y, START),
            optimizer.plan(decay, "t", CUBE, [1.0, 1.0], dims="t"),
        ]
    for plan in plans:
        assert plan.n_workers == 0
        assert plan.memory_limit is None
        assert any(
            "the cluster has no workers yet, and a fit waits for them; a worker with one thread "
            "needs a memory limit of" in problem
            for problem in plan.problems
        )
        assert "Workers                   none yet; the plan is for one" in str(plan)


WORKER = """
import sys
sys.modules["nlsq_dask"] = None
from distributed.cli.dask_worker import main
main([sys.argv[1], "--nthreads", "1", "--no-nanny", "--no-dashboard"])
"""


def test_a_worker_without_the_package() -> None:
    with cluster(0, protocol="tcp://") as (local, client):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, local.scheduler_address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            client.wait_for_workers(1, 60)
            address = next(iter(client.scheduler_info()["workers"]))
            named = f"the worker {address} cannot import nlsq_dask: "
            with pytest.raises(ImportError, match=named):
                fit()
            optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
            with pytest.raises(ImportError, match=named):
                optimizer.fit_each(decay, "t", CUBE, [1.0, 1.0], dims="t")
            plan = optimizer.plan(exponential, X, Y, START)
            assert any(named in problem for problem in plan.problems)
        finally:
            process.kill()
            process.wait()
