"""A few points of x, by which a model is checked before any data are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.model.check import check_row_wise
from nlsq_dask.model.model import Model
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.rows.rows import Rows

_N_POINTS = 8


def sample_points(blocks: RowBlocks, fitted: Sequence[int], is_held: Sequence[bool]) -> Rows:
    """Return the x of some points from the first to the last one; y is zero.

    Parameters
    ----------
    blocks : RowBlocks
    fitted : sequence of int
        Axes of y along which the fits run.
    is_held : sequence of bool
        Whether each x is in memory. Random numbers stand for the others.
    """
    random = np.random.default_rng(0)
    shape = blocks.y.shape
    at = {axis: np.linspace(0, shape[axis] - 1, _N_POINTS).astype(int) for axis in fitted}

    def points_of(array: Any, is_known: bool) -> NDArray[Any]:
        if not is_known:
            return random.uniform(0.1, 1.1, (_N_POINTS, *array.shape[len(shape) :]))
        index = [
            at[axis] if axis in at and array.shape[axis] > 1 else np.zeros(_N_POINTS, int)
            for axis in range(len(shape))
        ]
        points = array.vindex[(*index, *[slice(None)] * (array.ndim - len(shape)))]
        return np.asarray(points.compute(scheduler="sync"))

    return Rows(np.zeros(_N_POINTS), tuple(map(points_of, blocks.x, is_held)))


def check_points(model: Model, start: NDArray[np.float64], rows: Rows) -> None:
    """Raise a ModelError if the value of the model at a point depends on other points.

    ``start`` has the initial values of the free parameters.
    """
    check_row_wise(model, PredictionKernel.trace(model, len(rows)), rows, start)
