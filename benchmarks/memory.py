"""Peak memory of a fit above what the import takes: 1e7 rows next to 1e8, two threads.

    python -m benchmarks.memory

Each fit has a process of its own, with the cache in which blocks may stay between passes and
without. What is counted is the peak of the process's resident memory during the fit (VmHWM, which
unlike ``ru_maxrss`` knows nothing of the parent process) minus its resident memory after the
imports. Linux only.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

_CACHES = (0, "auto")


def memory_mb(field: str) -> float:
    """Return VmRSS (now) or VmHWM (peak so far) of this process, in MB of 10**6 bytes."""
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024 / 1e6


def measure(folder: Path, cache: int | str) -> dict[str, Any]:
    """Fit a store once; the process must be new."""
    imported = memory_mb("VmRSS")
    x, y = common.open_store(folder)
    with common.on_threads():
        result, _ = common.fit(common.exponential, x, y, common.START, cache=cache)
    return {
        "n_rows": result.n_points,
        "cache": cache,
        "imported_mb": imported,
        "above_import_mb": memory_mb("VmHWM") - imported,
        "passes": result.n_passes,
    }


def main() -> None:
    """Measure both sizes, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs=2, help="folder of the store, and cache; used by itself")
    args = parser.parse_args()
    if args.one:
        folder, cache = args.one
        json.dump(measure(Path(folder), 0 if cache == "0" else cache), sys.stdout)
        return
    if not Path("/proc/self/status").exists():
        print("memory: left out, it needs Linux's /proc.")
        return
    sizes = (200_000, 2_000_000) if args.quick else (10_000_000, 100_000_000)
    chunk, repeats = sizes[0] // 10, 1 if args.quick else 2
    found: list[dict[str, Any]] = []
    for n_rows in sizes:
        with tempfile.TemporaryDirectory() as store:
            common.write_store(Path(store), n_rows, chunk)
            for cache in _CACHES:
                runs = [
                    common.in_new_process("benchmarks.memory", "--one", store, cache)
                    for _ in range(repeats)
                ]
                found.append(max(runs, key=lambda run: run["above_import_mb"]) | {"runs": runs})
    headlines = []
    for i, cache in enumerate(_CACHES):
        small, large = (one["above_import_mb"] for one in found[i :: len(_CACHES)])
        headlines.append(
            (
                f"peak memory above the import, {sizes[1]:.0e} rows, 2 threads, cache={cache!r}",
                f"{large:.0f} MB, {large / small:.2f} x that of {sizes[0]:.0e} rows",
            )
        )
    common.Report(
        "memory",
        "Peak memory above the import, two threads",
        settings={"sizes": sizes, "chunk": chunk, "repeats": repeats, "figure": "largest run"},
        figures={"fits": found},
        headlines=headlines,
        header=["rows", "cache", "imports, MB", "fit above that, MB", "passes"],
        rows=[
            [
                f"{one['n_rows']:,}",
                str(one["cache"]),
                f"{one['imported_mb']:.0f}",
                f"{one['above_import_mb']:.0f}",
                str(one["passes"]),
            ]
            for one in found
        ],
    ).save(args)


if __name__ == "__main__":
    main()
