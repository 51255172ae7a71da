"""Dates become days since 1970-01-01, to the last digit, in any calendar; predict knows it."""

from __future__ import annotations

from fractions import Fraction

import cftime
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.optimize import OptimizeWarning

import nlsq_dask as nd
from nlsq_dask.data.alignment import align
from tests.problems import NO_WARMUP
from tests.test_input_kinds import (
    CHUNKS,
    DATES,
    START,
    TICKS,
    N,
    X,
    Y,
    calendar,
    fit,
    model,
    on_xarray,
)


def test_units_of_dates_are_kept() -> None:
    assert fit(x=X).x_units == {}
    assert fit(x=DATES).x_units == {"x_data": "days since 1970-01-01"}
    assert align({"time": DATES, "u": X}, Y).x_units == {"x_data['time']": "days since 1970-01-01"}
    assert align((X, DATES - DATES[0]), Y).x_units == {"x_data[1]": "days"}
    found = align("time", on_xarray(calendar("noleap"))).x_units
    assert found == {"x_data": "days since 1970-01-01, calendar noleap"}


def test_predictions_at_dates() -> None:
    result = fit(x=DATES)
    by_hand = fit(x=X)
    grid = np.datetime64("2000-01-01", "D") + np.arange(5)
    numbers = START + np.arange(5.0)
    np.testing.assert_allclose(result.predict(grid), by_hand.predict(numbers), rtol=1e-10)
    np.testing.assert_array_equal(result.predict(numbers), result.predict(grid))
    np.testing.assert_array_equal(result.predict(pd.DatetimeIndex(grid)), result.predict(grid))
    lazy = result.predict(da.from_array(grid, chunks=2))
    assert lazy.chunks == ((2, 2, 1),)
    np.testing.assert_array_equal(lazy, result.predict(grid))
    labelled = result.predict(xr.DataArray(grid.astype("M8[ns]"), dims="t"))
    np.testing.assert_array_equal(labelled, result.predict(grid))
    value, error = result.predict(
        np.where([1, 0, 1, 1, 1], grid, np.datetime64("NaT", "D")), return_std=True
    )
    assert list(np.isnan(value)) == list(np.isnan(error)) == [False, True, False, False, False]
    masked = result.predict(np.ma.masked_array(grid, [0, 1, 0, 0, 0]))
    np.testing.assert_array_equal(np.isnan(masked), np.isnan(value))
    with pytest.raises(nd.DataError, match="plain numbers"):
        by_hand.predict(grid)
    with pytest.raises(nd.DataError, match=r"calendar noleap.*'days since 1970-01-01'"):
        result.predict(calendar("noleap"))


def test_a_fit_in_a_calendar_of_its_own() -> None:
    days = 30 * 365 + TICKS / 86_400e6  # without leap days, 2000-01-01 is 30 years of 365
    by_hand = fit(x=days, p0=[0.015, 0.7, 0.3])
    result = fit(x=calendar("noleap"), p0=[0.015, 0.7, 0.3])
    np.testing.assert_allclose(result.popt, by_hand.popt, rtol=1e-10)
    grid = calendar("noleap")[:50]
    np.testing.assert_allclose(result.predict(grid), by_hand.predict(days[:50]), rtol=1e-10)
    with pytest.raises(nd.DataError, match=r"'days since 1970-01-01', but .*calendar noleap"):
        result.predict(DATES)


@pytest.mark.parametrize("name", ["noleap", "360_day", "julian", "all_leap"])
def test_calendars(name: str) -> None:
    days = cftime.date2num(
        cftime.datetime(2000, 1, 1, calendar=name), "days since 1970-01-01", calendar=name
    )
    assert days != START or name == "julian"
    dates = calendar(name)
    (array,) = align(dates, Y).x
    np.testing.assert_allclose(array.compute(), days + TICKS / 86_400e6, rtol=1e-15)
    lazy = xr.DataArray(da.from_array(dates, chunks=CHUNKS), dims="row")
    lazy.encoding["calendar"] = name  # as xarray leaves it when it opens a file
    blocks = align(lazy, Y)
    assert blocks.x_units == {"x_data": f"days since 1970-01-01, calendar {name}"}
    np.testing.assert_array_equal(blocks.x[0].compute(), array.compute())


@pytest.mark.parametrize(
    "unit", ["Y", "M", "W", "D", "h", "m", "25s", "ms", "us", "ns", "ps", "fs"]
)
def test_days_at_full_precision(unit: str) -> None:
    largest = {"Y": 50, "ms": 2**62, "us": 2**62, "ns": 2**62, "ps": 2**53, "fs": 2**53}
    rng = np.random.default_rng(7)
    count = rng.choice([-1, 1], 50) * rng.integers(0, largest.get(unit, 10**6), 50)
    dates = count.astype(f"M8[{unit}]")
    (array,) = align(dates, np.ones(len(dates))).x
    if unit in ("Y", "M", "W"):
        exact = dates.astype("M8[D]").astype(np.int64).astype(float)
    else:
        powers = {"25s": 0, "ms": 3, "us": 6, "ns": 9, "ps": 12, "fs": 15}
        per_day = {"D": 1, "h": 24, "m": 1440}.get(unit) or 86_400 * 10 ** powers[unit]
        step = np.datetime_data(dates.dtype)[1]
        exact = np.array([float(Fraction(int(c) * step, per_day)) for c in count])
    np.testing.assert_array_equal(array.compute(), exact)


def test_dates_that_days_cannot_tell_apart() -> None:
    dates = np.datetime64("2020-01-01", "ns") + np.arange(N)
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    with pytest.warns(UserWarning, match=r"spans 3e-06 s.* to 3.1e-07 s.*\(t - t\[0\]\)") as caught:
        optimizer.plan(model, dates, Y)
    assert caught[0].filename == __file__


def test_dates_as_labels() -> None:
    for dates in (DATES.astype("M8[ns]"), calendar("standard")):
        y = xr.DataArray(Y, coords={"time": dates}, dims="time")
        blocks = align("time", y)
        np.testing.assert_allclose(blocks.x[0].compute(), X, rtol=1e-15)
        with pytest.raises(nd.DataError, match="labels of x_data along 'time'"):
            align(y.time.assign_coords(time=y.indexes["time"][::-1]), y)


def test_no_doubt_of_a_short_grid_in_predict() -> None:
    result = fit(x=DATES)
    assert result.predict(DATES[:1] + np.arange(3)).shape == (3,)


def test_a_fit_says_which_numbers_dates_become(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = np.arange(1000)
    time = np.datetime64("2025-03-01", "s") + 60 * seconds
    y = xr.DataArray(3 * np.exp(-seconds / 200), {"time": time})

    def decay(t, height, lifetime):  # type: ignore[no-untyped-def]
        return height * jnp.exp(-t / lifetime)

    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(**NO_WARMUP))
    with pytest.warns(OptimizeWarning, match="could not be estimated"):
        result = optimizer.fit(decay, "time", y, [1, 0.1])
    number = int((np.datetime64("2025-01-01") - np.datetime64("1970-01-01")).astype(int))
    note = (
        f"x_data (time) holds dates, which the model receives as days since 1970-01-01 "
        f"(2025-01-01 is {number:,})."
    )
    assert note in " ".join(capsys.readouterr().out.split())
    assert not result.success
    assert note in result.message
    assert "an origin near the data" in result.message
