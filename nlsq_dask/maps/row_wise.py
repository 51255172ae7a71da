"""The check that a model is row-wise, on a few points, before any data are read."""

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


def check_points(
    model: Model,
    start: NDArray[np.float64],
    blocks: RowBlocks,
    fitted: Sequence[int],
    is_held: Sequence[bool],
) -> None:
    """Raise a ModelError if the value of the model at a point depends on other points.

    Parameters
    ----------
    model : Model
    start : ndarray, shape (p,)
        Initial values of the free parameters.
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

    x = tuple(map(points_of, blocks.x, is_held))
    rows = Rows(np.zeros(_N_POINTS), x)
    check_row_wise(model, PredictionKernel.trace(model, _N_POINTS), rows, start)
