"""What is made of a map: predictions, counts by status, plots and summaries."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from matplotlib import pyplot as plt

import nlsq_dask as nd
from nlsq_dask.maps.results.statuses import MEANINGS, format_share
from nlsq_dask.maps.tasks.tile_task import TileTask
from nlsq_dask.solvers.lanes.records import LaneStatus
from tests.test_accessor import _WITHOUT_PACKAGE

T = np.linspace(0.0, 5.0, 41)[:-1]  # days, in whole hours
DATES = np.datetime64("1970-01-01", "ns") + (24 * T).round().astype("m8[h]")
TRUTH = {"height": 2.0, "rate": 0.8, "background": 0.3}


def decay(t: Any, height: Any, rate: Any, background: Any) -> Any:
    return height * jnp.exp(-rate * t) + background


def decay_in_numpy(t: Any, ds: xr.Dataset) -> xr.DataArray:
    height, rate, background = (ds.popt.sel(param=name) for name in TRUTH)
    return (height * np.exp(-rate * t) + background).drop_vars("param")


DAYS = xr.DataArray(T, dims="time")


@pytest.fixture(scope="module")
def cube() -> xr.DataArray:
    """Decays at 4 x 3 positions in days since 1970, one without data, one with two points."""
    rng = np.random.default_rng(2)
    rate = rng.uniform(0.5, 1.5, (4, 3))
    y = 2.0 * np.exp(-rate * T[:, None, None]) + 0.3 + rng.normal(0.0, 0.01, (40, 4, 3))
    y[:, 0, 1] = np.nan
    y[2:, 3, 2] = np.nan
    coords = {
        "time": DATES,
        "lat": ("lat", [10.0, 11.0, 13.0, 17.0], {"units": "degrees_north"}),
        "site": ("lon", np.array(list("abc"), object)),
    }
    dims = ("time", "lat", "lon")
    return xr.DataArray(y, coords, dims, name="signal", attrs={"units": "V"})


@pytest.fixture(scope="module")
def lazy(cube: xr.DataArray) -> xr.Dataset:
    """The fits, in two tiles."""
    small = cube.chunk(lat=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_PIXELS", 1)
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_POINTS", 1)
        return small.nlsq.fit_each(decay, "time", TRUTH, dims="time")


@pytest.fixture(scope="module")
def fits(lazy: xr.Dataset) -> xr.Dataset:
    return lazy.compute()


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


def made(popt: dict[str, Any], dims: tuple[str, ...], fitted: str, **attrs: Any) -> xr.Dataset:
    """Return a map that no fit has computed."""
    arrays = np.stack(np.broadcast_arrays(*popt.values()), axis=-1)
    variables = {
        "popt": ((*dims, "param"), arrays),
        "status": (dims, np.ones(arrays.shape[:-1], np.int8)),
    }
    return xr.Dataset(variables, {"param": list(popt)}, {"fitted_dims": fitted, **attrs})


# Predictions


def test_the_values_of_the_model(cube: xr.DataArray, fits: xr.Dataset, tmp_path: Path) -> None:
    expected = decay_in_numpy(DAYS, fits)
    values = nd.predict_each(decay, fits, cube.time)
    assert values.dims == ("time", "lat", "lon")
    assert set(values.coords) == {"time", "lat", "site"}
    assert (values.name, values.attrs["units"], values.dtype) == ("signal", "V", np.float64)
    np.testing.assert_allclose(values, expected.transpose(*values.dims), rtol=1e-13)
    assert values.isnull().sum() == 80  # of the pixels that were not fitted
    residuals = (cube - values).sel(lat=11.0)
    assert residuals.dims == cube.sel(lat=11.0).dims
    assert np.abs(residuals).max() < 0.05
    stored = zarr.array(T, store=str(tmp_path / "t.zarr"), chunks=15)
    for x in (
        T,
        list(T),
        pd.Series(T),
        DATES,
        pd.DatetimeIndex(DATES),
        list(DATES.astype("M8[s]").astype(object)),
    ):
        np.testing.assert_array_equal(nd.predict_each(decay, fits, x), values)
    xr.testing.assert_identical(fits.nlsq.predict_each(decay, cube.time), values)
    lazy = da.from_array(T, 15)
    for x in (lazy, stored, xr.DataArray(lazy, dims="time"), da.from_array(DATES, 15)):
        other = nd.predict_each(decay, fits, x)
        assert other.chunksizes["time"] == (15, 15, 10)
        np.testing.assert_array_equal(other, values)


def test_other_points_and_parts_of_a_map(cube: xr.DataArray, fits: xr.Dataset) -> None:
    later = xr.DataArray([6.0, 7.0, 8.0], dims="later", name="hours")
    values = nd.predict_each(decay, fits.isel(lat=[2, 0]), later)
    assert values.dims == ("later", "lat", "lon")
    expected = decay_in_numpy(later, fits.isel(lat=[2, 0])).transpose(*values.dims)
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    row, pixel = fits.isel(lat=2), fits.isel(lat=2, lon=0)
    np.testing.assert_allclose(nd.predict_each(decay, row, 0.5), decay_in_numpy(0.5, row))
    np.testing.assert_allclose(nd.predict_each(decay, fits, 0.5), decay_in_numpy(0.5, fits))
    single = nd.predict_each(decay, pixel, T)
    np.testing.assert_allclose(single, decay_in_numpy(DAYS, pixel))
    assert (single.dims, nd.predict_each(decay, pixel, 0.5).shape) == (("time",), ())
    assert float(single.lat) == 13.0
    swapped = fits.isel(param=[2, 0, 1]).transpose("param", "lon", "lat")
    values = nd.predict_each(decay, swapped, cube.time)
    np.testing.assert_array_equal(
        values.transpose("time", "lat", "lon"), nd.predict_each(decay, fits, T)
    )
    stacked = nd.predict_each(decay, fits.stack(pixel=("lat", "lon")), cube.time)
    np.testing.assert_array_equal(
        stacked.unstack().transpose("time", "lat", "lon"), nd.predict_each(decay, fits, T)
    )


def line(x: Any, a: Any, kind: str = "straight", b: float = 0.0, power: float = 2.0) -> Any:
    u, v = (x["u"], x["v"]) if isinstance(x, dict) else x
    return a * u + b * v if kind == "straight" else a * u * v**power


def test_several_x_that_vary_over_the_map() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(5, 1)), rng.normal(size=(1, 7))
    ds = made({"a": a, "b": b}, ("row", "col"), "t")
    u = xr.DataArray(rng.normal(size=(7, 3)), dims=("col", "t"))
    v = xr.DataArray(rng.normal(size=5), dims="row")
    expected = (ds.popt.isel(param=0) * u + ds.popt.isel(param=1) * v).transpose("t", "row", "col")
    for x in ((u, v), {"v": v, "u": u}, {"u": u.chunk(t=1), "v": v}):
        values = nd.predict_each(line, ds, x)
        assert values.dims == ("t", "row", "col")
        np.testing.assert_allclose(values, expected, rtol=1e-13)
    assert values.chunksizes["t"] == (1, 1, 1)


def test_columns_of_x_and_arrays_without_names() -> None:
    def plane(x: Any, a: Any, b: Any) -> Any:
        return a * x[:, 0] + b * x[:, 1]

    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 1)), rng.normal(size=(1, 4))
    x = rng.normal(size=(6, 2))
    expected = a * x[:, 0, None, None] + b * x[:, 1, None, None]
    ds = made({"a": a, "b": b}, ("row", "col"), "t")
    for given in (x, xr.DataArray(x.T, dims=("which", "t"))):
        np.testing.assert_allclose(nd.predict_each(plane, ds, given), expected, rtol=1e-13)
    # The dimensions of plain arrays have the order of y, here with the points in the middle.
    plain = made({"a": a, "b": b}, ("dim_0", "dim_2"), "dim_1")
    for given in ((x[:, 0], x[:, 1]), (x[None, :, 0, None], np.tile(x[:, 1, None], (2, 1, 4)))):
        values = nd.predict_each(line, plain, given)
        assert values.dims == ("dim_0", "dim_1", "dim_2")
        np.testing.assert_allclose(values, expected.transpose(1, 0, 2), rtol=1e-13)
    grid = made({"a": a, "b": b}, ("row", "col"), "p q")
    p, q = np.ones((3, 2)), np.arange(6.0).reshape(3, 2)
    assert nd.predict_each(line, grid, (p, q)).dims == ("p", "q", "row", "col")


def test_many_points_of_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(size=(9, 11))
    ds = made({"a": a.astype(np.float32)}, ("row", "col"), "t")
    x = np.linspace(0, 1, 23)
    monkeypatch.setattr("nlsq_dask.maps.results.predict._CALL_POINTS", 10)
    monkeypatch.setattr("nlsq_dask.maps.results.predict._CALL_VALUES", 70)
    values = nd.predict_each(lambda x, a: jnp.where(x > 0.5, a, 1.0), ds, x)
    expected = np.where(x[:, None, None] > 0.5, a.astype(np.float32), np.float32(1.0))
    np.testing.assert_array_equal(values, expected)
    assert values.dtype == np.float32
    ds.popt[2, 3] = np.nan  # also where the model is finite
    masked = np.ma.masked_less(x, 0.2)
    values = nd.predict_each(lambda x, a: jnp.where(x > 0.5, a, 1.0), ds, masked)
    assert values[:, 2, 3].isnull().all()
    np.testing.assert_array_equal(values[:, 0, 0].isnull(), x < 0.2)


def test_large_results_are_lazy() -> None:
    popt = xr.DataArray(da.ones((2000, 2000, 1)), dims=("row", "col", "param"))
    ds = made({"a": np.ones((4, 4))}, ("row", "col"), "t")
    lazy = xr.Dataset({"popt": popt, "status": ds.status[0, 0]}, {"param": ["a"]}, ds.attrs)

    def largest(values: xr.DataArray) -> int:
        return int(np.prod(list(map(max, values.chunks)))) * 8

    model, x = lambda x, a: a * x, np.arange(3000.0)
    values = nd.predict_each(model, lazy, x)
    assert largest(values) <= 2**27
    assert largest(nd.predict_each(model, lazy, da.from_array(x, 3000))) <= 2**27
    assert nd.predict_each(model, ds, np.arange(2.0**17)).chunks is None
    many = np.arange(2.0**20 + 1)
    values = nd.predict_each(model, ds, many)
    many[:] = 7.0  # what was asked for does not change any more
    assert largest(values) <= 2**27
    assert values[:2, 0, 0].compute().values.tolist() == [0.0, 1.0]


def test_lazy_maps_are_fitted_once(
    cube: xr.DataArray, lazy: xr.Dataset, fits: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = TileTask.__call__

    def counted(self: TileTask, *args: Any) -> Any:
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(TileTask, "__call__", counted)
    values = nd.predict_each(decay, lazy, cube.time)
    assert values.chunksizes["lat"] == (2, 2)
    _, residuals = dask.compute(lazy, cube.chunk(lat=2) - values)
    assert len(calls) == 2
    expected = cube - nd.predict_each(decay, fits, cube.time)
    np.testing.assert_array_equal(residuals, expected)


def test_a_scheduler_needs_neither_the_package_nor_jax(lazy: xr.Dataset) -> None:
    graph = dict(nd.predict_each(decay, lazy, DATES).__dask_graph__())
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PACKAGE],
        input=cloudpickle.dumps(graph),
        capture_output=True,
        check=False,
    )
    assert result.stdout.decode().strip() == str(len(graph)), result.stderr.decode()


def test_maps_from_files(cube: xr.DataArray, fits: xr.Dataset, tmp_path: Path) -> None:
    expected = nd.predict_each(decay, fits, cube.time)
    table = nd.status_table(fits)
    fits.to_zarr(tmp_path / "fits.zarr", consolidated=False)
    fits.to_netcdf(tmp_path / "fits.nc", engine="scipy")
    for options in ({}, {"chunks": None}):
        with xr.open_zarr(tmp_path / "fits.zarr", consolidated=False, **options) as stored:
            values = nd.predict_each(decay, stored, cube.time)
            assert dask.is_dask_collection(values)
            np.testing.assert_array_equal(values, expected)
            pd.testing.assert_frame_equal(nd.status_table(stored), table)
            assert "not in memory" in repr(stored.nlsq)
    with xr.open_dataset(tmp_path / "fits.nc", engine="scipy") as stored:
        np.testing.assert_array_equal(nd.predict_each(decay, stored.load(), T), expected)
        pd.testing.assert_frame_equal(nd.status_table(stored), table)


def test_other_dates_than_in_the_fit(cube: xr.DataArray, fits: xr.Dataset) -> None:
    assert "days since 1970-01-01" in fits.dates
    with pytest.raises(nd.DataError, match=r"fitted with: x_data \(time\) holds dates"):
        nd.predict_each(decay, fits, np.array([1, 2], "m8[D]"))
    plain = fits.copy()
    del plain.attrs["dates"]
    with pytest.raises(nd.DataError, match=r"holds dates, .* fitted with: numbers"):
        nd.predict_each(decay, plain, cube.time)
    # Without attributes, nothing is known about the fit.
    values = nd.predict_each(decay, fits.drop_attrs(), cube.time)
    np.testing.assert_array_equal(values, nd.predict_each(decay, fits, T))


def test_curvefit_and_names_of_parameters(cube: xr.DataArray, fits: xr.Dataset) -> None:
    renamed = {
        "popt": "curvefit_coefficients",
        "perr": "curvefit_stderr",
        "status": "curvefit_status",
    }
    both = fits.rename(renamed)[[*renamed.values()]].drop_attrs(deep=False)
    expected = nd.predict_each(decay, fits, cube.time)
    np.testing.assert_array_equal(nd.predict_each(decay, both, DAYS), expected)
    with pytest.raises(nd.DataError, match=r"curvefit passes dates as"):
        nd.predict_each(decay, both, cube.time)
    assert nd.status_table(both).pixels.tolist() == [10, 1, 1]
    several = xr.merge([both.rename({each: f"{n}_{each}" for each in both}) for n in "ab"])
    with pytest.raises(ValueError, match=r"several variables: 'a_curvefit_.*startswith\('a_'\)"):
        nd.status_table(several)
    pd.testing.assert_frame_equal(nd.status_table(several.b_curvefit_status), nd.status_table(both))

    renamed = fits.assign_coords(param=["a", "b", "c"])
    values = nd.predict_each(decay, renamed, T, param_names=["a", "b", "c"])
    np.testing.assert_array_equal(values, expected)
    values = nd.predict_each(lambda t, *p: decay(t, *p), renamed, T)
    np.testing.assert_array_equal(values, expected)

    def longer(t: Any, height: Any, rate: Any, background: Any, more: float = 1.0) -> Any:
        return more + decay(t, height, rate, background)

    np.testing.assert_allclose(nd.predict_each(longer, fits, T), expected + 1)
    for model, ds, names in (
        (decay, renamed, None),
        (decay, fits.isel(param=[0, 1]), None),
        (lambda t, height, rate: height * rate * t, fits, None),
        (decay, renamed, ["a", "b"]),
    ):
        with pytest.raises(ValueError, match=r"the parameters '.*', but those of the fit are '"):
            nd.predict_each(model, ds, T, param_names=names)


def test_x_that_does_not_match(cube: xr.DataArray, fits: xr.Dataset) -> None:
    wrong = {
        r"x_data is the name 'time'.*cube\['time'\]": "time",
        r"labels of ds.popt along 'lat' differ from the labels of x_data": cube.lat.assign_coords(
            lat=cube.lat + 1
        ),
        r"ds.popt has size 3 along 'lon', but x_data has 2": xr.DataArray([1, 2], dims="lon"),
        r"x_data has shape \(2, 3, 4\), but the points of the fits have": np.ones((2, 3, 4)),
        r"x_data\[1\] has columns and varies over the map": (
            T,
            xr.DataArray(np.ones((40, 4, 2)), dims=("time", "lat", "k")),
        ),
        r"x_data is an empty tuple": (),
        r"nothing to predict: x_data or the map is empty \(time: 0": T[:0],
        r"x_data must be an array; got": Path("t.npy"),
        r"x_data has dtype complex128": T * 1j,
    }
    for match, x in wrong.items():
        with pytest.raises(nd.DataError, match=match):
            nd.predict_each(decay, fits, x)
    with pytest.raises(nd.DataError, match=r"dimension 'lat', but the map is .* lat = 13\.0"):
        nd.predict_each(decay, fits.isel(lat=2), cube.lat)
    with pytest.raises(nd.DataError, match="no 'fitted_dims'"):
        nd.predict_each(decay, fits.drop_attrs(), T)
    with pytest.raises(TypeError, match="ds must be the Dataset"):
        nd.predict_each(decay, fits.popt, T)
    with pytest.raises(ValueError, match=r"no variable 'popt'.*Its variables are 'signal'"):
        nd.predict_each(decay, cube.to_dataset(), T)
    with pytest.raises(ValueError, match="needs 'param'"):
        nd.predict_each(decay, fits.sel(param="rate"), T)
    with pytest.raises(nd.ModelError, match="numpy"):
        nd.predict_each(lambda t, height, rate, background: np.exp(t * rate), fits, T)


# Counts by status


def test_status_table(fits: xr.Dataset, lazy: xr.Dataset) -> None:
    table = nd.status_table(fits)
    assert table.index.tolist() == ["converged", "no_data", "too_few_points"]
    assert table.status.tolist() == [1, -1, -2]
    assert table.pixels.tolist() == [10, 1, 1]
    np.testing.assert_allclose(table["share"], [10 / 12, 1 / 12, 1 / 12])
    assert table.meaning.tolist() == [MEANINGS[flag] for flag in table.index]
    for other in (fits.chunk(lat=3), fits.status, fits.nlsq):
        other = other.status_table() if other is fits.nlsq else nd.status_table(other)
        pd.testing.assert_frame_equal(other, table)
    solved = nd.status_table(fits.where(fits.status > 0))
    assert solved.pixels.tolist() == [10]


def test_a_small_share_is_not_shown_as_none() -> None:
    assert [format_share(share) for share in (0.0, 1e-5, 1e-3, 1.0)] == [
        "0.0%",
        "<0.1%",
        "0.1%",
        "100.0%",
    ]


def test_parameters_are_named_for_programs_that_read_no_strings(fits: xr.Dataset) -> None:
    for variable in (fits.popt, fits.perr):
        assert variable.attrs["parameters"].split() == fits.param.values.tolist()


def test_statuses_of_other_versions(fits: xr.Dataset) -> None:
    attrs = {"flag_values": [1, -1, -2, -7], "flag_meanings": "converged no_data rare not_fitted"}
    status = fits.status.where(fits.status != 1, -7).assign_attrs(attrs)
    table = nd.status_table(status)
    assert table.loc["not_fitted", "meaning"] == "not fitted yet"
    assert table.loc["rare"].tolist() == [-2, 1, 1 / 12, ""]
    assert nd.status_table(fits.status.drop_attrs()).index[0] == "converged"
    assert len(nd.status_table(fits.status[:0])) == 0
    with pytest.raises(ValueError, match="the status of 12 pixels is none of 1, -1, -2, -7"):
        nd.status_table(status + 100)


def test_each_status_has_a_meaning_also_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "howto_maps.md").read_text()
    rows = re.findall(r"^\| (-?\d+) \| `(\w+)` \| .+? \|", page, flags=re.MULTILINE)
    flags = {int(status): status.name.lower() for status in LaneStatus}
    assert {int(number): flag for number, flag in rows} == flags
    assert MEANINGS.keys() == set(flags.values())
    assert max(map(len, MEANINGS.values())) <= 30  # a table in a terminal shows them as a whole


# Plots


def texts(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_plot_of_a_map(fits: xr.Dataset, lazy: xr.Dataset) -> None:
    wild = fits.copy(deep=True)
    wild.status[0, 0], wild.popt[0, 0], wild.perr[1, 1] = -4, 1e6, np.inf
    wild.popt.attrs["units"] = "1/s"
    for ds in (wild, wild.chunk(lat=3), wild.expand_dims(level=[500])):
        figure = nd.plot_map(ds, "rate")
        value, error, status, *bars = figure.axes
        assert [axes.get_title() for axes in (value, error, status)] == [
            "rate (1/s)",
            "standard error of rate",
            "status",
        ]
        assert (value.get_xlabel(), value.get_ylabel()) == ("lon", "lat [degrees_north]")
        solved = wild.popt.sel(param="rate").where(wild.status > 0)
        drawn = value.collections[0]
        np.testing.assert_array_equal(drawn.get_array().filled(np.nan), solved)
        low, high = np.nanpercentile(solved, [2, 98])
        np.testing.assert_allclose(drawn.get_clim(), (low, high))
        errors = wild.perr.sel(param="rate").where((wild.status > 0) & (wild.perr[..., 1] < np.inf))
        np.testing.assert_array_equal(error.collections[0].get_array().filled(np.nan), errors)
        # Cells reach to the middle between coordinates.
        edges = drawn.get_coordinates()[:, 0, 1]
        np.testing.assert_allclose(edges, [9.5, 10.5, 12.0, 15.0, 19.0])
        codes = status.collections[0].get_array()
        np.testing.assert_array_equal(codes[0], [3, 1, 0])
        assert texts(bars[-1]) == [
            "converged (75.0%)",
            "no_data (8.3%)",
            "too_few_points (8.3%)",
            "stalled (8.3%)",
        ]
        plt.close(figure)
    colors = codes_colors(nd.plot_map(fits, "height"))
    assert colors[:2] == codes_colors(nd.plot_map(wild, "height"))[:2]


def codes_colors(figure: Any) -> list[Any]:
    return [*map(tuple, figure.axes[2].collections[0].get_cmap().colors)]


def test_plot_of_other_variables_and_into_a_figure(fits: xr.Dataset) -> None:
    given = plt.figure()
    upper, lower = given.subfigures(2, 1)
    assert fits.nlsq.plot_map("reduced_chi2", figure=upper) is upper
    assert [axes.get_title() for axes in upper.axes[:2]] == ["reduced_chi2", "status"]
    without = fits.drop_vars(["perr", "lat"]).isel(lat=[3, 1])
    nd.plot_map(without, "rate", figure=lower)
    assert lower.axes[0].get_ylabel() == "lat"
    given.canvas.draw()


def test_plot_of_a_line(fits: xr.Dataset) -> None:
    figure = nd.plot_map(fits.isel(lon=1), "rate")
    upper, lower, bar = figure.axes
    (curve,), (band,) = upper.lines, upper.collections
    part = fits.isel(lon=1).sel(param="rate")
    np.testing.assert_array_equal(curve.get_xdata(), fits.lat)
    np.testing.assert_array_equal(curve.get_ydata(), part.popt)
    assert np.isnan(curve.get_ydata()[0])
    outline = np.concatenate([path.vertices for path in band.get_paths()])
    assert np.isclose(outline[:, 1].max(), (part.popt + part.perr).max())
    assert lower.get_xlabel() == "lat [degrees_north]"
    np.testing.assert_array_equal(lower.collections[0].get_array()[0], [1, 0, 0, 0])
    assert texts(bar) == ["converged (75.0%)", "no_data (25.0%)"]
    # Neither texts nor pixels in any order have a place on an axis: their positions do.
    for ds in (fits.isel(lat=0), fits.stack(pixel=("lat", "lon")), fits.isel(lat=[2, 0, 3], lon=0)):
        axes = nd.plot_map(ds, "rate").axes[0]
        n = ds.sizes[ds.status.dims[0]]
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), np.arange(n))
    dated = fits.isel(lon=0).assign_coords(lat=pd.date_range("2020", periods=4))
    nd.plot_map(dated, "rate").canvas.draw()


def test_plot_of_a_large_map(fits: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlsq_dask.maps.results.plotting._MAX_PIXELS", 4)
    figure = nd.plot_map(fits.chunk(lat=2), "rate")
    drawn = figure.axes[0].collections[0].get_array()
    np.testing.assert_array_equal(drawn.filled(np.nan), fits.popt.sel(param="rate")[::2, ::2])
    assert figure.get_supxlabel() == "every k-th pixel, k = 2"


def test_what_cannot_be_plotted(fits: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = xr.concat([fits, fits], "level")
    with pytest.raises(ValueError, match=r"has 3 \(level: 2, .*ds\.isel\(level=0\)"):
        nd.plot_map(deep, "rate")
    with pytest.raises(ValueError, match="Print its values"):
        nd.plot_map(fits.isel(lat=0, lon=0), "rate")
    with pytest.raises(ValueError, match="has no pixels"):
        nd.plot_map(fits.isel(lat=slice(0)), "rate")
    with pytest.raises(ValueError, match=r"no parameter 'x'.*'height', 'rate'.*'reduced_chi2'"):
        nd.plot_map(fits, "x")
    none = fits.assign(status=fits.status * 0 - 1)
    nd.plot_map(none.assign(status=none.status.assign_attrs(fits.status.attrs)), "rate")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"nlsq-dask\[plot\]"):
        nd.plot_map(fits, "rate")


# Summaries


def test_summary(cube: xr.DataArray, fits: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    text = repr(fits.nlsq)
    rate = fits.popt.sel(param="rate")
    low, middle, high = (float(rate.quantile(q)) for q in (0.25, 0.5, 0.75))
    relative = float((fits.perr.sel(param="rate") / rate).median())
    for part in (
        r"Model +decay",
        r"Map +4 lat x 3 lon",
        r"converged +10 +83.3%",
        rf"rate +{middle:.4g} +{low:.4g} to {high:.4g} +{relative:.2%}",
    ):
        assert re.search(part, text), part
    page = fits.nlsq._repr_html_()
    assert "10 of 12 pixels have the status 1 or 2" in page
    assert f"<td style='text-align:right;padding:0.15em 0.9em 0.15em 0.2em'>{middle:.4g}" in page
    assert MEANINGS["too_few_points"].replace("`", "`") in page
    for lazy in (fits.chunk(), fits.assign(perr=fits.perr.chunk())):
        with dask.config.set(scheduler="none"):  # nothing is computed
            assert "not in memory" in repr(lazy.nlsq)
            assert "not in memory" in lazy.nlsq._repr_html_()
    few = fits.drop_vars("perr").isel(lat=0, lon=1)
    assert re.search(r"rate\nbackground", repr(few.nlsq))
    monkeypatch.setattr("nlsq_dask.maps.results.summary._MAX_PIXELS", 4)
    assert "k = 2" in repr(fits.nlsq)
    other = cube.rename("<b>").to_dataset()
    assert repr(other.nlsq).startswith("Accessor of a Dataset with '<b>'")
    assert "<b>" not in other.nlsq._repr_html_()
