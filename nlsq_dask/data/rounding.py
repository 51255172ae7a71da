"""``rounding_notices``: warnings that y or x loses digits in the dtype in which a fit computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from nlsq_dask._text import sentence
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.dates import MAX_ROUNDING, span_notice
from nlsq_dask.rows.rows import Array, Rows

# Rounding by more than this many epsilons of the span of the values is reported: values whose
# distance from zero is some hundred times their span.
_MAX_EPSILONS = 100.0


def rounding_notices(blocks: RowBlocks, dtype: str, rows: Rows) -> Iterator[str]:
    """Yield a sentence for each of y and the x arrays that is rounded by too much of its span.

    Parameters
    ----------
    blocks : RowBlocks
    dtype : str
        dtype in which the model is evaluated.
    rows : Rows
        Usable rows from all parts of the data, with one-dimensional y.
    """
    used = np.dtype(dtype)
    if not len(rows):
        return
    for name, array in zip(blocks.layout.array_names, (rows.y, *rows.x), strict=False):
        if used == "float64" and name in blocks.unmeasured_dates:
            low, high = float(array.min()), float(array.max())
            notice = span_notice(high - low, float(np.spacing(max(-low, high))), name)
        elif array.dtype == used or _is_exact(array.dtype, used):
            continue
        else:
            notice = _notice(name, array.reshape(len(rows), -1), used, blocks.x_units.get(name))
        if notice:
            yield notice


def _notice(name: str, columns: Array, dtype: np.dtype[Any], units: str | None) -> str:
    """Return a sentence on the column that loses most; empty if none loses much."""
    with np.errstate(over="ignore", invalid="ignore"):
        is_exact = (columns.astype(dtype).astype(columns.dtype) == columns).all(axis=0)
    if is_exact.all():
        return ""
    low, high = (ends.astype(np.longdouble) for ends in (columns.min(axis=0), columns.max(axis=0)))
    span, largest = high - low, np.maximum(-low, high)
    step = np.spacing(largest.astype(dtype))
    share = np.divide(step, span, out=np.zeros_like(span), where=~is_exact & (span > 0.0))
    i = int(share.argmax())
    if not share[i] > max(_MAX_EPSILONS * float(np.finfo(dtype).eps), MAX_ROUNDING):
        return ""
    place = f"{name}[:, {i}]" if columns.shape[1] > 1 else name
    in_units = f" (in {units})" if units else ""
    return (
        f"{place} spans {float(span[i]):.3g} at values up to {float(largest[i]):.6g}{in_units}, "
        f"but in {dtype} such values are rounded to multiples of {float(step[i]):.3g}, "
        f"{100 * float(share[i]):.3g} % of the span. "
        f"{_advice(place, dtype, _origin(columns[:, i]), units)}"
    )


def _is_exact(stored: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    """Whether a dtype holds all values of another one; NumPy counts int64 as safe in float64."""
    return np.can_cast(stored, dtype, "safe") and stored.itemsize < 8


def _origin(column: Array) -> str:
    """Return a number near the data, with no more digits than their span asks for."""
    low = column.min()
    if column.dtype.kind in "iu":
        return str(int(low))
    digits = -math.floor(math.log10(float(column.max() - low)))
    return f"{round(float(low), digits):.15g}"


def _advice(place: str, dtype: np.dtype[Any], origin: str, units: str | None) -> str:
    if place == "y_data":
        shift = "subtract a number near the data from y_data, and from the model"
    elif units:
        shift = "measure time from its start: (t - t[0]) / np.timedelta64(1, 's')"
    else:
        shift = f"subtract an origin near the data, such as {place} - {origin}"
    if dtype == "float64":
        return sentence(shift)
    return f"Use HybridStreamingConfig(precision='float64'), or {shift}."
