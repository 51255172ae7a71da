"""Killed drivers, killed workers, lost clusters: the fit goes on, with the same bits."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, KilledWorker, LocalCluster
from distributed.client import FutureCancelledError, FuturesCancelledError

import nlsq_dask as nd
from nlsq_dask.checkpoints.checkpoint import new_fit_name
from nlsq_dask.checkpoints.folder import CheckpointFolder
from nlsq_dask.engine import dataset, execution
from nlsq_dask.engine.reduction_tree import Tree
from nlsq_dask.engine.waiting import WorkerMonitor, WorkersReplacedError
from nlsq_dask.fit.interruption import Interruption
from tests import surviving_fit
from tests.clusters import later
from tests.surviving_fit import BLOCK_ROWS, N_BLOCKS

INTERVAL = 0.1  # seconds between checkpoints
SECONDS = 0.03  # that reading a block takes
N_THREADS = 2
DAMAGE = ["half", "before fsync", "before rename", "after rename"]


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start a fit in a process and return when it is about to begin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.surviving_fit", folder, "--out", out, *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> int:
    """Return how the process has ended."""
    process.communicate()
    return process.returncode


def reads(log: Path) -> list[tuple[float, int]]:
    """Return when which block was read."""
    if not log.exists():
        return []
    return [(float(t), int(i)) for t, i in map(str.split, log.read_text().splitlines())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The fit that nobody kills, and the moments at which it reads."""
    folder = tmp_path_factory.mktemp("whole")
    out, log = folder / "result.npz", folder / "reads.txt"
    assert end(start(folder / "checkpoints", out, "--log", log)) == 0
    found = dict(np.load(out))
    assert found["success"]
    assert found["n_passes"] >= 4
    return {**found, "reads": len(reads(log))}


def is_same(out: Path, whole: dict[str, Any]) -> bool:
    found = np.load(out)
    return all(
        np.array_equal(found[name], whole[name])
        for name in ("popt", "pcov", "n_passes", "rows_read", "nit", "success")
    )


def survives_a_kill(folder: Path, whole: dict[str, Any], after: float, delay: float) -> None:
    """Kill a fit when this share of its reading is done, and so many seconds later."""
    checkpoints, out, log = folder / "checkpoints", folder / "result.npz", folder / "reads.txt"
    process = start(checkpoints, out, "--log", log)
    while len(reads(log)) < after * whole["reads"]:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    end(process)
    killed = time.time()
    assert not out.exists()
    assert end(start(checkpoints, out, "--log", log)) == 0
    assert is_same(out, whole)
    # Lost is what the interval and the time of a group allow, which on a busy machine may be long,
    # and of each thread the group that it computed and the one that it had read ahead.
    moments = reads(log)
    # The blocks of the sample are read once more, to see that the data are the same.
    n_sample = whole["rows_read"] // BLOCK_ROWS - whole["n_passes"] * N_BLOCKS
    lost = len(moments) - whole["reads"] - n_sample
    before = sorted(t for t, _ in moments if t < killed)
    if any(checkpoints.glob("*.nlsq")) and before:
        group_time = max(np.diff([*before, killed]).max(), SECONDS)
        recently = sum(t >= killed - INTERVAL - 2 * group_time for t in before)
        assert lost <= recently + 2 * N_THREADS


def test_a_killed_fit_goes_on(tmp_path: Path, whole: dict[str, Any]) -> None:
    survives_a_kill(tmp_path, whole, 0.5, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment(tmp_path: Path, whole: dict[str, Any], seed: int) -> None:
    random = np.random.default_rng(seed)
    # One in ten before the first pass, where programs are compiled; none so late that it is over.
    after = max(random.uniform(-0.1, 0.95), 0.0)
    survives_a_kill(tmp_path, whole, after, random.uniform(0.0, SECONDS if after else 5.0))


@pytest.mark.parametrize(
    ("moment", "number"),
    [(m, n) for m in DAMAGE for n in (1, 5, 9, 14, 20)],
)
@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, whole: dict[str, Any], moment: str, number: int
) -> None:
    checkpoints, out = tmp_path / "checkpoints", tmp_path / "result.npz"
    process = start(checkpoints, out, "--die", moment, str(number))
    assert end(process) == -signal.SIGKILL
    assert not out.exists()
    assert end(start(checkpoints, out)) == 0
    assert is_same(out, whole)
    left = list(checkpoints.glob(".*"))
    if number > 1:
        assert not left
        return
    # There was nothing to resume, so another fit began; which cannot know that this one is dead
    # until its file has not changed for an hour.
    for path in left:
        os.utime(path, (0, 0))
    CheckpointFolder(checkpoints).prepare(new_fit_name())
    assert not list(checkpoints.glob(".*"))


def test_a_handler_of_sigterm_that_is_not_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    before, setter = signal.getsignal(signal.SIGTERM), signal.signal

    def unknown(number: int, handler: Any) -> Any:
        previous = setter(number, handler)
        return previous if handler is signal.SIG_DFL else None

    monkeypatch.setattr(signal, "signal", unknown)
    try:
        with Interruption().heeding_sigterm():
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        setter(signal.SIGTERM, before)


def test_sigterm_ends_a_fit_with_a_checkpoint(tmp_path: Path) -> None:
    expected = surviving_fit.fit()
    before = signal.getsignal(signal.SIGTERM)
    log = tmp_path / "reads.txt"

    def terminate() -> None:  # by what was read: before the fit has begun it would end the tests
        while not log.exists() or len(log.read_text().splitlines()) < 25:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate, daemon=True)
    thread.start()
    stopped = surviving_fit.fit(
        str(log), seconds=0.02, checkpoint_dir=tmp_path / "kept", stop_on_sigterm=True
    )
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not stopped.success
    assert "SIGTERM" in stopped.message
    path = re.search(r"resume_from_checkpoint='(.*)'\)", stopped.message)
    assert path is not None
    result = surviving_fit.fit(resume_from_checkpoint=path[1])
    assert result.success
    np.testing.assert_array_equal(result.popt, expected.popt)
    np.testing.assert_array_equal(result.pcov, expected.pcov)


def test_sigterm_needs_the_main_thread() -> None:
    errors: list[str] = []

    def run() -> None:
        try:
            surviving_fit.fit(stop_on_sigterm=True)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]


@contextmanager
def cluster(**options: Any) -> Iterator[tuple[LocalCluster, Client]]:
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, **options}
    with (
        LocalCluster(dashboard_address=":0", silence_logs=50, **settings) as local,
        Client(local) as client,
    ):
        yield local, client


@pytest.fixture(scope="module")
def undisturbed() -> nd.FitResult:
    with dask.config.set(scheduler="threads"):
        return surviving_fit.fit()


def is_equal(result: nd.FitResult, other: nd.FitResult) -> bool:
    return np.array_equal(result.popt, other.popt) and np.array_equal(result.pcov, other.pcov)


def kill_a_worker(client: Client, which: int = 0) -> None:
    pids = list(client.run(os.getpid).values())
    if pids:
        os.kill(pids[which % len(pids)], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_worker_killed_at_a_random_moment(seed: int, undisturbed: nd.FitResult) -> None:
    delay = np.random.default_rng(seed).uniform(0.1, 2.5)
    with cluster() as (_, client):
        surviving_fit.fit(seconds=0.01)  # workers have compiled
        with later(delay, lambda: kill_a_worker(client, seed)):
            result = surviving_fit.fit(seconds=0.05)
        assert is_equal(result, undisturbed)


@pytest.mark.slow
def test_a_killed_worker_and_data_that_were_sent_to_it() -> None:
    x, y = dask.compute(*surviving_fit.data())
    config = nd.HybridStreamingConfig(verbose=0, **surviving_fit.OPTIONS)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    arrays = [da.from_array(a, chunks=BLOCK_ROWS) for a in (x, y)]
    with dask.config.set(scheduler="threads"):
        expected = optimizer.fit(surviving_fit.model, *arrays, surviving_fit.START)
    killed = threading.Event()

    def kill(params: Any, loss: float, iteration: int) -> None:
        if not killed.is_set() and optimizer.current_phase == 2:
            killed.set()
            kill_a_worker(client)

    with cluster() as (_, client):
        result = optimizer.fit(surviving_fit.model, *arrays, surviving_fit.START, callback=kill)
        # The error that was survived refers to what it came from.
        assert comes_true(lambda: gc.collect() >= 0 and not client.futures)
    assert killed.is_set()
    assert is_equal(result, expected)


@pytest.mark.slow
def test_all_workers_go_and_come_back(undisturbed: nd.FitResult) -> None:
    with cluster() as (local, _):
        surviving_fit.fit(seconds=0.01)

        def go_and_come() -> None:
            local.scale(0)
            time.sleep(2.0)
            local.scale(2)

        with later(1.0, go_and_come):
            result = surviving_fit.fit(seconds=0.05)
    assert is_equal(result, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("which", [1, 2], ids=["sample", "pass"])
def test_all_workers_go_when_a_result_is_about_to_be_fetched(
    which: int, undisturbed: nd.FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, calls = execution._fetch, []

    def too_late(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == which:
            local.scale(0)
            time.sleep(2.0)
            local.scale(2)
        return fetched(*args)

    monkeypatch.setattr(execution, "_fetch", too_late)
    with cluster() as (local, _):
        result = surviving_fit.fit()
    assert is_equal(result, undisturbed)


LOST: dict[str, Callable[[], Exception]] = {  # made when raised: an error keeps where it was
    "KilledWorker": lambda: KilledWorker("task", None, 3),
    "FutureCancelledError": lambda: FutureCancelledError("task", "lost dependencies"),
    "FuturesCancelledError": lambda: FuturesCancelledError([]),
    "WorkersReplacedError": lambda: WorkersReplacedError("all workers were replaced"),
}


@pytest.mark.parametrize("name", LOST)
def test_workers_that_are_lost_while_the_sample_is_read(
    name: str,
    undisturbed: nd.FitResult,
    process_client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, trees = dataset.execute, []

    def lost_once(tree: Tree, *args: Any) -> Any:
        trees.append(tree)
        if len(trees) == 1:
            raise LOST[name]()
        return runs(tree, *args)

    monkeypatch.setattr(dataset, "execute", lost_once)
    with process_client.as_current():
        result = surviving_fit.fit()
    assert ["sample" in str(tree.root.key) for tree in trees[:3]] == [True, True, False]
    assert trees[0] is not trees[1]  # what it refers to was placed anew
    assert is_equal(result, undisturbed)
    trees.clear()
    gc.collect()  # the error that was survived refers to what it came from
    assert not process_client.futures


def test_workers_that_are_lost_again_and_again_while_the_sample_is_read(
    process_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(monitor: Any, workers: Any, progress: Any) -> None:
        raise WorkersReplacedError("all workers were replaced")

    monkeypatch.setattr(WorkerMonitor, "check", replaced)
    monkeypatch.setattr(execution, "_CHECK_INTERVAL", 0.0)
    with (
        process_client.as_current(),
        pytest.raises(
            nd.ClusterLostError,
            match=r"in each of 4 attempts to read the data \(all workers were replaced\)",
        ),
    ):
        surviving_fit.fit()


@pytest.mark.slow
def test_a_worker_that_joins_late(undisturbed: nd.FitResult) -> None:
    with cluster(n_workers=1) as (local, _), later(1.0, lambda: local.scale(2)):
        result = surviving_fit.fit(seconds=0.1)
    assert is_equal(result, undisturbed)


def test_a_fit_without_workers_ends_at_its_time(tmp_path: Path) -> None:
    with cluster(n_workers=0):
        result = surviving_fit.fit(max_walltime=1.0, checkpoint_dir=tmp_path / "time")
        assert "`max_walltime` was reached" in result.message
        with later(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            result = surviving_fit.fit(stop_on_sigterm=True)
        assert "SIGTERM" in result.message


@pytest.mark.slow
def test_a_fit_that_has_lost_its_workers_ends_at_its_time(
    tmp_path: Path, undisturbed: nd.FitResult
) -> None:
    with cluster() as (local, _):
        surviving_fit.fit()  # workers have compiled
        with later(1.0, lambda: local.scale(0)):
            cut = surviving_fit.fit(
                seconds=0.1, max_walltime=5.0, checkpoint_dir=tmp_path, checkpoint_interval=0.2
            )
        assert "`max_walltime` was reached" in cut.message
    with dask.config.set(scheduler="threads"):
        result = surviving_fit.fit(resume_from_checkpoint=tmp_path)
    assert is_equal(result, undisturbed)


CLUSTER = """
import time
from distributed import LocalCluster

if __name__ == "__main__":
    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp://",
        dashboard_address=":0",
    )
    print(cluster.scheduler_address, flush=True)
    time.sleep(600)
"""


def test_a_lost_scheduler_is_a_clear_error(tmp_path: Path, undisturbed: nd.FitResult) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    seen: list[int] = []

    def lose(params: Any, loss: float, iteration: int) -> None:
        if list(tmp_path.glob("*.nlsq")) and not seen:
            seen.append(iteration)
            process.kill()
            process.communicate()

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        Client(address, timeout=2),
        pytest.raises(nd.ClusterLostError, match=r"resume_from_checkpoint='.*nlsq'") as info,
    ):
        surviving_fit.fit(checkpoint_dir=tmp_path, callback=lose, callback_frequency=1)
    path = re.search(r"resume_from_checkpoint='(.*)'\)", str(info.value))
    assert path is not None
    with dask.config.set(scheduler="threads"):
        result = surviving_fit.fit(resume_from_checkpoint=path[1])
    assert is_equal(result, undisturbed)


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether a condition is met within some seconds: futures are let go in another thread."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def rss_mb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_memory_and_files_level_off_over_many_fits(tmp_path: Path) -> None:
    n = 60_000
    x = da.random.default_rng(0).random(n, chunks=5_000)
    y = 2.0 * da.exp(-0.7 * x) + 0.3 + 0.01 * da.random.default_rng(1).normal(size=n, chunks=5_000)
    config = nd.HybridStreamingConfig(
        verbose=0, checkpoint_dir=tmp_path, max_warmup_iterations=0, sample_rows=2_000
    )
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    memory: list[list[float]] = []
    with cluster() as (local, client):
        for i in range(200):
            result = optimizer.fit(
                lambda x, a, b, c, shift=0.001 * i: a * jnp.exp(-b * x) + c + shift,
                x,
                y,
                [1.0, 1.0, 0.1],
            )
            assert result.success
            assert comes_true(lambda: not client.futures)
            for file in tmp_path.iterdir():
                file.unlink()
            if i % 25 == 24:
                gc.collect()
                workers = list(client.run(rss_mb).values())
                memory.append([rss_mb(), *workers])
        assert comes_true(lambda: not local.scheduler.tasks)  # it runs in this process
    first, last = np.mean(memory[3:5], axis=0), np.mean(memory[-2:], axis=0)
    # Of 75 fits, each with a model of its own; programs are kept for the last 64.
    assert (last - first < 40).all(), memory
