"""The Dataset of a fit for every pixel: its variables, coordinates and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nlsq_dask._version import __version__
from nlsq_dask.errors import DataError
from nlsq_dask.maps.problem.arguments import MapProblem
from nlsq_dask.maps.tasks.outputs import Outputs


def map_dims(problem: MapProblem) -> tuple[str, ...]:
    """Return the names of the dimensions of the map."""
    return tuple(problem.dims[axis] for axis in problem.grid.map_axes)


def as_dataset(problem: MapProblem, arrays: Mapping[str, Any]) -> xr.Dataset:
    """Return the Dataset, given the array of each variable; without arrays, coordinates only."""
    outputs, dims = problem.outputs, map_dims(problem)
    variables = {
        name: ((*dims, *outputs.variables[name].dims), array, outputs.attrs_of(name))
        for name, array in arrays.items()
    }
    return xr.Dataset(variables, _coordinates(problem, dims, outputs), _attrs(problem))


def _coordinates(problem: MapProblem, dims: tuple[str, ...], outputs: Outputs) -> dict[str, Any]:
    # As objects, because Zarr has no stable format for strings of a fixed length.
    names = np.array(problem.parameters.names, object)
    own: dict[Any, Any] = {dim: names for spec in outputs.variables.values() for dim in spec.dims}
    taken = [dim for dim in own if dim in dims]
    if taken:
        raise DataError(
            f"y_data has the dimension {taken[0]!r}, which the result uses for the parameters. "
            f"Rename it, such as y_data.rename({taken[0]}='{taken[0]}_0')."
        )
    if problem.template is None:
        return own
    of_map = {
        name: coordinate
        for name, coordinate in problem.template.coords.items()
        if set(map(str, coordinate.dims)) <= set(dims)
    }
    taken = [name for name in (*of_map, *dims) if name in outputs.variables or name in own]
    if taken:
        raise DataError(
            f"y_data has the coordinate or dimension {taken[0]!r}, which the result has, too. "
            f"Rename it, such as y_data.rename({taken[0]}='{taken[0]}_0')."
        )
    return {**of_map, **own}


def _attrs(problem: MapProblem) -> dict[str, Any]:
    fitted = [problem.dims[axis] for axis in problem.grid.fitted]
    attrs = {
        "model": problem.model.name,
        "fitted_dims": " ".join(fitted),
        "nlsq_dask_version": __version__,
    }
    if problem.template is not None:
        attrs["data"] = str(problem.template.name or "")
        attrs["data_units"] = str(problem.template.attrs.get("units", ""))
    units = problem.blocks.date_notices()
    if units:
        attrs["dates"] = "; ".join(units)
    return {name: text for name, text in attrs.items() if text}
