"""A fit in a process of its own, which others kill; used by the tests of survival.

    python -m tests.surviving_fit FOLDER --out result.npz --log reads.txt

Every block that is read is written to the log. With a folder that holds checkpoints the fit is
resumed, else it begins.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np

import nlsq_dask as nd
from tests import problems

BLOCK_ROWS = 2**18  # so that each is a group by itself
N_BLOCKS = 20
START = [1.0, 0.5, 1.0, 2.8]
OPTIONS: dict[str, Any] = {
    "sample_rows": 200,
    "warmup_iterations": 5,
    "max_warmup_iterations": 20,
    "gauss_newton_tol": 1e-12,
    "cache": 0,
}


def model(x: Any, a: Any, b: Any, c: Any, w: Any) -> Any:
    return a * jnp.exp(-b * x) + c * jnp.sin(w * x)


def read_slowly(x: np.ndarray, log: str, seconds: float, block_info: Any = None) -> np.ndarray:
    """Return y of a block, after a while, and say so."""
    index = block_info[None]["chunk-location"][0] if block_info else 0
    time.sleep(seconds)
    noise = np.random.default_rng(index).standard_normal(len(x))
    y = 2.0 * np.exp(-0.7 * x) + 0.5 * np.sin(3.0 * x) + 0.1 * noise
    if log:
        with Path(log).open("a") as file:
            file.write(f"{time.time()} {index}\n")
    return y


def data(log: str = "", seconds: float = 0.0) -> tuple[da.Array, da.Array]:
    """Return lazy x and y."""
    n = BLOCK_ROWS * N_BLOCKS
    x = da.linspace(0.0, 10.0, n, chunks=BLOCK_ROWS)
    return x, da.map_blocks(read_slowly, x, log=log, seconds=seconds, dtype=float)


def fit(
    log: str = "",
    seconds: float = 0.0,
    callback: Any = None,
    observers: Any = (),
    **options: Any,
) -> nd.FitResult:
    """Fit, in several passes because the sample is too small to spare any."""
    x, y = data(log, seconds)
    options = {**OPTIONS, **options}
    return problems.fit(model, x, y, START, callback=callback, observers=observers, **options)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_while_writing(moment: str, number: int) -> None:
    """Kill this process at a moment of writing its so manieth checkpoint."""
    count = 0

    def dying(function: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if before and count == number:
                die()
            value = function(*args, **kwargs)
            if count == number:
                die()
            return value

        return call

    if moment == "half":
        opened = Path.open

        def open_half(path: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            file = opened(path, *args, **kwargs)
            if path.suffix == ".unfinished":
                count += 1
                if count == number:
                    file.write(b"nlsq_dask checkpoint, version 1\n half of it")
                    file.flush()
                    die()
            return file

        Path.open = open_half  # type: ignore[assignment, method-assign]
    elif moment == "before fsync":
        os.fsync = dying(os.fsync, before=True)
    else:
        Path.replace = dying(Path.replace, moment == "before rename")  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--log", default="")
    parser.add_argument("--seconds", type=float, default=0.03)
    parser.add_argument("--interval", type=float, default=0.1)
    parser.add_argument("--die", nargs=2, metavar=("MOMENT", "NUMBER"))
    args = parser.parse_args()
    resume = args.folder if list(args.folder.glob("*.nlsq")) else None
    if args.die:
        die_while_writing(args.die[0], int(args.die[1]))
    print("ready", flush=True)
    with dask.config.set(scheduler="threads", num_workers=2):
        result = fit(
            args.log,
            args.seconds,
            checkpoint_dir=args.folder,
            checkpoint_interval=args.interval,
            checkpoint_frequency=5,
            resume_from_checkpoint=resume,
        )
    np.savez(
        args.out,
        popt=result.popt,
        pcov=result.pcov,
        n_passes=result.n_passes,
        rows_read=result.rows_read,
        nit=result.nit,
        success=result.success,
    )


if __name__ == "__main__":
    main()
