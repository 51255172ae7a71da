from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client, LocalCluster


def share_compiled_programs() -> None:
    """Share compiled programs among all processes of a run, workers of clusters included.

    JAX reads these variables when it is imported. The first process creates the folder and removes
    it at exit; the processes it starts inherit the variables.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="nlsq-dask-programs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


share_compiled_programs()


def pytest_configure(config: pytest.Config) -> None:
    # JAX writes entries in place. A process that reads a part of one, or finds what a killed
    # process has left, compiles the program itself.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning"
    )


@pytest.fixture(scope="session")
def process_client() -> Iterator[Client]:
    """A real cluster of two worker processes, not the default client of anyone."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=["threads", "processes"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[str]:
    """Dask's threads, or the cluster of processes."""
    scope: AbstractContextManager[Any] = nullcontext()
    if request.param == "processes":
        scope = request.getfixturevalue("process_client").as_current()
        with scope, dask.config.set(scheduler="dask.distributed"):
            yield request.param
    else:
        with dask.config.set(scheduler="threads"):
            yield request.param


def ragged(n: int) -> tuple[int, ...]:
    """Chunks that divide nothing evenly."""
    sizes, left = [], n
    for size in (1, 7_001, 12_345, 999, 20_000):
        sizes.append(min(size, left))
        left -= sizes[-1]
    return tuple(size for size in (*sizes, left) if size)


class Kinds:
    """Turns NumPy arrays of one kind into another."""

    def __init__(self, folder: Any) -> None:
        self._folder = folder
        self._count = 0

    def __call__(self, kind: str, array: np.ndarray, dims: tuple[str, ...] | None = None) -> Any:
        if kind == "numpy":
            return array
        if kind == "dask":
            chunks = (ragged(len(array)), *(-1 for _ in array.shape[1:]))
            return da.from_array(array, chunks=chunks)
        if kind == "zarr":
            return self._zarr(array)
        if kind == "xarray":
            dims = dims or ("row", "feature")[: array.ndim]
            return xr.DataArray(da.from_array(array, chunks=array.shape[0] // 4 + 1), dims=dims)
        raise ValueError(kind)

    def _zarr(self, array: np.ndarray) -> Any:
        self._count += 1
        store = zarr.create_array(
            str(self._folder / f"{self._count}.zarr"),
            shape=array.shape,
            chunks=tuple(max(n // 3, 1) for n in array.shape),
            dtype=array.dtype,
        )
        store[...] = array
        return store


@pytest.fixture
def as_kind(tmp_path: Any) -> Kinds:
    return Kinds(tmp_path)
