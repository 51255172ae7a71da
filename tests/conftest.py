from __future__ import annotations

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
