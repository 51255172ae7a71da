"""A whole fit of a Zarr store that answers late, next to the bare reading of it.

    python -m benchmarks.latency

The store is on the local disk, and waits before it answers a request, as an object store does. Bare
reading is ``dask.compute(x.sum(), y.sum())`` with the same threads.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from benchmarks import common
from benchmarks.out_of_core import AUTO, NO_CACHE, bare_read

# Threads of this process, or of two workers with one each.
WHERE = {"1 thread": 1, "2 threads": 2, "8 threads": 8, "2 processes": 0}
MILLISECONDS, OF_PROCESSES = (0, 20, 50, 100), (0, 50)


class LateStore(WrapperStore[LocalStore]):
    """A store that waits before each answer.

    Parameters
    ----------
    store : LocalStore
    seconds : float
        How long it waits.
    """

    def __init__(self, store: LocalStore, seconds: float = 0.0) -> None:
        super().__init__(store)
        self._seconds = seconds

    def _with_store(self, store: LocalStore) -> LateStore:
        return type(self)(store, self._seconds)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self._seconds)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a value after a while."""
        await asyncio.sleep(self._seconds)
        return await self._store.get(key, prototype, byte_range)


def measure(where: str, milliseconds: float, folder: Path, later: int) -> dict[str, Any]:
    """Time all calls behind one latency, in turns."""
    x, y = (
        zarr.open_array(LateStore(LocalStore(folder / name), milliseconds / 1000), mode="r")
        for name in "xy"
    )
    last: dict[str, Any] = {}

    def fit(name: str, cache: int | str) -> None:
        last[name] = common.fit(common.exponential, x, y, common.START, cache=cache)

    calls = {
        "bare read": lambda: bare_read(x, y),
        NO_CACHE: lambda: fit(NO_CACHE, 0),
        AUTO: lambda: fit(AUTO, "auto"),
    }
    with common.on_threads(WHERE[where]) if WHERE[where] else common.on_processes():
        timings = common.compare(calls, later)
    found: dict[str, Any] = {name: timing.record() for name, timing in timings.items()}
    for name, (result, pass_seconds) in last.items():
        found[name] |= {
            "passes": result.n_passes,
            "rows_read_per_row": result.rows_read / x.shape[0],
            "rows_cached": result.rows_cached,
            "pass_seconds": pass_seconds,
            "phases": common.phases(result),
        }
    return found


def main() -> None:
    """Measure all latencies, each in a process of its own, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs=4, help="where, latency, folder, repeats; used by itself")
    args = parser.parse_args()
    if args.one:
        where, milliseconds, folder, later = args.one
        json.dump(measure(where, float(milliseconds), Path(folder), int(later)), sys.stdout)
        return
    n_rows, chunk, later = (100_000, 20_000, 1) if args.quick else (20_000_000, 1_000_000, 3)
    cases = [
        (where, ms) for where in WHERE for ms in (MILLISECONDS if WHERE[where] else OF_PROCESSES)
    ]
    if args.quick:
        cases = [("2 threads", 20), ("2 processes", 20)]
    figures, rows, headlines = {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        common.write_store(Path(folder), n_rows, chunk)
        for where, ms in cases:
            arguments = "--one", where, ms, folder, later
            found = common.in_new_process("benchmarks.latency", *arguments)
            figures[f"{where}, {ms} ms"] = found
            bare = found["bare read"]["median"]
            ratios = {name: call["median"] / bare for name, call in found.items()}
            for name, call in found.items():
                passes = ", ".join(f"{took:.2f}" for took in call.get("pass_seconds", []))
                took, first = f"{call['median']:.2f}", f"{call['first']:.2f}"
                rows.append([where, str(ms), name, took, first, f"{ratios[name]:.2f}", passes])
            headlines.append(
                (
                    f"whole fit / bare read, {n_rows:.0e} rows, {ms} ms per request, {where}",
                    f'{ratios[NO_CACHE]:.2f} (cache="auto": {ratios[AUTO]:.2f})',
                )
            )
    common.Report(
        "latency",
        "A whole fit next to the bare reading of a store that answers late",
        settings={"n_rows": n_rows, "chunk": chunk, "later": later, "p0": common.START},
        figures=figures,
        headlines=headlines,
        header=["where", "ms per request", "what", "s", "first, s", "/ bare", "passes, s"],
        rows=rows,
    ).save(args)


if __name__ == "__main__":
    main()
