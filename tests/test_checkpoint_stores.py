"""Stores of checkpoints that are slow, go away or refuse; time limits and requeued jobs."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import nlsq_dask as nd
from nlsq_dask.checkpoints import journal
from nlsq_dask.events import CheckpointWritten, Event, IterationFinished, PassFinished
from nlsq_dask.kernels.in_memory import SampleObjective
from nlsq_dask.warmup.lbfgs import Warmup, WarmupState
from nlsq_dask.warmup.multistart import SuccessiveHalving
from tests.test_checkpoints import Clock, assert_same, fit

URL = "bucket://kept/checkpoints"
RARELY = {"checkpoint_frequency": 100, "checkpoint_interval": 1e9}
DOCS = Path(__file__).parents[1] / "docs"


class EndpointConnectionError(Exception):
    """As of botocore, whose errors are not OSErrors."""


class NoCredentialsError(Exception):
    """As of botocore."""


class Buckets(MemoryFileSystem):
    """An object store with one bucket."""

    protocol = "bucket"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    # Called before each request.
    fault: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("bucket://").strip("/")

    def _request(self, path: str) -> None:
        type(self).fault()
        if self._strip_protocol(path).split("/")[0] != "kept":
            raise FileNotFoundError("The specified bucket does not exist")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._request(path)
        self.store[self._strip_protocol(path)] = bytes(value)

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        self._request(path)
        return bytes(self.store[self._strip_protocol(path)])

    def rm_file(self, path: str) -> None:
        self._request(path)
        del self.store[self._strip_protocol(path)]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._request(path)
        prefix = f"{self._strip_protocol(path)}/"
        names = [name for name in self.store if name.startswith(prefix)]
        if not names:
            raise FileNotFoundError(path)
        return [{"name": n, "type": "file", "size": 0} for n in names] if detail else names

    def exists(self, path: str, **_: Any) -> bool:
        self._request(path)
        name = self._strip_protocol(path)
        return any(other == name or other.startswith(f"{name}/") for other in self.store)

    def isdir(self, path: str) -> bool:
        return self.exists(path) and self._strip_protocol(path) not in self.store

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pytest.fail("a bucket was made")

    mkdir = makedirs


@pytest.fixture
def buckets() -> Iterator[type[Buckets]]:
    fsspec.register_implementation("bucket", Buckets, clobber=True)
    yield Buckets
    Buckets.store.clear()
    Buckets.fault = staticmethod(lambda: None)


@pytest.fixture(scope="module")
def expected() -> nd.FitResult:
    return fit()


def test_a_store_that_goes_away_and_comes_back(
    buckets: type[Buckets], expected: nd.FitResult
) -> None:
    """It is away in the second pass; saving ends in the thread of the fit, where observers are."""
    threads, saved, tried = set(), [], threading.Event()

    def away() -> None:
        tried.set()
        raise EndpointConnectionError("Could not connect.\nAnd more lines")

    def watch(event: Event) -> None:
        threads.add(threading.get_ident())
        if isinstance(event, PassFinished) and event.number == 1:
            buckets.fault = staticmethod(away)
        elif isinstance(event, PassFinished) and event.number == 3:
            assert tried.wait(10)
            buckets.fault = staticmethod(lambda: None)
        elif isinstance(event, CheckpointWritten):
            saved.append(event)

    named = f"checkpoint_dir={URL!r}: EndpointConnectionError: Could not connect. The fit continues"
    with pytest.warns(UserWarning, match=re.escape(named)) as caught:
        result = fit(checkpoint_dir=URL, observers=[watch])
    assert len(caught) == 1
    assert_same(result, expected)
    assert threads == {threading.get_ident()}
    assert sum(event.n_failed > 0 for event in saved) == 1
    assert_same(fit(resume_from_checkpoint=saved[-1].path), expected)


def test_a_fit_continues_while_a_checkpoint_is_written(
    buckets: type[Buckets], expected: nd.FitResult
) -> None:
    release, numbers = threading.Event(), []

    def blocked() -> None:
        assert release.wait(10)

    def watch(event: Event) -> None:
        if isinstance(event, IterationFinished) and event.stage == "warm-up":
            buckets.fault = staticmethod(blocked)
        elif isinstance(event, PassFinished) and event.number == 3:
            release.set()
        elif isinstance(event, CheckpointWritten):
            numbers.append(int(event.path.removesuffix(".nlsq").rpartition("-")[2]))

    assert_same(fit(checkpoint_dir=URL, observers=[watch]), expected)
    # Of those that had to wait, only the newest was written.
    assert numbers == sorted(numbers)
    assert np.diff(numbers).max() > 1


def test_the_wait_for_the_last_checkpoint_is_limited(
    buckets: type[Buckets], expected: nd.FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(journal, "_MAX_WAIT", 0.05)

    def watch(event: Event) -> None:
        if isinstance(event, IterationFinished):
            buckets.fault = staticmethod(lambda: release.wait(10) and None)

    try:
        with pytest.warns(UserWarning, match=f"{URL!r}: the last one is not complete after"):
            assert_same(fit(checkpoint_dir=URL, observers=[watch]), expected)
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name == "nlsq-checkpoints":
                thread.join(10)


def test_ctrl_c_in_the_warm_up_saves_the_iterations(tmp_path: Path, expected: nd.FitResult) -> None:
    def interrupt(params: Any, loss: float, iteration: int) -> None:
        if iteration == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(callback=interrupt, checkpoint_dir=tmp_path, **RARELY)
    (path,) = tmp_path.iterdir()
    assert str(path) in caught.value.__notes__[0]
    seen: list[int] = []
    resumed = fit(resume_from_checkpoint=path, callback=lambda p, loss, i: seen.append(i))
    assert_same(resumed, expected)
    assert seen[0] == 8


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NoCredentialsError("Unable to locate credentials"), "Configure credentials that allow it"),
        (PermissionError("Forbidden"), "PermissionError: Forbidden. Configure credentials"),
        (EndpointConnectionError("no route"), "EndpointConnectionError: no route. "),
    ],
)
def test_a_store_that_refuses_is_named_at_the_start(
    error: Exception, sentence: str, buckets: type[Buckets]
) -> None:
    def refuse() -> None:
        raise error

    buckets.fault = staticmethod(refuse)
    for option, arguments in {
        "checkpoint_dir": {"checkpoint_dir": URL},
        "resume_from_checkpoint": {"resume_from_checkpoint": URL},
    }.items():
        with pytest.raises(nd.CheckpointError, match=f"{option}={URL!r}.*{sentence}"):
            fit(**arguments)
    with pytest.raises(nd.CheckpointError, match=f"checkpoint_dir={URL!r} cannot be read"):
        fit(checkpoint_dir=URL, resume_from_checkpoint=True)


def test_no_bucket_is_made(buckets: type[Buckets]) -> None:
    with pytest.raises(nd.CheckpointError, match=r"bucket does not exist\. Create the bucket"):
        fit(checkpoint_dir="bucket://nosuch/checkpoints")


# --- time limits


def end_after(seconds: float, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return options for a fit of so many seconds, of a clock that is advanced by ``sleep``."""
    monkeypatch.setattr("nlsq_dask.fit.interruption.time", clock)
    monkeypatch.setattr("nlsq_dask.fit.starts.time", clock)
    return {"max_walltime": seconds}


def test_a_time_limit_within_slow_iterations_of_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, run = Clock(), Warmup.run
    done: list[int] = []

    def slowly(warmup: Warmup, state: WarmupState, until: int) -> WarmupState:
        done.append(until - int(state.iteration))
        clock.sleep(5.0 * done[-1])
        return run(warmup, state, until)

    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "callback_frequency": 10}
    options |= {"checkpoint_frequency": 10, "resume_from_checkpoint": True}
    whole = fit(callback_frequency=10, checkpoint_frequency=10)
    with monkeypatch.context() as patch:
        patch.setattr(Warmup, "run", slowly)
        stopped = fit(**options, **end_after(12.0, clock, patch))
    assert stopped.status == -8
    assert done == [1] * 4  # the limit is checked after each slow one but the first of a burst
    result = fit(**options)
    np.testing.assert_array_equal(result.popt, whole.popt)
    assert result.history.iteration[-1] == whole.history.iteration[-1]


def test_a_time_limit_within_a_round_of_multistart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, improve = Clock(), SuccessiveHalving._improve_group
    groups: list[int] = []

    def slowly(halving: SuccessiveHalving, params: Any, damping: Any, n_rows: int) -> Any:
        groups.append(len(params))
        clock.sleep(5.0)
        return improve(halving, params, damping, n_rows)

    monkeypatch.setattr(SuccessiveHalving, "_improve_group", slowly)
    options = {"enable_multistart": True, "n_starts": 12, **end_after(7.0, clock, monkeypatch)}
    assert fit(**options).status == -8
    assert groups == [4, 4]


def test_a_time_limit_within_the_solve_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sum_rows = Clock(), SampleObjective._sum
    n_evaluations = 0

    def slowly(objective: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal n_evaluations
        sums = sum_rows(objective, *args, **kwargs)
        n_evaluations += 1
        clock.sleep(1.0)
        return sums

    monkeypatch.setattr(SampleObjective, "_sum", slowly)
    assert fit(max_warmup_iterations=0, **end_after(5.5, clock, monkeypatch)).status == -8
    assert n_evaluations == 6


def test_a_chain_without_progress_ends(tmp_path: Path, expected: nd.FitResult) -> None:
    """No time remains for anything; each fit adds what takes none, until nothing does."""
    options = {"checkpoint_dir": tmp_path, "resume_from_checkpoint": True}
    statuses, n_files = [], -1
    while not statuses or statuses[-1] == -8:
        result = fit(**options, max_walltime=1e-9)
        statuses.append(result.status)
        before, n_files = n_files, max(int(p.stem.rpartition("-")[2]) for p in tmp_path.iterdir())
        assert (n_files > before) == (result.status == -8)
        assert len(statuses) < 9
    assert statuses[-1] == -11
    assert "before this call could add anything to the checkpoints" in result.message
    assert_same(fit(**options), expected)


def test_a_fit_that_cannot_save_does_not_ask_for_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(journal, "_MAX_WAIT", 1.5)
    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.warns(UserWarning, match="No other was written"),
    ):
        assert fit(checkpoint_dir=tmp_path, max_walltime=1e-9).status == -11


def test_the_last_checkpoint_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_calls, fsync = 0, os.fsync

    def full_at_first(descriptor: int) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls <= 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full_at_first)
    monkeypatch.setattr(journal, "_RETRY_PAUSE", 0.01)
    with pytest.warns(UserWarning, match="No space left"):
        result = fit(checkpoint_dir=tmp_path, max_walltime=1e-9)
    assert result.status == -8
    (path,) = tmp_path.iterdir()
    assert str(path) in result.message


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [(0, 0, False), (1, 0, False), (99, 0, True), (143, 3, True), (99, 50, False)],
)
def test_the_script_of_a_batch_job(
    code: int, restarts: int, is_requeued: bool, tmp_path: Path
) -> None:
    script = re.search(r"```bash\n(.*?)```", (DOCS / "howto_checkpoints.md").read_text(), re.DOTALL)
    assert script is not None
    for name, line in {"srun": f"exit {code}", "scontrol": "echo $@ > called"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script[1]],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        },
        check=False,
    )
    assert done.returncode == code
    assert (tmp_path / "called").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "called").read_text() == "requeue 7\n"
