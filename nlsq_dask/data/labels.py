"""``Label``: names, units and columns of arrays, for plots and messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xarray as xr


@dataclass(frozen=True)
class Label:
    """Name, units and columns of an array; each is empty if the array has none."""

    name: str = ""  # of a DataArray or a pandas column
    long_name: str = ""  # attribute of a DataArray
    units: str = ""  # attribute of a DataArray
    columns: tuple[str, ...] = ()  # of a DataFrame


def label_of(value: Any) -> Label:
    """Return the label of an xarray or pandas object, or an empty label for other arrays."""
    if isinstance(value, xr.DataArray):
        attrs = value.attrs
        # An unnamed DataArray of a Dask array takes the name of the graph.
        is_by_dask = value.chunks is not None and value.name == value.data.name
        long_name = attrs.get("long_name") or attrs.get("standard_name") or ""
        name = "" if is_by_dask else _text(value.name)
        return Label(name, str(long_name), str(attrs.get("units", "")))
    if hasattr(value, "columns") and hasattr(value, "iloc"):
        return Label(columns=tuple(map(str, value.columns)))
    return Label(_text(value.name)) if hasattr(value, "iloc") else Label()


def _text(name: Any) -> str:
    return "" if name is None else str(name)
