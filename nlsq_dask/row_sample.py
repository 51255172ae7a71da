"""Some rows of the data with the fitted values there, as a Dataset: what plots are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.labels import Label
from nlsq_dask.rows.rows import Layout, Rows

_OWN_NAMES = ("y_data", "fitted", "sigma", "row", "feature")


def row_sample(rows: Rows, fitted: NDArray[np.float64], blocks: RowBlocks) -> xr.Dataset:
    """Put rows and the fitted values there under names; see ``FitResult.sample``.

    A "/" in a name, which netCDF and Zarr refuse, becomes "_"; ``long_name`` keeps it.

    Parameters
    ----------
    rows : Rows
        All of them usable. Their sigma has the weights of groups in it, if there are any.
    fitted : ndarray, shape (n,)
    blocks : RowBlocks
        The data that they are from, for names and units.
    """
    of_y, *of_x = blocks.labels
    about_y = _attributes(of_y, of_y.name, of_y.units)
    values: dict[str, Any] = {
        "y_data": ("row", rows.y, about_y),
        "fitted": ("row", fitted, about_y),
    }
    if rows.sigma is not None:
        values["sigma"] = "row", rows.sigma
    messages = blocks.layout.array_names[1:]
    tables = sum(leaf.ndim == 2 for leaf in rows.x)
    described = zip(rows.x, of_x, _names(blocks.layout, of_x), strict=True)
    for i, (leaf, label, name) in enumerate(described):
        units = blocks.x_units.get(messages[i], label.units)
        about = _attributes(label, name, units) | {"position": i}
        dims = ("row",) if leaf.ndim == 1 else ("row", "feature" if tables == 1 else f"feature_{i}")
        if leaf.ndim == 2 and label.columns:
            about["columns"] = list(label.columns)
        values[_unused(name.replace("/", "_"), values)] = dims, leaf, about
    return xr.Dataset(values)


def _attributes(label: Label, name: str, units: str) -> dict[str, Any]:
    about = {"long_name": label.long_name or name, "units": units}
    return {key: value for key, value in about.items() if value}


def _names(layout: Layout, labels: list[Label]) -> list[str]:
    """Return what each array of x is called: its key, its own name, or a number."""
    if isinstance(layout.x_names, tuple):
        return list(map(str, layout.x_names))
    if layout.x_names is None:
        return [labels[0].name or "x"]
    return [label.name or f"x_{i}" for i, label in enumerate(labels)]


def _unused(name: str, taken: dict[str, Any]) -> str:
    """Return the name, or one made of it that no other array has."""
    if name in _OWN_NAMES or name.startswith("feature_"):
        name = f"x_{name}"
    unused, number = name, len(taken)
    while unused in taken:
        unused, number = f"{name}_{number}", number + 1
    return unused
