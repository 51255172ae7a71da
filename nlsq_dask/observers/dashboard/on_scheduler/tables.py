"""Conversion of recorded fits to the data of the plots, mostly dicts of columns."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from nlsq_dask.observers.dashboard.on_scheduler.fits import Fit

_SECONDS = "seconds since the start of the fit"
# Curves by name: title, label of x, label of y, whether the y axis is logarithmic.
CURVES = {
    "loss": ("Loss: mean squared weighted residual", "iteration", "loss", True),
    "gradient_norm": ("Gradient norm", "iteration", "|gradient|", True),
    "trust_radius": ("Trust radius", "iteration", "radius", True),
    "rate": ("Data processed per second", _SECONDS, "MB/s", False),
}
MAP_CURVES = {"fit rate": ("Fits per second", _SECONDS, "fits/s", False)}
# Statuses of pixels, as LaneStatus, which cannot be imported here.
STATUSES = {
    3: "singular",
    2: "at_bound",
    1: "converged",
    0: "iteration_limit",
    -1: "no_data",
    -2: "too_few_points",
    -3: "non_finite",
    -4: "stalled",
    -5: "bad_start",
    -6: "not_read",
}
_PERCENTILES = (2, 98)  # limits of colors
_NO_TILE = -128  # status in a picture where no tile is complete
_ALL_ROWS = "all rows"  # as events.ALL_ROWS, which cannot be imported here
_POINT = ("x", "y", "marker", "size")
_BAR = ("fit", "name", "left", "right", "seconds", "label", "color", "state")


def _columns(names: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Convert a table from rows to a dict of its columns."""
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def curve(fit: Fit | None, name: str) -> dict[str, list[Any]]:
    """Return the points of a curve, by its name, as columns; no points if the fit is None.

    Markers are larger for iterations over all rows than for those on a sample.
    """
    if fit is None:
        return _columns(_POINT, [])
    if name in ("rate", "fit rate"):
        return rates(fit)
    points = []
    for entry in list(fit.iterations):
        # A logarithmic axis shows a gap for other values.
        y = entry[name] if math.isfinite(entry[name]) and entry[name] > 0 else math.nan
        marker, size = ("circle", 4) if entry["accepted"] else ("x", 7)
        size = 9 if entry["stage"] == _ALL_ROWS else size
        points.append((entry["iteration"], y, marker, size))
    return _columns(_POINT, points)


def rates(fit: Fit) -> dict[str, list[Any]]:
    """Return the megabytes, read and cached, or the pixels per second as columns over time."""
    measured, unit = list(fit.rates), 1.0 if fit.is_map else 1e6
    return _columns(_POINT, [(at - fit.began, rate / unit, "circle", 4) for at, rate in measured])


def bars_of_phases(fits: list[Fit], colors: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return one bar per phase of each fit, as columns; each phase has its own color."""
    bars = []
    ends = [fit.heard if not fit.is_running else time.time() for fit in fits]
    spans = [end - fit.began for fit, end in zip(fits, ends, strict=True)]
    for fit, end in zip(fits, ends, strict=True):
        for phase in fit.phases:
            left = phase["start"] - fit.began
            is_open = phase["duration"] is None
            right = end - fit.began if is_open else left + phase["duration"]
            state = "failed" if phase["failed"] else "running" if is_open else "done"
            seconds = max(right - left, 0.0)
            has_room = seconds > 0.12 * max(spans)
            label = f"{seconds:.1f} s" if has_room else ""
            color = colors[phase["phase"] % len(colors)]
            name = f"{phase['phase']} {phase['name']}"
            bars.append((fit.title, name, left, left + seconds, seconds, label, color, state))
    return _columns(_BAR, bars)


def bars_of_progress(fits: list[Fit], colors: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return one bar per fit, the progress of its current pass or of its map, as columns."""
    return {
        "fit": [fit.title for fit in fits],
        "share": [100 * fit.share for fit in fits],
        "label": [describe_progress(fit) or fit.state for fit in fits],
        "color": [colors[fit.number % len(colors)] for fit in fits],
    }


def describe_progress(fit: Fit) -> str:
    """Return the progress of a running fit as text; empty if the fit has ended."""
    now = fit.progress
    if not fit.is_running:
        return ""
    if fit.is_map:
        return str(now["text"]) if now else "beginning"
    if not now:
        phase = fit.phases[-1]["name"] if fit.phases else "beginning"
        done = f" (pass {fit.last_pass['pass']} done)" if fit.last_pass else ""
        return f"{phase}{done}"
    name = f"subset {now['subset']}" if now.get("subset") else f"pass {now['pass']}"
    words = f"{name}: {now['blocks']:,} of {now['n_blocks']:,} blocks"
    if now["blocks"] and now["seconds"] > 0.0:
        rate = now["bytes"] / now["seconds"]
        left = now["seconds"] * (now["n_blocks"] / now["blocks"] - 1)
        words += f", {rate / 1e6:,.0f} MB/s, {left:,.0f} s remaining"
    return words


class Image:
    """Data of a heat map; the first dimension of the data runs downwards.

    A heat map of data with fewer than two dimensions has one row.

    Parameters
    ----------
    table : ndarray
        Values of the cells.
    about : dict
        Message about the cells, with dims, size and step: for each dimension its name, length, and
        the length of a cell.
    element : str
        What a cell consists of, "block" or "pixel".
    note : str
        Text that says over which elements a cell is taken.
    """

    def __init__(self, table: Any, about: dict[str, Any], element: str, note: str) -> None:
        missing = max(2 - len(about["size"]), 0)
        size, step = ([*missing * (1,), *about[name]] for name in ("size", "step"))
        self.table = table.reshape((1,) * missing + table.shape)
        self.dims = [*about["dims"][::-1], *missing * [""]]  # along x and y; "" without a name
        self.step = step[::-1]  # number of elements in a cell, along x and y
        # Width and height of the image; the last cells may extend beyond the last element.
        self.drawn = (self.table.shape[1] * step[1], self.table.shape[0] * step[0])
        self.size = (size[1], size[0])
        self.axes = [dim and f"{element} along {dim}" for dim in self.dims]
        self.note = note
        self.low, self.high = _limits(table)


class Line:
    """Data of a step plot of the blocks along one dimension."""

    def __init__(self, table: Any, about: dict[str, Any], note: str) -> None:
        (step,) = about["step"]
        (size,) = about["size"]
        self.x = [min(i * step, size) for i in range(len(table) + 1)]
        self.y = [*map(float, table), float(table[-1])]
        self.axis = f"block along {about['dims'][0]}"
        self.note = note


def image(fit: Fit) -> Image | None:
    """Return the heat map of the blocks, or None.

    It is None if the blocks have no values yet or divide the data along one dimension only.
    """
    return Image(*_blocks(fit, "block")) if len(fit.map.get("shape", ())) == 2 else None


def profile(fit: Fit) -> Line | None:
    """Return the step plot of the blocks, or None.

    It is None if the blocks have no values yet or divide the data along several dimensions.
    """
    return Line(*_blocks(fit)) if len(fit.map.get("shape", ())) == 1 else None


def _blocks(fit: Fit, *element: str) -> tuple[Any, ...]:
    about = fit.map
    note = _note("largest", about["largest_over"], about["step"])
    return (_table(about, "values", "float32"), about, *element, note)


def status_image(fit: Fit) -> Image | None:
    """Return the heat map of the statuses of the pixels; None before the first picture."""
    import numpy as np

    about = fit.picture
    if not about:
        return None
    table = _table(about, "status", "int8").astype(np.float32)
    table[table == _NO_TILE] = np.nan
    return Image(table, about, "pixel", _note("lowest", about["over"], about["step"]))


def value_image(fit: Fit) -> Image | None:
    """Return the heat map of a parameter, with limits that ignore outliers, or None.

    It is None before the first picture.
    """
    import numpy as np

    about = fit.picture
    if not about:
        return None
    table = _table(about, "values", "float32")
    shown = Image(table, about, "pixel", _note("mean", about["over"], about["step"]))
    finite = table[np.isfinite(table)]
    if finite.size:
        shown.low, shown.high = _limits(np.percentile(finite, _PERCENTILES))
    return shown


def _table(about: dict[str, Any], name: str, dtype: str) -> Any:
    import numpy as np

    return np.frombuffer(about[name], dtype).reshape(about["shape"])


def _limits(table: Any) -> tuple[float, float]:
    import numpy as np

    finite = table[np.isfinite(table)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _note(what: str, over: list[str], steps: list[int]) -> str:
    """Return a text that says over which blocks or pixels a cell is taken, if over several."""
    words = [f"{what} over {', '.join(over)}"] if over else []
    words += [f"{what} of each {' x '.join(map(str, steps))}"] if max(steps, default=1) > 1 else []
    return f" ({'; '.join(words)})" if words else ""
