"""``RowSums``: sums over rows in memory, which cost no reading."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.core.model import Model
from nlsq_dask.core.normal_equations import NormalEquationsKernel
from nlsq_dask.core.penalty import GroupVariance
from nlsq_dask.core.product_loops import Product
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.sums import NormalEquations

_REMEMBERED = 8  # points; forecasts come back to those that they have tried


class RowSums:
    """Sums over rows, as a function of the parameters; the last few are remembered.

    Parameters
    ----------
    model : Model
    kernel : NormalEquationsKernel
        Of this model.
    rows : Rows
    penalty : GroupVariance
    """

    def __init__(
        self, model: Model, kernel: NormalEquationsKernel, rows: Rows, penalty: GroupVariance
    ) -> None:
        self._model = model
        self._penalty = penalty
        self._rows = rows
        self._known: dict[bytes, NormalEquations] = {}
        self.kernel = kernel

    def __call__(self, params: NDArray[np.float64]) -> NormalEquations:
        """Sum at ``params``."""
        key = params.tobytes()
        if key not in self._known:
            if len(self._known) == _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = self._penalty.added_to(self.kernel(self._rows, params), params)
        return self._known[key]

    def make(self, product: Product) -> None:
        """Go on with sums of another kind."""
        kernel = self.kernel.making(product, self._model)
        if kernel is not self.kernel:
            self.kernel = kernel
            self._known.clear()
