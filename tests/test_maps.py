"""A fit for every pixel: numbers as SciPy's, whatever the layout of the arrays."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client

from nlsq_dask import (
    AdaptiveHybridStreamingOptimizer,
    DataError,
    DataWarning,
    HybridStreamingConfig,
    NonFiniteDataError,
    PixelFitError,
)
from nlsq_dask.engine.workers import Workers
from nlsq_dask.maps import run
from nlsq_dask.maps.problem.arguments import validate_map_arguments
from nlsq_dask.maps.problem.plan import check_memory
from nlsq_dask.maps.tasks import starts, tile_task
from nlsq_dask.model.program import compile_count
from tests.cubes import Cube, cubes

CUBES = {cube.name: cube for cube in cubes()}
T = np.linspace(0.1, 5, 60)
P0 = {"a": 2.0, "b": 1.0, "c": 0.3}


def decay(t: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * t) + c


def fit_each(model: Any = decay, x: Any = "t", y: Any = None, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.pop("config", None)
    kwargs.setdefault("dims", "t")
    return AdaptiveHybridStreamingOptimizer(config).fit_each(model, x, y, *args, **kwargs)


@pytest.fixture(scope="module")
def cube() -> xr.DataArray:
    """The exponential cube with a pixel without data and one with two points."""
    y = CUBES["exponential"].y.copy()
    y[:, 0, 1] = np.nan
    y[2:, 0, 2] = np.nan
    return y.assign_coords(
        row=np.arange(5.0), col=("col", np.arange(7) * 10), site=("col", list("abcdefg"))
    )


@pytest.fixture(scope="module")
def fitted(cube: xr.DataArray) -> xr.Dataset:
    """The fits of the cube in memory."""
    result: xr.Dataset = fit_each(y=cube, p0=P0)
    return result


def assert_same_fits(one: xr.Dataset, other: xr.Dataset, tolerance: float = 1e-5) -> None:
    """Compare parameters in standard errors, and the status exactly."""
    other = other.transpose(*one.dims)
    np.testing.assert_array_equal(one.status, other.status)
    distance = np.abs((one.popt - other.popt) / one.perr)
    assert float(distance.max()) <= tolerance
    np.testing.assert_allclose(one.perr, other.perr, rtol=max(tolerance, 1e-12))
    np.testing.assert_array_equal(one.n_points, other.n_points)


# --- numbers


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "float64") for name in CUBES),
        ("exponential", "float32"),
        *(
            pytest.param(name, "float32", marks=pytest.mark.slow)
            for name in CUBES
            if name != "exponential"
        ),
    ],
)
def test_each_pixel_is_fitted_as_by_scipy(name: str, precision: str) -> None:
    cube: Cube = CUBES[name]
    ds = fit_each(
        cube.jax_model(),
        cube.x if isinstance(cube.x, str) else list(cube.x),
        cube.y,
        cube.p0,
        cube.bounds or None,
        dims=cube.dims,
        sigma=cube.sigma,
        loss=cube.loss,
        f_scale=cube.f_scale,
        fixed=cube.fixed or None,
        param_names=list(cube.p0),
        config=HybridStreamingConfig(precision=precision),
    )
    is_double = precision == "float64"
    assert ds.popt.dtype == precision
    for row, col in cube.pixels():
        pixel = ds.isel(row=row, col=col)
        reference = cube.scipy(row, col)
        assert reference is not None
        params, errors, cost = reference
        free = errors > 0
        assert pixel.status > 0
        distance = np.abs(pixel.popt.values - params)[free] / errors[free]
        is_lower = cube.loss == "linear" and float(pixel.chi2) / 2 < cost * (1 - 1e-9)
        assert distance.max() <= (1e-5 if is_double else 0.02) or is_lower
        np.testing.assert_allclose(pixel.perr.values, errors, rtol=1e-5 if is_double else 2e-2)


def test_a_pixel_is_fitted_as_by_fit(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    optimizer = AdaptiveHybridStreamingOptimizer()
    for row, col in ((0, 0), (3, 4)):
        one = optimizer.fit(
            decay, "t", cube.isel(row=row, col=col), P0, nan_policy="omit", verbose=0
        )
        pixel = fitted.isel(row=row, col=col)
        assert np.all(np.abs(pixel.popt.values - one.popt) <= 1e-5 * one.perr)
        np.testing.assert_allclose(pixel.perr, one.perr, rtol=1e-6)
        np.testing.assert_allclose(pixel.chi2, one.chi2, rtol=1e-9)
        np.testing.assert_allclose(pixel.reduced_chi2, one.reduced_chi2, rtol=1e-9)
        assert pixel.n_points == one.n_points


def test_the_result_is_labeled_as_the_data(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    assert fitted.popt.dims == ("row", "col", "param")
    assert list(fitted.param.values) == ["a", "b", "c"]
    for name in ("row", "col", "site"):
        xr.testing.assert_identical(
            fitted[name].drop_vars("site", errors="ignore"),
            cube[name].drop_vars("site", errors="ignore"),
        )
    assert "t" not in fitted.coords
    assert fitted.attrs["data"] == "signal"
    assert fitted.attrs["data_units"] == "V"
    dtypes = {name: str(array.dtype) for name, array in fitted.items()}
    assert dtypes == {
        "popt": "float64",
        "perr": "float64",
        "chi2": "float64",
        "reduced_chi2": "float64",
        "n_points": "int32",
        "n_iterations": "int16",
        "status": "int8",
    }
    meanings = dict(
        zip(
            fitted.status.attrs["flag_values"].tolist(),
            fitted.status.attrs["flag_meanings"].split(),
            strict=True,
        )
    )
    assert meanings[1] == "converged"
    assert meanings[-1] == "no_data"
    assert meanings[int(fitted.status[0, 2])] == "too_few_points"
    assert np.isnan(fitted.popt[0, 1:3]).all()
    assert (fitted.status > 0).sum() == 33


# --- layouts and schedulers


def in_layout(cube: xr.DataArray, layout: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the cube in another layout, with further arguments of ``fit_each``."""
    match layout:
        case "transposed":
            return cube.transpose("col", "t", "row"), {}
        case "chunked map":
            return cube.chunk(row=2, col=3), {}
        case "chunked time":
            return cube.chunk(t=7, row=3), {}
        case "axes":
            return cube.values, {"x": T, "dims": 0}
        case "axes, transposed":
            return np.moveaxis(cube.values, 0, 1), {"x": T, "dims": -2}
        case "masked":
            return np.ma.masked_invalid(cube.values), {"x": T, "dims": [0]}
        case "dask":
            return da.from_array(cube.values, chunks=(20, 5, 4)), {"x": da.from_array(T), "dims": 0}
        case "zarr":
            stored = zarr.create_array(
                folder / "y.zarr", shape=cube.shape, chunks=(30, 3, 7), dtype="f8"
            )
            stored[:] = cube.values
            return stored, {"x": T, "dims": 0}
        case "x over the map":
            times = xr.DataArray(T, dims="t") * xr.ones_like(cube.row) * xr.ones_like(cube.col)
            return cube, {"x": times.drop_vars(["row", "col", "site"], errors="ignore")}
    raise AssertionError(layout)


@pytest.mark.parametrize(
    "layout",
    [
        "transposed",
        "chunked map",
        "chunked time",
        "axes",
        "axes, transposed",
        "masked",
        "dask",
        "zarr",
        "x over the map",
    ],
)
def test_the_layout_of_the_arrays_changes_nothing(
    layout: str, cube: xr.DataArray, fitted: xr.Dataset, tmp_path: Path
) -> None:
    y, arguments = in_layout(cube, layout, tmp_path)
    ds = fit_each(y=y, p0=P0, **arguments)
    is_lazy = layout in ("chunked map", "chunked time", "dask", "zarr")
    assert isinstance(ds.popt.data, da.Array) == is_lazy
    ds = ds.compute()
    if "row" not in ds.dims:
        ds = ds.rename(dict(zip(ds.status.dims, ("row", "col"), strict=True)))
    assert_same_fits(fitted, ds)


def test_the_scheduler_changes_no_bit(cube: xr.DataArray, process_client: Client) -> None:
    lazy = fit_each(y=cube.chunk(t=20, row=2, col=3))
    with dask.config.set(scheduler="synchronous"):
        one = lazy.compute()
    with dask.config.set(scheduler="threads", num_workers=3):
        xr.testing.assert_identical(lazy.compute(), one)
    with process_client.as_current():
        xr.testing.assert_identical(lazy.compute(), one)


def test_each_chunk_is_read_once_and_a_tile_is_one_task(cube: xr.DataArray) -> None:
    reads: Counter[tuple[slice, ...]] = Counter()

    class Counting:
        shape, dtype, ndim = cube.shape, cube.dtype, 3

        def __getitem__(self, index: Any) -> Any:
            reads[str(index)] += 1
            return cube.values[index]

    chunks = ((20, 20, 20), (3, 2), (4, 3))
    y = da.from_array(Counting(), chunks, name="counting", meta=np.empty(0), asarray=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_PIXELS", 1)
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_POINTS", 1)
        ds = fit_each(x=T, y=y, dims=0)
    (popt,) = dask.optimize(ds.popt.data)
    graph = dict(popt.__dask_graph__())
    fits = [key for key in graph if str(key).startswith("('nlsq-tile")]
    assert len(fits) == 4
    assert len(graph) <= 4 * (3 + 3)
    ds.compute()
    assert len(reads) == 12
    assert set(reads.values()) == {1}


def test_a_map_needs_two_programs_and_the_next_one_none(cube: xr.DataArray) -> None:
    def model(t: Any, a: Any, b: Any, c: Any) -> Any:
        return a * jnp.exp2(-b * t) + c

    before = compile_count()
    fit_each(model, y=cube.chunk(row=2, col=4), p0=P0).compute()
    between = compile_count()
    assert between - before <= 2
    fit_each(model, y=2 * cube.chunk(row=2, col=4), p0=P0).compute()
    assert compile_count() == between


def test_a_column_larger_than_memory_is_read_in_parts(
    cube: xr.DataArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = cube.chunk(t=20)
    expected = fit_each(y=lazy).compute()
    monkeypatch.setattr(tile_task, "process_memory", lambda: (0, 1))  # in 20 parts
    xr.testing.assert_identical(fit_each(y=lazy).compute(), expected)


def test_the_pooled_start_of_long_fits_loads_few_pixels(
    cube: xr.DataArray, fitted: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    load = tile_task.TileTask._part

    def counting(self: Any, reader: Any, inputs: Any, tile: Any, index: Any) -> Any:
        sizes.append(len(index))
        return load(self, reader, inputs, tile, index)

    monkeypatch.setattr(tile_task.TileTask, "_part", counting)
    monkeypatch.setattr(tile_task, "process_memory", lambda: (0, 1))  # in 20 parts
    monkeypatch.setattr(starts, "_POOLED_POINTS", 1)
    assert_same_fits(fitted, fit_each(y=cube.chunk(t=20)).compute())
    assert max(sizes) == starts._MIN_POOLED


# --- starts, bounds, fixed parameters


def test_start_values_and_bounds_vary_over_the_map(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    a = xr.full_like(cube[0], 2.5).drop_vars("t")
    low = xr.where(cube.col < 30, 0.0, -np.inf).drop_vars("site")
    ds = fit_each(
        y=cube, p0={"a": a, "b": 1.0, "c": 0.3 + 0 * cube.row}, bounds={"a": (low, np.inf)}
    )
    assert_same_fits(fitted, ds)
    lazy = fit_each(y=cube.chunk(row=2), p0={"a": a.chunk(row=3), "b": 1.0, "c": 0.3})
    assert_same_fits(fitted, lazy.compute())


def test_active_bounds_of_some_pixels(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    high = xr.where(cube.col < 30, 1.0, np.inf).drop_vars("site")
    ds = fit_each(y=cube, p0=P0, bounds={"b": (-np.inf, high)})
    bound = fitted.isel(col=slice(3)).popt.sel(param="b") > 1.0
    assert bound.any()
    np.testing.assert_array_equal(ds.status.isel(col=slice(3)).where(bound, 2), 2)
    assert float(ds.popt.isel(col=slice(3)).sel(param="b").max()) == 1.0
    assert_same_fits(fitted.isel(col=slice(3, None)), ds.isel(col=slice(3, None)))


def test_parameters_are_fixed_by_numbers_and_by_maps(
    cube: xr.DataArray, fitted: xr.Dataset
) -> None:
    everywhere = fit_each(y=cube, p0=P0, fixed={"c": 0.5})
    values = xr.full_like(cube[0], 0.5).drop_vars("t")
    by_map = fit_each(y=cube, p0=P0, fixed={"c": values})
    assert_same_fits(everywhere.sel(param=["a", "b"]), by_map.sel(param=["a", "b"]))
    assert (by_map.perr.sel(param="c").where(by_map.status > 0, 0) == 0).all()
    np.testing.assert_allclose(by_map.reduced_chi2, everywhere.reduced_chi2, rtol=1e-9)
    some = (cube.col < 30) & (cube.row >= 0)
    partly = fit_each(y=cube, p0={**P0, "c": 0.5}, fixed={"c": some.drop_vars("site")})
    assert_same_fits(
        everywhere.sel(param=["a", "b"]).isel(col=slice(3)),
        partly.sel(param=["a", "b"]).isel(col=slice(3)),
    )
    assert_same_fits(fitted.isel(col=slice(3, None)), partly.isel(col=slice(3, None)))


def test_the_solutions_of_another_map_are_starts(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    again = fit_each(y=cube, p0=fitted.popt)
    is_fitted = fitted.status > 0
    difference = (abs(again.popt - fitted.popt) / fitted.perr).where(is_fitted)
    assert float(difference.max()) < 1e-5
    assert float(again.n_iterations.where(is_fitted).max()) <= 2
    np.testing.assert_array_equal(again.status > 0, is_fitted)
    fixed = fit_each(y=cube, p0=P0, fixed={"c": 0.5})
    refined = fit_each(y=cube, p0=fixed.popt, fixed={"c": 0.5})
    assert_same_fits(fixed.sel(param=["a", "b"]), refined.sel(param=["a", "b"]))


def test_a_value_fixed_outside_the_bounds_is_a_bad_start(cube: xr.DataArray) -> None:
    values = xr.where(cube.col < 30, 0.3, 0.7).drop_vars("site")
    ds = fit_each(y=cube, p0=P0, fixed={"c": values}, bounds={"c": (0.0, 0.5)})
    assert (ds.status.isel(col=slice(3, None)) == -5).all()
    assert ds.popt.isel(col=slice(3, None)).isnull().all()
    assert (ds.status.isel(col=0) == 1).all()


def test_p0_may_leave_out_a_parameter_that_a_map_fixes(
    cube: xr.DataArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = xr.full_like(cube[0], 0.5).drop_vars("t")
    expected = fit_each(y=cube, p0=P0, fixed={"c": values})
    monkeypatch.delattr(starts.LaneFitter, "_pooled_start")
    some = {name: P0[name] for name in "ab"}
    xr.testing.assert_identical(fit_each(y=cube, p0=some, fixed={"c": values}), expected)


def test_a_tied_parameter_has_the_error_of_its_function(cube: xr.DataArray) -> None:
    ds = fit_each(y=cube, p0=P0, ties={"c": lambda p: 0.2 * p["a"]}, covariance="full")
    np.testing.assert_allclose(ds.popt.sel(param="c"), 0.2 * ds.popt.sel(param="a"))
    np.testing.assert_allclose(ds.perr.sel(param="c"), 0.2 * ds.perr.sel(param="a"), rtol=1e-12)
    variances = np.diagonal(ds.pcov.values, axis1=-2, axis2=-1)
    np.testing.assert_allclose(np.sqrt(variances), ds.perr.values, rtol=1e-12)


def test_a_guess_replaces_the_start(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    def guess(t: Any, y: Any) -> dict[str, Any]:
        return {"a": jnp.nanmax(y) - jnp.nanmin(y), "c": jnp.nanmin(y)}

    assert_same_fits(fitted, fit_each(y=cube, p0={"b": 1.0}, guess=guess))
    with pytest.raises(ValueError, match="guess must return a dict by name, or 3 values"):
        fit_each(y=cube, guess=lambda t, y: [1.0, 2.0])
    with pytest.raises(ValueError, match=r"unknown parameter names in what guess returned: 'q'"):
        fit_each(y=cube, guess=lambda t, y: {"q": 1.0})
    with pytest.raises(ValueError, match=r"guess raised Tracer.* Write it with jax\.numpy"):
        fit_each(y=cube, guess=lambda t, y: {"a": np.nanmax(y)})


def test_without_start_values_the_pooled_start_is_used(
    cube: xr.DataArray, fitted: xr.Dataset
) -> None:
    far = 1000 * cube  # from which the default start, all ones, is far away
    ds = fit_each(y=far)
    scaled = fit_each(y=far, p0={"a": 2000.0, "b": 1.0, "c": 300.0})
    assert_same_fits(scaled, ds)
    assert_same_fits(fitted, fit_each(y=cube, p0={"a": 1.0, "b": 1e6, "c": 1.0}), 1e-4)


# --- points that are missing, weights


def test_x_with_columns_dates_and_several_arrays(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    table = np.stack([T, np.ones_like(T)], axis=1)
    by_columns = fit_each(
        lambda x, a, b, c: a * jnp.exp(-b * x[:, 0]) + c * x[:, 1], table, cube, P0, dims="t"
    )
    assert_same_fits(fitted, by_columns)
    named = fit_each(
        lambda x, a, b, c: a * jnp.exp(-b * x["t"]) + c * x["one"],
        {"t": "t", "one": xr.ones_like(cube.row).drop_vars("row")},
        cube,
        P0,
    )
    assert_same_fits(fitted, named)
    days = np.datetime64("1970-01-01", "ns") + (T * 86_400_000).round().astype("timedelta64[ms]")
    dated = fit_each(y=cube.assign_coords(t=days), p0=P0)
    assert_same_fits(fitted, dated, 1e-3)
    assert "days since 1970-01-01" in dated.attrs["dates"]


def test_sigma_of_each_point(cube: xr.DataArray) -> None:
    sigma = 0.05 + 0.02 * cube.col / 60 + 0 * cube.t
    sigma = sigma.drop_vars("site")
    weighted = fit_each(y=cube, p0=P0, sigma=sigma, absolute_sigma=True)
    lazy = fit_each(y=cube.chunk(t=30), p0=P0, sigma=sigma.chunk(col=2), absolute_sigma=True)
    assert_same_fits(weighted, lazy.compute())
    pixel = weighted.isel(row=2, col=4)
    one = AdaptiveHybridStreamingOptimizer().fit(
        decay,
        "t",
        cube.isel(row=2, col=4),
        P0,
        sigma=sigma.isel(col=4).values,
        absolute_sigma=True,
        nan_policy="omit",
        verbose=0,
    )
    np.testing.assert_allclose(pixel.popt, one.popt, rtol=1e-7)
    np.testing.assert_allclose(pixel.perr, one.perr, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero = fit_each(y=cube, p0=P0, sigma=sigma.where(sigma.col != 30, 0.0))
        missing = fit_each(y=cube, p0=P0, sigma=sigma.where(sigma.t > 1.0))
    assert (zero.status.isel(col=3) == -3).all()
    assert (zero.status.isel(col=4) == 1).all()
    np.testing.assert_array_equal(missing.n_points, (np.isfinite(cube) & (cube.t > 1.0)).sum("t"))


def test_hostile_pixels_do_not_disturb_each_other(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    y = cube.copy()
    y[:, 1, 0] = 3.0
    y[:, 1, 1] = np.inf
    y[0, 1, 2] = -np.inf
    y[:, 1, 3] *= 1e12
    y[:, 1, 4] *= 1e-12
    y[:, 1, 5] = 0.0
    y[:, 1, 6] = 1e300
    start = xr.full_like(y[0], 1.0).drop_vars("t")
    start[2, 0] = np.nan
    height = xr.full_like(y[0], 2.0).drop_vars("t")
    height[1, 3] = 2e12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds = fit_each(y=y, p0={"a": height, "b": start, "c": 0.3})
    assert ds.status[1, 1] == -1
    assert ds.status[2, 0] == -5
    assert np.isnan(ds.popt[2, 0]).all()
    assert ds.n_points[1, 2] == fitted.n_points[1, 2] - np.isfinite(cube[0, 1, 2])
    for col, factor in ((3, 1e12), (4, 1e-12)):
        np.testing.assert_allclose(ds.popt[1, col, 0], factor * fitted.popt[1, col, 0], rtol=1e-5)
    for col in (0, 5):  # a constant is fitted exactly
        assert ds.status[1, col] > 0
        assert ds.chi2[1, col] < 1e-20
    quiet = [0, 3, 4]
    assert_same_fits(fitted.isel(row=quiet), ds.isel(row=quiet))


# --- errors


def test_failed_pixels_raise_if_asked_for(cube: xr.DataArray) -> None:
    limited = HybridStreamingConfig(gauss_newton_max_iterations=1)
    far = {"a": 1.0, "b": 40.0, "c": 1.0}
    flagged = fit_each(y=cube, p0=far, config=limited)
    assert (flagged.status == 0).any()
    with pytest.raises(PixelFitError, match=r"of 35 fits failed \("):
        fit_each(y=cube, p0=far, config=limited, errors="raise")
    lazy = fit_each(y=cube.chunk(row=2), p0=far, config=limited, errors="raise")
    with pytest.raises(PixelFitError, match="in the tile that begins at"):
        lazy.compute()
    fit_each(y=cube.isel(row=0, col=[0, 1, 3]), p0=P0, errors="raise")  # no_data is no error
    with pytest.raises(NonFiniteDataError, match="points of the tile"):
        fit_each(y=cube, p0=P0, nan_policy="raise")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": "time"}, "dims has 'time', but y_data has the names of dimensions 't'"),
        ({"sigma": np.ones((60, 7))}, r"sigma has shape \(60, 7\), but the fits run along"),
        (
            {"sigma": da.ones((60, 5, 7)).map_blocks(abs, chunks=((np.nan,), 5, 7))},
            "sigma has unknown chunk sizes",
        ),
        ({"dims": []}, "dims is empty"),
        ({"dims": None}, "dims must be names of dimensions of y_data"),
        ({"dims": ["t", "row", "col"]}, "so there is a single fit. Use fit"),
        ({"dims": ["t", "t"]}, "dims names a dimension twice"),
        ({"covariance": "all"}, "covariance must be one of 'errors', 'full', None; got 'all'"),
        ({"errors": "ignore"}, "errors must be one of 'flag', 'raise'; got 'ignore'"),
        ({"nan_policy": "skip"}, "nan_policy must be one of"),
        ({"min_points": 0}, "min_points must be a positive integer"),
        ({"p0": {"q": np.ones((5, 7))}}, "'q'"),
        ({"p0": {"a": np.ma.ones((5, 7))}}, r"p0\['a'\] is a masked array"),
        (
            {"p0": {"a": np.ones((4, 7))}},
            r"p0\['a'\] has shape \(4, 7\), but the map has the shape",
        ),
        ({"p0": {"a": xr.DataArray(T, dims="t")}}, "varies along 't', along which the fits run"),
        ({"fixed": {"a": np.ones((5, 7), bool)}}, "p0 does not say at which value"),
        ({"config": HybridStreamingConfig(n_starts=3)}, "fit_each does not use n_starts=3"),
        (
            {"config": HybridStreamingConfig(cg_max_iterations=3)},
            "does not use cg_max_iterations=3",
        ),
    ],
)
def test_invalid_arguments(cube: xr.DataArray, change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, DataError), match=message):
        fit_each(y=cube, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.astype(object), "y_data has dtype object"),
        (lambda y: y.rename(row="param"), "which the result uses for the parameters"),
        (lambda y: y.rename(site="status"), "'status', which the result has, too"),
        (lambda y: y.drop_vars("row").rename(row="chi2"), "'chi2', which the result has"),
    ],
)
def test_invalid_data(cube: xr.DataArray, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_each(y=change(cube), p0=P0)


def test_the_plan_of_a_map(cube: xr.DataArray) -> None:
    optimizer = AdaptiveHybridStreamingOptimizer()
    plan = optimizer.plan(decay, "t", cube.chunk(t=20), P0, dims="t")
    assert (plan.n_fits, plan.n_points, plan.n_tiles, plan.reads_per_chunk) == (35, 60, 1, 1)
    assert plan.bytes_read >= cube.nbytes
    ds = optimizer.fit_each(decay, "t", cube.drop_vars("site").chunk(t=20), P0, dims="t")
    assert len(dict(ds.__dask_graph__())) == plan.n_tasks
    assert "35, of 60 points each" in str(plan)
    assert "no problems" in plan._repr_html_() or "problem" in plan._repr_html_()
    with pytest.raises(TypeError, match="has no argument 'guess'"):
        optimizer.plan(decay, "t", cube, P0, guess=lambda t, y: y)
    with pytest.raises(TypeError, match="has no argument 'callback'"):
        optimizer.plan(decay, "t", cube, P0, dims="t", callback=print)


def test_workers_with_too_little_memory_are_refused_before_the_fits(cube: xr.DataArray) -> None:
    config = HybridStreamingConfig()
    problem = validate_map_arguments(config, decay, "t", cube.chunk(row=2), P0, dims="t")
    check_memory(problem, Workers(None, {"worker": 1}, 2**30, True))
    check_memory(problem, Workers(None, {}, None, True))  # not known yet
    with pytest.raises(DataError, match=r"^A worker needs .* of memory, but may use 240\.00 MiB"):
        check_memory(problem, Workers(None, {"worker": 1}, 300 * 2**20, True))
    with pytest.warns(DataWarning, match=r"^A worker needs .* of memory, but may use 480\.00 MiB"):
        check_memory(problem, Workers(None, {"worker": 1}, 600 * 2**20, True))


def test_a_cluster_is_asked_for_its_memory(
    cube: xr.DataArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(problem: Any, workers: Workers) -> None:
        assert workers.threads
        raise DataError("too little")

    monkeypatch.setattr(run, "check_memory", refuse)
    path = tmp_path / "map.zarr"
    with (
        Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"),
        pytest.raises(DataError, match="too little"),
    ):
        fit_each(y=cube.chunk(row=2).drop_vars("site"), p0=P0, store=path)


@pytest.mark.parametrize("is_named", [True, False])
def test_tiles_follow_from_the_chunks_of_y_alone(is_named: bool) -> None:
    y, sigma = (da.ones((60, 512, 512), chunks=c) for c in [(60, 128, 256), (10, 512, 100)])
    arguments: dict[str, Any] = {"dims": 0, "sigma": sigma}
    if is_named:
        y = xr.DataArray(y, dims=("t", "row", "col"))
        arguments = {"dims": "t", "sigma": xr.DataArray(sigma, dims=y.dims)}
    plan = AdaptiveHybridStreamingOptimizer().plan(decay, T, y, P0, **arguments)
    assert plan.grid == (4, 2)
    assert plan.realigned == ("sigma: 6 x 1 x 6 blocks become 1 x 4 x 2 blocks",)
