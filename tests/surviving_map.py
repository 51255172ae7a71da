"""Fits for every pixel with a store, in a process of its own, which others kill.

    python -m tests.surviving_map DATA STORE LOG

Every block that is read is written to the log.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import xarray as xr

import nlsq_dask as nd

N_TILES = 12
SHAPE = (30, 4 * 3, 3 * 40)  # of y: points, rows and columns; tiles have 3 x 40 pixels
T = np.linspace(0.0, 3.0, SHAPE[0])


def decay(t: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-b * t)


def write_data(path: Path) -> None:
    """Write a cube in which the fitted dimension has two chunks."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1.5, 2.5, SHAPE[1:]), rng.uniform(0.8, 1.2, SHAPE[1:])
    y = a * np.exp(-b * T[:, None, None]) + 0.05 * rng.standard_normal(SHAPE)
    y[:, 1, 5] = np.nan
    cube = xr.DataArray(y, {"t": T}, dims=("t", "row", "col"), name="signal")
    cube.chunk(t=15, row=3, col=40).to_zarr(path, consolidated=False)


def read_slowly(block: np.ndarray, log: str, seconds: float, block_info: Any = None) -> np.ndarray:
    """Return a block after a while, and write its position to the log."""
    time.sleep(seconds)
    if log and block_info:
        with Path(log).open("a") as file:
            file.write(f"{block_info[0]['chunk-location']}\n")
    return block


def fit(
    data: Path,
    store: Path | None,
    log: str = "",
    seconds: float = 0.0,
    observers: Any = (),
    change: Any = None,
    **more: Any,
) -> xr.Dataset:
    """Fit all pixels; ``change`` is a function of y."""
    cube = xr.open_zarr(data, consolidated=False).signal
    lazy = da.map_blocks(
        read_slowly, cube.data, log=log, seconds=seconds, dtype=float, meta=np.empty((0, 0, 0))
    )
    y = cube.copy(data=lazy)
    options = {"verbose": 0, **more.pop("options", {})}
    config = nd.HybridStreamingConfig(**options)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config, observers=observers)
    model = more.pop("model", decay)
    y = y if change is None else change(y)
    ds: xr.Dataset = optimizer.fit_each(model, "t", y, dims="t", store=store, **more)
    return ds


if __name__ == "__main__":
    from nlsq_dask.maps.problem import tiles

    tiles._MIN_PIXELS, tiles._MIN_POINTS = 1, 1
    data, store, log = sys.argv[1:]
    print("ready", flush=True)
    with dask.config.set(scheduler="threads", num_workers=2):
        fit(Path(data), Path(store), log, seconds=0.02)
