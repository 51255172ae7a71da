"""``Label``: what arrays call themselves, for the axes of plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xarray as xr


@dataclass(frozen=True)
class Label:
    """What an array says of itself; empty where it says nothing.

    Attributes
    ----------
    name : str
        Of a DataArray or a column.
    long_name, units : str
        Attributes of a DataArray.
    columns : tuple of str
        Of a table.
    """

    name: str = ""
    long_name: str = ""
    units: str = ""
    columns: tuple[str, ...] = ()


def label_of(value: Any) -> Label:
    """Return what an xarray or pandas object says of itself; nothing for other arrays."""
    if isinstance(value, xr.DataArray):
        attrs = value.attrs
        # A DataArray that is made of a Dask array without a name takes that of its graph.
        is_by_dask = value.chunks is not None and value.name == value.data.name
        long_name = attrs.get("long_name") or attrs.get("standard_name") or ""
        name = "" if is_by_dask else _text(value.name)
        return Label(name, str(long_name), str(attrs.get("units", "")))
    if hasattr(value, "columns") and hasattr(value, "iloc"):
        return Label(columns=tuple(map(str, value.columns)))
    return Label(_text(value.name)) if hasattr(value, "iloc") else Label()


def _text(name: Any) -> str:
    return "" if name is None else str(name)
