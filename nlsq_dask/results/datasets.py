"""The Datasets ``FitResult.sample`` and ``FitResult.block_statistics``."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.labels import Label
from nlsq_dask.engine.block_sums import BlockSums
from nlsq_dask.rows.rows import Layout, Rows

_RESERVED_NAMES = ("y_data", "fitted", "sigma", "row", "feature")


def row_sample(rows: Rows, fitted: NDArray[np.float64], blocks: RowBlocks) -> xr.Dataset:
    """Return rows of the data and their fitted values as a Dataset; see ``FitResult.sample``.

    netCDF and Zarr do not allow "/" in names: it becomes "_", and the attribute ``long_name`` has
    the original name.

    Parameters
    ----------
    rows : Rows
        Rows that are finite and not masked. With the option ``residual_weights``, sigma is already
        divided by the square root of the weight.
    fitted : ndarray, shape (n,)
        Values of the model at these rows.
    blocks : RowBlocks
        The data, with names and units of the arrays.
    """
    y_label, *x_labels = blocks.labels
    y_attrs = _label_attributes(y_label, y_label.name, y_label.units)
    values: dict[str, Any] = {
        "y_data": ("row", rows.y, y_attrs),
        "fitted": ("row", fitted, y_attrs),
    }
    if rows.sigma is not None:
        values["sigma"] = "row", rows.sigma
    message_names = blocks.layout.array_names[1:]
    n_tables = sum(leaf.ndim == 2 for leaf in rows.x)
    labelled = zip(rows.x, x_labels, _x_names(blocks.layout, x_labels), strict=True)
    for i, (leaf, label, name) in enumerate(labelled):
        units = blocks.x_units.get(message_names[i], label.units)
        attrs = _label_attributes(label, name, units) | {"position": i}
        dims = ("row", "feature" if n_tables == 1 else f"feature_{i}")[: leaf.ndim]
        if leaf.ndim == 2 and label.columns:
            attrs["columns"] = list(label.columns)
        values[_unused_name(name.replace("/", "_"), values)] = dims, leaf, attrs
    return xr.Dataset(values)


def _label_attributes(label: Label, name: str, units: str) -> dict[str, Any]:
    attrs = {"long_name": label.long_name or name, "units": units}
    return {key: value for key, value in attrs.items() if value}


def _x_names(layout: Layout, labels: list[Label]) -> list[str]:
    """Return a name for each x array: its key in a dict, the name of its DataArray, or a number."""
    if isinstance(layout.x_names, tuple):
        return list(map(str, layout.x_names))
    if layout.x_names is None:
        return [labels[0].name or "x"]
    return [label.name or f"x_{i}" for i, label in enumerate(labels)]


def _unused_name(name: str, taken: dict[str, Any]) -> str:
    """Return the name, changed by a prefix or a number if it is reserved or taken."""
    if name in _RESERVED_NAMES or name.startswith("feature_"):
        name = f"x_{name}"
    unused, number = name, len(taken)
    while unused in taken:
        unused, number = f"{name}_{number}", number + 1
    return unused


def block_statistics(sums: BlockSums, blocks: RowBlocks) -> xr.Dataset:
    """Return residual statistics with one value per block; see ``FitResult.block_statistics``.

    Parameters
    ----------
    sums : BlockSums
        Statistics from one pass over the data.
    blocks : RowBlocks
        The data; unnamed dimensions are called ``dim_0``, ``dim_1``, ...
    """

    def on_grid(values: NDArray[Any]) -> NDArray[Any]:
        grid = np.zeros(int(np.prod(blocks.grid)), values.dtype)
        grid[sums.index] = values  # passes omit blocks without rows, which keep zeros
        return grid.reshape(blocks.grid)

    counts, chi2 = on_grid(sums.n_used), on_grid(sums.chi2)
    reduced = np.divide(chi2, counts, out=np.full(blocks.grid, np.nan), where=counts > 0)
    values = {
        "chi2": chi2,
        "n_points": counts,
        "reduced_chi2": reduced,
        "largest_residual": np.where(counts > 0, on_grid(sums.largest), np.nan),
    }
    starts = {
        dim: (dim, np.cumsum((0, *sizes[:-1])), {"size": sum(sizes)})
        for dim, sizes in zip(blocks.dims, blocks.y.chunks, strict=True)
    }
    return xr.Dataset({name: (blocks.dims, grid) for name, grid in values.items()}, coords=starts)
