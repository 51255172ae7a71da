"""One million rows in memory: this package, SciPy, and the ``nlsq`` package.

    python -m benchmarks.in_memory

``nlsq`` needs Python 3.12 or newer and an environment of its own, which ``make bench-nlsq-env``
builds in ``.venv-nlsq``; without it that line is left out, with a message, as it is with
``--quick``. Its optimizer runs with its ``aggressive`` preset, and so does this package's in a line
of its own.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize

from benchmarks import common
from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig

_NLSQ_PYTHON = Path(__file__).parents[1] / ".venv-nlsq" / "bin" / "python"
_NLSQ_SCRIPT = Path(__file__).with_name("nlsq_fit.py")


def model(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """Return the exponential in NumPy, for SciPy."""
    return a * np.exp(-b * x) + c


def jacobian(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """Return its derivatives."""
    decay = np.exp(-b * x)
    return np.stack([decay, -a * x * decay, np.ones_like(x)], axis=1)


def nlsq(x: np.ndarray, y: np.ndarray, later: int) -> dict[str, Any] | None:
    """Time nlsq's optimizer in its own environment, or say why not and return None."""
    if not _NLSQ_PYTHON.exists():
        print("nlsq: left out, there is no .venv-nlsq; `make bench-nlsq-env` builds it.")
        return None
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/data.npy", np.stack([x, y]))
        start = json.dumps(common.START)
        command = [_NLSQ_PYTHON, "-P", _NLSQ_SCRIPT, f"{folder}/data.npy", start, str(1 + later)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    fits = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(fits) < 2:
        print(f"nlsq: left out, it ended with {done.returncode}: {done.stderr[-300:]}")
        return None
    timing = common.Timing(fits[0]["seconds"], [one["seconds"] for one in fits[1:]])
    return {**timing.record(), **fits[-1], "exit_status": done.returncode}


def main() -> None:
    """Measure, print and save."""
    args = common.arguments(__doc__).parse_args()
    n_rows, later = (50_000, 2) if args.quick else (1_000_000, 5)
    rng = np.random.default_rng(0)
    x = rng.uniform(*common.X_RANGE, n_rows)
    y = model(x, *common.TRUTH) + rng.normal(0, common.NOISE, n_rows)
    solution: dict[str, Any] = {}

    def keep(name: str, params: Any) -> None:
        solution[name] = np.asarray(params).tolist()

    def this_package(name: str, config: HybridStreamingConfig) -> None:
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        keep(name, optimizer.fit(common.exponential, x, y, common.START).x)

    def scipy(name: str, **options: Any) -> None:
        keep(name, optimize.curve_fit(model, x, y, common.START, **options)[0])

    default = HybridStreamingConfig(verbose=0)
    aggressive = HybridStreamingConfig.aggressive(verbose=0)
    names = "nlsq_dask", "nlsq_dask, aggressive", "SciPy", "SciPy, analytic Jacobian"
    calls = {
        names[0]: lambda: this_package(names[0], default),
        names[1]: lambda: this_package(names[1], aggressive),
        names[2]: lambda: scipy(names[2]),
        names[3]: lambda: scipy(names[3], jac=jacobian),
    }
    found = {name: timing.record() for name, timing in common.compare(calls, later).items()}
    for name, params in solution.items():
        found[name]["params"] = params
    reference = None if args.quick else nlsq(x, y, later=1)
    if reference:
        found["nlsq, aggressive"] = reference
    base = found[names[0]]["median"]
    headlines = [
        (
            f"whole fit of {n_rows:,} rows in memory",
            f"{base:.2f} s; SciPy's curve_fit takes {found[names[2]]['median'] / base:.1f} x as "
            f"long, with an analytic Jacobian {found[names[3]]['median'] / base:.1f} x",
        ),
        (
            "nlsq's optimizer, aggressive preset, on the same rows",
            f"{reference['median'] / found[names[1]]['median']:.0f} x as long as this package's "
            f"aggressive, {reference['median'] / base:.0f} x as long as its default"
            if reference
            else "not measured",
        ),
    ]
    common.Report(
        "in_memory",
        f"{n_rows:,} rows in memory, exponential of 3 parameters",
        settings={"n_rows": n_rows, "later": later, "p0": common.START},
        figures=found,
        headlines=headlines,
        header=["what", "s", "first, s", "/ nlsq_dask", "parameters"],
        rows=[
            [
                name,
                f"{one['median']:.3f}",
                f"{one['first']:.2f}",
                f"{one['median'] / base:.2f}",
                ", ".join(f"{value:.9f}" for value in one["params"]),
            ]
            for name, one in found.items()
        ],
    ).save(args)


if __name__ == "__main__":
    main()
