"""Conjugate gradients: 5,000 parameters, a million rows, on two processes.

    python -m benchmarks.many_parameters

Local amplitudes and offsets, ``a[g] exp(-x) + b[g]``, once as they are (the model is then linear in
its parameters, and SciPy's sparse solution is exact) and once with a rate that is common to all.
What is counted of memory is the peak of each worker's resident memory (VmHWM) during the fit minus
its resident memory before. Linux only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse
import zarr
from scipy.sparse.linalg import spsolve

from benchmarks import common
from benchmarks.memory import memory_mb

_NOISE = 0.1


def local(n_groups: int, has_rate: bool) -> Any:
    """Return the model of so many groups."""

    def model(x: Any, *params: Any) -> Any:
        p, group = jnp.stack(params), x[:, 0].astype(int)
        rate = p[-1] if has_rate else 1.0
        return p[group] * jnp.exp(-rate * x[:, 1]) + p[n_groups + group]

    return model


def write(folder: Path, n_groups: int, n_rows: int) -> None:
    """Write a store of rows, the group in the first column of x."""
    rng = np.random.default_rng(0)
    group, t = rng.integers(0, n_groups, n_rows), rng.random(n_rows)
    a, b = rng.uniform(1, 3, n_groups), rng.uniform(-1, 1, n_groups)
    y = a[group] * np.exp(-t) + b[group] + _NOISE * rng.standard_normal(n_rows)
    chunk = n_rows // 10
    for name, values in (("x", np.column_stack([group, t])), ("y", y)):
        chunks = (chunk, *values.shape[1:])
        zarr.create_array(folder / name, data=values, chunks=chunks)


def sparse_solution(x: np.ndarray, y: np.ndarray, n_groups: int) -> np.ndarray:
    """Solve the linear problem with SciPy."""
    n, group = len(y), x[:, 0].astype(int)
    rows, columns = np.tile(np.arange(n), 2), np.concatenate([group, n_groups + group])
    values = np.concatenate([np.exp(-x[:, 1]), np.ones(n)])
    jacobian = sparse.csr_matrix((values, (rows, columns)), (n, 2 * n_groups))
    return spsolve((jacobian.T @ jacobian).tocsc(), jacobian.T @ y)


def measure(folder: Path, n_groups: int, has_rate: bool) -> dict[str, Any]:
    """Fit once on a new cluster."""
    x, y = common.open_store(folder)
    n_params = 2 * n_groups + has_rate
    with common.on_processes() as client:
        client.run(lambda: (jnp.zeros(1), None)[1])  # JAX is imported before
        before = client.run(memory_mb, "VmRSS")
        began = time.perf_counter()
        options = {"cg_param_threshold": min(2_000, n_params), "cache": 0}
        result, pass_seconds = common.fit(
            local(n_groups, has_rate), x, y, np.ones(n_params), **options
        )
        taken = time.perf_counter() - began
        peak = client.run(memory_mb, "VmHWM")
    found = {
        "n_params": n_params,
        "n_rows": result.n_points,
        "passes": result.n_passes,
        "seconds": taken,
        "pass_seconds": pass_seconds,
        "phases": common.phases(result),
        "worker_mb": max(peak[address] - before[address] for address in peak),
    }
    if not has_rate:
        expected = sparse_solution(x[...], y[...], n_groups)
        found["relative_error"] = float(
            np.linalg.norm(result.x - expected) / np.linalg.norm(expected)
        )
    return found


def main() -> None:
    """Measure both models, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--one", nargs=3, help="store, groups, 1 for a rate; used by itself")
    args = parser.parse_args()
    if args.one:
        folder, n_groups, has_rate = args.one
        json.dump(measure(Path(folder), int(n_groups), has_rate == "1"), sys.stdout)
        return
    n_groups, n_rows = (50, 50_000) if args.quick else (2_500, 1_000_000)
    with tempfile.TemporaryDirectory() as store:
        write(Path(store), n_groups, n_rows)
        linear, rate = (
            common.in_new_process("benchmarks.many_parameters", "--one", store, n_groups, has_rate)
            for has_rate in (0, 1)
        )
    headline = (
        f"{linear['passes']} passes, {linear['seconds']:.0f} s, {linear['worker_mb']:.0f} MB a "
        f"worker; relative error against SciPy's sparse solution {linear['relative_error']:.0e}"
    )
    common.Report(
        "many_parameters",
        "Conjugate gradients on two processes",
        settings={"groups": n_groups, "rows": n_rows, "chunks": 10},
        figures={"linear": linear, "rate": rate},
        headlines=[(f"{linear['n_params']:,} parameters, {n_rows:,} rows, 2 processes", headline)],
        header=["model", "passes", "fit, s", "peak of a worker above its start, MB"],
        rows=[
            [
                name,
                str(one["passes"]),
                f"{one['seconds']:.0f}",
                f"{one['worker_mb']:.0f}",
            ]
            for name, one in (("amplitudes and offsets", linear), ("with a common rate", rate))
        ],
    ).save(args)


if __name__ == "__main__":
    main()
