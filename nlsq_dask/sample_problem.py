"""``SampleProblem``: the fit restricted to the rows in memory, which costs no reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.core.kernel import (
    BLOCK_ROWS,
    NormalEquationsKernel,
    PredictionKernel,
)
from nlsq_dask.core.lbfgs_warmup import Warmup
from nlsq_dask.core.model import Model
from nlsq_dask.core.model_check import check_row_wise
from nlsq_dask.core.normalize import ParameterNormalizer
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.sums import NormalEquations

Vector = NDArray[np.float64]


class SampleProblem:
    """Rows in memory that can be reduced and handed to the warm-up.

    Parameters
    ----------
    model : Model
    kernel : NormalEquationsKernel
    rows : Rows
        As they were read, unusable ones among them.
    start : ndarray, shape (p,)

    Attributes
    ----------
    at_start : NormalEquations
        The sums at ``start``; they also count the unusable rows.
    kernel : NormalEquationsKernel
        The one given, measuring y from its mean.
    """

    def __init__(
        self, model: Model, kernel: NormalEquationsKernel, rows: Rows, start: Vector
    ) -> None:
        self._model = model
        self._rows = rows.usable()
        usable_y = self._rows.y.astype(np.float64)
        y_reference = float(usable_y.mean()) if len(usable_y) else 0.0
        self.kernel = replace(kernel, y_reference=y_reference)
        self._pieces = list(rows.pieces(kernel.piece_rows))
        prediction = PredictionKernel.trace(model, BLOCK_ROWS)
        # Not the other kernel's, which depends on the chunks, too.
        self._fingerprint = prediction.program.fingerprint
        if len(self._rows):
            check_row_wise(model, prediction, self._rows, start)
        self.at_start = self.reduce(start)

    @property
    def is_informative(self) -> bool:
        """Whether there are more usable rows than parameters."""
        return len(self._rows) > self._model.n_params

    @property
    def variance(self) -> float:
        """What the loss of the warm-up is divided by, positive in any case."""
        sums = self.at_start
        return (sums.total_variation or sums.signal or sums.n_used) / max(sums.n_used, 1)

    def reduce(self, params: Vector) -> NormalEquations:
        """Sum over the sample."""
        return self.kernel(self._pieces, params)

    def prepare_warmup(
        self, normalizer: ParameterNormalizer, first_step: float, config: HybridStreamingConfig
    ) -> Warmup:
        """Make the L-BFGS problem of the usable rows, padded by repetition to a power of two."""
        n_rows = len(self._rows)
        capacity = 1 << (n_rows - 1).bit_length()
        return Warmup.prepare(
            self._model,
            self._rows.take(np.arange(capacity) % n_rows),
            n_rows,
            (normalizer.scales, normalizer.offsets),
            normalizer.transform_bounds(),
            self.variance,
            first_step,
            config,
            self._fingerprint,
        )
