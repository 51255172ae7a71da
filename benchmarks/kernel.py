"""Rows a second of the kernel in memory, on one core, next to other ways to make ``J^T J``.

    python -m benchmarks.kernel

Each model is timed with the package's own choice of mode ("rule"), with pure forward and pure
reverse mode forced on the same kernel, and as ``vmap(jacrev)`` over all rows followed by
``J.T @ J``, which is the textbook spelling.
"""

from __future__ import annotations

import os

os.environ.setdefault("NPROC", "1")  # XLA's threads; read when JAX first needs the CPU

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from nlsq_dask.kernels.dense_kernel import dense_kernel
from nlsq_dask.kernels.kernel import batch_rows_for
from nlsq_dask.kernels.request import Request
from nlsq_dask.model.jacobian import Mode, choose_mode
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import STRIP_ROWS, Layout, Rows

SIZES = (3, 10, 20, 60)
MODES = ("rule", "forward", "reverse")
MIXED, TEXTBOOK = "rule, float32 of float64 rows", "vmap(jacrev), float64"


# --- models of p parameters


def exponentials(p: int) -> Callable[..., Any]:
    """Return a sum of p // 2 exponentials, one term after another, and a constant if p is odd."""

    def model(x: Any, *q: Any) -> Any:
        total = q[-1] if p % 2 else 0.0
        for i in range(0, p - 1, 2):
            total += q[i] * jnp.exp(-q[i + 1] * x)
        return total

    return model


def _line(x: Any, q: Any) -> Any:
    """Return the polynomial that uses up the parameters left over by terms of three."""
    return sum(q[i] * x**i for i in range(len(q)))


def gaussians(p: int) -> Callable[..., Any]:
    """Return a sum of p // 3 Gaussians, one term after another, on a polynomial."""

    def model(x: Any, *q: Any) -> Any:
        total = _line(x, q[p - p % 3 :])
        for i in range(0, p - 2, 3):
            total += q[i] * jnp.exp(-0.5 * ((x - q[i + 1]) / q[i + 2]) ** 2)
        return total

    return model


def network(p: int) -> Callable[..., Any]:
    """Return p // 3 tanh units in one vectorized expression, on a polynomial."""
    units = p // 3

    def model(x: Any, *q: Any) -> Any:
        weight, shift, height = jnp.stack(q[: 3 * units]).reshape(3, units)
        return jnp.tanh(x[:, None] * weight + shift) @ height + _line(x, q[3 * units :])

    return model


KINDS = {
    "exponentials, unrolled": exponentials,
    "Gaussians, unrolled": gaussians,
    "tanh network, vectorized": network,
}


# --- the kernels


def package_kernel(
    model: Callable[..., Any], p: int, dtype: str, mode: str, rows: Rows, stored: str
) -> tuple[Callable[[], object], str]:
    """Return a call that reduces all rows once with the kernel in this mode, and the mode.

    This is the only place that touches the kernel's module-level interface. Sums of the data alone,
    which only the first pass makes, are left out.
    """
    layout = Layout(None, ((),), (stored,), stored, None, False)
    rows = replace(
        rows,
        y=rows.y.astype(stored, copy=False),
        x=tuple(x.astype(stored, copy=False) for x in rows.x),
    )
    traced, params = Model(model, p, layout, dtype), start(p)
    with jax.enable_x64(True):
        chosen = choose_mode(traced, traced.jaxpr()) if mode == "rule" else Mode(mode)
    n_rows = batch_rows_for(len(rows), 2**20, layout.row_bytes)
    kernel = dense_kernel(traced, n_rows, None if mode == "rule" else chosen)
    return lambda: kernel(rows, Request(params), wants_moments=False), chosen.value


def textbook_kernel(model: Callable[..., Any], p: int, rows: Rows) -> Callable[[], object]:
    """Return a call of ``vmap(jacrev)`` over all rows, ``J.T @ J``, ``J.T @ r`` and the cost."""

    @jax.jit
    def sums(params: Any, x: Any, y: Any) -> Any:
        jacobian = jax.vmap(jax.jacrev(lambda q, row: model(row[None], *q)[0]), (None, 0))(
            params, x
        )
        residual = model(x, *params) - y
        return jacobian.T @ jacobian, jacobian.T @ residual, 0.5 * residual @ residual

    with jax.enable_x64(True):
        held = [jnp.asarray(a) for a in (start(p), rows.x[0], rows.y)]

    def call() -> None:
        with jax.enable_x64(True):
            jax.block_until_ready(sums(*held))

    return call


def start(p: int) -> np.ndarray:
    """Return parameters at which every model here is smooth and finite."""
    return np.linspace(0.5, 1.5, p)


def make_rows(p: int, quick: bool) -> Rows:
    """Return float64 rows in memory: 2**20 for p = 3, fewer for more parameters."""
    n_rows = 2 ** (12 if quick else round(np.log2(3 * 2**20 / p)))
    rng = np.random.default_rng(p)
    return Rows(rng.normal(size=n_rows), (rng.uniform(0, 5, n_rows),))


# --- the suite


def measure(kind: str, p: int, quick: bool) -> dict[str, Any]:
    """Time one model in all forms, in turns."""
    model, rows = KINDS[kind](p), make_rows(p, quick)
    calls, modes = {}, {}
    for dtype in ("float64", "float32"):
        for mode in MODES:
            name = f"{mode}, {dtype}"
            calls[name], modes[name] = package_kernel(model, p, dtype, mode, rows, dtype)
    calls[MIXED], modes[MIXED] = package_kernel(model, p, "float32", "rule", rows, "float64")
    slow = {TEXTBOOK: textbook_kernel(model, p, rows)}
    timings = common.compare(calls, 2 if quick else 9) | common.compare(slow, 2)
    found = {
        name: {**timing.record(), "rate": len(rows) / timing.median, "mode": modes.get(name)}
        for name, timing in timings.items()
    }
    return {"kind": kind, "p": p, "n_rows": len(rows), "timings": found}


def loss_of_rule(found: Mapping[str, Any], dtype: str) -> float:
    """Return the time with the rule's mode over that of the better pure mode."""
    rates = [found["timings"][f"{mode}, {dtype}"]["rate"] for mode in MODES]
    return max(rates[1:]) / rates[0]


def main() -> None:
    """Measure all models, print and save."""
    args = common.arguments(__doc__).parse_args()
    if hasattr(os, "sched_setaffinity"):
        common.pin(common.cores()[0])
    sizes = SIZES[:2] if args.quick else SIZES
    found = [measure(kind, p, args.quick) for p in sizes for kind in KINDS]

    def rates(record: Mapping[str, Any], *names: str) -> list[str]:
        return [f"{record['timings'][name]['rate'] / 1e6:.3g}" for name in names]

    columns = [f"{mode}, {dtype}" for dtype in ("float64", "float32") for mode in MODES]
    three = found[0]["timings"]
    speed = three["rule, float64"]["rate"] / three[TEXTBOOK]["rate"]
    narrow, mixed = (
        three[name]["rate"] / three["rule, float64"]["rate"] for name in ("rule, float32", MIXED)
    )
    worst = max(found, key=lambda one: loss_of_rule(one, "float64"))
    common.Report(
        "kernel",
        "The kernel in memory, one core: million rows a second",
        settings={"block_rows": STRIP_ROWS},
        figures={"models": found},
        headlines=[
            (
                "kernel, exponential of 3 parameters, float64",
                f"{three['rule, float64']['rate'] / 1e6:.0f} million rows/s a core: "
                f"{speed:.1f} x `vmap(jacrev)` and `J.T @ J`",
            ),
            (
                "the same in float32",
                f"{narrow:.2f} x float64 ({mixed:.2f} x where the rows are stored in float64)",
            ),
            (
                "rule against the better pure mode, float64",
                f"at worst {loss_of_rule(worst, 'float64'):.2f} x its time "
                f"({worst['kind']}, p = {worst['p']})",
            ),
        ],
        header=[
            "model",
            "p",
            "rule",
            *columns,
            TEXTBOOK,
            "rule / better mode, time",
        ],
        rows=[
            [
                one["kind"],
                str(one["p"]),
                one["timings"][columns[0]]["mode"],
                *rates(one, *columns, TEXTBOOK),
                " and ".join(f"{loss_of_rule(one, d):.2f}" for d in ("float64", "float32")),
            ]
            for one in found
        ],
    ).save(args)


if __name__ == "__main__":
    main()
