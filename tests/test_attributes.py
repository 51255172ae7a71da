"""Attributes that say what values stand for, and that nobody has heeded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

import nlsq_dask as nd

N, FILL = 400, -9999.0
X = np.linspace(0, 4, N)
Y = np.where(np.arange(N) % 9 == 0, FILL, 2.0 * np.exp(-0.7 * X)).astype(np.float32)


def plan(x: Any, y: Any, sigma: Any = None) -> None:
    """Say what a fit would do, which warns as the fit does."""
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    optimizer.plan(lambda x, a, b: a * jnp.exp(-b * x), x, y, sigma=sigma)


def written(folder: Path, zarr_format: int, **encoding: Any) -> str:
    """Write Y with its gaps as NaN, and return the path of the store."""
    array = xr.DataArray(np.where(Y == FILL, np.nan, Y), {"x": X}, name="y").to_dataset()
    path = str(folder / "y.zarr")
    array.to_zarr(path, consolidated=False, zarr_format=zarr_format, encoding={"y": encoding})
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_fill_value_that_nobody_masked(zarr_format: int, tmp_path: Path) -> None:
    path = written(tmp_path, zarr_format, _FillValue=np.float32(FILL))
    with pytest.warns(nd.DataWarning, match=r"y_data has .* _FillValue=-9999 .* open it with xar"):
        plan(X, zarr.open_group(path)["y"])
    with pytest.warns(nd.DataWarning, match=r"sigma has a CF attribute _FillValue=-9999"):
        plan(X, np.ones(N), sigma=zarr.open_group(path)["y"])
    options: dict[str, Any] = {"consolidated": False, "chunks": {}}
    with pytest.warns(nd.DataWarning, match="open it without mask_and_scale=False"):
        plan("x", xr.open_zarr(path, mask_and_scale=False, **options)["y"])
    masked = xr.open_zarr(path, **options)["y"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan("x", masked)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_nan_as_fill_value_needs_no_mask(zarr_format: int, tmp_path: Path) -> None:
    path = written(tmp_path, zarr_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(X, zarr.open_group(path)["y"])
        plan(X, zarr.array(Y, fill_value=0))  # Zarr's default


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_packed_values(zarr_format: int, tmp_path: Path) -> None:
    packing = {"dtype": "i2", "scale_factor": 1e-3, "add_offset": 5.0, "_FillValue": -1}
    path = written(tmp_path, zarr_format, **packing)
    with pytest.warns(nd.DataWarning) as caught:
        plan(X, zarr.open_group(path)["y"])
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "y_data has CF attributes 'scale_factor' and 'add_offset' that have not been" in texts[0]
    assert "_FillValue=-1" in texts[1]


def test_values_in_memory_are_looked_at() -> None:
    array = xr.DataArray(Y, {"x": X}, attrs={"missing_value": FILL})
    with pytest.warns(nd.DataWarning, match="y_data has a CF attribute missing_value=-9999"):
        plan("x", array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan("x", array.where(array != FILL))


def test_attributes_of_hdf5_are_arrays(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["y"] = Y
        file["y"].attrs["_FillValue"] = np.array([FILL], np.float32)
        with pytest.warns(nd.DataWarning, match="y_data has a CF attribute _FillValue=-9999"):
            plan(X, file["y"])


@pytest.mark.parametrize("said", ["none", "", [], None, np.nan])
def test_what_is_no_number_says_nothing(said: Any) -> None:
    array = xr.DataArray(Y, {"x": X}, attrs={"_FillValue": said})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan("x", array)
