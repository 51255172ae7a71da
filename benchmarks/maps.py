"""A fit for every pixel: whole maps, next to SciPy and xarray, from Zarr, and their memory.

    python -m benchmarks.maps

Speed is that of one process on one core, with arrays in memory. SciPy's ``curve_fit`` in a loop and
xarray's ``curvefit`` fit some of the same pixels from the same start, in turns with this package. A
map is also put next to its mean number of iterations times one evaluation of ``J^T J``, ``J^T r``
and cost for all pixels, compiled by itself: the rest is algebra, copying and starts.

A store has the fitted dimension in 1 or 20 chunks. Maps from a store to a store are made by one
and by two workers, in turns. Memory is the peak of a process that fits a store and writes the
result to one, as ``benchmarks.memory`` measures it.
"""

from __future__ import annotations

import os
import sys

if "--one" in sys.argv and "speed" in sys.argv:
    os.environ.setdefault("NPROC", "1")  # XLA's threads; read when JAX first needs the CPU

import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import dask
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
import zarr
from distributed import Client
from jax import lax
from scipy import optimize

from benchmarks import common
from benchmarks.memory import memory_mb
from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig
from nlsq_dask.kernels.lane_sums import LaneData, LaneSummation, padded_points, strip_points
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.maps.problem.arguments import validate_map_arguments
from nlsq_dask.model.jacobian import choose_mode

N_POINTS, TILE, BLOCK = 100, 100, 256
P0 = dict(zip("abc", common.START, strict=True))
GPUFIT_CPU = 61_000  # fits/s of such spots on one core, as published with Gpufit


def in_numpy(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """Return the exponential, for SciPy and xarray."""
    return a * np.exp(-b * x) + c


def spot(xy: Any, height: Any, x0: Any, y0: Any, width: Any, base: Any) -> Any:
    """Return a round Gaussian on a constant."""
    x, y = xy
    return height * jnp.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * width**2)) + base


def decays(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return exponentials of ``N_POINTS`` points with noise; parameters differ by 10 %."""
    rng = np.random.default_rng(seed)
    params = (value * rng.normal(1, 0.1, shape) for value in common.TRUTH)
    times = np.linspace(*common.X_RANGE, N_POINTS).reshape(-1, *(1 for _ in shape))
    return in_numpy(times, *params) + rng.normal(0, common.NOISE, (N_POINTS, *shape))


def spots(n_pixels: int, size: int = 5) -> xr.DataArray:
    """Return images of spots."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    truth = np.array([500.0, 2.0, 2.0, 1.0, 10.0])[:, None] * rng.normal(1, 0.05, (5, n_pixels))
    params = (each[:, None, None] for each in truth)
    height, x0, y0, width, base = params
    clean = height * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * width**2)) + base
    coords = {"x": np.arange(size), "y": np.arange(size)}
    images = clean + rng.normal(0, 5, clean.shape)
    return xr.DataArray(images, coords, dims=("pixel", "x", "y"))


# --- speed


def evaluation(cube: xr.DataArray, config: HybridStreamingConfig) -> Callable[[], object]:
    """Return a call that evaluates the sums of all pixels once, in blocks as the solver's."""
    problem = validate_map_arguments(config, common.exponential, "t", cube, P0, dims="t")
    with jax.enable_x64(True):
        model = problem.model
        mode = choose_mode(model, model.jaxpr())
        summation = LaneSummation(model, mode, Loss(), (False,), strip_points(N_POINTS))
        more = padded_points(N_POINTS) - N_POINTS
        n_blocks = cube.sizes["pixel"] // BLOCK
        values = np.pad(cube.values[:, : n_blocks * BLOCK], ((0, more), (0, 0)), mode="edge")
        y = jnp.asarray(values.reshape(-1, n_blocks, BLOCK).swapaxes(0, 1), model.dtype)
        x = (jnp.asarray(np.pad(cube.t.values, (0, more), mode="edge"), model.dtype),)
        truth = np.array(common.TRUTH)[:, None]
        params = jnp.asarray(np.tile(truth, (n_blocks, 1, BLOCK)))

    # All of them are arguments: of constants, XLA would compute the model at compile time.
    @jax.jit
    def all_blocks(x: Any, y: Any, params: Any) -> Any:
        return lax.map(lambda each: summation(LaneData(each[0], x, None), each[1]), (y, params))

    def call() -> None:
        with jax.enable_x64(True):
            jax.block_until_ready(all_blocks(x, y, params))

    return call


def speed(n_pixels: int, n_scipy: int, later: int) -> dict[str, Any]:
    """Time all of them on one core; the process must be new."""
    common.pin(common.cores()[0])
    t = np.linspace(*common.X_RANGE, N_POINTS)
    cube = xr.DataArray(decays((n_pixels,)), {"t": t}, dims=("t", "pixel"))
    some, images = cube[:, :n_scipy], spots(n_pixels)
    start = {"height": 400.0, "x0": 2.0, "y0": 2.0, "width": 1.2, "base": 5.0}
    iterations: dict[str, float] = {}

    def fit(name: str, precision: str, y: Any, model: Any, x: Any, p0: Any, dims: Any) -> None:
        config = HybridStreamingConfig(precision=precision)
        ds = AdaptiveHybridStreamingOptimizer(config).fit_each(model, x, y, p0, dims=dims)
        if int((ds.status <= 0).sum()) > 1e-3 * n_pixels:
            raise RuntimeError(f"too many fits of {name} failed")
        iterations[name] = float(ds.n_iterations.mean())

    def scipy() -> None:
        for pixel in some.values.T:
            optimize.curve_fit(in_numpy, t, pixel, common.START)

    calls: dict[str, Callable[[], object]] = {
        "SciPy curve_fit": scipy,
        "xarray curvefit": lambda: some.curvefit("t", in_numpy, p0=P0),
    }
    for precision in ("float64", "float32"):
        decay = (precision, cube, common.exponential, "t", P0, "t")
        calls[precision] = lambda name=precision, decay=decay: fit(name, *decay)
        config = HybridStreamingConfig(precision=precision)
        calls[f"evaluation, {precision}"] = evaluation(cube, config)
    gaussian = ("float32", images, spot, ("x", "y"), start, ("x", "y"))
    calls["spots, float32"] = lambda: fit("spots, float32", *gaussian)
    with dask.config.set(scheduler="synchronous"):
        timings = common.compare(calls, later)
    return {
        name: timing.record()
        | {"fits": n_scipy if "curve" in name else n_pixels}
        | {"iterations": iterations.get(name)}
        for name, timing in timings.items()
    }


# --- stores


def write_cube(folder: Path, side: int, n_chunks: int) -> None:
    """Write a cube of ``side`` x ``side`` pixels in float32, uncompressed."""
    array = zarr.create_array(
        folder / "cube.zarr",
        shape=(N_POINTS, side, side),
        chunks=(N_POINTS // n_chunks, TILE, TILE),
        dtype="float32",
        compressors=None,
    )

    def write(corner: tuple[int, int]) -> None:
        i, j = corner
        shape = (min(TILE, side - i), min(TILE, side - j))
        array[:, i : i + TILE, j : j + TILE] = decays(shape, seed=i * side + j)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, product(range(0, side, TILE), repeat=2)))


def _lazy(cube: zarr.Array) -> xr.Dataset:
    times = np.linspace(*common.X_RANGE, N_POINTS)
    optimizer = AdaptiveHybridStreamingOptimizer()
    ds: xr.Dataset = optimizer.fit_each(common.exponential, times, cube, P0, dims=0)
    return ds


def store(side: int, later: int) -> dict[str, Any]:
    """Time maps of a store with the fitted dimension in 1 and 20 chunks, and bare reading."""
    found = {}
    for n_chunks in (1, 20):
        with tempfile.TemporaryDirectory() as folder:
            write_cube(Path(folder), side, n_chunks)
            cube = zarr.open_array(f"{folder}/cube.zarr", mode="r")
            calls = {
                "bare read": lambda cube=cube: dask.array.from_zarr(cube).sum().compute(),
                "map": lambda cube=cube: _lazy(cube).compute(),
            }
            with common.on_threads():
                timings = common.compare(calls, later)
        found[str(n_chunks)] = {name: timing.record() for name, timing in timings.items()}
    return found


def workers(side: int, later: int) -> dict[str, Any]:
    """Time maps from a store to a store, with 1 and 2 workers of one thread, in turns."""
    found: dict[str, Any] = {"n_pixels": side**2}
    for n_chunks in (1, 20):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            write_cube(Path(folder), side, n_chunks)
            cube = zarr.open_array(f"{folder}/cube.zarr", mode="r")
            calls = {}
            # As docs/howto_maps.md advises.
            kept = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), 2**28)
            stack.enter_context(
                dask.config.set(
                    {f"distributed.nanny.pre-spawn-environ.{k}": v for k, v in kept.items()}
                )
            )
            for n_workers in (1, 2):
                client = stack.enter_context(common.on_processes(n_workers, {"NPROC": "1"}))
                calls[f"{n_chunks} chunks, {n_workers} workers"] = partial(
                    _to_store, cube, Path(folder) / "maps.zarr", client
                )
            timings = common.compare(calls, later)
        found |= {name: timing.record() for name, timing in timings.items()}
    return found


def _to_store(cube: zarr.Array, path: Path, client: Client | None = None) -> None:
    """Write a new store, on threads if there is no client."""
    shutil.rmtree(path, ignore_errors=True)
    times = np.linspace(*common.X_RANGE, N_POINTS)
    optimizer = AdaptiveHybridStreamingOptimizer(HybridStreamingConfig(verbose=0))
    scheduler = common.on_threads() if client is None else client.as_current()
    with scheduler, dask.config.set(scheduler="threads" if client is None else "dask.distributed"):
        optimizer.fit_each(common.exponential, times, cube, P0, dims=0, store=path)


def memory(folder: Path) -> dict[str, Any]:
    """Fit a store once and write the result; the process must be new."""
    imported = memory_mb("VmRSS")
    cube = zarr.open_array(folder / "cube.zarr", mode="r")
    times = np.linspace(*common.X_RANGE, N_POINTS)
    with common.on_threads():
        optimizer = AdaptiveHybridStreamingOptimizer()
        planned = optimizer.plan(common.exponential, times, cube, P0, dims=0).peak_memory
    _to_store(cube, folder / "maps.zarr")
    peak = memory_mb("VmHWM")
    return {
        "imported_mb": imported,
        "above_import_mb": peak - imported,
        "peak_mb": peak,
        "planned_mb": planned / 1e6,
    }


# --- the report


def main() -> None:
    """Measure, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs="+", help="what to measure, and sizes; used by itself")
    args = parser.parse_args()
    if args.one:
        what, *sizes = args.one
        if what == "memory":
            json.dump(memory(Path(sizes[0])), sys.stdout)
        else:
            measured = {"speed": speed, "store": store, "workers": workers}[what]
            json.dump(measured(*map(int, sizes)), sys.stdout)
        return
    n_pixels, n_scipy, later = (2_048, 20, 1) if args.quick else (102_400, 1_000, 5)
    sides = (100, 200) if args.quick else (1_000, 2_000)

    def measure(*arguments: object) -> Any:
        return common.in_new_process("benchmarks.maps", "--one", *arguments)

    found = {
        "speed": measure("speed", n_pixels, n_scipy, later),
        "store": measure("store", sides[0] // 2, later),
        "workers": measure("workers", sides[0], min(later, 3)),
    }
    if Path("/proc/self/status").exists():
        for side in sides:
            with tempfile.TemporaryDirectory() as folder:
                write_cube(Path(folder), side, 1)
                found[f"memory, {side**2:,} pixels"] = measure("memory", folder)
    common.Report(
        "maps",
        f"A fit for every pixel, {N_POINTS} points, exponential of 3 parameters",
        settings={"n_pixels": n_pixels, "n_scipy": n_scipy, "later": later, "sides": sides},
        figures=found,
        headlines=headlines(found),
        header=["what", "s", "first, s", "measured"],
        rows=rows(found),
    ).save(args)


def rates(found: dict[str, Any]) -> dict[str, float]:
    """Return fits, or evaluations, per second."""
    return {name: one["fits"] / one["median"] for name, one in found["speed"].items()}


def overhead(speed: dict[str, Any], precision: str) -> float:
    """Return the seconds of a map over iterations times evaluations."""
    one = speed[precision]
    once = speed[f"evaluation, {precision}"]["median"]
    return float(one["median"] / (one["iterations"] * once))


def headlines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader wants first."""
    rate = rates(found)
    others = max(rate["SciPy curve_fit"], rate["xarray curvefit"])
    listed = [
        (
            f"fits for pixels of {N_POINTS} points, {precision}, one core",
            f"{rate[precision]:,.0f}/s, {rate[precision] / others:.0f} x the faster of SciPy and "
            f"xarray; {overhead(found['speed'], precision):.1f} x iterations times evaluation",
        )
        for precision in ("float64", "float32")
    ]
    name = "spots, float32"
    listed.append(
        (
            "spots of 5 x 5 points, 5 parameters, float32, one core",
            f"{rate[name]:,.0f}/s, {rate[name] / GPUFIT_CPU:.1f} x Gpufit's figure for a CPU core",
        )
    )
    ratios = [f"{one['map']['median']:.1f} s" for one in found["store"].values()]
    listed.append(("a map from Zarr, its points in 1 / 20 chunks", " / ".join(ratios)))
    for n_chunks in (1, 20):
        one, two = (
            found["workers"][f"{n_chunks} chunks, {n_workers} workers"]["median"]
            for n_workers in (1, 2)
        )
        rate = found["workers"]["n_pixels"] / two
        listed.append(
            (
                f"from Zarr to a store, points in {n_chunks} chunks, two workers",
                f"{rate:,.0f} fits/s, {one / two:.2f} x one worker",
            )
        )
    for key, one in found.items():
        if key.startswith("memory"):
            what = f"{key} above the import, written to Zarr"
            planned = f"the plan has {one['planned_mb'] / one['peak_mb']:.2f} x the peak"
            listed.append((what, f"{one['above_import_mb']:.0f} MB; {planned}"))
    return listed


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the full table."""
    rate = rates(found)
    table = []
    for name, one in found["speed"].items():
        iterations = f", {one['iterations']:.1f} iterations" if one["iterations"] else ""
        timing = [f"{one['median']:.3f}", f"{one['first']:.2f}"]
        table.append([name, *timing, f"{rate[name]:,.0f} fits/s{iterations}"])
    for n_chunks, calls in found["store"].items():
        for name, one in calls.items():
            what = f"{name}, Zarr, {n_chunks} chunks along the points"
            table.append([what, f"{one['median']:.3f}", f"{one['first']:.2f}", ""])
    for name, one in found["workers"].items():
        if name == "n_pixels":
            continue
        timing = [f"{one['median']:.3f}", f"{one['first']:.2f}"]
        table.append([f"from Zarr to a store, {name}", *timing, ""])
    for key, one in found.items():
        if key.startswith("memory"):
            peak = f"{one['peak_mb']:.0f} MB, planned {one['planned_mb']:.0f} MB"
            table.append([key, "", "", peak])
    return table


if __name__ == "__main__":
    main()
