"""Datasets of a result: sampled rows with their fitted values, and statistics of blocks."""

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
    """Return rows and their fitted values as a Dataset; see ``FitResult.sample``.

    A "/" in a name, which netCDF and Zarr do not allow, becomes "_"; ``long_name`` keeps it.

    Parameters
    ----------
    rows : Rows
        Usable rows, with sigma divided by the root of group weights, if there are any.
    fitted : ndarray, shape (n,)
    blocks : RowBlocks
        Source of names and units.
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
    """Return the name of each x array: its key, its own name, or a numbered one."""
    if isinstance(layout.x_names, tuple):
        return list(map(str, layout.x_names))
    if layout.x_names is None:
        return [labels[0].name or "x"]
    return [label.name or f"x_{i}" for i, label in enumerate(labels)]


def _unused_name(name: str, taken: dict[str, Any]) -> str:
    """Return the name, made unique by a prefix or number if necessary."""
    if name in _RESERVED_NAMES or name.startswith("feature_"):
        name = f"x_{name}"
    unused, number = name, len(taken)
    while unused in taken:
        unused, number = f"{name}_{number}", number + 1
    return unused


def block_statistics(sums: BlockSums, blocks: RowBlocks) -> xr.Dataset:
    """Return statistics of the blocks of one pass on the grid of blocks.

    Parameters
    ----------
    sums : BlockSums
    blocks : RowBlocks

    Returns
    -------
    xarray.Dataset
        ``chi2``, ``n_points``, ``reduced_chi2`` and ``largest_residual`` along the dimensions of y
        (``dim_0``, ... if unnamed). Coordinates are the positions of each block's first element;
        their attribute ``size`` is the length of the dimension. ``reduced_chi2`` is
        ``chi2 / n_points``, NaN without points: a block has no degrees of freedom of its own.
    """

    def on_grid(values: NDArray[Any]) -> NDArray[Any]:
        grid = np.zeros(int(np.prod(blocks.grid)), values.dtype)
        grid[sums.index] = values  # passes do not contain blocks without rows
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
