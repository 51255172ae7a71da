"""``map_fingerprint``: model, data and options of a fit for every pixel."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.checkpoints.identity import FitFingerprint
from nlsq_dask.data.fingerprints import digest
from nlsq_dask.engine.independent_tasks import execute_each
from nlsq_dask.engine.reduction_tree import TaskGraph
from nlsq_dask.engine.retries import ReadFailedError, ReadPolicy
from nlsq_dask.engine.serialization import to_opaque_graph
from nlsq_dask.engine.source_graph import GroupReader, Index, SourceGraph
from nlsq_dask.errors import DataError
from nlsq_dask.events import Observer
from nlsq_dask.maps.problem.arguments import MapProblem
from nlsq_dask.maps.tasks.columns import ColumnReader
from nlsq_dask.model.guess import GuessKernel
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.rows.rows import STRIP_ROWS

# Options that change a result. An unfinished map is not continued with another number of
# iterations, unlike a single fit; the pixels of a store would differ by the time of their fit.
_OPTIONS = (
    "precision",
    "gauss_newton_tol",
    "gauss_newton_max_iterations",
    "random_seed",
    "cov_type",
)
_GUESS_LANES = 8  # any number, the same for all values of chunk_size
_BLOCKS_AT_ONCE, _MAX_BLOCKS = 3, 12  # whose values are read
_PIECE = 2**16  # elements
_NOTHING = "no finite value"
_DIGITS = {2: 3, 4: 7, 8: 12}  # that are compared, by size of a float

Array = NDArray[Any]
Values = dict[str, str]


def map_fingerprint(
    problem: MapProblem,
    coordinates: Mapping[Hashable, xr.DataArray],
    check: Callable[[], None] = lambda: None,
    emit: Observer = lambda event: None,
) -> FitFingerprint:
    """Return the fingerprint of a fit for every pixel; a few blocks of lazy data are read.

    Parameters
    ----------
    problem : MapProblem
    coordinates : mapping of name to DataArray
        Coordinates of the result, which is not recognized as the same with others.
    check, emit : callable, optional
        As for ``execute_each``, which reads the blocks.
    """
    base = FitFingerprint.of(
        " ".join(_programs(problem)), problem.blocks, _arguments(problem), problem.config, _OPTIONS
    )
    of_map = {
        f"coordinate {name}": _describe(coordinate) for name, coordinate in coordinates.items()
    }
    values = _values(problem, check, emit)
    return replace(base, data={**base.data, **of_map}, values=values)


def _programs(problem: MapProblem) -> Iterator[str]:
    """Yield the digest of the model, and that of ``guess`` if there is one."""
    model, grid = problem.model, problem.grid
    # In float64, because precision is compared as an option.
    exact = replace(model, dtype="float64")
    yield PredictionKernel.trace(exact, STRIP_ROWS).program.fingerprint
    if problem.guess is not None:
        varies = ColumnReader.of(problem.blocks, grid, exact.dtype).x_varies
        names = problem.parameters.names
        kernel = GuessKernel.trace(problem.guess, exact, names, grid.n_points, _GUESS_LANES, varies)
        yield kernel.function.program.fingerprint


def _arguments(problem: MapProblem) -> dict[str, Any]:
    return {
        **problem.parameters.arguments,
        "p0 is complete": problem.is_given,
        "guess": None if problem.guess is None else "given",
        "dims": [problem.dims[axis] for axis in problem.grid.fitted],
        "nan_policy": problem.nan_policy,
        "absolute_sigma": problem.absolute_sigma,
        "loss": problem.loss.name,
        "f_scale": problem.loss.f_scale,
        "min_points": problem.min_points,
        "covariance": problem.covariance,
    }


def _describe(coordinate: xr.DataArray) -> str:
    """Return dtype and shape of a coordinate, with a digest of its values unless it is lazy."""
    text = f"{coordinate.dtype.kind} {coordinate.dims} {coordinate.shape}"
    if coordinate.chunks is not None:
        return text
    values = np.asarray(coordinate.values)
    if values.dtype.kind not in "biufmM":
        return f"{text}, values {digest(str(values.tolist()))}"
    data = np.ascontiguousarray(values).reshape(-1).view("u1").data
    return f"{text}, values {hashlib.sha256(data).hexdigest()[:16]}"


def _values(problem: MapProblem, check: Callable[[], None], emit: Observer) -> Values:
    """Return summaries of the values of some blocks, by array and block.

    Nothing is read if all arrays are in memory, because ``FitFingerprint.of`` has their digests.
    Blocks of which y has no finite value tell little, so others are read, too.
    """
    if problem.in_memory:
        return {}
    blocks = problem.blocks
    n_blocks = math.prod(blocks.grid)
    chosen = np.random.default_rng(0).permutation(n_blocks)[:_MAX_BLOCKS]
    indices = list(dict.fromkeys([0, *chosen.tolist()]))[:_MAX_BLOCKS]
    policy = replace(ReadPolicy.of(problem.config), skips_unreadable=True)
    source = SourceGraph(blocks, policy)
    values: Values = {}
    for first in range(0, len(indices), _BLOCKS_AT_ONCE):
        some = indices[first : first + _BLOCKS_AT_ONCE]
        group = [tuple(map(int, np.unravel_index(i, blocks.grid))) for i in some]
        values |= _values_of(source, group, check, emit)
        if any(k.startswith("y_data ") and v != _NOTHING for k, v in values.items()):
            break
    return values


def _values_of(
    source: SourceGraph, group: Sequence[Index], check: Callable[[], None], emit: Observer
) -> Values:
    """Read blocks in one task, and return their summaries; none if reading them fails."""
    ((reader,), shared) = source.readers([group])
    graph = TaskGraph(shared)
    task = graph.task("summarize", 0, _summaries, reader, inputs=reader.inputs)
    values: Values = {}
    try:
        execute_each(
            lambda client: (to_opaque_graph(graph.of_one(task).tasks), [task.key]),
            lambda key, summaries: values.update(summaries),
            check,
            emit,
        )
    except (ReadFailedError, DataError):  # which the fit reports, with the block
        return {}
    return values


def _summaries(reader: GroupReader, *inputs: Any) -> Values:
    """Return the summaries of the blocks of a reader that could be read."""
    values = {}
    for read in reader.read(inputs):
        if read.block is None:
            continue
        block = tuple(map(int, np.unravel_index(read.index, reader.grid)))
        arrays = [array for array in read.block.arrays if array is not None]
        for name, array in zip(reader.layout.array_names, arrays, strict=True):
            values[f"{name} in block {block}"] = summary(np.asarray(array))
    return values


def summary(array: Array) -> str:
    """Return a text on the values of an array.

    Equal values have equal texts, also if they were computed on different processors, which round
    differently in the last digits. A digest would not allow for that.
    """
    digits = _DIGITS.get(array.itemsize, 9) if array.dtype.kind == "f" else 9
    n_finite = 0
    sums = np.zeros(3)  # of values, of their magnitudes, and weighted by position
    flat = array.reshape(-1)
    weights = np.random.default_rng(0).uniform(-1, 1, min(_PIECE, flat.size))
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float64)
        is_finite = np.isfinite(piece)
        n_finite += int(is_finite.sum())
        piece[~is_finite] = 0.0
        # Differs from piece to piece, so that two of them cannot be exchanged.
        factor = 1 + start / flat.size
        sums += piece.sum(), np.abs(piece).sum(), factor * (piece @ weights[: len(piece)])
    if not n_finite:
        return _NOTHING
    mean, magnitude, weighted = sums / n_finite
    if not magnitude:
        return f"{n_finite:,} zeros of {array.size:,} values"
    quantum = 10.0 ** (math.floor(math.log10(magnitude)) + 1 - digits)

    def rounded(value: float) -> str:
        return f"{round(value / quantum) * quantum:.{digits}g}"

    return (
        f"{n_finite:,} finite of {array.size:,} values, with mean {rounded(mean)}, mean of "
        f"absolute values {rounded(magnitude)} and checksum of their order {rounded(weighted)}"
    )
