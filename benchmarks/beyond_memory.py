"""A whole fit of data larger than memory, next to the bare reading of them: 4e9 rows, 32 GB.

    python -m benchmarks.beyond_memory

x and y are float32, uncompressed, in chunks of 10 million rows. Bare reading is
``dask.compute(x.sum(), y.sum())`` with the same threads; both are measured in turns. The machine's
memory cannot hold the files, so each pass reads them from the disk. The model was compiled by a fit
of a small part. Memory is the peak of the process above that after this first fit.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks import common
from benchmarks.memory import memory_mb
from benchmarks.out_of_core import bare_read

_CHUNK = 10_000_000


def write(folder: Path, n_rows: int, chunk: int) -> None:
    """Write the store; the noise of a chunk is that of the first, in another order."""
    shape = {"shape": (n_rows,), "chunks": (chunk,), "dtype": "float32", "compressors": None}
    x, y = (zarr.create_array(folder / name, **shape) for name in "xy")
    noise = np.random.default_rng(0).standard_normal(chunk, np.float32) * np.float32(common.NOISE)
    a, b, c = (np.float32(value) for value in common.TRUTH)
    low, high = (np.float32(value) for value in common.X_RANGE)

    def write_chunk(start: int) -> None:
        random = np.random.default_rng([1, start // chunk])
        at = low + (high - low) * random.random(min(chunk, n_rows - start), np.float32)
        shift = int(random.integers(chunk))
        x[start : start + chunk] = at
        y[start : start + chunk] = a * np.exp(-b * at) + c + np.roll(noise, shift)[: len(at)]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_chunk, range(0, n_rows, chunk)))


def measure(folder: Path, n_rows: int, repeats: int) -> dict[str, Any]:
    """Time bare reading and fits in turns, after a first fit of a part."""
    x, y = common.open_store(folder)
    found: dict[str, Any] = {"n_rows": n_rows, "bytes": 8 * n_rows, "runs": []}
    with common.on_threads():
        common.fit(common.exponential, x[: 2**18], y[: 2**18], common.START, cache=0)
        before = memory_mb("VmHWM")
        for _ in range(repeats):
            bare = common.seconds(lambda: bare_read(x, y))
            run: dict[str, Any] = {"bare_read": bare}
            for name, is_one in (("fit", True), ("fit, enable_one_pass=False", False)):
                results: list[Any] = []

                def fit(results: list[Any] = results, is_one: bool = is_one) -> None:
                    options = {"cache": 0, "enable_one_pass": is_one}
                    results.append(common.fit(common.exponential, x, y, common.START, **options))

                run[name] = {"seconds": common.seconds(fit)}
                result, pass_seconds = results[0]
                run[name] |= {
                    "rows_read_per_row": result.rows_read / n_rows,
                    "passes": result.n_passes,
                    "pass_seconds": pass_seconds,
                    "estimated_step_left": result.diagnostics["last_step_error"],
                    "popt": result.popt.tolist(),
                    "perr": result.perr.tolist(),
                }
            found["runs"].append(run)
        found["memory_mb"] = memory_mb("VmHWM") - before
    return found


def main() -> None:
    """Write the store, measure, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--folder", help="where the store is, or is to be written and kept")
    args = parser.parse_args()
    n_rows, chunk, repeats = (10**6, 10**5, 1) if args.quick else (4 * 10**9, _CHUNK, 2)
    folder = Path(args.folder or tempfile.mkdtemp())
    needed = 1.1 * 8 * n_rows
    if not (folder / "y").exists() and shutil.disk_usage(folder).free < needed:
        print(f"beyond_memory: left out, it needs {needed / 1e9:.0f} GB of disk.")
        return
    try:
        if not (folder / "y").exists():
            write(folder, n_rows, chunk)
        found = measure(folder, n_rows, repeats)
    finally:
        if not args.folder:
            shutil.rmtree(folder)
    names = ("fit", "fit, enable_one_pass=False")
    rows = []
    for run in found["runs"]:
        for name in names:
            ratio = run[name]["seconds"] / run["bare_read"]
            read, passes = run[name]["rows_read_per_row"], run[name]["passes"]
            rows.append(
                [name, f"{run[name]['seconds']:.1f}", f"{ratio:.2f}", f"{read:.2f}", passes]
            )
        rows.append(["bare read", f"{run['bare_read']:.1f}", "1", "1", 1])
    ratios = sorted(run["fit"]["seconds"] / run["bare_read"] for run in found["runs"])
    common.Report(
        "beyond_memory",
        "A whole fit of data larger than memory",
        settings={"n_rows": n_rows, "chunk": chunk, "dtype": "float32", "cache": 0},
        figures=found,
        headlines=[
            (
                f"whole fit / bare read, {n_rows:.0e} rows, {8 * n_rows / 1e9:.0f} GB",
                " and ".join(f"{ratio:.2f}" for ratio in ratios),
            ),
            ("peak memory above that after a small fit", f"{found['memory_mb']:.0f} MB"),
        ],
        header=["what", "s", "/ bare read", "rows read / rows", "passes"],
        rows=[[str(cell) for cell in row] for row in rows],
    ).save(args)


if __name__ == "__main__":
    main()
