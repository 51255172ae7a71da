"""What a pass costs on a GPU; says so and ends well where JAX sees none.

    python -m benchmarks.gpu

Needs a JAX that was installed for the GPU (``pip install "jax[cuda12]"``). Measured are: the bare
kernel in both modes on rows that are in the device's memory already, which is the limit; transfers
of rows from NumPy arrays, which is what a pass over data that are read again has to pay; and the
passes of a whole fit of rows in memory by this package, which does both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card may be shared

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import common, kernel
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Layout

_BLOCK = 2**18  # rows at once: a GPU wants many


def pure_mode(model: Model, n_rows: int, mode: str) -> Callable[..., Any]:
    """Return a bare kernel in blocks with the Jacobian in one mode: no masks, no counts."""
    block = min(_BLOCK, n_rows)

    def forward(x: Any, params: Any) -> tuple[Any, Any]:
        values, push = jax.linearize(lambda q: model((x,), q), params)
        return values, jax.vmap(push)(jnp.eye(model.n_params, dtype=model.dtype))

    def reverse(x: Any, params: Any) -> tuple[Any, Any]:
        def one(row: Any, q: Any) -> Any:
            return model((row[None],), q)[0]

        values, jacobian = jax.vmap(jax.value_and_grad(one, 1), (0, None))(x, params)
        return values, jacobian.T

    evaluate = {"forward": forward, "reverse": reverse}[mode]

    def program(params: Any, x: Any, y: Any) -> Any:
        params = params.astype(model.dtype)

        def add(i: Any, gram: Any) -> Any:
            at, of = (lax.dynamic_slice_in_dim(a, i * block, block) for a in (x, y))
            values, jacobian = evaluate(at, params)
            stacked = jnp.concatenate([jacobian, (values - of.astype(model.dtype))[None]])
            return gram + (stacked @ stacked.T).astype(jnp.float64)

        zero = jnp.zeros((model.n_params + 1,) * 2)
        return (lax.fori_loop(0, n_rows // block, add, zero),)

    return program


def on_device(device: Any, kind: str, p: int, dtype: str, n_rows: int, later: int) -> list[Any]:
    """Time the bare kernel on rows that stay on the device, in both modes."""
    layout = Layout(None, ((),), (dtype,), dtype, None, False)
    model = Model(kernel.KINDS[kind](p), p, layout, dtype)
    rng = np.random.default_rng(0)
    found = []
    with jax.enable_x64(True), jax.default_device(device):
        x, y = (jax.device_put(a.astype(dtype), device) for a in rng.random((2, n_rows)))
        params = jax.device_put(kernel.start(p), device)
        for mode in ("forward", "reverse"):
            program = jax.jit(pure_mode(model, n_rows, mode))
            call = {"": lambda program=program: jax.block_until_ready(program(params, x, y))}
            timing = common.compare(call, later)[""]
            found.append(
                {
                    "what": f"kernel, {kind}, p = {p}, {dtype}, {mode}",
                    **timing.record(),
                    "rate": n_rows / timing.median,
                }
            )
    return found


def transfer(device: Any, n_rows: int, later: int) -> dict[str, Any]:
    """Time the way of x and y, float64, from NumPy arrays to the device."""
    rows = np.random.default_rng(0).random((2, n_rows))
    with jax.enable_x64(True):
        call = {"": lambda: jax.block_until_ready(jax.device_put(rows, device))}
        timing = common.compare(call, later)[""]
    return {
        "what": f"transfer to the device, {rows.nbytes / timing.median / 1e9:.1f} GB/s",
        **timing.record(),
        "rate": n_rows / timing.median,
    }


def whole_fit(n_rows: int, later: int) -> dict[str, Any]:
    """Time the passes of this package's fit to rows in memory, on the device that it chooses."""
    rng = np.random.default_rng(0)
    x = rng.uniform(*common.X_RANGE, n_rows)
    a, b, c = common.TRUTH
    y = a * np.exp(-b * x) + c + rng.normal(0, common.NOISE, n_rows)
    fits = [common.fit(common.exponential, x, y, common.START)[1] for _ in range(1 + later)]
    timing = common.Timing(fits[0][0], [took for passes in fits[1:] for took in passes])
    return {
        "what": "a pass of a fit by nlsq_dask, exponential, p = 3, float64",
        **timing.record(),
        "rate": n_rows / timing.median,
    }


def main() -> None:
    """Measure on the first GPU, print and save."""
    parser = common.arguments(__doc__)
    parser.add_argument("--platform", default="gpu", help="cpu only to try the script out")
    args = parser.parse_args()
    try:
        device = jax.devices(args.platform)[0]
    except RuntimeError:
        print(f"gpu: left out, JAX sees no GPU here, only {jax.devices()}.")
        return
    n_rows, later = (2**18, 2) if args.quick else (2**24, 5)
    found = [transfer(device, n_rows, later), whole_fit(n_rows, later)]
    for kind in kernel.KINDS:
        for p in (3, 20):
            for dtype in ("float64", "float32"):
                found += on_device(device, kind, p, dtype, n_rows, later)
    common.Report(
        "gpu",
        f"On {device.device_kind}: million rows a second",
        settings={"n_rows": n_rows, "later": later, "block": _BLOCK, "device": device.device_kind},
        figures={"calls": found},
        headlines=[
            (f"GPU: {one['what']}", f"{one['rate'] / 1e6:.0f} million rows/s") for one in found[:3]
        ],
        header=["what", "million rows/s", "s", "first, s"],
        rows=[
            [
                one["what"],
                f"{one['rate'] / 1e6:.4g}",
                f"{one['median']:.4f}",
                f"{one['first']:.2f}",
            ]
            for one in found
        ],
    ).save(args)


if __name__ == "__main__":
    main()
