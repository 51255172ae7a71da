"""Conversion of dates to float64 days since 1970-01-01, and of durations to float64 days.

Dates of cftime are counted in their own calendar; missing dates (NaT, None) become NaN. The units
do not depend on the data, so each block can be converted alone, and predictions use the units of
the fit.
"""

from __future__ import annotations

import datetime
import sys
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.data.sources.from_array import as_numpy
from nlsq_dask.errors import DataError

_DURATION = "days"
_EPOCH = "days since 1970-01-01"
_CALENDAR = f"{_EPOCH}, calendar "

# Units of datetime64 and timedelta64 per day.
_UNITS_PER_DAY = {"D": 1, "h": 24, "m": 1440, "s": 86_400}
_UNITS_PER_DAY |= {
    f"{p}s": 86_400 * 1000**i for i, p in enumerate(("m", "u", "n", "p", "f", "a"), 1)
}
# cftime's names of calendars that have two names in CF.
_SYNONYMS = {"gregorian": "standard", "365_day": "noleap", "366_day": "all_leap"}

# Largest rounding in float64 without a notice, as a fraction of the span of the values.
MAX_ROUNDING = 1e-9


def convert_date_objects(value: Any, name: str, in_memory: bool) -> tuple[Any, str]:
    """Convert an array of date objects, and determine the units that its dates will have.

    Parameters
    ----------
    value : array or list
    name : str
        Name of the array in messages.
    in_memory : bool
        Whether the values are in memory and are converted here. Otherwise, ``to_days`` converts
        them block by block.

    Returns
    -------
    value : array
        Dates of Python as datetime64, dates of cftime as numbers; any other array unchanged.
    units : str
        Units of the numbers that ``to_days`` returns; "" if the array holds no dates.
    """
    if isinstance(value, list | tuple):
        value = as_numpy(value, name)
    units = ""
    if not hasattr(value, "dtype"):
        return value, units
    if value.dtype.kind == "O" and in_memory:
        value, units = _objects_in_memory(value, name)
    elif value.dtype.kind == "O":
        # Without reading values, only the encoding kept by xarray tells the calendar.
        calendar = getattr(value, "encoding", {}).get("calendar")
        units = f"{_CALENDAR}{_SYNONYMS.get(calendar, calendar)}" if calendar else ""
    if value.dtype.kind in "mM":
        units = _EPOCH if value.dtype.kind == "M" else _DURATION
        unit = np.datetime_data(value.dtype)[0]
        if unit not in _UNITS_PER_DAY and unit not in ("W" if units == _DURATION else "YMW"):
            raise DataError(
                f"{name} has dtype {value.dtype}, whose unit has no fixed length. Convert it to "
                f"days, such as with x.astype('timedelta64[D]')."
            )
    return value, units


def describe_units(units: str) -> str:
    """Return units such as "days since 1970-01-01" for a message.

    The text for days since 1970 includes an example, a date and its number of days, because such
    numbers are large.
    """
    return f"{units} (2025-01-01 is 20,089)" if units == _EPOCH else units


def rounding_notice(value: Any, name: str) -> str:
    """Return a warning if days since 1970 in float64 are too coarse for the dates, else "".

    Parameters
    ----------
    value : array of datetime64 or timedelta64, in memory
    name : str
        Name of the array in messages.
    """
    dates = np.asarray(value).ravel()
    dates = dates[~np.isnat(dates)]
    if not dates.size:
        return ""
    count, per_day = _integer_counts(np.array([dates.min(), dates.max()]))
    span = (int(count[1]) - int(count[0])) / per_day
    return span_notice(span, float(np.spacing(np.abs(_days(count, per_day)).max())), name)


def span_notice(span: float, rounding: float, name: str) -> str:
    """Return a warning if dates are rounded by too much of their span, else "".

    Parameters
    ----------
    span, rounding : float
        In days.
    name : str
        Name of the array in messages.
    """
    if not 0.0 < MAX_ROUNDING * span < rounding:
        return ""
    return (
        f"{name} spans {86_400 * span:.2g} s, but days since 1970-01-01 in float64 are rounded to "
        f"{86_400 * rounding:.2g} s. Measure time from its start: "
        f"(t - t[0]) / np.timedelta64(1, 's')."
    )


def to_days(array: da.Array, units: str, name: str) -> da.Array:
    """Convert dates to days, without computing them; return other arrays unchanged.

    Parameters
    ----------
    array : dask.array.Array
    units : str
        Units returned by ``convert_date_objects``.
    name : str
        Name of the array in messages.
    """
    if not units or array.dtype.kind not in "mMO":
        return array
    days: da.Array = da.map_blocks(
        _days_of_block,
        array,
        name,
        array.dtype,
        units.removeprefix(_CALENDAR),
        dtype=np.float64,
        meta=np.empty((0,) * array.ndim),
    )
    return days


def _days_of_block(
    block: NDArray[Any], name: str, declared: np.dtype[Any], calendar: str
) -> NDArray[np.float64]:
    """Return a block of dates as days; ``calendar`` is used if they are objects of cftime.

    A masked array stays one, because a mask that is not declared is refused when it is used.
    """
    dates, mask = np.ma.getdata(block), np.ma.getmask(block)
    if dates.dtype.kind != declared.kind:
        raise DataError(
            f"{name} has dtype {dates.dtype} in a block, but its Dask array declares {declared}. "
            f"Pass the actual dtype to map_blocks or from_delayed."
        )
    if dates.dtype.kind == "O":
        days = _days_of_cftime(np.where(mask, np.array(None), dates), calendar)
    else:
        days = _days_of_datetime64(dates)
    return days if mask is np.ma.nomask else np.ma.masked_array(days, mask)


def _days_of_datetime64(dates: NDArray[Any]) -> NDArray[np.float64]:
    count, per_day = _integer_counts(dates)
    return np.where(np.isnat(dates), np.nan, _days(count, per_day))


def _integer_counts(dates: NDArray[Any]) -> tuple[NDArray[np.int64], int]:
    """Return dates as counts of a time unit since 1970, and how many of these units make a day."""
    unit = np.datetime_data(dates.dtype)[0]
    unit = unit if unit in _UNITS_PER_DAY else "D"  # weeks, and years and months of the calendar
    count = dates.astype(f"{dates.dtype.kind}8[{unit}]")
    return count.view(np.int64), _UNITS_PER_DAY[unit]


def _days(count: NDArray[np.int64], per_day: int) -> NDArray[np.float64]:
    """Convert counts of a time unit to days, given how many of these units make a day.

    Whole days and the rest are converted separately and then added, because float64 cannot hold a
    count of up to 19 digits.
    """
    if per_day > np.iinfo(np.int64).max:  # int64 holds less than a day of fs or as
        return count / float(per_day)
    rest = np.fmod(count, per_day)  # has the sign of the count: no cancellation
    return (count - rest) // per_day + rest / per_day


def _days_of_cftime(dates: NDArray[Any], calendar: str) -> NDArray[np.float64]:
    import cftime  # installed if there are such dates

    flat = dates.ravel()
    days = np.full(flat.shape, np.nan)
    present = ~_is_missing(flat)
    calendars = {getattr(date, "calendar", type(date).__name__) for date in flat[present]}
    if calendars - {calendar}:
        raise DataError(
            f"All dates must be of the calendar {calendar!r}; got dates of "
            f"{', '.join(sorted(calendars - {calendar}))}. Convert them to one calendar."
        )
    if present.any():
        units = "microseconds since 1970-01-01"
        count = np.asarray(cftime.date2num(flat[present], units, calendar=calendar), np.int64)
        days[present] = _days(count, _UNITS_PER_DAY["us"])
    return days.reshape(dates.shape)


def _is_missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    return np.array([value is None or value != value for value in values], bool)


def _objects_in_memory(value: Any, name: str) -> tuple[Any, str]:
    objects = value.values if isinstance(value, xr.DataArray) else value
    # Masked elements may be of any type.
    flat = np.where(np.ma.getmaskarray(objects), np.array(None), np.ma.getdata(objects)).ravel()
    missing = _is_missing(flat)
    first = flat[~missing][0] if not missing.all() else None
    cftime: Any = sys.modules.get("cftime")
    units = ""
    if isinstance(first, datetime.date | datetime.timedelta):
        plain = [None if m else _without_zone(v) for v, m in zip(flat, missing, strict=True)]
        kind = "m8[us]" if isinstance(first, datetime.timedelta) else "M8[us]"
        try:
            dates: NDArray[Any] = np.array(plain, kind)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{name} mixes {type(first).__name__} with other types: {error}. Convert all "
                f"elements to one type."
            ) from error
    elif cftime is not None and isinstance(first, cftime.datetime):
        dates, units = _days_of_cftime(flat, first.calendar), f"{_CALENDAR}{first.calendar}"
    else:
        return value, ""
    dates = dates.reshape(value.shape)
    if isinstance(value, xr.DataArray):
        return value.copy(data=dates), units
    if isinstance(value, np.ma.MaskedArray):
        return np.ma.masked_array(dates, np.ma.getmask(value)), units
    return dates, units


def _without_zone(date: Any) -> Any:
    """Return the date in UTC and without time zone, as datetime64 expects."""
    if getattr(date, "tzinfo", None) is None:
        return date
    return date.astimezone(datetime.UTC).replace(tzinfo=None)
