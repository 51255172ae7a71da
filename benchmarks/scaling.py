"""Two workers against one on a compute-bound model: how much of the second core is used.

    python -m benchmarks.scaling

A worker has one Dask thread and is pinned to one core. Client and scheduler are not pinned: on a
machine of two cores they take their share from the two workers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax.numpy as jnp
import numpy as np
import zarr
from distributed import Client

from benchmarks import common


def peaks(count: int) -> tuple[Callable[..., Any], list[float]]:
    """Return a sum of Gaussians side by side, and its parameters."""

    def model(x: Any, *q: Any) -> Any:
        terms = [
            q[i] * jnp.exp(-0.5 * ((x - q[i + 1]) / q[i + 2]) ** 2) for i in range(0, 3 * count, 3)
        ]
        return sum(terms)

    return model, [value for i in range(count) for value in (1.0 + 0.1 * i, i + 0.5, 0.3)]


def pin_workers(client: Client) -> None:
    """Give each worker a core of its own."""
    workers = list(client.scheduler_info()["workers"])
    for worker, core in zip(workers, common.cores(), strict=False):
        client.run(common.pin, core, workers=[worker])


def measure(
    model: Callable[..., Any], x: zarr.Array, y: zarr.Array, p0: Any, n_workers: int, later: int
) -> dict[str, Any]:
    """Time passes on so many pinned workers."""
    with common.on_processes(n_workers) as client:
        pin_workers(client)
        fits = [common.fit(model, x, y, p0, cache=0) for _ in range(1 + later)]
    took = [seconds for _, passes in fits[1:] for seconds in passes]
    return {
        "first": fits[0][1][0],
        "later": took,
        "median": median(took),
        "passes": fits[-1][0].n_passes,
        "phases": common.phases(fits[-1][0]),
    }


def main() -> None:
    """Measure one worker and two, print and save."""
    args = common.arguments(__doc__).parse_args()
    if not hasattr(os, "sched_setaffinity") or len(common.cores()) < 2:
        print("scaling: left out, it needs Linux and two cores.")
        return
    n_rows, n_peaks, later = (400_000, 3, 1) if args.quick else (8_000_000, 10, 3)
    model, truth = peaks(n_peaks)
    p0 = np.array(truth) * 1.02
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common.write_store(
            folder,
            n_rows,
            n_rows // 32,
            model=model,
            truth=truth,
            x_range=(0.0, n_peaks),
            compressed=False,
        )
        store = common.open_store(folder)
        found = {str(n): measure(model, *store, p0, n, later) for n in (1, 2)}
    ratio = found["1"]["median"] / found["2"]["median"]
    common.Report(
        "scaling",
        f"Two workers against one, sum of {n_peaks} Gaussians ({len(truth)} parameters)",
        settings={"n_rows": n_rows, "chunk": n_rows // 32, "later": later},
        figures={**found, "ratio": ratio},
        headlines=[
            (
                f"two pinned workers against one, {len(truth)} parameters, a pass",
                f"{ratio:.2f} x as fast",
            )
        ],
        header=["workers", "a pass, s", "first, s", "million rows/s"],
        rows=[
            [
                n,
                f"{one['median']:.3f}",
                f"{one['first']:.2f}",
                f"{n_rows / one['median'] / 1e6:.2f}",
            ]
            for n, one in found.items()
        ],
    ).save(args)


if __name__ == "__main__":
    main()
