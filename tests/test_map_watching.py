"""What is seen of ``fit_each`` while it runs: text, bars, logs, metrics and the page's messages."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import xarray as xr
from bokeh.models import HoverTool
from prometheus_client import CollectorRegistry

import nlsq_dask as nd
from nlsq_dask import HybridStreamingConfig as Config
from nlsq_dask.events import (
    Event,
    FitAborted,
    MapDrawn,
    MapEnded,
    MapResumed,
    MapStarted,
    TileFinished,
)
from nlsq_dask.maps.results import plotting
from nlsq_dask.observers import logs, progress
from nlsq_dask.observers.dashboard.messages import Messages
from nlsq_dask.observers.dashboard.observer import Page
from nlsq_dask.observers.dashboard.on_scheduler.fits import Fit, Fits
from nlsq_dask.observers.dashboard.on_scheduler.page import View
from nlsq_dask.observers.dashboard.on_scheduler.pictures import STATUS_COLORS, StatusMap
from nlsq_dask.observers.dashboard.on_scheduler.tables import (
    STATUSES,
    rates,
    status_image,
    value_image,
)
from nlsq_dask.observers.format import format_event
from nlsq_dask.observers.progress import Progress
from nlsq_dask.observers.telemetry import DefenseLayerTelemetry
from nlsq_dask.solvers.lanes.records import LaneStatus

T = np.linspace(0.0, 3.0, 20)
COUNTS = {"converged": 34, "no_data": 1, "too_few_points": 1}


def decay(t: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-b * t)


@pytest.fixture(scope="module")
def cube() -> xr.DataArray:
    """36 pixels, of which (0, 0) has no data, and (0, 1) one point."""
    rng = np.random.default_rng(3)
    a, b = rng.uniform(1.5, 2.5, (6, 6)), rng.uniform(0.8, 1.2, (6, 6))
    y = a * np.exp(-b * T[:, None, None]) + 0.01 * rng.standard_normal((20, 6, 6))
    y[:, 0, 0] = y[1:, 0, 1] = np.nan
    return xr.DataArray(y, {"t": T}, dims=("t", "row", "col"))


@pytest.fixture(autouse=True)
def _tiles_of_few_pixels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Divide the cube into 2 x 2 tiles."""
    monkeypatch.setattr("nlsq_dask.maps.problem.tiles._MIN_PIXELS", 9)
    monkeypatch.setattr("nlsq_dask.maps.problem.tiles._MIN_POINTS", 1)
    with dask.config.set(scheduler="sync"):
        yield


def fit_each(y: Any, observers: Any = (), **options: Any) -> xr.Dataset:
    config = Config(**{"verbose": 0, **options})
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config, observers=observers)
    ds: xr.Dataset = optimizer.fit_each(decay, "t", y, {"a": 2, "b": 1}, dims="t")
    return ds


@pytest.fixture(scope="module")
def seen() -> list[Event]:
    """Events of a map of 2,000 pixels of which 800 are in a store, in 20 tiles."""
    totals = {"converged": 790, "stalled": 10}
    started = MapStarted("decay", 100, (40, 50), (4, 5), ("lat", "lon"), ("a", "b"), "x.zarr")
    return [
        started,
        MapResumed(8, 20, 800, 2000, totals),
        *(
            TileFinished(
                (i // 5, i % 5), {"converged": 100}, i + 1, 20, 100 * (i + 1), 2000,
                100 * (i - 7), {"converged": 100 * i + 90, "stalled": 10}, 0.5 * (i - 7),
            )
            for i in range(8, 20)
        ),
        MapEnded(True, 2000, 2000, 1200, {"converged": 1990, "stalled": 10}, 6.0, ""),
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- events


def test_observers_get_all_events_in_order(cube: xr.DataArray) -> None:
    events: list[Event] = []
    ds = fit_each(cube, [events.append])
    started, *_, drawn, ended = events
    tiles = [event for event in events if isinstance(event, TileFinished)]
    assert isinstance(started, MapStarted)
    assert (started.n_pixels, started.n_points, started.n_tiles) == (36, 20, 4)
    assert (started.dims, started.param_names) == (("row", "col"), ("a", "b"))
    assert sorted(tile.index for tile in tiles) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [tile.pixels for tile in tiles] == [tile.fitted for tile in tiles] == [9, 18, 27, 36]
    assert sum((Counter(tile.counts) for tile in tiles), Counter()) == Counter(COUNTS)
    assert isinstance(drawn, MapDrawn)
    np.testing.assert_array_equal(drawn.status, ds.status)
    np.testing.assert_allclose(drawn.values[1:], ds.popt.sel(param="a")[1:], rtol=1e-6)
    assert isinstance(ended, MapEnded)
    assert (ended.is_complete, ended.pixels, ended.totals) == (True, 36, COUNTS)


def test_observers_of_a_lazy_result_are_refused(cube: xr.DataArray) -> None:
    with pytest.raises(ValueError, match=r"^observers have no effect on a lazy result"):
        fit_each(cube.chunk(), [print])


# --- text


def test_lines_in_a_file(cube: xr.DataArray, capsys: pytest.CaptureFixture[str]) -> None:
    fit_each(cube)
    assert capsys.readouterr().out == ""
    fit_each(cube, verbose=1)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "Fitting a, b to 36 pixels of 20 points in 4 tiles"
    assert re.fullmatch(
        r"36 pixels fitted in \d+\.\d\d s \([\d,]+ fits/s\): "
        r"34 converged, 1 no_data, 1 too_few_points",
        last,
    )
    fit_each(cube, verbose=2, log_frequency=3)
    _, *tile, _ = capsys.readouterr().out.splitlines()  # two lines if the rate has many digits
    assert re.match(
        r"  27 of 36 pixels, 3 of 4 tiles, [\d,]+ fits/s, \d s remaining; 2\d conv", " ".join(tile)
    )


def test_texts_of_a_resumed_map(seen: list[Event]) -> None:
    assert format_event(seen[1]) == "Resuming: 8 of 20 tiles are in the store"
    assert format_event(MapResumed(8, 20, 800, 2000, {}, 2)) == (
        "Resuming: 8 of 20 tiles are in the store; damaged: 2"
    )
    # 100 pixels were fitted in half a second, and 1,100 are left.
    assert format_event(seen[2]) == (
        "  900 of 2,000 pixels, 9 of 20 tiles, 200 fits/s, 6 s remaining; 890 converged, 10 stalled"
    )
    assert format_event(seen[-1]) == (
        "2,000 pixels complete, 1,200 of them fitted in 6.00 s (200 fits/s): "
        "1,990 converged, 10 stalled"
    )
    stopped = MapEnded(False, 900, 2000, 900, {"converged": 900}, 1.0, "max_walltime was reached")
    assert format_event(stopped) == (
        "Stopped, max_walltime was reached: 900 of 2,000 pixels fitted in 1.00 s (900 fits/s): "
        "900 converged"
    )
    nothing = MapEnded(False, 0, 1, 0, {}, 0.0, "SIGTERM was received")
    assert format_event(nothing) == ("Stopped, SIGTERM was received: 0 of 1 pixel fitted in 0.00 s")


def test_a_bar_in_a_terminal(seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.0)
    terminal = Terminal()
    shown = Progress(stream=terminal)
    for event in seen[:6]:
        time.sleep(0.11)  # the bar is drawn ten times a second at most
        shown(event)
    bar = terminal.getvalue().split("\r")[-1]
    assert "map:  60%|" in bar
    assert "1,200/2,000 pixels [00:00<00:0" in bar
    # Pixels of the store are not among those that were fitted in these 0.5 seconds.
    assert "200 fits/s, 1,190 converged, 10 stalled" in bar
    shown(seen[-1])
    first, *_, last = terminal.getvalue().replace("\r", "\n").splitlines()
    assert first == format_event(seen[0])
    assert last == format_event(seen[-1])


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (90, "1,200/2,000 [00:00 left, 200 fits/s, 1,190 converged, 10 stalled]"),
        (80, "1,200/2,000 [00:00 left, 200 fits/s, 99% converged]"),
        (60, "1,200/2,000 [00:00 left, 200 fits/s]"),
        (50, "1,200/2,000 [00:00 left]"),
    ],
)
def test_a_narrow_terminal_shortens_the_text_and_keeps_the_bar(
    seen: list[Event], monkeypatch: pytest.MonkeyPatch, columns: int, text: str
) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(terminal, "fileno", lambda: 1, raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((columns, 40)))
    shown = Progress(stream=terminal)
    for event in seen[:6]:
        time.sleep(0.11)
        shown(event)
    shown.close()
    bars = [bar for bar in terminal.getvalue().split("\r") if text in bar]
    assert bars
    assert all(bar.count("#") >= 2 and len(bar) < columns for bar in bars)


def test_a_bar_is_shown_before_the_first_tile(
    seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.01)
    terminal = Terminal()
    shown = Progress(stream=terminal)
    shown(seen[0])
    time.sleep(0.2)
    shown.close()
    assert "0/2,000 pixels [00:00<?, first tile in progress]" in terminal.getvalue()


def test_a_small_map_flashes_no_bar(cube: xr.DataArray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 60.0)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    fit_each(cube, verbose=1)
    assert "Fitting a, b" in terminal.getvalue()
    assert "%|" not in terminal.getvalue()
    assert not progress._bar_class()._instances


def test_a_line_now_and_then_in_a_file(seen: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    shown = Progress(stream=file)
    for event in seen[:5]:
        shown(event)
    assert len(file.getvalue().splitlines()) == 2
    monkeypatch.setattr(progress, "_LINE_INTERVAL", 0.0)
    for event in seen[5:]:
        shown(event)
    lines = file.getvalue().splitlines()
    assert lines[2] == format_event(seen[5])
    assert lines[-2:] == [format_event(seen[-3]), format_event(seen[-1])]


# --- logs


def test_levels_of_the_log(
    cube: xr.DataArray, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def records() -> list[tuple[int, str]]:
        found = [(record.levelno, record.getMessage().split()[0]) for record in caplog.records]
        caplog.clear()
        return found

    outer = [(logging.INFO, "Fitting"), (logging.INFO, "36")]
    with caplog.at_level(logging.DEBUG, "nlsq_dask"):
        fit_each(cube)
        assert records() == outer  # tiles come every ten seconds
        monkeypatch.setattr(logs, "_INTERVAL", 0.0)
        fit_each(cube)
        tiles = [(logging.DEBUG, n) for n in ("9", "18", "27", "36")]
        assert records() == [outer[0], *tiles, outer[1]]
        with pytest.warns(UserWarning, match="max_walltime was reached: 0 of 36"):
            fit_each(cube, max_walltime=1e-9)
        assert records() == [outer[0], (logging.WARNING, "Stopped,")]


def test_lines_of_json(cube: xr.DataArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_INTERVAL", 0.0)
    fit_each(cube, log_file=tmp_path / "map.jsonl")
    lines = (tmp_path / "map.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["event"] for record in records] == [
        "MapStarted", *["TileFinished"] * 4, "MapEnded",
    ]  # fmt: skip
    assert records[0]["shape"] == [6, 6]
    assert records[-2]["totals"] == records[-1]["totals"] == COUNTS
    assert max(map(len, lines)) < 500


# --- metrics


def test_metrics_by_status(cube: xr.DataArray) -> None:
    nd.reset_defense_telemetry()
    registry = CollectorRegistry()
    registry.register(nd.metrics_collector())
    for _ in range(2):
        fit_each(cube)
    values = {
        status.name.lower(): registry.get_sample_value(f"nlsq_pixels_{status.name.lower()}_total")
        for status in LaneStatus
        if status is not LaneStatus.NOT_FITTED
    }
    assert values == {**dict.fromkeys(values, 0), **{name: 2 * n for name, n in COUNTS.items()}}
    assert registry.get_sample_value("nlsq_maps_total") == 2
    assert registry.get_sample_value("nlsq_fits_total") == 0
    telemetry = nd.get_defense_telemetry()
    assert telemetry.pixel_status_counts["converged"] == 68
    assert set(telemetry.get_trigger_rates()) == set(DefenseLayerTelemetry().get_trigger_rates())
    nd.reset_defense_telemetry()
    assert set(telemetry.pixel_status_counts.values()) == {0}


def test_a_map_that_is_aborted_is_no_fit(cube: xr.DataArray) -> None:
    nd.reset_defense_telemetry()
    events: list[Event] = []

    def interrupt(event: Event) -> None:
        events.append(event)
        if isinstance(event, TileFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_each(cube, [interrupt])
    assert events[-1] == FitAborted("KeyboardInterrupt: ", is_map=True)
    telemetry = nd.get_defense_telemetry()
    assert (telemetry.total_maps, telemetry.total_fits) == (1, 0)
    assert sum(telemetry.pixel_status_counts.values()) == 9


# --- the page


def drawn(shape: tuple[int, ...], step: int = 1, over: tuple[str, ...] = ()) -> MapDrawn:
    """Return a picture of values that grow; of its cells, the first is not fitted yet.

    The fits of the second one have failed, and the last one is an outlier.
    """
    cells = tuple(-(n // -step) for n in shape)
    status, values = np.ones(cells, np.int8), np.arange(np.prod(cells), dtype=np.float32)
    status.ravel()[:2] = -128, -4
    values[:2], values[-1] = np.nan, 1e9
    steps = (step,) * len(shape)
    return MapDrawn("a", ("lat", "lon"), shape, steps, over, status, values.reshape(cells))


def taken(*events: Event) -> Fit:
    """Return a map as the scheduler knows it; msgpack makes tuples of lists."""
    messages = [message for event in events for message in Messages().of(event)]
    packed = msgpack.packb({"fit": "a", "client": "c", "messages": messages, "metrics": {}})
    fits = Fits()
    fits.take(msgpack.unpackb(packed, use_list=False))
    return fits.recent["a"]


def test_messages_are_small_and_the_last_ones_replace_others(
    seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, batches = Page(None), []
    monkeypatch.setattr(page, "_send", lambda: batches.append(list(page._waiting)))
    for event in (*seen[2:4], drawn((100, 100)), seen[4], drawn((100, 100)), seen[5]):
        page(event)
    kinds = [[message["kind"] for message in batch] for batch in batches]
    assert kinds == [["tiles", "picture"]] * 2
    assert [batch[0]["pixels"] for batch in batches] == [1000, 1100]
    assert len(msgpack.packb(batches[0])) < 52_000
    assert page._telemetry.pixel_status_counts["converged"] == 400


def test_a_map_on_the_page(seen: list[Event]) -> None:
    fit = taken(*seen[:4], drawn((40, 50)))
    view = View(_fits(fit))
    view.update()
    models = {root.name: root for root in view.roots}
    assert "2,000 pixels of 100 points &middot; tiles: 4 x 5" in models["head"].text
    assert "1,000 of 2,000 pixels, 10 of 20 tiles, 200 fits/s" in models["head"].text
    assert "; 990 converged, 10 stalled" in models["head"].text
    assert "8 of 20 tiles are in the store" in models["notes"].text
    visible = {"choice", "head", "pass", "fit rate", "status", "parameter", "notes"}
    assert {name for name, model in models.items() if model.visible} == visible - {"choice"}
    assert models["pass"].title.text == "Completed pixels of the map"
    assert fit.share == 0.5
    assert rates(fit)["y"] == pytest.approx([200, 200])
    assert models["status"].title.text == "Status of the pixels: 1: decay"
    (legend,) = models["status"].legend
    assert {item.label.value for item in legend.items if item.visible} == {"converged", "stalled"}
    assert models["parameter"].title.text == "Parameter a of the pixels: 1: decay"
    assert [axis.axis_label for axis in models["parameter"].axis] == [
        "pixel along lon", "pixel along lat",
    ]  # fmt: skip
    fit.take({"kind": "ended", "state": "finished", "text": str(format_event(seen[-1]))})
    view._fits.version += 1
    view.update()
    assert models["head"].text.count("converged") == 1


def _fits(*recent: Fit) -> Fits:
    fits = Fits()
    fits.recent = {str(fit.number): fit for fit in recent}
    return fits


def test_what_does_not_apply_is_hidden() -> None:
    fits = _fits(Fit(1, "c"))
    view = View(fits)
    view.update()
    hidden = {root.name for root in view.roots if not root.visible}
    assert hidden == {"choice", "fit rate", "status", "parameter", "map", "profile"}
    fits.recent["2"] = taken(MapStarted("m", 9, (4, 5), (1, 1), ("u", "v"), ("a",)))
    fits.version += 1
    view.update()
    visible = {root.name: root for root in view.roots if root.visible}
    assert {"loss", "fit rate"} < set(visible)
    assert visible["pass"].title.text == (
        "Completed blocks of the running pass and pixels of the map"
    )


@pytest.mark.parametrize("shape", [(), (30,), (9, 8)])
def test_pictures_of_maps_with_fewer_dimensions(shape: tuple[int, ...]) -> None:
    dims, ones = ("u", "v")[: len(shape)], np.ones(shape)
    steps = (1,) * len(shape)
    event = MapDrawn("a", dims, shape, steps, (), ones.astype("int8"), ones.astype("float32"))
    fit = taken(MapStarted("m", 9, shape, steps, dims, ("a",)), event)
    status, value = status_image(fit), value_image(fit)
    assert status is not None
    assert value is not None
    assert status.table.shape == value.table.shape == (1, 1, *shape)[-2:]
    assert status.size == status.table.shape[::-1]
    assert status.dims == [*dims[::-1], *[""] * (2 - len(shape))]
    assert (value.low, value.high) == (0.5, 1.5)
    figure = StatusMap()
    figure.update([fit])
    assert figure.figure.yaxis.visible == (len(shape) == 2)
    names = [name for name, _ in figure.figure.select_one(HoverTool).tooltips]
    assert names == [*dims, "status"]


def test_colors_of_a_parameter_ignore_outliers() -> None:
    value = value_image(taken(drawn((99, 100), step=2, over=("time",))))
    assert value is not None
    assert 2 < value.low < 100 < 2400 < value.high < 2500
    assert value.note == " (mean over time; mean of each 2 x 2)"
    assert (value.drawn, value.size) == ((100, 100), (100, 99))


def test_the_page_has_the_statuses_and_colors_of_plot_map() -> None:
    expected = {int(status): status.name.lower() for status in LaneStatus}
    del expected[LaneStatus.NOT_FITTED]
    assert expected == STATUSES
    colors = {STATUSES[code]: color for code, color in STATUS_COLORS.items()}
    assert {**colors, "not_fitted": "#FFFFFF"} == plotting._COLORS
