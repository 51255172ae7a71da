"""What watching costs: fits that everything watches against fits that nothing does.

    python -m benchmarks.watching

On two processes, from a store on the disk, in turns: lines and records go to files, and the page of
the dashboard is served, as it is with nobody looking at it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import zarr

from benchmarks import common
from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig


def _seconds(x: zarr.Array[Any], y: zarr.Array[Any], **options: Any) -> float:
    config = HybridStreamingConfig(cache=0, **options)
    began = time.perf_counter()
    result = AdaptiveHybridStreamingOptimizer(config).fit(common.exponential, x, y, common.START)
    if not result.success:
        raise RuntimeError(f"a benchmark's fit failed: {result.message}")
    return time.perf_counter() - began


def measure(folder: Path, later: int) -> dict[str, Any]:
    """Fit in turns; return the median seconds of a fit, and of the ratios of neighbours."""
    kinds: dict[str, dict[str, Any]] = {
        "nothing": {"verbose": 0, "dashboard": False},
        "page": {"verbose": 0, "dashboard": True},
        "everything": {"verbose": 1, "dashboard": True, "log_file": folder / "record.jsonl"},
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with common.on_processes(), (folder / "lines").open("w") as lines:
        x, y = common.open_store(folder / "store")
        names = list(kinds)
        for repeat in range(1 + later):
            for name in names[repeat % 3 :] + names[: repeat % 3]:
                with contextlib.redirect_stdout(lines):
                    took = _seconds(x, y, **kinds[name])
                if repeat:
                    seconds[name].append(took)
    found: dict[str, Any] = {name: median(took) for name, took in seconds.items()}
    for name in ("page", "everything"):
        pairs = zip(seconds[name], seconds["nothing"], strict=True)
        found[f"{name} / nothing"] = median(one / other for one, other in pairs)
    return found | {"seconds": seconds}


def main() -> None:
    """Measure, print and save."""
    args = common.arguments(__doc__).parse_args()
    n_rows, later = (20_000_000, 3) if args.quick else (100_000_000, 7)
    with tempfile.TemporaryDirectory() as folder:
        common.write_store(Path(folder) / "store", n_rows, 1_000_000)
        found = measure(Path(folder), later)
    page, everything = (found[f"{name} / nothing"] for name in ("page", "everything"))
    common.Report(
        "watching",
        "What watching costs",
        settings={"rows": n_rows, "later": later},
        figures=found,
        headlines=[("fit that everything watches / nothing, 2 processes", f"{everything:.3f}")],
        header=["what watches", "seconds a fit", "relative"],
        rows=[
            ["nothing", f"{found['nothing']:.2f}", "1"],
            ["the page", f"{found['page']:.2f}", f"{page:.3f}"],
            ["everything", f"{found['everything']:.2f}", f"{everything:.3f}"],
        ],
    ).save(args)


if __name__ == "__main__":
    main()
