"""``fit_map``: the Dataset of a fit for every pixel, lazy or computed."""

from __future__ import annotations

import operator
import uuid
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.highlevelgraph import HighLevelGraph

from nlsq_dask.events import Observer
from nlsq_dask.maps.problem.arguments import MapProblem
from nlsq_dask.maps.results.dataset import as_dataset
from nlsq_dask.maps.run import run_map
from nlsq_dask.maps.tasks.graph import build_graph, trace_tile_task


def fit_map(problem: MapProblem, observers: Sequence[Observer] = ()) -> xr.Dataset:
    """Return the Dataset of a fit for every pixel.

    It is computed, which ``observers`` watch, if all arrays are in memory or there is a store.

    Raises
    ------
    ValueError
        If there are observers, but the result is lazy.
    """
    if problem.is_eager:
        return run_map(problem, observers)
    if observers:
        raise ValueError(
            "observers have no effect on a lazy result, whose fits run when you compute it. Pass "
            "store=..., load the data into memory, or use an optimizer without observers."
        )
    return lazy_dataset(problem)


def lazy_dataset(problem: MapProblem) -> xr.Dataset:
    """Return the Dataset with a task per tile."""
    grid = problem.grid
    task = trace_tile_task(problem, raises=problem.errors == "raise")
    tiles = list(grid)
    graph, keys = build_graph(problem, task, tiles)
    name = f"nlsq-tiles-{uuid.uuid4().hex}"
    tile_layer = HighLevelGraph({name: graph}, {name: set()})
    arrays = {}
    n_params = len(problem.parameters.names)
    for variable, spec in task.outputs.variables.items():
        own = f"nlsq-{variable}-{uuid.uuid4().hex}"
        end = (0,) * len(spec.dims)
        layer: dict[Any, Any] = {
            (own, *tile.index, *end): Task(
                (own, *tile.index, *end), operator.getitem, TaskRef(key), variable
            )
            for tile, key in zip(tiles, keys, strict=True)
        }
        chunks = (*grid.map_chunks, *((n_params,) for _ in spec.dims))
        layers = {**tile_layer.layers, own: layer}
        whole = HighLevelGraph(layers, {**tile_layer.dependencies, own: {name}})
        arrays[variable] = da.Array(whole, own, chunks, dtype=np.dtype(spec.dtype))
    return as_dataset(problem, arrays)
