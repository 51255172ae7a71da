"""``fit_map``: the lazy Dataset of a fit for every pixel, and its computation."""

from __future__ import annotations

import operator
import time
import uuid
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.highlevelgraph import HighLevelGraph

from nlsq_dask._version import __version__
from nlsq_dask.engine.execution import is_inside_task
from nlsq_dask.engine.retries import ReadPolicy
from nlsq_dask.engine.source_graph import SourceGraph
from nlsq_dask.engine.tile_graph import tile_graph
from nlsq_dask.errors import DataError, MissingChunksWarning, PixelFitError, warn_caller
from nlsq_dask.maps.arguments import MapProblem
from nlsq_dask.maps.columns import ColumnReader
from nlsq_dask.maps.outputs import Outputs, failure_text
from nlsq_dask.maps.parameter_maps import ParameterMaps
from nlsq_dask.maps.progress import show_summary
from nlsq_dask.maps.starts import LaneFitter
from nlsq_dask.maps.tile_task import TileTask
from nlsq_dask.model.guess import GuessKernel
from nlsq_dask.solvers.batched_lm import LaneSolver
from nlsq_dask.solvers.lanes import LaneSettings, SigmaKind


def fit_map(problem: MapProblem) -> xr.Dataset:
    """Return the Dataset of a fit for every pixel, computed if all arrays are in memory."""
    dataset = lazy_dataset(problem, raises=problem.errors == "raise" and not problem.in_memory)
    if not problem.in_memory:
        return dataset
    # Inside a task of a cluster, other tasks could only wait for this one.
    options = {"scheduler": "sync"} if is_inside_task() else {}
    started = time.perf_counter()
    computed: xr.Dataset = dataset.compute(**options)
    if problem.config.verbose >= 2 and not is_inside_task():
        show_summary(computed["status"].values, time.perf_counter() - started)
    if problem.errors == "raise" and (text := failure_text(computed["status"].values)):
        raise PixelFitError(
            f"{text}. Use errors='flag' (in curvefit, errors='ignore') to keep the others."
        )
    return computed


def tile_task(problem: MapProblem, raises: bool) -> TileTask:
    """Return the function of the tasks, with the traced programs."""
    config, grid, model = problem.config, problem.grid, problem.model
    reader = ColumnReader.of(problem.blocks, grid, model.dtype)
    settings = LaneSettings(
        tolerance=config.gauss_newton_tol,
        max_iterations=config.gauss_newton_max_iterations,
        loss=problem.loss,
        absolute_sigma=problem.absolute_sigma,
        covariance=problem.covariance,
        cov_type=config.cov_type,
        min_points=problem.min_points,
    )
    n_points, n_lanes = grid.n_points, problem.n_lanes
    kinds: dict[bool | None, SigmaKind] = {None: "none", False: "shared", True: "varies"}
    solver = LaneSolver.trace(
        model,
        n_points,
        n_lanes,
        settings,
        x_varies=reader.x_varies,
        sigma=kinds[reader.sigma_varies],
    )
    guess = None
    names = problem.parameters.names
    if problem.guess is not None:
        guess = GuessKernel.trace(problem.guess, model, names, n_points, n_lanes, reader.x_varies)
    return TileTask(
        reader=reader,
        parameters=ParameterMaps.of(problem.parameters, problem.maps),
        fitter=LaneFitter(solver, problem.parameters.transform.is_free),
        guess=guess,
        outputs=problem.outputs,
        memory=problem.memory,
        is_given=problem.is_given,
        omits_nan=problem.nan_policy == "omit",
        raises=raises,
        seed=config.random_seed,
    )


def lazy_dataset(problem: MapProblem, raises: bool) -> xr.Dataset:
    """Return the Dataset with a task per tile, whatever the arrays are."""
    blocks, grid, config = problem.blocks, problem.grid, problem.config
    task = tile_task(problem, raises)
    source = SourceGraph(blocks, ReadPolicy(config.read_retries, config.min_success_rate < 1.0))
    for sentence in source.missing_chunks():
        warn_caller(sentence, MissingChunksWarning)
    token = uuid.uuid4().hex
    tiles = list(grid)
    name = f"nlsq-tile-{token}"
    keys: list[Any] = [(name, *tile.index) for tile in tiles]
    groups = [grid.blocks_of(tile) for tile in tiles]
    graph = HighLevelGraph(
        {name: tile_graph(source, groups, keys, task, tiles, token)}, {name: set()}
    )
    variables = {}
    names = problem.parameters.names
    map_dims = tuple(problem.dims[axis] for axis in grid.map_axes)
    for variable, spec in task.outputs.variables.items():
        own = f"nlsq-{variable}-{token}"
        end = (0,) * len(spec.dims)
        layer: dict[Any, Any] = {
            (own, *tile.index, *end): Task(
                (own, *tile.index, *end), operator.getitem, TaskRef(key), variable
            )
            for tile, key in zip(tiles, keys, strict=True)
        }
        chunks = (*grid.map_chunks, *((len(names),) for _ in spec.dims))
        whole = HighLevelGraph({**graph.layers, own: layer}, {**graph.dependencies, own: {name}})
        array = da.Array(whole, own, chunks, dtype=np.dtype(spec.dtype))
        attrs = task.outputs.attrs_of(variable)
        variables[variable] = ((*map_dims, *spec.dims), array, attrs)
    return xr.Dataset(variables, _coordinates(problem, map_dims, task.outputs), _attrs(problem))


def _coordinates(
    problem: MapProblem, map_dims: tuple[str, ...], outputs: Outputs
) -> dict[str, Any]:
    # As objects, because Zarr has no stable format for strings of a fixed length.
    names = np.array(problem.parameters.names, object)
    own: dict[Any, Any] = {dim: names for spec in outputs.variables.values() for dim in spec.dims}
    taken = [dim for dim in own if dim in map_dims]
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
        if set(map(str, coordinate.dims)) <= set(map_dims) and name not in own
    }
    taken = [name for name in (*of_map, *map_dims) if name in outputs.variables]
    if taken:
        raise DataError(
            f"y_data has the coordinate or dimension {taken[0]!r}, which is also a variable of the "
            f"result. Rename it, such as y_data.rename({taken[0]}='{taken[0]}_0')."
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
