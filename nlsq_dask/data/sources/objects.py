"""Advice for values that are no arrays of numbers: delayed objects, paths, objects in arrays."""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Iterator, Set
from decimal import Decimal
from os import PathLike
from typing import Any

from dask.base import is_dask_collection
from dask.delayed import Delayed

from nlsq_dask.errors import DataError

_OPEN = (
    "Open the file first, such as with xarray.open_dataset(path)['name'], zarr.open_array(path) or "
    "numpy.load(path, mmap_mode='r')."
)
_FROM_DELAYED = "dask.array.from_delayed({}, shape=(n,), dtype=float)"


def check_is_array(name: str, value: Any) -> None:
    """Raise a DataError for a value that cannot be an array, such as a path or a Delayed object.

    Parameters
    ----------
    name : str
        Name in messages.
    value : Any
    """
    kind = type(value).__name__
    if isinstance(value, Delayed):
        raise DataError(
            f"{name} is a Dask Delayed object, whose shape is unknown. Make an array of it: "
            f"{_FROM_DELAYED.format(name)}, where n is its number of elements."
        )
    if value is None:
        raise DataError(f"{name} is None; expected an array.")
    if hasattr(value, "shape") or hasattr(value, "to_dask_array"):
        return
    if is_dask_collection(value):
        advice = f"Pass a Dask array, or {name}.compute()."
    elif callable(getattr(value, "result", None)):
        advice = f"Pass its result: {name}.result()."
    elif isinstance(value, PathLike):
        advice = _OPEN
    elif isinstance(value, Set | Iterator):
        advice = f"Pass a list: list({name})."
        if isinstance(value, Set):
            advice = "A set has no order; pass a list or an array."
    elif callable(value):
        advice = "The order of arguments is model, x_data, y_data, p0."
    else:
        return
    raise DataError(f"{name} must be an array; got {_article(kind)} {kind}. {advice}")


def object_advice(element: Any, name: str, has_methods: bool) -> str:
    """Return how to convert an array of objects to numbers.

    Parameters
    ----------
    element : Any
        First element that is not missing; None if all are.
    name : str
        Name of the array in messages.
    has_methods : bool
        Whether the value is an array and no list.
    """
    kind = type(element).__name__
    if kind == "Period":
        return f"Convert periods to dates: pandas.PeriodIndex({name}).to_timestamp()."
    if kind == "Interval":
        return f"Use the middle of the intervals: pandas.IntervalIndex({name}).mid."
    if isinstance(element, datetime.time):
        return (
            f"Convert times to seconds: [t.hour * 3600 + t.minute * 60 + t.second for t in {name}]."
        )
    if isinstance(element, datetime.date):
        return (
            f"Only x may hold dates. Convert them to numbers first: (np.array({name}, "
            f"dtype='datetime64[us]') - np.datetime64('1970-01-01')) / np.timedelta64(1, 'D')."
        )
    if isinstance(element, Delayed):
        return (
            f"Make an array of its Delayed objects: "
            f"dask.array.concatenate([{_FROM_DELAYED.format('part')} for part in {name}]), where n "
            f"is the number of elements of each part."
        )
    if isinstance(element, PathLike):
        return _OPEN
    if callable(getattr(element, "result", None)):
        return f"Pass the results: [each.result() for each in {name}]."
    if hasattr(element, "toarray"):
        return f"Convert it to an array: {name}.toarray()."
    if hasattr(element, "__len__") and not isinstance(element, str | bytes):
        return "Its elements are sequences: join them with np.concatenate, or np.stack as columns."
    if isinstance(element, complex):
        return f"Its elements are complex: fit the absolute value, np.abs({name}.astype(complex))."
    if _is_number(element):
        convert = f"{name}.astype(float)" if has_methods else f"np.array({name}, dtype=float)"
        return f"Convert it to numbers: {convert}. None becomes NaN."
    if isinstance(element, str):
        return f"Convert text of dates in x with np.array({name}, dtype='datetime64[ns]')."
    return "Pass the numbers that its elements stand for."


def _is_number(element: Any) -> bool:
    """Return whether ``astype(float)`` converts an element: a number, or a text of one, or None."""
    if element is None or isinstance(element, numbers.Number | Decimal):
        return True
    try:
        float(element)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"
