"""What a fit costs on a GPU, and whether it is right; prints a message if JAX sees no GPU.

    python -m benchmarks.gpu

Needs a JAX that was installed for the GPU (``pip install "jax[cuda13]"``); takes four minutes.

- limits: a sum over x and y in the memory of the card, and copies to it;
- kernels: one call of the kernel over rows that are on the card, per number of parameters;
- overheads: where the time of a call goes that has hardly any rows, in microseconds;
- passes: the passes of whole fits, of arrays in memory and of a Zarr store, next to reading the
  store with the same threads;
- agreement: nine standard models against SciPy, in four processes that share the card;
- sharing: two workers on one card, a card that another program has filled, and what is left on the
  card after a fit.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card may be shared

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, kernel
from nlsq_dask.kernels.dense_kernel import dense_kernel
from nlsq_dask.kernels.dense_terms import Accumulation
from nlsq_dask.kernels.request import Request
from nlsq_dask.model.jax_scope import platform_of
from nlsq_dask.model.model import Model
from nlsq_dask.rows.device_rows import to_device
from nlsq_dask.rows.rows import Layout, Rows
from tests.problems import PROBLEMS, Problem, scipy_fit

VARIANTS: dict[str, dict[str, Any]] = {
    "float64": {},
    "float32": {"precision": "float32"},
    "qr": {"gauss_newton_solver": "qr"},
    "huber": {"loss": "huber", "f_scale": 0.1},
}
# Holds as much of the card as the first argument says, in bytes, until its input ends.
_HOLDER = """
import sys, os
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.98"
import jax.numpy as jnp
held = [jnp.ones(2**28, "float32").block_until_ready() for _ in range(int(sys.argv[1]) // 2**30)]
print("held", flush=True)
sys.stdin.read()
"""
_PART = 2**21  # rows that a thread makes at a time
Found = list[dict[str, Any]]


def timed(what: str, n_rows: int, call: Callable[[], object], later: int) -> dict[str, Any]:
    """Time a call that goes over ``n_rows`` rows."""
    timing = common.compare({"": call}, later)[""]
    return {"what": what, **timing.record(), "rate": n_rows / timing.median}


def exponential_rows(n_rows: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the model that most parts use."""
    x, y = np.empty(n_rows, dtype), np.empty(n_rows, dtype)
    a, b, c = common.TRUTH

    def fill(start: int) -> None:
        rng, part = np.random.default_rng([0, start]), slice(start, start + _PART)
        x[part] = 5 * rng.random(x[part].size, np.float32)
        noise = common.NOISE * rng.standard_normal(x[part].size, np.float32)
        y[part] = a * np.exp(-b * x[part]) + c + noise

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, n_rows, _PART)))
    return x, y


# --- limits and kernels


def limits(device: jax.Device, n_rows: int, later: int) -> Found:
    """Return the rates of a sum on the card, of copies to it, and of copies by eight threads."""
    x, y = exponential_rows(n_rows, "float64")
    found = []
    with jax.enable_x64(True):
        on_card = [jax.device_put(array, device) for array in (x, y)]
        total = jax.jit(lambda x, y: x.sum() + y.sum())
        call = lambda: jax.block_until_ready(total(*on_card))  # noqa: E731
        found.append(timed("limit: sum of x and y in the card's memory", n_rows, call, later))
    parts = np.array_split(x, 8)

    def copy(array: np.ndarray) -> Any:
        with jax.enable_x64(True):
            return jax.block_until_ready(to_device(array, device))

    found.append(timed("copy of x to the card, one thread", n_rows, lambda: copy(x), later))
    with ThreadPoolExecutor(8) as pool:
        call = lambda: list(pool.map(copy, parts))  # noqa: E731
        found.append(timed("copy of x to the card, 8 threads", n_rows, call, later))
    return found


def kernels(device: jax.Device, n_rows: int, later: int) -> Found:
    """Return the rates of one call of the kernel over rows on the card."""
    found = []
    plan = [(p, Accumulation.GRAM) for p in (3, 10, 20, 60)]
    plan += [(p, Accumulation.TRIANGLE) for p in (3, 20)]
    for p, accumulation in plan:
        for dtype in ("float64", "float32"):
            if accumulation is Accumulation.TRIANGLE and dtype == "float32":
                continue
            x, y = exponential_rows(n_rows, dtype)
            layout = Layout(None, ((),), (dtype,), dtype, None, False)
            model = Model(kernel.exponentials(p), p, layout, dtype)
            compiled = dense_kernel(
                model,
                2**18,
                platforms=("cpu", platform_of(device)),
                accumulation=accumulation,
                longest_block=n_rows,
            )
            rows = Rows(y, (x,))
            placed = compiled.placed(rows) or rows
            request = Request(kernel.start(p))

            def call(compiled: Any = compiled, placed: Any = placed, request: Any = request) -> Any:
                return compiled(placed, request, wants_moments=False)

            name = f"kernel, p = {p}, {dtype}, {accumulation.value}"
            found.append(timed(name, n_rows, call, later))
            print(json.dumps(found[-1]), flush=True)
    return found


def overheads(device: jax.Device, n_calls: int) -> dict[str, float]:
    """Return the microseconds of a call with few rows: of the program, the kernel, and a pass."""
    n_rows = 2**12
    x, y = exponential_rows(n_rows, "float64")
    layout = Layout(None, ((),), ("float64",), "float64", None, False)
    platforms = "cpu", platform_of(device)
    model = Model(common.exponential, 3, layout, "float64")
    compiled = dense_kernel(model, n_rows, platforms=platforms, longest_block=n_rows)
    request, rows = Request(np.array(common.START)), Rows(y, (x,))
    placed = compiled.placed(rows) or rows
    with jax.enable_x64(True):
        arrays = [jax.device_put(array, device) for array in (x, y)]
        program = jax.jit(lambda x, y: jnp.stack([(x * y).sum(), x.sum(), y.sum()]))

        def started() -> Any:
            result = program(*arrays)
            result.copy_to_host_async()
            return result

        calls: dict[str, Callable[[], object]] = {
            "a program, without waiting": lambda: program(*arrays),
            "a program": lambda: jax.block_until_ready(program(*arrays)),
            "a program and its result": lambda: np.asarray(program(*arrays)),
            "the same, copied as soon as it is there": lambda: np.asarray(started()),
            "the kernel": lambda: compiled(placed, request, wants_moments=False),
        }
        found = {}
        for name, call in calls.items():
            call()
            began = time.perf_counter()
            for _ in range(n_calls):
                call()
            found[name] = (time.perf_counter() - began) / n_calls * 1e6
    for n_threads in (4, 16):
        with ThreadPoolExecutor(n_threads) as pool:
            began = time.perf_counter()
            list(pool.map(lambda _: calls["the kernel"](), range(n_calls)))
            took = (time.perf_counter() - began) / n_calls * 1e6
        found[f"the kernel, on {n_threads} threads"] = took
    x, y = (da.from_array(array, chunks=2**18) for array in exponential_rows(2**24, "float64"))
    for _ in range(2):
        _, pass_seconds = common.fit(common.exponential, x, y, common.START, may_fail=True)
    found["a kept pass, per block of 2**18 rows"] = pass_seconds[-1] / 64 * 1e6
    return found


# --- passes


def passes(n_rows: int, later: int) -> Found:
    """Return the rates of the first and the second pass of fits of arrays in memory."""
    found = []
    for dtype in ("float64", "float32"):  # of the same size in memory
        n_rows *= 2
        x, y = exponential_rows(n_rows, dtype)
        fits = [
            common.fit(common.exponential, x, y, common.START, may_fail=True, precision=dtype)
            for _ in range(1 + later)
        ]
        found += of_passes(f"in memory, {dtype}", n_rows, fits)
    return found


def of_passes(what: str, n_rows: int, fits: list[Any]) -> Found:
    """Return the median rates of the first pass and of the kept passes of repeated fits."""
    found = []
    for name, part in (("first pass", slice(0, 1)), ("kept pass", slice(1, None))):
        later = [took for _, all_passes in fits[1:] for took in all_passes[part]]
        rate = n_rows / median(later) if later else 0.0
        first = fits[0][1][part][0] if fits[0][1][part] else 0.0
        found.append({"what": f"{name}, {what}", "first": first, "later": later, "rate": rate})
        print(json.dumps(found[-1]), flush=True)
    result = fits[-1][0]
    found[-1]["phases"] = common.phases(result)
    found[-1]["rows_cached"] = result.rows_cached
    return found


def stored(folder: Path, n_rows: int, chunk: int, later: int) -> Found:
    """Return the rates of the passes over a store of raw Zarr chunks, and of reading it."""
    common.write_store(folder, n_rows, chunk, compressed=False)
    x, y = common.open_store(folder)
    starts = range(0, n_rows, chunk)

    def read(start: int) -> None:
        for array in (x, y):
            array[start : start + chunk]

    with ThreadPoolExecutor() as pool:
        call = lambda: list(pool.map(read, starts))  # noqa: E731
        found = [timed(f"bare read, Zarr, chunks of {chunk:,} rows", n_rows, call, later)]
    fits = [common.fit(common.exponential, x, y, common.START) for _ in range(1 + later)]
    return found + of_passes(f"Zarr, chunks of {chunk:,} rows", n_rows, fits)


# --- agreement


def difference(problem: Problem, n_rows: int, variant: str) -> float:
    """Return the largest difference from SciPy's solution, in standard errors."""
    options = VARIANTS[variant]
    robust = {name: options[name] for name in ("loss", "f_scale") if name in options}
    config = {name: value for name, value in options.items() if name not in robust}
    rng = np.random.default_rng(7)
    shape = (n_rows,) if problem.n_variables == 1 else (n_rows, problem.n_variables)
    x = rng.uniform(*problem.x_range, shape)
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        y = np.asarray(problem.model(jnp.asarray(x), *problem.truth))
        y = y + problem.noise * rng.standard_normal(n_rows)
        trf = {"method": "trf", **robust} if robust else {}
        expected, covariance = scipy_fit(problem.model, x, y, problem.truth, **trf)
    optimizer = common.Watched(common.HybridStreamingConfig(verbose=0, **config))
    result = optimizer.fit(problem.model, x, y, problem.start, **robust)
    return float(np.abs((result.popt - expected) / np.sqrt(np.diag(covariance))).max())


def agreement(variant: str, n_rows: int) -> dict[str, float]:
    """Return ``difference`` for each model, by name."""
    return {problem.name: difference(problem, n_rows, variant) for problem in PROBLEMS}


# --- sharing


def bytes_in_use() -> int:
    """Return the bytes that arrays of this process take on its GPU."""
    gc.collect()
    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0))


def two_workers(folder: Path) -> dict[str, Any]:
    """Fit on two worker processes that share the card."""
    x, y = common.open_store(folder)
    with common.on_processes() as client:
        fits = [common.fit(common.exponential, x, y, common.START) for _ in range(2)]
        time.sleep(2.0)  # until the scheduler has told the workers that the fit is over
        left = client.run(bytes_in_use)
    result, pass_seconds = fits[-1]
    return {
        "x": result.x.tolist(),
        "rows_cached": result.rows_cached,
        "pass_seconds": pass_seconds,
        "bytes_left": list(left.values()),
    }


@contextmanager
def filled(n_bytes: int) -> Iterator[None]:
    """Let another process hold this much of the card."""
    command = [sys.executable, "-c", _HOLDER, str(n_bytes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        yield
        holder.stdin.close()


def crowded(n_rows: int, free: int) -> dict[str, Any]:
    """Fit on a card of which another program leaves ``free`` bytes, less than the rows take."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    now = int(subprocess.run(query, capture_output=True, text=True).stdout.split()[0]) * 2**20
    with filled(now - free):
        x, y = exponential_rows(n_rows, "float64")
        result, pass_seconds = common.fit(common.exponential, x, y, common.START)
    return {
        "x": result.x.tolist(),
        "rows_cached": result.rows_cached,
        "passes": result.n_passes,
        "pass_seconds": pass_seconds,
        "bytes_left": bytes_in_use(),
    }


# --- the whole


def main() -> None:
    """Measure on the first GPU, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--platform", default="gpu", help="cpu only to try the script out")
    parser.add_argument("--agreement", choices=VARIANTS, help="only this, as JSON")
    parser.add_argument("--crowded", type=int, help="only a fit with so many bytes free, as JSON")
    args = parser.parse_args()
    try:
        device = jax.devices(args.platform)[0]
    except RuntimeError:
        print(f"gpu: left out, JAX sees no GPU here, only {jax.devices()}.")
        return
    if args.agreement:
        print(json.dumps(agreement(args.agreement, 20_000 if args.quick else 200_000)))
        return
    if args.crowded:
        print(json.dumps(crowded(2**22 if args.quick else 2**28, args.crowded)))
        return
    n_rows, later = (2**18, 2) if args.quick else (2**24, 7)
    began, seconds = time.perf_counter(), {}

    def lap(name: str, found: Any) -> Any:
        seconds[name] = time.perf_counter() - began
        return found

    quick = ["--quick"] * args.quick + ["--platform", args.platform]
    with ThreadPoolExecutor(4) as pool:
        processes = [
            pool.submit(common.in_new_process, "benchmarks.gpu", "--agreement", name, *quick)
            for name in VARIANTS
        ]
        differences = lap(
            "agreement", dict(zip(VARIANTS, (one.result() for one in processes), strict=True))
        )
    print(json.dumps(differences), flush=True)
    found = lap("limits", limits(device, 4 * n_rows, later))
    found += lap("kernels", kernels(device, n_rows, later))
    each = lap("overheads", overheads(device, 20 if args.quick else 500))
    print(json.dumps(each), flush=True)
    found += lap("passes", passes(16 * n_rows, 3))
    with tempfile.TemporaryDirectory(dir=shared_memory()) as name:
        folders = [Path(name) / str(i) for i in range(2)]
        for folder, chunk in zip(folders, (n_rows // 4, n_rows), strict=True):
            found += lap(f"stored {chunk}", stored(folder, 8 * n_rows, chunk, 3))
        left = bytes_in_use()
        workers = lap("workers", two_workers(folders[0]))
    sharing: dict[str, Any] = {"bytes_left": left, "two_workers": workers}
    if args.platform == "gpu":
        try:
            call = common.in_new_process("benchmarks.gpu", "--crowded", 3 * 2**30, *quick)
        except subprocess.CalledProcessError as error:
            call = {"error": str(error)}
        sharing["crowded"] = lap("crowded", call)
    print(json.dumps(sharing), flush=True)
    worst = {name: max(of.values()) for name, of in differences.items()}
    agreed = ", ".join(f"{name} {value:.1g}" for name, value in worst.items())
    common.Report(
        "gpu",
        f"On {device.device_kind}: million rows a second",
        settings={"n_rows": n_rows, "later": later, "device": device.device_kind},
        figures={
            "calls": found,
            "overheads_in_microseconds": each,
            "differences": differences,
            "sharing": sharing,
            "seconds": seconds,
        },
        headlines=[
            *((f"GPU: {one['what']}", f"{one['rate'] / 1e6:,.0f} million rows/s") for one in found),
            ("GPU: largest difference from SciPy, in standard errors", agreed),
        ],
        header=["what", "million rows/s"],
        rows=[[one["what"], f"{one['rate'] / 1e6:,.0f}"] for one in found],
    ).save(args)
    print(agreed, seconds, sep="\n", flush=True)


def shared_memory() -> str | None:
    """Return a folder in memory, so that the speed of a disk does not matter; None if unknown."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


if __name__ == "__main__":
    main()
