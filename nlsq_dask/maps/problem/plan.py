"""``MapPlan``: size, tasks and memory of a fit for every pixel, computed without reading data."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from dask.utils import format_bytes

from nlsq_dask import _html as html
from nlsq_dask._text import sentence, wrap
from nlsq_dask.engine.memory import (
    base_bytes,
    memory_text,
    missing_workers,
    shortage,
    small_blocks,
    workers_text,
)
from nlsq_dask.engine.source_graph import SourceGraph
from nlsq_dask.engine.workers import Workers
from nlsq_dask.errors import DataError, DataWarning, warn_caller
from nlsq_dask.maps.problem.arguments import MapProblem
from nlsq_dask.maps.problem.memory import COMPILED_BYTES, task_share
from nlsq_dask.maps.problem.parameter_maps import Role
from nlsq_dask.model.jacobian import choose_mode
from nlsq_dask.model.jax_scope import x64

_MARGIN = 1.5  # maximum ratio of the peak memory in a plan to the measured one

SINGLE_TILE = (
    "the map is a single tile, because the chunks of y_data span it: one thread fits it, and "
    "nothing is done before its end. Use chunks that are smaller along the dimensions of the map"
)
_MANY_TILES = 1000
_SMALL_TILE_PIXELS = 256  # starting a task takes longer than fitting so few pixels


@dataclass(frozen=True)
class MapPlan:
    """Size, tasks and memory of a fit for every pixel, computed without reading data.

    Attributes
    ----------
    n_fits : int
        Number of pixels, each of which is fitted.
    n_points : int
        Number of points of each fit.
    grid : tuple of int
        Number of tiles along each dimension of the map. A tile holds the pixels that one task fits.
    n_tiles : int
        Number of tiles.
    n_tasks : int
        Number of Dask tasks; of a lazy result, if all its variables are computed.
    bytes_read : int
        Bytes of all arrays in memory, decoded, that are read once.
    reads_per_chunk : int
        How often each chunk is read: once, if the points of all pixels of a tile fit in the memory
        of a task. Otherwise some pixels at a time are fitted, and some more reads are needed to
        choose starts and to repeat fits that fail.
    n_workers, threads : int
        Number of processes, and the maximum number of threads per process. A cluster that has no
        workers yet has 0; the plan is then for one worker with one thread.
    peak_memory : int
        Maximum bytes per worker: Python with its libraries, and the running tasks. The result is
        not included, which stays in memory if it is not written tile by tile.
    memory_limit : int or None
        Bytes of memory of the smallest worker; None if the cluster has no workers yet.
    jacobian : {"forward", "reverse"}
        Mode of automatic differentiation for the Jacobian of the model.
    realigned : tuple of str
        One text per array whose chunks are split to match the chunks of the other arrays.
    problems : tuple of str
        Texts on whatever would stop the fit, slow it down, or may be unintended.
    not_free : tuple of str
        Texts on the parameters that are fixed or tied for all pixels; empty if there are none.
    """

    n_fits: int
    n_points: int
    grid: tuple[int, ...]
    n_tiles: int
    n_tasks: int
    bytes_read: int
    reads_per_chunk: int
    n_workers: int
    threads: int
    peak_memory: int
    memory_limit: int | None
    jacobian: str
    realigned: tuple[str, ...]
    problems: tuple[str, ...]
    not_free: tuple[str, ...] = ()

    def _lines(self) -> list[tuple[str, str]]:
        grid = " x ".join(map(str, self.grid))
        return [
            ("Fits", f"{self.n_fits:,}, of {self.n_points:,} points each"),
            ("Tiles", f"{self.n_tiles:,} ({grid})"),
            ("Tasks", f"{self.n_tasks:,}"),
            ("Bytes read", format_bytes(self.bytes_read)),
            ("Reads per chunk", f"{self.reads_per_chunk}"),
            ("Workers", workers_text(self.n_workers, self.threads)),
            ("Peak memory per worker", memory_text(self.peak_memory, self.memory_limit)),
            *([("Parameters", " ".join(self.not_free))] if self.not_free else []),
            ("Jacobian", f"{self.jacobian} mode"),
            ("Rechunked arrays", "; ".join(self.realigned) or "none"),
            ("Problems", "; ".join(self.problems) or "none"),
        ]

    def __str__(self) -> str:
        return "\n".join(wrap(f"{name:<26}{text}", " " * 26) for name, text in self._lines())

    def _repr_html_(self) -> str:
        return html.plan(self.problems, self._lines()[:-1])


def build_map_plan(problem: MapProblem) -> MapPlan:
    """Return the plan on the current Dask workers, or on threads if there are none."""
    blocks, grid, model = problem.blocks, problem.grid, problem.model
    workers = Workers.active()
    tiles = list(grid)
    _, shared = SourceGraph(blocks).readers([grid.blocks_of(tile) for tile in tiles])
    threads, peak = _peak_memory(problem, workers)
    share, memory = _task_share(workers), problem.memory
    n_parts = -(-grid.largest // memory.max_pixels(grid.largest, share))
    # Of a lazy result, each variable has a task of its own, which takes it out of the tile's.
    tasks_per_tile = 1 if problem.is_eager else 1 + len(problem.outputs.variables)
    with x64():
        mode = choose_mode(model, model.jaxpr())
    return MapPlan(
        n_fits=grid.n_pixels,
        n_points=grid.n_points,
        grid=grid.shape,
        n_tiles=len(tiles),
        n_tasks=len(tiles) * tasks_per_tile + len(shared) + 1,
        bytes_read=int(blocks.block_bytes().sum()),
        # With several parts, once more for the pooled start and for fits that fail.
        reads_per_chunk=1 if n_parts == 1 else n_parts + 2,
        n_workers=len(workers.threads),
        threads=threads,
        peak_memory=peak,
        memory_limit=workers.memory_limit,
        jacobian=mode.value,
        realigned=blocks.realigned,
        problems=tuple(_problems(problem, workers, peak, n_parts)),
        not_free=problem.parameters.not_free,
    )


def check_memory(problem: MapProblem, workers: Workers) -> None:
    """Raise a DataError if a tile needs more memory than a worker has; warn if it possibly does."""
    _, peak = _peak_memory(problem, workers)
    if too_little := _too_little_memory(workers, peak):
        text = sentence(too_little)
        if _too_little_memory(workers, int(peak / _MARGIN)):
            raise DataError(text)
        warn_caller(text, DataWarning)


def _peak_memory(problem: MapProblem, workers: Workers) -> tuple[int, int]:
    """Return the number of concurrent tasks of a worker, and its peak memory."""
    threads = min(workers.max_threads, math.prod(problem.grid.shape))
    tile = problem.memory.peak(problem.grid.largest, _task_share(workers))
    return threads, base_bytes(workers, COMPILED_BYTES) + threads * tile


def _too_little_memory(workers: Workers, peak: int) -> str:
    too_little = shortage(peak, workers.memory_limit)
    if not too_little:
        return ""
    return (
        f"{too_little}. Use smaller chunks, fewer threads per worker, or workers with more memory"
    )


def _task_share(workers: Workers) -> int:
    """Return the memory for a task; without workers, enough for any."""
    if workers.memory_limit is None:
        return sys.maxsize
    return task_share(workers.memory_limit, workers.max_threads)


def _problems(problem: MapProblem, workers: Workers, peak: int, n_parts: int) -> Iterator[str]:
    grid = problem.grid
    parameters = problem.parameters
    missing = [n for n in parameters.not_given if Role("start", n) not in problem.maps]
    if notice := parameters.missing_notice(missing):
        yield notice
    if workers.import_problem:
        yield workers.import_problem
    if no_workers := missing_workers(peak, workers.memory_limit):
        yield no_workers
    if too_little := _too_little_memory(workers, peak):
        yield too_little
    if n_parts > 1:
        yield (
            f"the points of all pixels of a tile do not fit in the memory of a task, so that each "
            f"chunk is read {n_parts + 2} times. Use chunks that are smaller along the dimensions "
            f"of the map"
        )
    if not problem.in_memory and (small := small_blocks(problem.blocks)):
        yield small
    n_tiles = math.prod(grid.shape)
    is_merged = problem.in_memory or problem.has_merged_tiles
    if problem.is_single_tile:
        yield SINGLE_TILE
    elif not is_merged and (idle := workers.idle_problem(n_tiles)):
        yield f"{idle} along the dimensions of the map"
    if n_tiles > _MANY_TILES and grid.largest < _SMALL_TILE_PIXELS:
        yield (
            f"{n_tiles:,} tiles of up to {grid.largest} pixels: starting a task takes longer than "
            f"their fits. Use chunks that are larger along the dimensions of the map"
        )
