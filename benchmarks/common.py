"""What the benchmarks share: stores, timings, fits that are watched, and the record of a run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import dask
import jax
import jax.numpy as jnp
import numpy as np
import zarr
from distributed import Client, LocalCluster

from nlsq_dask import AdaptiveHybridStreamingOptimizer, FitResult, HybridStreamingConfig
from nlsq_dask.events import Event, PassFinished

# What the record of a run names.
PACKAGES = ("nlsq-dask", "jax", "jaxlib", "numpy", "scipy", "dask", "distributed", "zarr", "optax")


# --- the model and start that most parts use


def exponential(x: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a exp(-b x) + c``; on the workers as here."""
    return a * jnp.exp(-b * x) + c


TRUTH, START, X_RANGE, NOISE = (2.5, 1.3, 0.5), (2.0, 0.5, 0.3), (0.0, 5.0), 0.05


# --- stores


def write_store(
    folder: Path,
    n_rows: int,
    chunk: int,
    *,
    model: Callable[..., Any] = exponential,
    truth: Sequence[float] = TRUTH,
    x_range: tuple[float, float] = X_RANGE,
    noise: float = NOISE,
    compressed: bool = True,
    ordered: bool = False,
    seed: int = 0,
) -> None:
    """Write ``x`` and ``y`` as float64 Zarr arrays, a chunk at a time.

    x is uniform over its range; ``ordered`` cuts the range into consecutive intervals, a chunk
    each, as in a time series, so that no chunk is like another. ``compressed`` is Zarr's default.
    """
    options: dict[str, Any] = {} if compressed else {"compressors": None}
    shape = {"shape": (n_rows,), "chunks": (chunk,), "dtype": "float64"}
    x, y = (zarr.create_array(folder / name, **shape, **options) for name in "xy")
    low, high = x_range

    def write(start: int) -> None:
        stop = min(start + chunk, n_rows)
        rng = np.random.default_rng([seed, start // chunk])
        at = rng.random(stop - start)
        if ordered:
            at = (start + np.sort(at) * (stop - start)) / n_rows
        at = low + (high - low) * at
        with jax.enable_x64(True):
            clean = np.asarray(model(jnp.asarray(at), *truth))
        x[start:stop] = at
        y[start:stop] = clean + noise * rng.standard_normal(stop - start)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(0, n_rows, chunk)))


def open_store(folder: Path) -> tuple[zarr.Array, zarr.Array]:
    """Open what ``write_store`` wrote, for reading."""
    x, y = (zarr.open_array(folder / name, mode="r") for name in "xy")
    return x, y


# --- timings


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the first in its process (which compiles) and the later ones."""

    first: float
    later: list[float]

    @property
    def median(self) -> float:
        """Median of the later calls."""
        return median(self.later)

    def record(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        return {"first": self.first, "later": self.later, "median": self.median}


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def compare(calls: Mapping[str, Callable[[], object]], later: int) -> dict[str, Timing]:
    """Time several calls in turns, so that a disturbance of the machine meets all of them.

    Each turn begins with another call, because what ran before has an influence, too.
    """
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1 + later):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(seconds(calls[name]))
    return {name: Timing(first, rest) for name, (first, *rest) in taken.items()}


# --- fits


class Watched(AdaptiveHybridStreamingOptimizer):
    """The optimizer, which also keeps how long each pass over all rows took."""

    def _forget(self) -> None:
        super()._forget()
        self.pass_seconds: list[float] = []

    def _observe(self, event: Event) -> None:
        super()._observe(event)
        if isinstance(event, PassFinished):
            self.pass_seconds.append(event.seconds)


def fit(
    model: Callable[..., Any], x: Any, y: Any, p0: Any, may_fail: bool = False, **options: Any
) -> tuple[FitResult, list[float]]:
    """Fit, and return the result with the seconds of each pass.

    Raises
    ------
    RuntimeError
        If there is no solution, unless it ``may_fail``: its time would mean nothing.
    """
    optimizer = Watched(HybridStreamingConfig(verbose=0, **options))
    result = optimizer.fit(model, x, y, p0)
    if not (result.success or may_fail):
        raise RuntimeError(f"a benchmark's fit failed: {result.message}")
    return result, optimizer.pass_seconds


def phases(result: FitResult) -> dict[str, float]:
    """Return the seconds of each phase by its name."""
    return {record["name"]: record["duration"] for record in result.phase_history}


# --- where tasks run


@contextmanager
def on_threads(n_threads: int = 2) -> Iterator[None]:
    """Use Dask's threads in this process."""
    with dask.config.set(scheduler="threads", num_workers=n_threads):
        yield


@contextmanager
def on_processes(n_workers: int = 2, env: dict[str, str] | None = None) -> Iterator[Client]:
    """Use a cluster of processes with one thread each, and ``env`` in their environment."""
    with (
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            env=env or {},
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def pin(core: int) -> None:
    """Keep this process, with all threads that it has, on one core; Linux only."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def in_new_process(module: str, *arguments: object) -> Any:
    """Run ``python -m module arguments`` and return the JSON of its last line."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- the record of a run


def environment() -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@dataclass
class Report:
    """What one suite found, for people and for programs.

    Attributes
    ----------
    suite, title : str
    settings : dict
        Sizes and choices that the figures depend on.
    figures : dict
        All raw timings and what was made of them.
    headlines : list of (what, measured)
        The few lines that a reader wants first.
    header, rows : the full table
    """

    suite: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    headlines: list[tuple[str, str]] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def save(self, args: argparse.Namespace) -> None:
        """Write the JSON and print the table."""
        results = folder_of(args)
        results.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment(), "quick": args.quick, **vars(self)}
        text = json.dumps(record, indent=1, default=float)
        (results / f"{self.suite}.json").write_text(text + "\n")
        print(markdown(self.header, self.rows), flush=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the options that every part has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    return parser


def folder_of(args: argparse.Namespace) -> Path:
    """Return where results go; those of ``--quick`` mean nothing and are kept apart."""
    folder: Path = args.results / "quick" if args.quick else args.results
    return folder
