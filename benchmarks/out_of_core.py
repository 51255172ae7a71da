"""A whole fit of a Zarr store next to the bare reading of it, and next to the textbook loop.

    python -m benchmarks.out_of_core

Bare reading is ``dask.compute(x.sum(), y.sum())``. The textbook loop is Gauss-Newton with NumPy
residuals and Jacobians in ``map_blocks``, summed by Dask, with one ``compute`` a step, from the
same p0 to the same tolerance. The store is on the local disk and, after it was written, in the
operating system's cache: so what is measured is decompression and arithmetic, not a disk.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr

from benchmarks import common

STORES = {"zstd": "Zarr's default (zstd)", "raw": "uncompressed"}
SCHEDULERS = {"threads": "2 threads", "processes": "2 processes"}
NO_CACHE, AUTO = "fit, cache=0", 'fit, cache="auto"'


def bare_read(x: zarr.Array, y: zarr.Array) -> None:
    """Read all rows and do next to nothing with them."""
    dask.compute(*(da.from_zarr(array).sum() for array in (x, y)))


def textbook(x: zarr.Array, y: zarr.Array, tol: float = 1e-8) -> tuple[np.ndarray, int]:
    """Fit with the loop that one would write; return the solution and the number of passes."""
    xs, ys = da.from_zarr(x), da.from_zarr(y)
    params = np.array(common.START)
    shape = {"new_axis": (1, 2), "chunks": ((1,) * xs.numblocks[0], 4, 4)}

    def block_sums(at: np.ndarray, of: np.ndarray, params: np.ndarray) -> np.ndarray:
        a, b, c = params
        decay = np.exp(-b * at)
        stacked = np.stack([decay, -a * at * decay, np.ones_like(at), a * decay + c - of])
        return (stacked @ stacked.T)[None]

    for n_passes in range(1, 101):
        blocks = da.map_blocks(block_sums, xs, ys, params, **shape, dtype="float64")
        sums = blocks.sum(axis=0).compute()
        jtj, jtr, cost = sums[:3, :3], sums[:3, 3], 0.5 * sums[3, 3]
        step = np.linalg.solve(jtj, -jtr)
        params = params + step
        if -0.5 * step @ jtr <= tol**2 * cost:
            return params, n_passes
    raise RuntimeError("the textbook loop did not converge")


def measure(scheduler: str, folder: Path, later: int) -> dict[str, Any]:
    """Time all calls on one store and one scheduler, in turns."""
    x, y = common.open_store(folder)
    last: dict[str, Any] = {}

    def fit(name: str, cache: int | str) -> None:
        last[name] = common.fit(common.exponential, x, y, common.START, cache=cache)

    def loop() -> None:
        last["textbook loop"] = textbook(x, y)

    calls = {
        "bare read": lambda: bare_read(x, y),
        NO_CACHE: lambda: fit(NO_CACHE, 0),
        AUTO: lambda: fit(AUTO, "auto"),
        "textbook loop": loop,
    }
    with common.on_threads() if scheduler == "threads" else common.on_processes():
        timings = common.compare(calls, later)
    loop_params, loop_passes = last.pop("textbook loop")
    found: dict[str, Any] = {name: timing.record() for name, timing in timings.items()}
    found["textbook loop"]["passes"] = loop_passes
    for name, (result, pass_seconds) in last.items():
        off = np.abs((result.x - loop_params) / result.perr).max()
        found[name] |= {
            "passes": result.n_passes,
            "rows_read_per_row": result.rows_read / x.shape[0],
            "rows_cached": result.rows_cached,
            "pass_seconds": pass_seconds,
            "phases": common.phases(result),
            "off_the_loop_in_standard_errors": off,
        }
    return found


def main() -> None:
    """Measure all stores and schedulers, each pair in a process of its own, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs=3, help="scheduler, folder and repeats; used by itself")
    args = parser.parse_args()
    if args.one:
        scheduler, folder, later = args.one
        json.dump(measure(scheduler, Path(folder), int(later)), sys.stdout)
        return
    n_rows, chunk, later = (200_000, 20_000, 1) if args.quick else (20_000_000, 1_000_000, 3)
    found = {}
    for store in STORES:
        with tempfile.TemporaryDirectory() as folder:
            common.write_store(Path(folder), n_rows, chunk, compressed=store == "zstd")
            for scheduler in SCHEDULERS:
                found[f"{store}, {scheduler}"] = common.in_new_process(
                    "benchmarks.out_of_core", "--one", scheduler, folder, later
                )
    rows, headlines = [], []
    for key, calls in found.items():
        store, scheduler = key.split(", ")
        where = f"{STORES[store]}, {SCHEDULERS[scheduler]}"
        bare = calls["bare read"]["median"]
        ratios = {name: call["median"] / bare for name, call in calls.items()}
        for name, call in calls.items():
            phases = call.get("phases", {})
            rows.append(
                [
                    where,
                    name,
                    f"{call['median']:.2f}",
                    f"{call['first']:.2f}",
                    f"{ratios[name]:.2f}",
                    f"{call.get('rows_read_per_row', call.get('passes', 1)):.2f}",
                    ", ".join(f"{phase} {took:.2f}" for phase, took in phases.items()),
                ]
            )
        headlines.append(
            (
                f"whole fit / bare read, {n_rows:.0e} rows, {where}",
                f'{ratios[NO_CACHE]:.2f} (cache="auto": {ratios[AUTO]:.2f}; '
                f"textbook loop: {ratios['textbook loop']:.2f})",
            )
        )
    common.Report(
        "out_of_core",
        "A whole fit next to the bare reading of its store",
        settings={"n_rows": n_rows, "chunk": chunk, "later": later, "p0": common.START},
        figures=found,
        headlines=headlines,
        header=["store, scheduler", "what", "s", "first, s", "/ bare", "read", "phases, s"],
        rows=rows,
    ).save(args)


if __name__ == "__main__":
    main()
