"""What the client needs before the first pass, by the number of chunks: seconds, memory, bytes.

    python -m benchmarks.client

10 TB in chunks of 8 MB are 625,000 chunks each of x and y. The arrays here have no contents, only
the metadata of a Zarr store: preparing a fit reads no more. Each size has a process of its own.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from typing import Any

import zarr

from benchmarks import common
from benchmarks.memory import memory_mb
from nlsq_dask.data.alignment import align
from nlsq_dask.engine.dataset import DataSet

_CHUNK = 1_000_000


def measure(n_chunks: int) -> dict[str, Any]:
    """Prepare a data set of so many chunks; the process must be new."""
    with tempfile.TemporaryDirectory() as folder:
        x, y = (
            zarr.create_array(
                f"{folder}/{name}", shape=(n_chunks * _CHUNK,), chunks=(_CHUNK,), dtype="float64"
            )
            for name in "xy"
        )
        before, began = memory_mb("VmRSS"), time.perf_counter()
        data = DataSet(align(x, y, None), cache=0)
        data.open()
        took = time.perf_counter() - began
        peak = memory_mb("VmHWM") - before
        tasks, sent = graph_size(data)
    return {"n_chunks": n_chunks, "seconds": took, "mb": peak, "tasks": tasks, "sent_mb": sent}


def graph_size(data: DataSet) -> tuple[int, float]:
    """Return the number of group tasks and the MB of what is placed on the workers for them.

    This is the only place that looks into the engine.
    """
    groups = data._groups
    some = groups[:: max(len(groups) // 100, 1)]
    each = sum(len(pickle.dumps(group)) for group in some) / len(some)
    return len(groups), each * len(groups) / 1e6


def main() -> None:
    """Measure a few sizes, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--one", type=int, help="number of chunks; used by itself")
    args = parser.parse_args()
    if args.one:
        json.dump(measure(args.one), sys.stdout)
        return
    sizes = (200, 400) if args.quick else (10_000, 40_000)
    found = [common.in_new_process("benchmarks.client", "--one", size) for size in sizes]
    last = found[-1]
    factor = 625_000 / last["n_chunks"]
    common.Report(
        "client",
        "Before the first pass, on the client",
        settings={"chunk": _CHUNK, "sizes": sizes},
        figures={"sizes": found},
        headlines=[
            (
                f"preparing a fit of {last['n_chunks']:,} chunks of x and of y",
                f"{last['seconds']:.1f} s and {last['mb']:.0f} MB on the client, "
                f"{last['tasks']:,} groups; for 625,000 chunks, if it grows in proportion: "
                f"{last['seconds'] * factor:.0f} s and {last['mb'] * factor / 1000:.1f} GB",
            )
        ],
        header=["chunks", "s", "MB", "groups", "MB placed on the workers"],
        rows=[
            [
                f"{one['n_chunks']:,}",
                f"{one['seconds']:.2f}",
                f"{one['mb']:.0f}",
                f"{one['tasks']:,}",
                f"{one['sent_mb']:.2f}",
            ]
            for one in found
        ],
    ).save(args)


if __name__ == "__main__":
    main()
