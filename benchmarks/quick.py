"""How long a pass over a Zarr store takes, next to the bare reading of the same store.

    python benchmarks/quick.py

Prints medians of five runs, on Dask's threads.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import dask
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import zarr

from nlsq_dask import AdaptiveHybridStreamingOptimizer, FitResult, HybridStreamingConfig

N_ROWS, CHUNK, RUNS = 10_000_000, 1_000_000, 5


def peak(x, height, centre, width, background):
    """Gaussian on a constant background."""
    return height * jnp.exp(-0.5 * ((x - centre) / width) ** 2) + background


def make_store(folder: Path) -> tuple[zarr.Array, zarr.Array]:
    """Write x and y, 80 MB each, a chunk at a time."""
    x, y = (
        zarr.create_array(folder / name, shape=(N_ROWS,), chunks=(CHUNK,), dtype="float64")
        for name in ("x", "y")
    )
    rng = np.random.default_rng(0)
    for start in range(0, N_ROWS, CHUNK):
        at = rng.uniform(-5, 5, CHUNK)
        x[start : start + CHUNK] = at
        noise = rng.normal(0, 0.5, CHUNK)
        y[start : start + CHUNK] = 3 * np.exp(-0.5 * ((at - 0.5) / 1.2) ** 2) + 1 + noise
    return x, y


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def fit(x: zarr.Array, y: zarr.Array) -> tuple[FitResult, float]:
    """Fit, and return the median time from one iteration over all rows to the next."""
    ticks: list[float] = []
    config = HybridStreamingConfig(verbose=0, callback_frequency=1)
    result = AdaptiveHybridStreamingOptimizer(config).fit(
        peak, x, y, [1, 0, 1, 0], callback=lambda *_: ticks.append(time.perf_counter())
    )
    return result, median(np.diff(ticks[-result.nit :]))


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        x, y = make_store(Path(folder))
        sums = [da.from_zarr(array).sum() for array in (x, y)]
        first = seconds(lambda: fit(x, y))
        runs = []
        for _ in range(RUNS):
            read = seconds(lambda: dask.compute(*sums))
            began = time.perf_counter()
            result, a_pass = fit(x, y)
            runs.append((read, a_pass, time.perf_counter() - began))
    read, a_pass, whole = map(median, zip(*runs, strict=True))
    print(
        f"{N_ROWS:,} rows of x and y, float64, {N_ROWS // CHUNK} chunks each; "
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, jax {jax.__version__}, dask {dask.__version__}\n"
    )
    print(f"| what | seconds, median of {RUNS} |")
    print("|---|---|")
    print(f"| sum of x and y, da.from_zarr | {read:.2f} |")
    print(f"| one pass of a fit: cost, gradient and J^T J of 4 parameters | {a_pass:.2f} |")
    print(f"| whole fit, {result.n_passes} passes | {whole:.2f} |")
    print(f"| whole fit, the first of a process, which compiles (once) | {first:.2f} |")


if __name__ == "__main__":
    main()
