"""The Dask graph of a fit for every pixel: a task per tile, with the traced programs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from nlsq_dask.engine.reduction_tree import broadcast
from nlsq_dask.engine.retries import ReadPolicy
from nlsq_dask.engine.source_graph import SourceGraph
from nlsq_dask.engine.tile_graph import tile_graph
from nlsq_dask.errors import MissingChunksWarning, warn_caller
from nlsq_dask.maps.problem.arguments import MapProblem
from nlsq_dask.maps.problem.parameter_maps import ParameterMaps
from nlsq_dask.maps.problem.tiles import Tile
from nlsq_dask.maps.tasks.columns import ColumnReader
from nlsq_dask.maps.tasks.starts import LaneFitter
from nlsq_dask.maps.tasks.tile_task import TileTask
from nlsq_dask.model.guess import GuessKernel
from nlsq_dask.solvers.lanes.batched_lm import LaneSolver
from nlsq_dask.solvers.lanes.records import LaneSettings, SigmaKind

_MAX_GRAPH_BYTES = 2**22  # of arrays, which a scheduler should hold
# Points of a map whose fits take less time than what compiling faster saves, about a second.
_MAX_FAST_COMPILE = 2_000_000


def trace_tile_task(problem: MapProblem, raises: bool) -> TileTask:
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
        fast_compile=grid.n_pixels * n_points <= _MAX_FAST_COMPILE,
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


def build_graph(
    problem: MapProblem,
    function: Callable[..., Any],
    tiles: Sequence[Tile],
    client: Any = None,
) -> tuple[dict[Any, Any], list[Any]]:
    """Return a graph with a task per tile, which calls a ``TileTask`` or the like, and its keys.

    Large arrays in memory are sent to the workers of a ``client`` if there is one; otherwise they
    are in the graph.
    """
    blocks, grid = problem.blocks, problem.grid
    source = SourceGraph(blocks, ReadPolicy.of(problem.config))
    for sentence in source.missing_chunks():
        warn_caller(sentence, MissingChunksWarning)
    literals = source.large_literals
    if sum(array.nbytes for array in literals.values()) > _MAX_GRAPH_BYTES:
        source.replace(broadcast(literals, client))
    token = uuid.uuid4().hex
    keys: list[Any] = [(f"nlsq-tile-{token}", *tile.index) for tile in tiles]
    groups = [grid.blocks_of(tile) for tile in tiles]
    return tile_graph(source, groups, keys, function, tiles, token), keys
