"""The page of fits on a cluster's dashboard."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import cloudpickle
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster, get_client
from prometheus_client.parser import text_string_to_metric_families

import nlsq_dask as nd
from nlsq_dask import HybridStreamingConfig
from nlsq_dask.events import BlocksFinished, BlocksMeasured, Event, FitStarted, TileFinished
from nlsq_dask.observers.dashboard.messages import Messages
from nlsq_dask.observers.dashboard.observer import Page
from nlsq_dask.observers.dashboard.on_scheduler.fits import MAX_FITS, MAX_RUNNING, Fit, Fits
from nlsq_dask.observers.dashboard.on_scheduler.page import View
from nlsq_dask.observers.dashboard.on_scheduler.pictures import Map
from nlsq_dask.observers.dashboard.on_scheduler.plots import COLORS
from nlsq_dask.observers.dashboard.on_scheduler.plugin import PLUGIN
from nlsq_dask.observers.dashboard.on_scheduler.tables import (
    bars_of_phases,
    describe_progress,
    image,
    profile,
    rates,
)
from nlsq_dask.observers.dashboard.shipping import ShippedPlugin, why_not_to_ship
from tests import problems
from tests.browser import CHROMIUM, Browser
from tests.problems import exponential

# A worker in this process would be told that its collector of metrics is there already.
LOCAL = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": ":0"}


def other(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp2(-b * x) + c


def slowly(block: np.ndarray, seconds: float) -> np.ndarray:
    time.sleep(seconds)
    return block


def fit(model: Any = exponential, n_blocks: int = 12, seconds: float = 0.0, **options: Any) -> Any:
    # A group of blocks, which is one task, ends with 2**18 rows.
    rows = 2_000 if not seconds else 2**18
    x = da.linspace(0, 4, n_blocks * rows, chunks=rows)
    y = 2.0 * da.exp(-0.7 * x) + 0.3 + 0.01 * da.sin(1e6 * x)
    if seconds:
        y = y.map_blocks(slowly, seconds, dtype=float, meta=np.zeros(0))
    return problems.fit(model, x, y, [1.0, 1.0, 0.1], **{"cache": 0, **options})


IS_OURS = '<div class="nlsq">'


def fetch(url: str) -> str:
    with urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def counted(url: str) -> dict[str, float]:
    samples = [
        (sample.name, sample.value)
        for family in text_string_to_metric_families(fetch(url))
        for sample in family.samples
        if sample.name.startswith("nlsq_")
    ]
    assert len(dict(samples)) == len(samples)
    return dict(samples)


def pages(client: Client) -> list[dict[str, Any]]:
    """Return what the scheduler knows of the last fits."""

    def look(dask_scheduler: Any) -> list[dict[str, Any]]:
        known = dask_scheduler.plugins["nlsq-dask"].fits.recent.values()
        names = ("number", "state", "text", "about", "map", "picture", "progress", "metrics")
        names += ("client",)
        return [
            {name: getattr(fit, name) for name in names}
            | {"iterations": list(fit.iterations), "phases": list(fit.phases)}
            | {"notes": list(fit.notes)}
            for fit in known
        ]

    return list(client.run_on_scheduler(look))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if "page" in line or "watched" in line]


@contextmanager
def scheduler(
    folder: Path, *arguments: str, without: str = "", n_workers: int = 1
) -> Iterator[Client]:
    """A scheduler in a process of its own, which cannot import some packages, and workers."""
    file = folder / "scheduler.json"
    script = (
        "import sys\n"
        f"for name in {without.split()!r}: sys.modules[name] = None\n"
        "from distributed.cli.dask_scheduler import main\n"
        "main(sys.argv[1:])\n"
    )
    here = [sys.executable, "-c", script, "--scheduler-file", str(file), "--port", "0"]
    here += ["--host", "127.0.0.1", "--dashboard-address", ":0", *arguments]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file)]
    worker += ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["."])}
    with (folder / "log").open("w") as log:
        started = [
            subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            for command in [here, *[worker] * n_workers]
        ]
        try:
            deadline = time.monotonic() + 60
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            with Client(scheduler_file=str(file), set_as_default=True) as client:
                client.wait_for_workers(n_workers, 60)
                yield client
        finally:
            for process in started:
                process.kill()  # a worker without its scheduler would wait for it
            for process in started:
                process.wait(30)


def address(client: Client) -> str:
    port = client.scheduler_info()["services"]["dashboard"]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def as_default(process_client: Client) -> Iterator[Client]:
    with process_client.as_current():
        yield process_client


# --- messages


def measured(grid: tuple[int, ...], values: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    messages = Messages()
    dims = tuple("abcd"[: len(grid)])
    messages.of(FitStarted("m", 1, grid, dims, ("p",)))
    n = values.size
    measured = BlocksMeasured(1, np.arange(n), 7.0 * values.ravel(), np.full(n, 7), np.zeros(n))
    (message,) = messages.of(measured)
    return message, np.frombuffer(message["values"], np.float32).reshape(message["shape"])


def test_a_small_map_is_sent_as_it_is() -> None:
    values = np.arange(12.0).reshape(3, 4)
    message, table = measured((3, 4), values)
    np.testing.assert_allclose(table, values, rtol=1e-6)
    assert message["dims"] == ["a", "b"]
    assert message["step"] == [1, 1]


def test_a_large_map_shows_the_worst_of_neighbours() -> None:
    values = np.random.default_rng(0).uniform(1, 2, (2001, 350))
    values[1234, 222] = 99.0
    message, table = measured(values.shape, values)
    assert table.size <= 10_000
    assert table.max() == np.float32(99.0)
    down, across = message["step"]
    assert table[1234 // down, 222 // across] == np.float32(99.0)


@pytest.mark.parametrize(
    ("grid", "dims", "shape"),
    [((5000,), ["a"], [1000]), ((1, 30), ["b"], [30]), ((2, 9, 8), ["b", "c"], [9, 8])],
)
def test_other_grids(grid: tuple[int, ...], dims: list[str], shape: list[int]) -> None:
    message, table = measured(grid, np.arange(float(np.prod(grid))).reshape(grid))
    assert message["dims"] == dims
    assert message["shape"] == shape
    assert table.max() == np.float32(np.prod(grid) - 1)


def mapped(grid: tuple[int, ...], values: np.ndarray) -> Fit:
    """Return a fit as the scheduler knows it, with what was measured of its blocks."""
    message, _ = measured(grid, values)
    fits = Fits()
    fits.take(batch("a", {**message, "kind": "map"}))
    return fits.recent["a"]


def test_a_map_says_over_what_it_is_the_largest() -> None:
    figure = Map()
    figure.show([mapped((2, 9, 8), np.ones((2, 9, 8)))])
    assert figure.figure.title.text.endswith(" (largest over a)")
    figure.show([mapped((1, 9, 8), np.ones((1, 9, 8)))])
    assert "largest" not in figure.figure.title.text
    figure.show([mapped((3, 350, 150), np.ones((3, 350, 150)))])
    assert figure.figure.title.text.endswith(" (largest over a; largest of each 4 x 2)")


def test_a_map_ends_with_its_grid() -> None:
    picture = image(mapped((350, 150), np.ones((350, 150))))
    assert picture is not None
    assert (picture.drawn, picture.size) == ((150, 352), (150, 350))
    shown = Map()
    shown.show([mapped((350, 150), np.ones((350, 150)))])
    across, down = shown.figure.x_range, shown.figure.y_range
    assert (across.start, across.end, across.bounds) == (0, 150, (0, 150))
    assert (down.start, down.end, down.bounds) == (350, 0, (0, 350))  # downwards, as in results
    line = profile(mapped((2001,), np.ones(2001)))
    assert line is not None
    assert line.x[-2:] == [1998, 2001]
    assert len(line.x) == len(line.y)


def test_messages_are_small_and_plain() -> None:
    import msgpack

    names = tuple(f"p{i}" for i in range(5000))
    (message,) = Messages().of(FitStarted("m", 10**9, (10**5,), ("row",), names))
    assert len(msgpack.packb(message)) < 2_000
    (message,) = Messages().of(BlocksFinished(1, np.int64(3), np.int64(9), 1, 3, 8, 0.5))
    assert len(msgpack.packb(message)) < 200


def batch(name: str, *messages: dict[str, Any], passes: int = 1) -> dict[str, Any]:
    metrics = {"nlsq_passes_total": passes, "nlsq_last_loss": 0.5}
    return {"fit": name, "client": "c", "messages": list(messages), "metrics": metrics}


def test_old_fits_are_forgotten_and_their_counts_stay() -> None:
    fits = Fits()
    end = {"kind": "ended", "state": "finished", "text": ""}
    fits.take(batch("one that runs on"))
    for i in range(100):
        fits.take(batch(str(i), passes=1))
        fits.take(batch(str(i), end, passes=2))
    assert len(fits.recent) == MAX_FITS
    assert "one that runs on" in fits.recent
    assert fits.metrics() == {"nlsq_passes_total": 201, "nlsq_last_loss": 0.5}


def test_running_fits_are_not_forgotten_and_count_once() -> None:
    fits = Fits()
    names = [f"fit {i}" for i in range(25)]
    for n in (1, 2, 3):
        for name in names:
            fits.take(batch(name, passes=n))
        assert list(fits.recent) == names
        assert fits.metrics()["nlsq_passes_total"] == 25 * n


def test_one_of_very_many_that_is_heard_of_again_counts_once() -> None:
    fits = Fits()
    names = [f"fit {i}" for i in range(MAX_RUNNING + 30)]
    for n in (1, 2, 3):
        for name in names:
            fits.take(batch(name, passes=n))
        assert len(fits.recent) == MAX_RUNNING
        assert fits.metrics()["nlsq_passes_total"] == n * len(names)
    assert {fit.number for fit in fits.recent.values()} <= set(range(1, len(names) + 1))


def test_a_client_that_comes_back_goes_on_and_counts_once() -> None:
    fits = Fits()
    fits.take(batch("a", passes=1))
    fits.client_left("c")
    assert fits.recent["a"].state == "lost"
    for i in range(MAX_FITS):
        fits.take(batch(str(i), passes=1))
    assert "a" not in fits.recent
    fits.take(batch("a", passes=2))
    assert fits.recent["a"].is_running
    assert fits.metrics()["nlsq_passes_total"] == MAX_FITS + 2


@pytest.mark.parametrize("ahead", [0.0, -3600.0, 86400.0])
def test_times_are_those_of_the_scheduler(ahead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    clock = "nlsq_dask.observers.dashboard.on_scheduler.fits.time.time"
    monkeypatch.setattr(clock, lambda: now + ahead)
    fits = Fits()
    phase = {"kind": "phase", "phase": 1, "name": "warm-up", "start": now - 2}
    progress = {"kind": "progress", "pass": 1, "n_blocks": 9}
    told = [
        {**progress, "time": now + i, "blocks": i, "bytes": i * 5e6, "seconds": float(i)}
        for i in range(3)
    ]
    note = {"kind": "note", "time": now + 1, "text": "so"}
    fits.take({**batch("a", phase, *told, note), "time": now})
    (fit,) = fits.recent.values()
    bars = bars_of_phases([fit], COLORS)
    assert bars["left"] == pytest.approx([0], abs=1e-4)
    assert bars["seconds"] == pytest.approx([2], abs=1e-4)
    assert rates(fit)["x"] == pytest.approx([3, 4], abs=1e-4)
    assert rates(fit)["y"] == pytest.approx([5, 5])
    assert fit.notes[0][0] == pytest.approx(now + ahead + 1, abs=1e-4)
    now += 5
    fits.take({**batch("a"), "time": now})
    assert bars_of_phases([fit], COLORS)["seconds"] == pytest.approx([7], abs=1e-4)


def test_bytes_a_second_are_those_gone_through() -> None:
    """What is kept from an earlier pass is among them, so they are not called read."""
    fits = Fits()
    at = {"kind": "progress", "time": 1.0, "pass": 2, "blocks": 3, "n_blocks": 9, "seconds": 2.0}
    fits.take(batch("a", {**at, "bytes": 30_000_000}))
    (fit,) = fits.recent.values()
    assert describe_progress(fit) == ("pass 2: 3 of 9 blocks, 15 MB/s, 4 s remaining")
    titles = [root.title.text for root in View(fits).roots if root.name == "rate"]
    assert titles == ["Data processed per second"]


def test_a_rate_is_taken_from_one_end_of_blocks_to_the_next() -> None:
    fits = Fits()
    for second, blocks in enumerate([0, 3, 3, 3, 6, 6, 9, 9]):
        at = {"time": float(second), "seconds": float(second), "blocks": blocks, "n_blocks": 9}
        fits.take(batch("a", {"kind": "progress", "pass": 1, "bytes": blocks * 1e6, **at}))
    (fit,) = fits.recent.values()
    assert rates(fit)["y"] == pytest.approx([3, 1, 1.5])


def test_messages_of_another_version_are_no_harm() -> None:
    fits = Fits()
    fits.take(batch("a", {"kind": "unheard of"}, {}))
    assert len(fits.recent) == 1


# --- on a cluster


def test_the_page_and_its_link(as_default: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nlsq_dask"):
        result = fit()
    (line,) = said(caplog)
    url = line.split()[-1]
    assert "/nlsq" in url
    assert IS_OURS in fetch(url)
    for page in ("status", "nlsq", "workers"):
        text = fetch(url.replace("nlsq", page))
        assert text.count('href="nlsq"') == 1
    *_, known = pages(as_default)
    assert known["state"] == "finished"
    assert known["text"] == result.message
    assert known["about"]["model"] == "exponential"
    losses = [entry["loss"] for entry in known["iterations"]]
    np.testing.assert_array_equal(losses, result.history.loss)
    assert [phase["phase"] for phase in known["phases"]] == [0, 1, 2, 3]
    assert all(phase["duration"] >= 0 for phase in known["phases"])
    found = np.frombuffer(known["map"]["values"], np.float32)
    np.testing.assert_allclose(found, result.block_statistics.reduced_chi2, rtol=1e-2)


def test_dashboard_false_tells_nobody(as_default: Client) -> None:
    fit()
    n = len(pages(as_default))
    last = pages(as_default)[-1]["number"]
    before = counted(address(as_default) + "/metrics")
    fit(dashboard=False)
    assert counted(address(as_default) + "/metrics") == before
    assert len(pages(as_default)) == n
    assert pages(as_default)[-1]["number"] == last


def test_metrics_agree_with_the_results(as_default: Client) -> None:
    fit()
    url = address(as_default) + "/metrics"
    before = counted(url)
    results = [fit(), fit(other)]
    after = counted(url)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["nlsq_fits_total"] == 2
    assert grown["nlsq_passes_total"] == sum(result.n_passes for result in results)
    assert grown["nlsq_rows_read_total"] == sum(result.rows_read for result in results)
    assert grown["nlsq_bytes_read_total"] == sum(result.bytes_read for result in results)
    calls = sum(result.diagnostics["defense"]["total_warmup_calls"] for result in results)
    assert grown["nlsq_defense_warmup_calls_total"] == calls
    assert after["nlsq_last_loss"] == float(results[1].history.loss[-1])
    assert set(after) == set(nd.get_defense_telemetry().export_metrics())


def film(n_pixels: int = 1024, n_points: int = 20) -> xr.DataArray:
    """Return decays in two tiles at least, in memory; the first pixel has no data."""
    t = np.linspace(0, 4, n_points)
    height = np.linspace(1, 3, 2 * n_pixels).reshape(2, n_pixels)
    y = height * np.exp(-0.7 * t[:, None, None]) + 0.3 + 0.01 * np.sin(1e6 * t[:, None, None])
    y[:, 0, 0] = np.nan
    return xr.DataArray(y, {"t": t}, dims=("t", "row", "col"))


def fit_each(y: xr.DataArray, **options: Any) -> xr.Dataset:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(HybridStreamingConfig(verbose=0, **options))
    ds: xr.Dataset = optimizer.fit_each(exponential, "t", y, [1.0, 1.0, 0.1], dims="t")
    return ds


def test_a_map_on_the_page_and_in_the_metrics(as_default: Client) -> None:
    fit_each(film())
    url = address(as_default) + "/metrics"
    before = counted(url)
    ds = fit_each(film())
    *_, known = pages(as_default)
    assert known["state"] == "finished"
    assert known["about"]["n_pixels"] == 2048
    assert known["text"].endswith(": 2,047 converged, 1 no_data")
    assert known["progress"]["pixels"] == 2048
    picture = known["picture"]
    lowest = np.frombuffer(picture["status"], np.int8).reshape(picture["shape"])
    _, step = picture["step"]
    columns = np.arange(0, 1024, step)
    np.testing.assert_array_equal(lowest, np.minimum.reduceat(ds.status.values, columns, axis=1))
    fit_each(film(), dashboard=False)
    assert pages(as_default)[-1]["number"] == known["number"]
    after = counted(url)
    grown = {name: after[name] - before[name] for name in after if after[name] > before[name]}
    assert grown == {
        "nlsq_maps_total": 1, "nlsq_pixels_converged_total": 2047, "nlsq_pixels_no_data_total": 1,
    }  # fmt: skip


def test_two_fits_at_once_from_two_clients(as_default: Client) -> None:
    fit()
    last = pages(as_default)[-1]["number"]
    with Client(as_default.scheduler.address, set_as_default=False) as second:
        clients = {exponential: as_default, other: second}

        def run(model: Any) -> None:
            with clients[model].as_current():
                fit(model, 30)

        threads = [threading.Thread(target=run, args=[model]) for model in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ours = [known for known in pages(as_default) if known["number"] > last]
        assert {known["about"]["model"] for known in ours} == {"exponential", "other"}
        assert {known["client"] for known in ours} == {client.id for client in clients.values()}
        assert {known["state"] for known in ours} == {"finished"}
    assert fetch(address(as_default) + "/nlsq").count('href="nlsq"') == 1


def test_registered_again_after_it_was_taken_away(as_default: Client) -> None:
    fit()
    n = len(pages(as_default))
    as_default.unregister_scheduler_plugin(PLUGIN)
    assert IS_OURS in fetch(address(as_default) + "/nlsq")
    as_default.register_plugin(ShippedPlugin())
    assert len(pages(as_default)) == n
    fit()
    assert len(pages(as_default)) == min(n + 1, MAX_FITS)
    assert fetch(address(as_default) + "/status").count('href="nlsq"') == 1


def test_an_error_and_a_resumed_fit_are_shown(as_default: Client, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fit(callback=stop, callback_frequency=1)
    assert pages(as_default)[-1]["state"] == "aborted"
    assert "enough" in pages(as_default)[-1]["text"]
    whole = fit(checkpoint_dir=tmp_path)
    before = counted(address(as_default) + "/metrics")
    fit(resume_from_checkpoint=tmp_path)
    *_, known = pages(as_default)
    assert len(known["iterations"]) == len(whole.history.iteration)
    assert known["about"]["model"] == "exponential"
    after = counted(address(as_default) + "/metrics")
    assert after["nlsq_passes_total"] == before["nlsq_passes_total"]


def test_a_fit_that_was_cut_counts_once(as_default: Client, tmp_path: Path) -> None:
    def cut(event: Event) -> None:
        if isinstance(event, BlocksFinished) and event.number == 2 and event.blocks >= 3:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"n_blocks": 8, "seconds": 0.01, "gauss_newton_tol": 1e-12}
    url = address(as_default) + "/metrics"
    fit()  # else there are no metrics yet
    process = nd.get_defense_telemetry().export_metrics()
    before = counted(url)
    whole = fit(**options)
    undisturbed = counted(url)
    with pytest.raises(KeyboardInterrupt):
        fit(**options, checkpoint_dir=tmp_path, observers=[cut])
    *_, first = pages(as_default)
    assert first["state"] == "aborted"
    assert first["metrics"]["nlsq_passes_total"] == 1
    result = fit(**options, resume_from_checkpoint=tmp_path)
    np.testing.assert_array_equal(result.popt, whole.popt)
    *_, known = pages(as_default)
    assert known["state"] == "finished"
    # What was remembered is shown once.
    shown = [entry["iteration"] for entry in known["iterations"]]
    np.testing.assert_array_equal(shown, whole.history.iteration)
    assert [phase["phase"] for phase in known["phases"]] == [0, 1, 2, 3]
    after = counted(url)
    once = {name: undisturbed[name] - before[name] for name in after}
    both = {name: after[name] - undisturbed[name] for name in after}
    for name in ("passes", "iterations", "rows_read", "bytes_read", "defense_warmup_calls"):
        assert both[f"nlsq_{name}_total"] == once[f"nlsq_{name}_total"], name
    assert both["nlsq_fits_total"] == 2  # both have ended
    of_process = nd.get_defense_telemetry().export_metrics()
    for name in after:
        if name.endswith("_total"):
            assert after[name] - before[name] == of_process[name] - process[name], name


def test_a_fit_inside_a_task(as_default: Client) -> None:
    def inside() -> bool:
        with get_client().as_current():
            return bool(fit().success)

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        assert as_default.submit(inside, pure=False).result(timeout=120)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert pages(as_default)[-1]["state"] == "finished"


def test_trouble_with_the_page_is_one_line(
    as_default: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, batch: Any) -> None:
        raise OSError("no way there")

    monkeypatch.setattr("nlsq_dask.observers.dashboard.observer.Page._call", broken)
    with caplog.at_level(logging.INFO, "nlsq_dask"):
        assert fit().success
    assert said(caplog) == ["The dashboard page is disabled: OSError: no way there"]


@pytest.mark.parametrize("python", ["3.9.1.final.0", "4.0.0.final.0"])
def test_no_code_goes_to_another_python(
    as_default: Client,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    python: str,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("bytecode went to another Python")

    monkeypatch.setattr("nlsq_dask.observers.dashboard.observer._registered", set())
    monkeypatch.setattr(
        "nlsq_dask.observers.dashboard.observer.Page._python_of_scheduler", lambda self: python
    )
    monkeypatch.setattr(as_default, "register_plugin", never)
    with caplog.at_level(logging.INFO, "nlsq_dask"):
        assert fit().success
    (line,) = said(caplog)
    assert line.startswith("The fit has no dashboard page: the scheduler runs Python " + python[:3])


def test_the_python_of_the_scheduler_is_read(as_default: Client) -> None:
    found = Page(as_default)._python_of_scheduler()
    assert found.split(".")[:3] == [*map(str, sys.version_info[:3])]
    assert why_not_to_ship(found) == ""
    assert why_not_to_ship("3.1.0.final.0")  # no prefix of 3.1x


# --- other clusters


@pytest.mark.parametrize(
    ("without", "arguments", "has_page"),
    [
        ("nlsq_dask jax", [], True),
        ("bokeh", [], False),
        ("prometheus_client", [], True),
        pytest.param("", ["--no-dashboard"], False, marks=pytest.mark.slow),
    ],
)
def test_a_scheduler_that_lacks_something(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    without: str,
    arguments: list[str],
    has_page: bool,
) -> None:
    with scheduler(tmp_path, *arguments, without=without) as client:
        with caplog.at_level(logging.INFO, "nlsq_dask"):
            assert fit().success
        (line,) = said(caplog)
        assert ("Dashboard page of the fit" in line) == has_page, line
        if has_page:
            assert IS_OURS in fetch(address(client) + "/nlsq")
        else:
            with pytest.raises(HTTPError, match="404"):
                fetch(address(client) + "/nlsq")
        loaded = client.run_on_scheduler(lambda: [*__import__("sys").modules])
        assert not [name for name in loaded if name == "jax" and without != "nlsq_dask jax"]
        if without == "bokeh":
            assert counted(address(client) + "/metrics")["nlsq_fits_total"] == 1


def test_behind_a_prefix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with scheduler(tmp_path, "--dashboard-prefix", "/some/where") as client:
        assert fit().success
        for page in ("status", "nlsq"):
            text = fetch(f"{address(client)}/some/where/{page}")
            assert text.count('href="nlsq"') == 1


def test_a_cluster_in_this_process() -> None:
    from prometheus_client import REGISTRY

    for _ in range(2):
        mine = nd.metrics_collector()
        with LocalCluster(processes=False, **LOCAL) as cluster, Client(cluster) as client:
            fit()
            assert IS_OURS in fetch(address(client) + "/nlsq")
            assert counted(address(client) + "/metrics")["nlsq_fits_total"] == 1
            REGISTRY.register(mine)
            try:
                nd.reset_defense_telemetry()
                fit()
                assert counted(address(client) + "/metrics")["nlsq_fits_total"] == 1
            finally:
                REGISTRY.unregister(mine)
            assert counted(address(client) + "/metrics")["nlsq_fits_total"] == 2
    nothing_left = [c for c in REGISTRY._collector_to_names if hasattr(c, "is_of_nlsq_dask")]
    assert nothing_left == []


# --- in a browser

LOSS = "Bokeh.documents[0].get_model_by_name('loss')"
POINTS = f"{LOSS}.renderers.map(r => r.data_source.data.x.length).reduce((a, b) => a + b, 0)"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("prefix", ["", "/some/where"])
def test_a_browser_sees_two_fits(tmp_path: Path, prefix: str) -> None:
    arguments = ["--dashboard-prefix", prefix] if prefix else []
    with (
        scheduler(tmp_path, *arguments, n_workers=2) as client,
        Browser(tmp_path / "browser") as browser,
    ):
        base = address(client) + prefix
        assert fit().success
        browser.open(f"{base}/status", 1400, 1400)
        browser.wait_for("document.querySelector(\"a[href='nlsq']\") !== null")
        browser.evaluate("document.querySelector(\"a[href='nlsq']\").click()")
        browser.wait_for(f"location.pathname == '{prefix}/nlsq'")
        browser.wait_for("window.Bokeh && Bokeh.documents.length == 1")
        before = browser.wait_for(POINTS)
        threads = [
            threading.Thread(target=fit, args=[model, 12, 0.3]) for model in (exponential, other)
        ]
        for thread in threads:
            thread.start()
        grown = browser.wait_for(f"{POINTS} > {before} && {POINTS}")
        browser.wait_for(f"{POINTS} > {grown}")
        shown = f"{LOSS}.renderers.filter(r => r.data_source.data.x.length).length"
        browser.wait_for(f"{shown} == 6")  # a line and marks for each of three fits
        for thread in threads:
            thread.join()
        browser.wait_for("document.title == 'Dask: nonlinear fits'")
        for width in (1400, 600):
            browser.open(f"{base}/nlsq", width, 1400)
            browser.wait_for(f"window.Bokeh && Bokeh.documents.length == 1 && {POINTS} > 0")
            time.sleep(1)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            menu = "document.querySelector('.navbar').getBoundingClientRect().bottom"
            first = "document.querySelector('.nlsq').getBoundingClientRect().top"
            assert browser.evaluate(f"{menu} <= {first}")


# What stands in the tooltip, which is in a shadow root of a shadow root.
TOOLTIP = """(function text(node) {
    if (node.matches && node.matches(".bk-tooltip-row-value")) {
        return [node.innerText]
    }
    const inside = [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children]
    return inside.flatMap(text)
})(document.body).join(" ").replace(/\\s+/g, " ")"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(("shape", "step"), [((3, 4), (1, 1)), ((350, 150), (4, 2))])
def test_the_block_under_the_pointer(
    tmp_path: Path, shape: tuple[int, int], step: tuple[int, int]
) -> None:
    from bokeh.embed import file_html
    from bokeh.resources import INLINE

    values = np.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    shown = Map()
    shown.show([mapped(shape, values)])
    (tmp_path / "map.html").write_text(file_html(shown.figure, INLINE))
    with Browser(tmp_path / "browser") as browser:
        browser.open((tmp_path / "map.html").as_uri(), 800, 500)
        browser.wait_for(
            "window.Bokeh && Bokeh.documents.length == 1 && Bokeh.documents[0].is_idle"
        )
        plot = "Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name('map'))"
        for row, column in [(0, 0), (0, shape[1] - 1), (shape[0] - 1, 0), (1, 2)]:
            # A little before the end of the block, where rounding would name the next.
            x, y = (
                browser.evaluate(
                    f"{plot}.frame.{axis}_scale.compute({at + 0.8}) + "
                    f"{plot}.canvas_view.el.getBoundingClientRect().{side}"
                )
                for axis, at, side in (("x", column, "left"), ("y", row, "top"))
            )
            browser.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            places, worst = [], []
            for at, width, size in zip((row, column), step, shape, strict=True):
                first = at // width * width
                last = min(first + width, size) - 1
                places.append(f"{first} to {last}" if last > first else f"{first}")
                worst.append(last)  # of values that grow
            expected = f"{', '.join(places)} {values[tuple(worst)]:.4f}"
            browser.wait_for(f"{TOOLTIP}.includes({expected!r})", 10)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_map_of_another_grid_is_seen_whole(tmp_path: Path) -> None:
    def fit_grid(down: int, across: int) -> None:
        x = da.linspace(0, 4, down * across * 100).reshape(down * 10, across * 10)
        y = (2.0 * da.exp(-0.7 * x) + 0.3 + 0.01 * da.sin(1e6 * x)).rechunk(10)
        problems.fit(exponential, x.rechunk(10), y, [1.0, 1.0, 0.1])

    plot = "Bokeh.documents[0].get_model_by_name('map')"
    ends = ", ".join(f"{plot}.{axis}_range.{end}" for axis in "xy" for end in ("start", "end"))
    with scheduler(tmp_path) as client, Browser(tmp_path / "browser") as browser:
        fit_grid(3, 5)
        browser.open(f"{address(client)}/nlsq")
        browser.wait_for(f"window.Bokeh && Bokeh.documents.length == 1 && {plot} !== null")
        browser.wait_for(f"[{ends}].join() == '0,5,3,0'")
        for down, across in [(6, 4), (2, 9)]:
            fit_grid(down, across)
            browser.wait_for(f"[{ends}].join() == '0,{across},{down},0'", 20)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_sees_a_map_that_fills(tmp_path: Path) -> None:
    """One of two tiles first, while an observer of the other one waits; then all pixels."""
    seen, goes_on = threading.Event(), threading.Event()

    def wait(event: Event) -> None:
        if isinstance(event, TileFinished) and event.tiles == 2:
            seen.set()
            goes_on.wait(60)

    def run() -> None:
        optimizer = nd.AdaptiveHybridStreamingOptimizer(observers=[wait])
        y = film(n_points=400)
        optimizer.fit_each(exponential, "t", y, [1.0, 1.0, 0.1], dims="t", verbose=0)

    status = "Bokeh.documents[0].get_model_by_name('status')"
    visible = "Bokeh.documents[0].roots().filter(r => r.visible).map(r => r.name).join()"
    cells = f"{status}.renderers[0].data_source.data.image[0]"
    with scheduler(tmp_path) as client, Browser(tmp_path / "browser") as browser:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert seen.wait(60)
            browser.open(f"{address(client)}/nlsq")
            browser.wait_for(f"window.Bokeh && Bokeh.documents.length == 1 && {status} !== null")
            assert browser.wait_for(visible) == "head,pass,fit rate,status,parameter,notes"
            empty = browser.wait_for(f"{cells}.filter(Number.isNaN).length")
        finally:
            goes_on.set()
            thread.join()
        browser.wait_for(f"{cells}.filter(Number.isNaN).length == 0")
        assert empty > 50
        plot = f"Bokeh.index.find_one({status})"
        x, y = (
            browser.evaluate(
                f"{plot}.frame.{axis}_scale.compute(0.5) + "
                f"{plot}.canvas_view.el.getBoundingClientRect().{side}"
            )
            for axis, side in (("x", "left"), ("y", "top"))
        )
        browser.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        browser.wait_for(f"{TOOLTIP}.includes('0 0 to 10 no_data')", 10)


def test_metrics_come_back_after_another_scheduler_in_the_process(as_default: Client) -> None:
    fit()
    before = counted(address(as_default) + "/metrics")
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
        client.as_current(),
    ):
        fit()
        assert counted(address(client) + "/metrics")["nlsq_fits_total"] == 1
    fit()
    after = counted(address(as_default) + "/metrics")
    assert after["nlsq_fits_total"] == before["nlsq_fits_total"] + 1
