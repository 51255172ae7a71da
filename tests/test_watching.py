"""What is seen of a fit while it runs, and what is on record afterwards."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client

import nlsq_dask as nd
from nlsq_dask import events
from nlsq_dask.events import (
    EVENTS,
    BlocksFinished,
    BlocksMeasured,
    Event,
    FitAborted,
    FitEnded,
    FitResumed,
    FitStarted,
    IterationFinished,
    MapDrawn,
    PassFinished,
    PhaseEnded,
    PhaseStarted,
    WarmupEnded,
    WarmupStarted,
)
from nlsq_dask.observers import logs, progress
from nlsq_dask.observers.build import build_observers
from nlsq_dask.observers.dashboard.messages import Messages
from nlsq_dask.observers.format import TEXTS, format_event
from nlsq_dask.observers.progress import Progress

N = 40_000
X = np.linspace(0.0, 4.0, N)
Y = 2.0 * np.exp(-0.7 * X) + 0.3 + 0.02 * np.random.default_rng(0).standard_normal(N)
START = [1.0, 1.0, 0.1]


def decay(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


def slowly(y: np.ndarray) -> np.ndarray:
    time.sleep(0.02)
    return y


def fit(seconds: bool = False, observers: Any = (), **options: Any) -> nd.FitResult:
    y = da.from_array(Y, chunks=N // 10)
    y = y.map_blocks(slowly, dtype=float) if seconds else y
    config = nd.HybridStreamingConfig(
        **{"verbose": 0, "sample_rows": 300, "gauss_newton_tol": 1e-12, **options}
    )
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config, observers=observers)
    with dask.config.set(scheduler="sync"):
        return optimizer.fit(decay, da.from_array(X, chunks=N // 10), y, START)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def running(done: int, seconds: float = 1.0, number: int = 3) -> BlocksFinished:
    return BlocksFinished(number, done, 200, done * 1000, 200_000, done * 8000, seconds)


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.0)


@pytest.mark.usefixtures("no_delay")
def test_a_bar_in_a_terminal() -> None:
    terminal = Terminal()
    shown = Progress(stream=terminal)
    threads = threading.active_count()
    shown(running(0, 0.0))
    for done in range(50, 200, 50):
        time.sleep(0.15)  # it is drawn anew ten times a second at most
        shown(running(done, 0.5))
    text = terminal.getvalue()
    assert "pass 3:" in text
    assert "100/200 blocks" in text
    assert "0.20 million rows/s" in text
    assert "50%" in text
    assert threading.active_count() == threads
    shown(PassFinished(3, np.ones(2), 1.0, 2.0, 200_000, 0, 0))
    shown(FitEnded(True, "Converged."))
    last = terminal.getvalue().replace("\r", "\n").splitlines()
    assert "pass 3: 200,000 rows in 2.00 s" in last[-2]
    assert last[-1] == "Converged."


@pytest.mark.usefixtures("no_delay")
def test_no_bar_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    shown = Progress(stream=file)
    for done in range(0, 200, 10):
        shown(running(done))
    assert file.getvalue() == ""
    monkeypatch.setattr(progress, "_LINE_INTERVAL", 0.0)
    shown(running(50, 10.0))
    assert file.getvalue() == "  pass 3: 50 of 200 blocks (25%) in 10 s, 30 s remaining\n"


@pytest.mark.usefixtures("no_delay")
def test_a_bar_that_is_left_by_an_error_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(progress, "_FORMAT", "bar\n")

    def interrupt(y: np.ndarray, block_info: Any = None) -> np.ndarray:
        time.sleep(0.15)
        if calls.append(0) or len(calls) > 18:
            raise KeyboardInterrupt
        return y

    calls: list[int] = []
    y = da.from_array(Y, chunks=N // 10).map_blocks(interrupt, dtype=float)
    config = nd.HybridStreamingConfig(sample_rows=300, gauss_newton_tol=1e-12, cache=0)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    with dask.config.set(scheduler="sync"), pytest.raises(KeyboardInterrupt):
        optimizer.fit(decay, da.from_array(X, chunks=N // 10), y, START)
    assert "bar" in terminal.getvalue()
    assert not progress._bar_class()._instances


def test_nothing_is_printed_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    fit(verbose=0)
    assert capfd.readouterr() == ("", "")


def test_how_far_a_pass_is() -> None:
    seen: list[Event] = []
    result = fit(cache=0, observers=[seen.append])
    steps = [event for event in seen if isinstance(event, BlocksFinished)]
    for number in range(1, result.n_passes + 1):
        own = [event for event in steps if event.number == number]
        # A pass over so few rows is one group of blocks.
        assert [event.blocks for event in own] == [0, 10]
        assert [event.rows for event in own] == [0, N]
        assert [event.bytes for event in own] == [0, 16 * N]
        assert {(event.n_blocks, event.n_rows) for event in own} == {(10, N)}


def assert_ordered(seen: list[Event], result: nd.FitResult) -> None:
    """Assert that events are complete and in order."""
    assert isinstance(seen[0], FitStarted)
    assert seen[-1] == FitEnded(result.success, result.message)
    assert [e.phase for e in seen if isinstance(e, PhaseStarted)] == [0, 1, 2, 3]
    assert [e.phase for e in seen if isinstance(e, PhaseEnded)] == [0, 1, 2, 3]
    numbers = [e.number for e in seen if isinstance(e, PassFinished)]
    assert numbers == list(range(1, result.n_passes + 1))
    iterations = [e for e in seen if isinstance(e, IterationFinished)]
    np.testing.assert_array_equal([e.iteration for e in iterations], result.history.iteration)
    for event, following in pairwise(seen):
        assert not isinstance(event, BlocksMeasured) or isinstance(following, PassFinished)


# --- observers of the caller


@pytest.mark.parametrize("scheduler", ["sync", "threads", "processes"])
def test_observers_get_all_events_in_order(scheduler: str) -> None:
    seen: list[Event] = []
    threads: set[threading.Thread] = set()

    def note_thread(event: Event) -> None:
        threads.add(threading.current_thread())

    config = nd.HybridStreamingConfig(verbose=0, sample_rows=300, gauss_newton_tol=1e-12)
    observers = [seen.append, note_thread]
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config, observers=observers)
    x, y = (da.from_array(a, chunks=N // 10) for a in (X, Y))
    with dask.config.set(scheduler=scheduler):
        result = optimizer.fit(decay, x, y, START)
    assert_ordered(seen, result)
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("kind", [ValueError, StopIteration])
def test_an_observer_that_raises_is_dropped(kind: type[Exception]) -> None:
    seen: list[Event] = []

    def broken(event: Event) -> None:
        seen.append(event)
        if isinstance(event, PassFinished):
            raise kind("no way")

    expected = fit()
    after: list[Event] = []
    with pytest.warns(UserWarning, match=rf"observer .*broken raised {kind.__name__}: no") as all_:
        result = fit(observers=[broken, after.append])
    assert len(all_) == 1
    assert all_[0].filename == __file__
    assert isinstance(seen[-1], PassFinished)
    assert_ordered(after, result)
    np.testing.assert_array_equal(result.popt, expected.popt)
    np.testing.assert_array_equal(result.pcov, expected.pcov)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_observer_can_interrupt_a_fit(kind: type[BaseException]) -> None:
    seen: list[Event] = []

    def interrupt(event: Event) -> None:
        seen.append(event)
        if isinstance(event, PassFinished):
            raise kind

    with pytest.raises(kind):
        fit(observers=[interrupt])
    assert isinstance(seen[-1], FitAborted)


def test_an_observer_cannot_change_an_event() -> None:
    def change(event: Event) -> None:
        if isinstance(event, IterationFinished):
            event.params[:] = 0.0

    with pytest.warns(UserWarning, match=r"change raised ValueError: .*read-only"):
        result = fit(observers=[change])
    np.testing.assert_array_equal(result.popt, fit().popt)


def test_observers_of_a_fit_that_fails() -> None:
    seen: list[Event] = []
    config = nd.HybridStreamingConfig(verbose=0)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config, observers=[seen.append])
    with pytest.raises(nd.NonFiniteDataError):
        optimizer.fit(decay, X, np.where(X > 3, np.nan, Y), START)
    assert isinstance(seen[-1], FitAborted)
    assert "NonFiniteDataError" in seen[-1].error


def test_observers_of_a_resumed_fit_get_what_follows(tmp_path: Path) -> None:
    def cut(event: Event) -> None:
        if isinstance(event, PassFinished) and event.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint_dir=tmp_path, observers=[cut])
    seen: list[Event] = []
    result = fit(resume_from_checkpoint=tmp_path, observers=[seen.append])
    first, *others = seen
    assert isinstance(first, FitResumed)
    assert first.started is not None
    assert first.started.param_names == ("a", "b", "c")
    assert not any(isinstance(event, FitStarted | FitResumed) for event in others)
    passes = [event.number for event in others if isinstance(event, PassFinished)]
    assert passes == list(range(first.n_passes + 1, result.n_passes + 1)) != []


@pytest.mark.parametrize("observers", [print, [print, "progress"], 3, "progress"])
def test_observers_that_cannot_be_called(observers: Any) -> None:
    with pytest.raises(TypeError, match=r"^observers must be a list of callables, each .*; "):
        nd.AdaptiveHybridStreamingOptimizer(observers=observers)


def test_the_documentation_lists_every_event() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    for kind in EVENTS.values():
        assert f".. autoclass:: {kind.__name__}\n" in page
        assert kind.__doc__
        assert getattr(events, kind.__name__) is kind


def test_on_a_cluster_blocks_are_counted(process_client: Client) -> None:
    seen: list[Event] = []
    n = 2**18 * 6
    x = da.linspace(0.0, 4.0, n, chunks=2**18)
    y = 2.0 * da.exp(-0.7 * x) + 0.3
    threads: set[threading.Thread] = set()

    def note_thread(event: Event) -> None:
        threads.add(threading.current_thread())

    with process_client.as_current():
        config = nd.HybridStreamingConfig(sample_rows=300)
        observers = [seen.append, note_thread]
        optimizer = nd.AdaptiveHybridStreamingOptimizer(config, observers=observers)
        result = optimizer.fit(decay, x, y, START)
    assert threads == {threading.current_thread()}
    assert_ordered(seen, result)
    first = [e.blocks for e in seen if isinstance(e, BlocksFinished) and e.number == 1]
    assert first[0] == 0
    assert first[-1] == 6
    assert sorted(first) == first
    assert len(set(first)) > 3


def test_history_is_what_happened() -> None:
    calls: list[tuple[np.ndarray, float, int]] = []
    config = nd.HybridStreamingConfig(
        verbose=0, sample_rows=300, gauss_newton_tol=1e-12, callback_frequency=1
    )
    result = nd.AdaptiveHybridStreamingOptimizer(config).fit(
        decay, X, Y, START, callback=lambda *call: calls.append(call)
    )
    history = result.history
    assert [int(i) for i in history.iteration] == [i for *_, i in calls]
    np.testing.assert_array_equal(history.loss, [loss for _, loss, _ in calls])
    np.testing.assert_array_equal(history.params, [params for params, *_ in calls])
    assert list(history.param.values) == ["a", "b", "c"]
    assert set(history.stage.values) == {"warm-up", "sample", "all rows"}
    last = history.where(history.stage == "all rows", drop=True)
    assert len(last.iteration) == result.nit
    assert (last.trust_radius > 0).all()
    before = np.vstack([START / np.ones(3), history.params.values])
    steps = np.linalg.norm(np.diff(before, axis=0) / np.abs(START), axis=1)
    ours = (history.stage == "all rows") & history.accepted
    np.testing.assert_allclose(history.step_norm.values[ours], steps[ours.values])
    assert (np.diff(history.time) >= 0).all()
    assert int(history.n_passes[-1]) == result.n_passes


def test_history_goes_on_in_a_resumed_fit(tmp_path: Path) -> None:
    whole = fit(checkpoint_dir=tmp_path)
    again = fit(resume_from_checkpoint=tmp_path)
    assert again.history.identical(whole.history)


NOT_FINITE_THERE = [1.0, -1e4, 0.1]


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize(
    ("start", "options"), [(START, {"max_warmup_iterations": 0}), (NOT_FINITE_THERE, {})]
)
def test_a_warmup_that_is_skipped(
    start: list[float], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = nd.HybridStreamingConfig(warmup_iterations=0, sample_rows=300, **options)
    nd.AdaptiveHybridStreamingOptimizer(config).fit(decay, X, Y, start)
    out = capsys.readouterr().out
    what = (
        "the model" if start is NOT_FINITE_THERE else "no iterations are allowed, or the gradient"
    )
    assert f"  warm-up skipped: {what} is not finite at p0 (" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "None" not in out
    event = WarmupStarted("p0", 0.5, None, is_warm_start=False)
    (note,) = Messages().of(event)
    assert note["text"].startswith("warm-up skipped: no iterations are allowed, or")


def test_events_without_text() -> None:
    assert set(EVENTS.values()) - set(TEXTS) == {PhaseEnded, BlocksMeasured, MapDrawn}


def test_layers_that_acted_are_named() -> None:
    ended = WarmupEnded("plateau", 12, 0.1, True, 3, 2, True, 0)
    text = format_event(ended)
    assert text is not None
    for part in ("12 iterations", "layer 3", "layer 4, clipping: 3 steps", "line searches: 2"):
        assert part in text
    (note,) = Messages().of(ended)
    assert note["text"] == text.strip()


def test_json_lines_say_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_INTERVAL", 0.0)
    path = tmp_path / "fit.jsonl"
    result = fit(log_file=path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [record["event"] for record in records]
    assert kinds[0] == "FitStarted"
    assert kinds[-1] == "FitEnded"
    assert records[0]["grid"] == [10]
    assert records[-1]["message"] == result.message
    passes = [record for record in records if record["event"] == "PassFinished"]
    assert [record["number"] for record in passes] == list(range(1, result.n_passes + 1))
    assert sum(record["rows"] for record in passes) <= result.rows_read
    iterations = [record for record in records if record["event"] == "IterationFinished"]
    assert [record["loss"] for record in iterations] == list(result.history.loss.values)
    assert any(record["trust_radius"] is None for record in iterations)  # NaN
    assert "BlocksFinished" in kinds
    times = [record["time"] for record in records]
    assert min(times) == times[0]
    # Another fit is added, and one that fails says why.
    with pytest.raises(nd.DataError):
        nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0, log_file=path)).fit(
            decay, X, np.where(X > 3, np.nan, Y), START
        )
    more = [json.loads(line) for line in path.read_text().splitlines()]
    assert more[: len(records)] == records
    assert more[-1]["event"] == "FitAborted"
    assert "NonFiniteDataError" in more[-1]["error"]


def test_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"could not open log_file .*no-folder"):
        fit(log_file=tmp_path / "no-folder" / "fit.jsonl")


def test_a_disk_that_is_full_does_not_end_the_fit() -> None:
    with pytest.warns(UserWarning, match="Could not write to log_file='/dev/full'"):
        result = fit(log_file="/dev/full")
    assert result.success


class Ascii(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("no space left")


class NoTerminal:
    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [lambda: None, closed, Ascii, Full, NoTerminal])
def test_no_output_can_end_a_fit(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", stream())
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(sample_rows=300))
    assert optimizer.fit(decay, X, Y, START, param_names=["ä", "ö", "ü"]).success


def test_half_a_character_is_written_escaped(tmp_path: Path) -> None:
    path = tmp_path / "fit.jsonl"
    config = nd.HybridStreamingConfig(verbose=0, sample_rows=300, log_file=path)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    assert optimizer.fit(decay, X, Y, START, param_names=["a\udc80", "b", "c"]).success
    assert json.loads(path.read_text().splitlines()[0])["param_names"][0] == "a\\udc80"


def test_the_record_of_a_resumed_fit_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "fit.jsonl"
    fit(checkpoint_dir=tmp_path / "checkpoints", log_file=path)
    fit(resume_from_checkpoint=tmp_path / "checkpoints", log_file=path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    (resumed,) = [record for record in records if record["event"] == "FitResumed"]
    assert resumed["started"]["param_names"] == ["a", "b", "c"]
    assert len({record["fit"] for record in records}) == 2


def test_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nlsq_dask"):
        result = fit()
    messages = [record.getMessage() for record in caplog.records]
    assert messages[-1] == result.message
    assert "Phase 2: Gauss-Newton" in messages
    assert not any("sample " in message and "loss" in message for message in messages[3:-5])
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "nlsq_dask"):
        result = fit(gauss_newton_max_iterations=1)
    levels = {record.getMessage(): record.levelno for record in caplog.records}
    assert not result.success
    assert levels[result.message] == logging.WARNING
    assert logging.DEBUG in levels.values()


def test_who_watches() -> None:
    def names(**options: Any) -> set[str]:
        found: set[str] = set()
        for watch in build_observers(nd.HybridStreamingConfig(**options)):
            with watch as observer:
                found.add(type(observer).__name__)
        return found

    assert names(verbose=0) == {"LogRecords"}
    assert names() == {"LogRecords", "Progress"}


@pytest.fixture(autouse=True)
def _no_handlers_are_left() -> Iterator[None]:
    before = list(logs.LOGGER.handlers)
    yield
    assert logs.LOGGER.handlers == before
