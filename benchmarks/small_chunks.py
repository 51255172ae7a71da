"""Thousands of small chunks on a cluster of two processes: where tasks cost more than rows.

    python -m benchmarks.small_chunks

A pass over all rows is set against ``dask.compute(x.sum(), y.sum())`` on the same cluster, for
chunks made by Dask (``da.linspace`` and arithmetic on it) and for a Zarr store chunked alike.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import dask
import dask.array as da

from benchmarks import common

_CHUNK = 1_000


def made_by_dask(n_rows: int) -> tuple[da.Array, da.Array]:
    """Return x and y as graphs; the noise is a sine too fast for the grid."""
    x = da.linspace(*common.X_RANGE, n_rows, chunks=_CHUNK)
    a, b, c = common.TRUTH
    return x, a * da.exp(-b * x) + c + common.NOISE * da.sin(1e7 * x)


def measure(x: Any, y: Any, later: int, n_bare: int) -> dict[str, Any]:
    """Time fits and bare sums on the active cluster."""
    lazy = [array if isinstance(array, da.Array) else da.from_zarr(array) for array in (x, y)]
    last: list[Any] = []

    def fit() -> None:
        last.append(common.fit(common.exponential, x, y, common.START, cache=0))

    # Nothing is compiled for these, so few chunks are enough to warm up.
    dask.compute(*(a[: 100 * _CHUNK].sum() for a in lazy))
    took = [common.seconds(lambda: dask.compute(*(a.sum() for a in lazy))) for _ in range(n_bare)]
    bare = common.Timing(took[0], took)
    whole = common.compare({"": fit}, later)[""]
    pass_seconds = [took for _, passes in last[1:] for took in passes]
    result = last[-1][0]
    return {
        "bare sums": bare.record(),
        "whole fit": whole.record(),
        "pass": {"first": last[0][1][0], "later": pass_seconds, "median": median(pass_seconds)},
        "passes": result.n_passes,
        "phases": common.phases(result),
    }


def main() -> None:
    """Measure both kinds of chunks, each on a fresh cluster, print and save."""
    args = common.arguments(__doc__).parse_args()
    n_chunks, later, n_bare = (100, 1, 1) if args.quick else (4_000, 1, 1)
    n_rows = n_chunks * _CHUNK
    found = {}
    with common.on_processes():
        found["made by Dask"] = measure(*made_by_dask(n_rows), later, n_bare)
    with tempfile.TemporaryDirectory() as folder:
        common.write_store(Path(folder), n_rows, _CHUNK)
        with common.on_processes():
            found["Zarr"] = measure(*common.open_store(Path(folder)), later, n_bare)
    common.Report(
        "small_chunks",
        f"{n_chunks:,} chunks of {_CHUNK:,} rows on two processes",
        settings={"n_chunks": n_chunks, "chunk": _CHUNK, "later": later, "n_bare": n_bare},
        figures=found,
        headlines=[
            (
                f"a pass / bare sums, {n_chunks:,} chunks of {_CHUNK:,} rows, {kind}, 2 processes",
                f"{one['pass']['median'] / one['bare sums']['median']:.3f} "
                f"({one['pass']['median']:.2f} s / {one['bare sums']['median']:.1f} s)",
            )
            for kind, one in found.items()
        ],
        header=["chunks", "what", "s", "first, s", "/ bare sums"],
        rows=[
            [
                kind,
                what,
                f"{one[what]['median']:.2f}",
                f"{one[what]['first']:.2f}",
                f"{one[what]['median'] / one['bare sums']['median']:.3f}",
            ]
            for kind, one in found.items()
            for what in ("bare sums", "pass", "whole fit")
        ],
    ).save(args)


if __name__ == "__main__":
    main()
