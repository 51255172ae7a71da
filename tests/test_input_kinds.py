"""Every kind of array gives the parameters that NumPy arrays give."""

from __future__ import annotations

import datetime
import functools
import pickle
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import cftime
import dask
import dask.array as da
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from dask import delayed
from distributed import Client

import nlsq_dask as nd
from nlsq_dask.data.alignment import align
from nlsq_dask.data.sources.from_array import is_in_memory
from nlsq_dask.engine.source_graph import SourceGraph
from tests import problems
from tests.problems import NO_WARMUP, plane

N = 3_000
START = 10_957.0  # 2000-01-01, in days since 1970-01-01
RNG = np.random.default_rng(3)
TICKS = np.sort(RNG.integers(0, 4 * 86_400_000_000, N))  # microseconds since then
DATES = np.datetime64("2000-01-01", "us") + TICKS
X = START + TICKS / 86_400e6
SIGMA = RNG.uniform(0.01, 0.05, N)
Y = 2.0 * np.exp(-0.7 * (X - START)) + 0.3 + SIGMA * RNG.standard_normal(N)
BAD = np.arange(N) % 7 == 0
SECOND_BAD = np.c_[np.zeros(N, bool), BAD]  # of two features
CHUNKS = 700


def model(x: Any, a: Any, b: Any, c: Any) -> Any:
    t = x if x.ndim == 1 else x[:, 0]
    return a * jnp.exp(-b * (t - START)) + c


fit = functools.partial(problems.fit, model=model, y=Y, sigma=SIGMA, **NO_WARMUP)


def with_nan(array: np.ndarray) -> np.ndarray:
    return np.where(BAD, np.nan, array)


@pytest.fixture(scope="module")
def expected() -> dict[bool, nd.FitResult]:
    """By whether the bad rows are left out: what NumPy arrays give."""
    return {False: fit(x=X), True: fit(x=X, y=with_nan(Y), nan_policy="omit")}


def mapped(folder: Path, name: str, array: np.ndarray) -> np.ndarray:
    np.save(folder / f"{name}.npy", array)
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def in_hdf5(folder: Path, array: np.ndarray, chunks: Any = None) -> Any:
    path = folder / f"{len(list(folder.iterdir()))}.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("group/values", data=array, chunks=chunks)
    return h5py.File(path, "r")["group/values"]


def raw_memmap(folder: Path) -> Any:
    written = np.memmap(folder / "raw", np.float64, "w+", offset=24, shape=(N,))
    written[:] = X
    written.flush()
    return written  # still open for writing


def records(folder: Path) -> np.ndarray:
    table = np.zeros(N, [("flag", "i1"), ("x", "<f8"), ("y", ">f8")])
    table["x"], table["y"] = X, Y
    return mapped(folder, "records", table)


def on_xarray(x: Any, **options: Any) -> xr.DataArray:
    return xr.DataArray(Y, coords={"time": ("row", x)}, dims="row", **options)


def zarr_of(folder: Path, array: np.ndarray, name: str) -> Any:
    store = zarr.create_array(
        str(folder / name), shape=array.shape, chunks=(CHUNKS,), dtype=array.dtype, zarr_format=2
    )
    store[:] = array
    return store


def pair(folder: Path, function: Callable[..., Any], *options: Any) -> dict[str, Any]:
    return {"x": function(folder, X, *options), "y": function(folder, Y, *options)}


def backwards(folder: Path) -> dict[str, Any]:
    """Views at a distance from the start, with gaps, and from the end to the start."""
    spread = np.zeros((N + 5, 3))
    spread[5:, 1], spread[5:, 2] = X[::-1], Y[::-1]
    table = mapped(folder, "spread", spread)
    return {"x": table[5:][::-1, 1], "y": np.asarray(table)[:4:-1, 2]}


def calendar(name: str) -> np.ndarray:
    """Dates that are TICKS after 2000-01-01 in that calendar, in an object array."""
    unit = "microseconds since 2000-01-01"
    return cftime.num2date(TICKS, unit, calendar=name, only_use_cftime_datetimes=True)


# By kind: what to fit, as NumPy's X, Y and SIGMA with the rows BAD left out or not.
KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "Series": lambda _: {"x": pd.Series(X), "y": pd.Series(Y), "sigma": pd.Series(SIGMA)},
    "Series of Float64": lambda _: {"x": pd.Series(X, dtype="Float64"), "y": pd.array(Y)},
    "DataFrame": lambda _: {"x": pd.DataFrame({"t": X, "u": 1}), "y": pd.Series(Y)},
    "DataFrame of Float64": lambda _: {"x": pd.DataFrame({"t": X, "u": 1}).convert_dtypes()},
    "DatetimeIndex": lambda _: {"x": pd.DatetimeIndex(DATES)},
    "Series of dates": lambda _: {"x": pd.Series(DATES), "y": pd.Series(Y)},
    "Series in a time zone": lambda _: {
        "x": pd.Series(DATES).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    },
    "JAX": lambda _: dict(zip(("x", "y", "sigma"), map(in_jax, (X, Y, SIGMA)), strict=True)),
    "memmap": lambda folder: {"x": raw_memmap(folder)},
    "npy": lambda folder: {"x": mapped(folder, "x", X), "y": mapped(folder, "y", Y)},
    "npy of features": lambda folder: {"x": mapped(folder, "x", np.c_[X, X])},
    "npy in Fortran order": lambda folder: {
        "x": mapped(folder, "x", np.asfortranarray(np.c_[X, X]))
    },
    "views of npy": backwards,
    "fields of npy": lambda folder: {"x": records(folder)["x"], "y": records(folder)["y"]},
    "npy in Dask": lambda folder: {
        "x": da.from_array(mapped(folder, "x", X), chunks=CHUNKS),
        "y": da.from_array(mapped(folder, "y", Y), chunks=-1)[::-1][::-1],
    },
    "npy in xarray": lambda folder: {"x": "time", "y": on_xarray(mapped(folder, "x", X))},
    "npy of dates": lambda folder: {"x": mapped(folder, "x", DATES)},
    "HDF5": lambda folder: pair(folder, in_hdf5, (CHUNKS,)),
    "HDF5 in one piece": lambda folder: pair(folder, in_hdf5),
    "HDF5 of features": lambda folder: {"x": in_hdf5(folder, np.c_[X, X], (50, 1))},
    "HDF5 in Dask": lambda folder: {
        "x": da.from_array(in_hdf5(folder, X), chunks=CHUNKS),
        "y": da.from_array(in_hdf5(folder, Y, (500,)), chunks=-1),
    },
    "datetime64": lambda _: {"x": DATES},
    "datetime64 in Dask": lambda _: {"x": da.from_array(DATES, chunks=CHUNKS)},
    "datetime64 in Zarr": lambda folder: {"x": zarr_of(folder, DATES.astype("M8[ns]"), "t")},
    "datetime64 in xarray": lambda _: {"x": "time", "y": on_xarray(DATES.astype("M8[ns]"))},
    "datetime64 as features": lambda _: {"x": np.c_[DATES, DATES]},
    "datetime": lambda _: {"x": DATES.tolist()},
    "datetime in a time zone": lambda _: {
        "x": [d.replace(tzinfo=datetime.UTC).astimezone() for d in DATES.tolist()]
    },
    "timedelta64": lambda _: {"x": DATES - np.datetime64("1970-01-01")},
    "timedelta": lambda _: {"x": (DATES - np.datetime64("1970-01-01")).tolist()},
    "cftime": lambda _: {"x": calendar("standard")},
    "cftime in xarray": lambda _: {"x": "time", "y": on_xarray(calendar("standard"))},
}
OMITTING: dict[str, Callable[[Path], dict[str, Any]]] = {
    "masked x": lambda _: {"x": np.ma.masked_array(with_nan(X), BAD)},
    "masked sigma": lambda _: {"sigma": np.ma.masked_array(np.where(BAD, -1.0, SIGMA), BAD)},
    "masks combined": lambda _: {
        "x": np.ma.masked_array(X, BAD & (np.arange(N) % 2 == 0)),
        "y": np.ma.masked_array(Y, BAD & (np.arange(N) % 2 == 1)),
    },
    "masked features": lambda _: {"x": np.ma.masked_array(np.c_[X, X], SECOND_BAD)},
    "masked x in Dask": lambda _: {
        "x": da.from_array(np.ma.masked_array(np.c_[X, X], np.c_[BAD, BAD]), chunks=(CHUNKS, 1)),
        "y": da.from_array(Y, chunks=999),
    },
    "masked npy": lambda folder: {"x": np.ma.masked_array(mapped(folder, "x", X), BAD)},
    "masked dates": lambda _: {"x": np.ma.masked_array(DATES, BAD)},
    "masked cftime": lambda _: {"x": np.ma.masked_array(calendar("standard"), BAD)},
    "Float64 with NA": lambda _: {
        "x": pd.Series(X).convert_dtypes().mask(BAD),
        "options": {"nan_policy": "omit"},
    },
    "DataFrame with NA": lambda _: {
        "x": pd.DataFrame({"t": X, "u": pd.array(np.arange(N))}).mask(SECOND_BAD),
        "options": {"nan_policy": "omit"},
    },
    "NaT": lambda _: {
        "x": np.where(BAD, np.datetime64("NaT", "D"), DATES),
        "options": {"nan_policy": "omit"},
    },
    "datetime with None": lambda _: {
        "x": [None if bad else d for bad, d in zip(BAD, DATES.tolist(), strict=True)],
        "options": {"nan_policy": "omit"},
    },
    "cftime with None": lambda _: {
        "x": np.where(BAD, None, calendar("standard")),
        "options": {"nan_policy": "omit"},
    },
}


def in_jax(array: np.ndarray) -> jax.Array:
    with jax.enable_x64(True):
        return jnp.asarray(array)


def check(kind: str, folder: Path, expected: dict[bool, nd.FitResult]) -> None:
    given = (KINDS | OMITTING)[kind](folder)
    wanted = expected[kind in OMITTING]
    options = given.pop("options", {})
    result = fit(**({"x": X} | given), **options)
    assert (result.n_points, result.n_omitted) == (wanted.n_points, wanted.n_omitted)
    np.testing.assert_allclose(result.popt, wanted.popt, rtol=1e-10)
    np.testing.assert_allclose(result.perr, wanted.perr, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS | OMITTING)
def test_every_kind_of_array(kind: str, tmp_path: Path, expected: dict[bool, nd.FitResult]) -> None:
    check(kind, tmp_path, expected)


# What is sent in another way than NumPy arrays are.
ON_A_CLUSTER = (
    "memmap",
    "views of npy",
    "fields of npy",
    "npy of dates",
    "HDF5",
    "HDF5 in one piece",
    "HDF5 in Dask",
    "datetime64 in Dask",
    "datetime64 in Zarr",
    "cftime in xarray",
    "masked npy",
)


@pytest.mark.parametrize("kind", ON_A_CLUSTER)
def test_on_a_cluster_of_processes(
    kind: str, tmp_path: Path, process_client: Client, expected: dict[bool, nd.FitResult]
) -> None:
    with process_client.as_current():
        check(kind, tmp_path, expected)


# --- files


@pytest.mark.parametrize("kind", ["npy", "views of npy", "masked npy", "HDF5", "HDF5 in Dask"])
def test_a_file_is_sent_by_name(kind: str, tmp_path: Path) -> None:
    given = (KINDS | OMITTING)[kind](tmp_path)
    blocks = align(given["x"], given.get("y", given["x"]))
    source = SourceGraph(blocks)
    readers, shared = source.readers([list(np.ndindex(blocks.grid))])
    sent = len(pickle.dumps((readers, shared, source.large_literals)))
    assert sent < (X.nbytes // 2 if "masked" not in kind else X.nbytes)


def test_files_are_read_in_blocks_of_a_sensible_size(tmp_path: Path) -> None:
    n = 2**20
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float64, (n, 3))
    y = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float64, (n,))
    blocks = align(x, y)
    assert not blocks.in_memory
    assert set(blocks.y.chunks[0]) == {2**16}
    with h5py.File(tmp_path / "y.h5", "w") as file:
        stored = file.create_dataset("y", (5000, 100, 100), "f4", chunks=(1, 10, 50))
        blocks = align(0.0, stored)
        assert blocks.y.chunksize == (64, 100, 100)  # whole chunks, up to 4 MB
        piece = file.create_dataset("z", (5000, 100, 100), "f4")
        assert align(0.0, piece).y.chunksize == (16, 100, 100)


def test_what_a_copy_on_write_map_holds_is_not_in_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(N))
    x = np.load(tmp_path / "x.npy", mmap_mode="c")
    x[:] = X
    blocks = align(x, Y)
    assert blocks.in_memory
    np.testing.assert_array_equal(blocks.x[0].compute(), X)


def test_arrays_in_memory_are_not_copied() -> None:
    x, y, pairs = np.linspace(0, 1, 2**20), np.zeros(2**20), np.zeros((2**20, 2))
    tracemalloc.start()
    blocks = align((x, pairs[:, 0]), y, np.full((), 0.1))
    SourceGraph(blocks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 4
    x[2**19] = 7.0
    assert blocks.x[0][2**19].compute() == 7.0


def test_a_lazy_prediction_does_not_change_with_arrays_in_memory() -> None:
    result = problems.fit(plane, (X, np.ones(N)), Y, **NO_WARMUP)
    other = np.ones(N)
    lazy = result.predict((da.from_array(X, CHUNKS), other))
    other[:] = 2.0
    np.testing.assert_allclose(lazy, result.predict((X, np.ones(N))), rtol=1e-12)


def test_a_file_that_a_worker_does_not_find(tmp_path: Path, process_client: Client) -> None:
    x = mapped(tmp_path, "x", X)
    lazy = align(x, Y).x[0]
    (tmp_path / "x.npy").unlink()
    with process_client.as_current(), pytest.raises(OSError, match=r"x\.npy.*every worker"):
        lazy.compute()
    dataset = in_hdf5(tmp_path, X)
    Path(dataset.file.filename).unlink()
    with process_client.as_current(), pytest.raises(nd.DataError, match=r"\.h5.*every worker"):
        fit(x=dataset)


# --- SciPy's call


def test_rows_of_a_stored_table_are_variables(tmp_path: Path) -> None:
    table = np.stack([X - START, Y])
    z = 2 * table[0] - table[1]
    for xdata in (mapped(tmp_path, "t", table), in_hdf5(tmp_path, table)):
        popt, _ = nd.curve_fit(plane, xdata, z, config=nd.HybridStreamingConfig(**NO_WARMUP))
        np.testing.assert_allclose(popt, [2, -1], rtol=1e-10)
    with pytest.raises(nd.DataError, match=r"\(frame\['t'\], \.\.\.\)"):
        nd.curve_fit(plane, pd.DataFrame({"t": X, "u": X}), z)


# --- what is refused, and how

NOT_AGREEING = pd.Series(X, index=np.arange(N) + 1)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "indexes": ({"x": NOT_AGREEING, "y": pd.Series(Y)}, r"index of x_data .*of y_data.*\.loc"),
    "index of sigma": ({"x": X, "y": pd.Series(Y), "sigma": NOT_AGREEING}, "index of sigma"),
    "y in a DataFrame": ({"y": pd.DataFrame({"v": Y})}, r"columns v; pass one.*frame\['v'\]"),
    "columns that differ": (
        {"x": pd.DataFrame({"t": DATES, "u": X})},
        r"t: datetime64\[us\], u: float64.*dict",
    ),
    "categories": ({"x": pd.Series(["a", "b", "c"] * 1000, dtype="category")}, "dtype"),
    "dates as sigma": ({"sigma": DATES}, "sigma has dtype datetime64.*Only x may hold dates"),
    "dates as y": ({"y": DATES.tolist()}, "y_data has dtype object"),
    "objects in Dask": (
        {"x": da.from_array(calendar("noleap"), chunks=CHUNKS)},
        r"map_blocks\(cftime\.date2num",
    ),
    "months": ({"x": np.arange(N).astype("m8[M]")}, "no fixed length"),
    "dates and others": ({"x": [1.0, *DATES.tolist()[1:]]}, "float"),
    "calendars": (
        {"x": np.r_[calendar("noleap")[:9], calendar("julian")[9:]]},
        "calendar 'noleap'; got dates of julian",
    ),
}


MONTHS = pd.period_range("2020-01", periods=40, freq="M")
SECONDS = np.arange(40.0)
# Values that are no arrays of numbers, and the code that messages suggest to convert them.
CONVERTED: dict[str, tuple[str, Any, str]] = {
    "periods": ("x_data", MONTHS, "pandas.PeriodIndex(x_data).to_timestamp()"),
    "a series of periods": (
        "x_data",
        pd.Series(MONTHS),
        "pandas.PeriodIndex(x_data).to_timestamp()",
    ),
    "intervals": ("x_data", pd.interval_range(0, 40), "pandas.IntervalIndex(x_data).mid"),
    "objects": ("y_data", SECONDS.astype(object), "y_data.astype(float)"),
    "a list with None": ("sigma", [Decimal(1)] * 40, "np.array(sigma, dtype=float)"),
    "text": ("y_data", SECONDS.astype(str), "np.array(y_data, dtype=float)"),
    "text as objects": ("x_data", SECONDS.astype(str).astype(object), "x_data.astype(float)"),
    "lazy objects": (
        "y_data",
        da.from_array(SECONDS.astype(object), chunks=20),
        "y_data.astype(float)",
    ),
    "times": (
        "x_data",
        [datetime.time(0, 0, s) for s in range(40)],
        "[t.hour * 3600 + t.minute * 60 + t.second for t in x_data]",
    ),
    "dates as y": (
        "y_data",
        [datetime.date(2020, 1, 1 + i % 28) for i in range(40)],
        "(np.array(y_data, dtype='datetime64[us]') - np.datetime64('1970-01-01')) / "
        "np.timedelta64(1, 'D')",
    ),
    "a delayed array": (
        "y_data",
        delayed(SECONDS),
        "dask.array.from_delayed(y_data, shape=(n,), dtype=float)",
    ),
    "delayed arrays": (
        "y_data",
        [delayed(SECONDS)],
        "dask.array.concatenate([dask.array.from_delayed(part, shape=(n,), dtype=float) for part "
        "in y_data])",
    ),
    "a generator": ("y_data", (s for s in range(40)), "list(y_data)"),
    "fields": ("y_data", np.zeros(40, [("height", "f8")]), "y_data['height']"),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_advice_for_objects_can_be_followed(case: str) -> None:
    name, value, code = CONVERTED[case]
    arguments = {"x_data": SECONDS, "y_data": SECONDS} | {name: value}
    with pytest.raises(nd.DataError) as caught:
        align(**arguments)
    assert code in str(caught.value)
    names = {name: value, "np": np, "dask": dask, "pandas": pd, "n": 40}
    arguments[name] = eval(code, names)  # a constant of this file
    assert align(**arguments).n_rows == 40


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (Path("y.nc"), r"must be an array; got an? \w*Path\. Open the file first"),
        ([Path("y.nc")] * 40, r"first element: \w*Path\).* Open the file first"),
        ({1.0, 2.0}, "got a set. A set has no order"),
        (lambda: SECONDS, "got a function. The order of arguments"),
        (None, "is None; expected an array"),
        ([np.zeros(2), np.zeros(3)] * 20, "must have equal lengths"),
    ],
)
@pytest.mark.parametrize("name", ["x_data", "y_data"])
def test_values_that_are_no_arrays(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(nd.DataError, match=sentence):
        align(**({"x_data": SECONDS, "y_data": SECONDS} | {name: value}))


def test_predict_at_something_that_is_no_array() -> None:
    result = problems.fit(lambda x, a, b: a + b * x, SECONDS, SECONDS, **NO_WARMUP)
    with pytest.raises(nd.DataError, match="is a Dask Delayed object"):
        result.predict(delayed(SECONDS))


class DaskSeries:
    """As much of a ``dask.dataframe.Series`` as is looked at; Dask's needs pyarrow."""

    def to_dask_array(self) -> None: ...


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_sentence(case: str) -> None:
    given, sentence = WRONG[case]
    with pytest.raises(nd.DataError, match=f"(?s){sentence}"):
        fit(**({"x": X} | given))


def test_a_dask_dataframe_is_told_how_to_become_an_array() -> None:
    with pytest.raises(nd.DataError, match=r"to_dask_array\(lengths=True\)"):
        fit(x=DaskSeries())


def test_what_was_read_from_a_store_is_in_memory(tmp_path: Path) -> None:
    """Indexes are, as soon as the store is opened; so what is predicted at them is not lazy."""
    t, z = np.linspace(0, 1, 50), np.linspace(0, 2, 40)
    y = xr.DataArray(t[:, None] + 2 * z, {"t": t, "z": z}, name="y").chunk(t=10)
    y.to_zarr(tmp_path / "y.zarr", consolidated=False)
    data = xr.open_zarr(tmp_path / "y.zarr", consolidated=False).y
    result = problems.fit(plane, ("t", "z"), data, **NO_WARMUP)
    values = result.predict((data.t, data.z))
    assert isinstance(values.data, np.ndarray)
    np.testing.assert_allclose(values, data, rtol=1e-10)
    without_dask = xr.open_zarr(tmp_path / "y.zarr", consolidated=False, chunks=None).y
    assert not is_in_memory(without_dask)
    assert is_in_memory(without_dask.load())
