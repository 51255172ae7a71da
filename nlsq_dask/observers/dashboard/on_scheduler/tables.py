"""Conversion of recorded fits to the data of the plots, mostly dicts of columns."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from nlsq_dask.observers.dashboard.on_scheduler.fits import Fit

# Curves by name: title, label of x, label of y, whether the y axis is logarithmic.
CURVES = {
    "loss": ("Loss: mean squared weighted residual", "iteration", "loss", True),
    "gradient_norm": ("Gradient norm", "iteration", "|gradient|", True),
    "trust_radius": ("Trust radius", "iteration", "radius", True),
    "rate": ("Data processed per second", "seconds since the start of the fit", "MB/s", False),
}
_ALL_ROWS = "all rows"  # as events.ALL_ROWS, which cannot be imported here
_POINT = ("x", "y", "marker", "size")
_BAR = ("fit", "name", "left", "right", "seconds", "label", "color", "state")


def _columns(names: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Convert a table from rows to a dict of its columns."""
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def curve(fit: Fit | None, name: str) -> dict[str, list[Any]]:
    """Return the points of a curve of ``CURVES`` as columns; no points if the fit is None.

    Markers are larger for iterations over all rows than for those on a sample.
    """
    if fit is None:
        return _columns(_POINT, [])
    if name == "rate":
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
    """Return the megabytes processed per second, read and cached, as columns over time."""
    measured = list(fit.rates)
    return _columns(_POINT, [(at - fit.began, rate / 1e6, "circle", 4) for at, rate in measured])


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


def bars_of_pass(fits: list[Fit], colors: tuple[str, ...]) -> dict[str, list[Any]]:
    """Return one bar per fit, the progress of its current pass, as columns."""
    return {
        "fit": [fit.title for fit in fits],
        "share": [100 * _share(fit) for fit in fits],
        "label": [describe_pass(fit) or fit.state for fit in fits],
        "color": [colors[fit.number % len(colors)] for fit in fits],
    }


def _share(fit: Fit) -> float:
    now = fit.progress
    return float(now["blocks"] / max(now["n_blocks"], 1)) if now else 0.0


def describe_pass(fit: Fit) -> str:
    """Return the progress of a running fit as text; empty if the fit has ended."""
    now = fit.progress
    if not fit.is_running:
        return ""
    if not now:
        phase = fit.phases[-1]["name"] if fit.phases else "beginning"
        done = f" (pass {fit.last_pass['pass']} done)" if fit.last_pass else ""
        return f"{phase}{done}"
    words = f"pass {now['pass']}: {now['blocks']:,} of {now['n_blocks']:,} blocks"
    if now["blocks"] and now["seconds"] > 0.0:
        rate = now["bytes"] / now["seconds"]
        left = now["seconds"] * (now["n_blocks"] / now["blocks"] - 1)
        words += f", {rate / 1e6:,.0f} MB/s, {left:,.0f} s remaining"
    return words


class Image:
    """Data of a heat map of the blocks; the first dimension of the data runs downwards."""

    def __init__(self, table: Any, about: dict[str, Any]) -> None:
        self.table = table
        down, across = about["step"]
        self.blocks = [across, down]  # number of blocks in a cell, along x and y
        # Width and height of the image in blocks; the last cells may extend beyond the last block.
        self.drawn = (table.shape[1] * across, table.shape[0] * down)
        height, width = about["size"]
        self.size = (width, height)  # number of blocks along x and y
        self.axes = [_axis(dim) for dim in reversed(about["dims"])]
        self.low, self.high = _limits(table)
        self.note = _note(about)


class Line:
    """Data of a step plot of the blocks along one dimension."""

    def __init__(self, table: Any, about: dict[str, Any]) -> None:
        (step,) = about["step"]
        (size,) = about["size"]
        self.x = [min(i * step, size) for i in range(len(table) + 1)]
        self.y = [*map(float, table), float(table[-1])]
        self.axis = _axis(about["dims"][0])
        self.note = _note(about)


def image(fit: Fit) -> Image | None:
    """Return the heat map of the blocks, or None.

    It is None if the blocks have no values yet or divide the data along one dimension only.
    """
    return Image(_table(fit.map), fit.map) if len(fit.map.get("shape", ())) == 2 else None


def profile(fit: Fit) -> Line | None:
    """Return the step plot of the blocks, or None.

    It is None if the blocks have no values yet or divide the data along several dimensions.
    """
    return Line(_table(fit.map), fit.map) if len(fit.map.get("shape", ())) == 1 else None


def _table(about: dict[str, Any]) -> Any:
    import numpy as np

    return np.frombuffer(about["values"], np.float32).reshape(about["shape"])


def _limits(table: Any) -> tuple[float, float]:
    import numpy as np

    finite = table[np.isfinite(table)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _axis(dim: str) -> str:
    return f"block along {dim}"


def _note(about: dict[str, Any]) -> str:
    """Return a text that says over which blocks each value is the maximum, if over several."""
    over, steps = about["largest_over"], about["step"]
    words = [f"largest over {', '.join(over)}"] if over else []
    words += [f"largest of each {' x '.join(map(str, steps))}"] if max(steps) > 1 else []
    return f" ({'; '.join(words)})" if words else ""
