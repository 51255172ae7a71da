"""Many small fits at once, beside SciPy and xarray in a loop, on one core.

    python -m benchmarks.lanes

Fits of ``a exp(-b x) + c`` to 100 points each. The time of a map is also set against that of one
evaluation of residuals, Jacobian and normal matrix of its lanes, times the mean number of points at
which a lane is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy.optimize import curve_fit

from benchmarks import common
from nlsq_dask.kernels.lane_sums import LaneData, LaneSummation, strip_points
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.model.jacobian import Mode
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Layout
from nlsq_dask.solvers.lanes.batched_lm import LaneSolver, choose_lanes
from nlsq_dask.solvers.lanes.records import Lanes, LaneSettings

N_POINTS = 100
_BLOCK = 256  # lanes of an evaluation, as in the solver


def in_numpy(x: Any, a: Any, b: Any, c: Any) -> Any:
    """Return the model for SciPy and xarray."""
    return a * np.exp(-b * x) + c


def simulate(n_lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x, and y of shape (points, lanes)."""
    rng = np.random.default_rng(0)
    x = np.linspace(*common.X_RANGE, N_POINTS)
    truth = np.array(common.TRUTH)[:, None] * (1 + 0.1 * rng.standard_normal((3, n_lanes)))
    noise = common.NOISE * rng.standard_normal((N_POINTS, n_lanes))
    return x, in_numpy(x[:, None], *truth) + noise


def scipy_loop(x: np.ndarray, y: np.ndarray) -> None:
    """Fit one lane after the other with SciPy."""
    for column in y.T:
        curve_fit(in_numpy, x, column, common.START)


def xarray_loop(x: np.ndarray, y: np.ndarray) -> None:
    """Fit all lanes with xarray."""
    data = xr.DataArray(y, dims=("x", "lane"), coords={"x": x})
    data.curvefit("x", in_numpy, p0=dict(zip("abc", common.START, strict=True)))


def lanes_of(model: Model, x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    """Return a call that fits all lanes."""
    lanes = choose_lanes(N_POINTS, 3, model.dtype, y.shape[1])
    solver = LaneSolver.trace(
        model, N_POINTS, lanes, LaneSettings(), x_varies=(False,), sigma="none"
    )
    start, infinite = np.array(common.START)[:, None], np.full((3, 1), np.inf)
    return lambda: solver(Lanes(y, (x,)), start, -infinite, infinite)


def evaluation_of(model: Model, x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    """Return a call that evaluates all lanes once, a block after the other."""
    strip = strip_points(N_POINTS)
    summation = LaneSummation(model, Mode.FORWARD, Loss(), (False,), strip)
    blocks = np.stack(np.array_split(y, y.shape[1] // _BLOCK, axis=1))
    params = np.repeat(np.array(common.TRUTH)[:, None], _BLOCK, axis=1)
    with jax.enable_x64(True):
        device = [jnp.asarray(array) for array in (blocks, x, params)]

        @jax.jit
        def evaluate(blocks: Any, x: Any, params: Any) -> Any:
            return jax.lax.map(lambda y: summation(LaneData(y, (x,), None), params), blocks)

        compiled = evaluate.lower(*device).compile()
    return lambda: jax.block_until_ready(compiled(*device))


def main() -> None:
    """Run all parts."""
    args = common.arguments(__doc__).parse_args()
    common.pin(common.cores()[0])
    n_lanes, n_loop, later = (1_024, 10, 1) if args.quick else (20_480, 1_000, 5)
    x, y = simulate(n_lanes)
    calls: dict[str, Callable[[], Any]] = {
        "SciPy": lambda: scipy_loop(x, y[:, :n_loop]),
        "xarray": lambda: xarray_loop(x, y[:, :n_loop]),
    }
    counts = {"SciPy": n_loop, "xarray": n_loop}
    evaluated: dict[str, float] = {}
    for dtype in ("float64", "float32"):
        model = Model(
            common.exponential, 3, Layout(None, ((),), (dtype,), dtype, None, False), dtype
        )
        data = x.astype(dtype), y.astype(dtype)
        calls[dtype] = lanes_of(model, *data)
        calls[f"evaluation, {dtype}"] = evaluation_of(model, *data)
        counts[dtype] = counts[f"evaluation, {dtype}"] = n_lanes
        evaluated[dtype] = float(calls[dtype]().n_iterations.mean()) + 1
    timings = common.compare(calls, later)
    rates = {name: counts[name] / timing.median for name, timing in timings.items()}
    fastest = max(rates["SciPy"], rates["xarray"])
    costs = {
        dtype: timings[dtype].median / timings[f"evaluation, {dtype}"].median / number
        for dtype, number in evaluated.items()
    }
    report = common.Report(
        "lanes",
        "Many small fits at once",
        settings={"points": N_POINTS, "lanes": n_lanes, "lanes of loops": n_loop},
        figures={
            "seconds": {name: timing.record() for name, timing in timings.items()},
            "evaluations per lane": evaluated,
            "cost in evaluations": costs,
        },
        headlines=[
            (
                f"fits per second of one core, {dtype}, 100 points, p = 3",
                f"{rates[dtype]:,.0f}, {rates[dtype] / fastest:.0f} times the faster of SciPy and "
                f"xarray in a loop",
            )
            for dtype in evaluated
        ],
        header=["what", "fits per second", "ratio", "cost per evaluation, in evaluations"],
        rows=[
            [
                name,
                f"{rate:,.0f}",
                f"{rate / fastest:.1f}",
                f"{costs[name]:.2f}" if name in costs else "",
            ]
            for name, rate in rates.items()
        ],
    )
    report.save(args)


if __name__ == "__main__":
    main()
