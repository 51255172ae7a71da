"""How often the data are read: eight standard models, started off by a factor of two.

    python -m benchmarks.passes

The models are those of ``tests/problems.py``; every parameter of p0 is twice its true value, but
for the frequency of the damped sine: from twice that it is chance which minimum a local method
finds, so it is 1.1 times the true value.
x is drawn at random all over its range ("mixed", every chunk is like the others), or each chunk has
its own interval of x ("ordered", as in a time series, where a few chunks tell little of the rest).

The solution is checked without this package's kernel: ``J^T J`` and ``J^T r`` are summed again over
all rows, with JAX's exact Jacobian. The remaining Gauss-Newton step is given in standard errors; no
better solution is near if it is far below one. Standard errors are compared with those from these
sums.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zarr

from benchmarks import common
from tests.problems import PROBLEMS, Problem

_BLOCK = 100_000
_MAX_ORDERED_ROWS = 10**7


def start(problem: Problem) -> np.ndarray:
    """Return the p0 that is off by a factor of two."""
    p0 = 2 * np.array(problem.truth)
    if problem.name == "damped sine":
        p0[2] = 1.1 * problem.truth[2]
    return p0


def check(
    problem: Problem, x: zarr.Array, y: zarr.Array, params: Any
) -> tuple[float, float, np.ndarray]:
    """Return how good ``params`` are, computed without the package's kernel.

    The largest component of the Gauss-Newton step from there, in standard errors; the standard
    deviation of the residuals over that of the noise, which is 1 in the right minimum; and the
    standard errors.
    """
    p = len(params)

    @jax.jit
    def sums(q: Any, at: Any, of: Any) -> Any:
        residual = problem.model(at, *q) - of
        jacobian = jax.jacfwd(lambda q: problem.model(at, *q))(q)
        return jacobian.T @ jacobian, jacobian.T @ residual, residual @ residual

    hessian, gradient, chi2 = np.zeros((p, p)), np.zeros(p), 0.0
    with jax.enable_x64(True):
        for start in range(0, x.shape[0], x.chunks[0]):
            chunks = x[start : start + x.chunks[0]], y[start : start + x.chunks[0]]
            for i in range(0, len(chunks[0]), _BLOCK):
                parts = sums(jnp.asarray(params), *(a[i : i + _BLOCK] for a in chunks))
                hessian += parts[0]
                gradient += parts[1]
                chi2 += float(parts[2])
    errors = np.sqrt(np.diag(np.linalg.inv(hessian)) * chi2 / (x.shape[0] - p))
    step = np.linalg.solve(hessian, -gradient)
    noise = np.sqrt(chi2 / (x.shape[0] - p)) / problem.noise
    return float(np.abs(step / errors).max()), float(noise), errors


def measure(problem: Problem, ordered: bool, n_rows: int, chunk: int) -> dict[str, Any]:
    """Fit one model to a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        common.write_store(
            Path(folder),
            n_rows,
            chunk,
            model=problem.model,
            truth=problem.truth,
            x_range=problem.x_range,
            noise=problem.noise,
            ordered=ordered,
        )
        x, y = common.open_store(Path(folder))
        p0 = start(problem)
        with common.on_threads():
            result, pass_seconds = common.fit(problem.model, x, y, p0, may_fail=True, cache=0)
        step, noise, errors = check(problem, x, y, result.x)
    return {
        "model": problem.name,
        "n_rows": n_rows,
        "chunks": n_rows // chunk,
        "order": "ordered" if ordered else "mixed",
        "p0": p0.tolist(),
        "success": result.success,
        "rows_read_per_row": result.rows_read / n_rows,
        "passes": result.n_passes,
        "step_left_in_standard_errors": step,
        "estimated_step_left": result.diagnostics["last_step_error"],
        "standard_errors_off": float(np.abs(result.perr / errors - 1.0).max()),
        "residuals_over_noise": noise,
        "pass_seconds": pass_seconds,
        "phases": common.phases(result),
        "message": result.message,
    }


def main() -> None:
    """Measure all models, print and save."""
    args = common.arguments(__doc__).parse_args()
    sizes = [(200_000, 10)] if args.quick else [(10**7, 10), (10**7, 100), (10**8, 100)]
    problems = [problem for problem in PROBLEMS if problem.n_variables == 1]
    cases = [(size, ordered) for size in sizes for ordered in (False, True)]
    found, headlines = [], []
    for (n_rows, n_chunks), ordered in cases:
        if ordered and n_rows > _MAX_ORDERED_ROWS:
            continue
        of_case = [measure(p, ordered, n_rows, n_rows // n_chunks) for p in problems]
        found += of_case
        read = sorted(one["rows_read_per_row"] for one in of_case)
        order = "ordered" if ordered else "mixed"
        headlines.append(
            (
                f"rows read / rows, {len(read)} models, {n_rows:.0e} rows in {n_chunks} chunks, "
                f"x {order}",
                f"{read[0]:.2f} to {read[-1]:.2f}, median {np.median(read):.2f}",
            )
        )
    errors = max(one["standard_errors_off"] for one in found if one["success"])
    step = max(one["step_left_in_standard_errors"] for one in found)
    failed = sum(not one["success"] for one in found)
    headlines.append(("largest step left, in standard errors", f"{step:.1e}"))
    headlines.append(("largest relative error of a standard error", f"{errors:.1e}"))
    headlines.append(("fits of these that ended without success", f"{failed} of {len(found)}"))
    common.Report(
        "passes",
        "How often the data are read",
        settings={
            "sizes": sizes,
            "cache": 0,
            "p0": "2 x truth; frequency of the damped sine 1.1 x",
        },
        figures={"fits": found},
        headlines=headlines,
        header=[
            "rows",
            "chunks",
            "model",
            "x",
            "rows read / rows",
            "passes",
            "success",
            "step left / error",
            "estimated",
            "errors off",
            "residuals / noise",
        ],
        rows=[
            [
                f"{one['n_rows']:.0e}",
                str(one["chunks"]),
                one["model"],
                one["order"],
                f"{one['rows_read_per_row']:.2f}",
                str(one["passes"]),
                "yes" if one["success"] else "no",
                f"{one['step_left_in_standard_errors']:.1e}",
                "" if (step := one["estimated_step_left"]) is None else f"{step:.1e}",
                f"{one['standard_errors_off']:.1e}",
                f"{one['residuals_over_noise']:.4f}",
            ]
            for one in found
        ],
    ).save(args)


if __name__ == "__main__":
    main()
