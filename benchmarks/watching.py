"""What watching costs: fits that everything watches against fits that nothing does.

    python -m benchmarks.watching

On two processes, in turns: a fit from a store on the disk, and a map of 1e5 pixels of 100 points in
memory. Lines and records go to files, the bar of a map to what takes itself for a terminal, and the
page of the dashboard is served, as it is with nobody looking at it.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import xarray as xr
import zarr

from benchmarks import common
from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig
from nlsq_dask.events import Event

Kinds = dict[str, Callable[[], float]]  # seconds of a call by who watches


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _ignore(event: Event) -> None:
    pass


def _seconds(x: zarr.Array[Any], y: zarr.Array[Any], **options: Any) -> float:
    config = HybridStreamingConfig(cache=0, **options)
    began = time.perf_counter()
    result = AdaptiveHybridStreamingOptimizer(config).fit(common.exponential, x, y, common.START)
    if not result.success:
        raise RuntimeError(f"a benchmark's fit failed: {result.message}")
    return time.perf_counter() - began


def _map_seconds(cube: xr.DataArray, observers: Any = (), **options: Any) -> float:
    optimizer = AdaptiveHybridStreamingOptimizer(
        HybridStreamingConfig(**options), observers=observers
    )
    began = time.perf_counter()
    maps = optimizer.fit_each(common.exponential, "t", cube, common.START, dims="t")
    seconds = time.perf_counter() - began
    if not bool((maps.status == 1).all()):
        raise RuntimeError("a benchmark's fits of pixels failed")
    return seconds


def _cube(n_pixels: int, n_points: int = 100) -> xr.DataArray:
    rng = np.random.default_rng(0)
    t, (a, b, c) = np.linspace(*common.X_RANGE, n_points), common.TRUTH
    heights = a * rng.uniform(0.8, 1.2, (n_pixels // 100, 100))
    y = heights * np.exp(-b * t[:, None, None]) + c
    y += common.NOISE * rng.standard_normal(y.shape)
    return xr.DataArray(y, {"t": t}, dims=("t", "row", "col"))


def _fits(folder: Path) -> Kinds:
    x, y = common.open_store(folder / "store")
    log = folder / "record.jsonl"

    def everything() -> float:
        with (folder / "lines").open("a") as lines, contextlib.redirect_stdout(lines):
            return _seconds(x, y, verbose=1, log_file=log)

    return {
        "nothing": lambda: _seconds(x, y, verbose=0, dashboard=False),
        "page": lambda: _seconds(x, y, verbose=0),
        "everything": everything,
    }


def _maps(folder: Path, n_pixels: int) -> Kinds:
    cube, log = _cube(n_pixels), folder / "map.jsonl"

    def everything() -> float:
        with contextlib.redirect_stdout(_Terminal()):
            return _map_seconds(cube, [_ignore], verbose=1, log_file=log)

    return {
        "nothing": lambda: _map_seconds(cube, verbose=0, dashboard=False),
        "page": lambda: _map_seconds(cube, verbose=0),
        "everything": everything,
    }


def _in_turns(kinds: Kinds, later: int) -> dict[str, Any]:
    """Call in turns; return the median seconds of a call, and of the ratios of neighbors."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    names = list(kinds)
    for repeat in range(1 + later):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            took = kinds[name]()
            if repeat:
                seconds[name].append(took)
    figures: dict[str, Any] = {name: median(took) for name, took in seconds.items()}
    for name in names[1:]:
        pairs = zip(seconds[name], seconds["nothing"], strict=True)
        figures[f"{name} / nothing"] = median(one / other for one, other in pairs)
    return figures | {"seconds": seconds}


def main() -> None:
    """Measure, print and save."""
    args = common.arguments(__doc__).parse_args()
    n_rows, n_pixels, later = (20_000_000, 20_000, 3) if args.quick else (100_000_000, 100_000, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common.write_store(folder / "store", n_rows, 1_000_000)
        with common.on_processes():
            figures = {"fit": _in_turns(_fits(folder), later)}
            # Distributed warns of arrays in a graph, which are what is fitted here.
            warnings.filterwarnings("ignore", "Sending large graph")
            figures["map"] = _in_turns(_maps(folder, n_pixels), 2 * later)
    common.Report(
        "watching",
        "What watching costs",
        settings={"rows": n_rows, "pixels": n_pixels, "later": later},
        figures=figures,
        headlines=[
            (
                f"{what} that everything watches / nothing, 2 processes",
                f"{found['everything / nothing']:.3f}",
            )
            for what, found in figures.items()
        ],
        header=["what watches", "seconds per fit", "relative", "seconds per map", "relative"],
        rows=[
            [
                name,
                *(
                    text
                    for found in figures.values()
                    for text in (f"{found[name]:.2f}", f"{found.get(f'{name} / nothing', 1):.3f}")
                ),
            ]
            for name in ("nothing", "page", "everything")
        ],
    ).save(args)


if __name__ == "__main__":
    main()
