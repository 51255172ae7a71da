"""``SampleProblem``: the fit restricted to the rows in memory, which costs no reading."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.core.block_loops import BLOCK_ROWS
from nlsq_dask.core.kernel import NormalEquationsKernel
from nlsq_dask.core.lbfgs_warmup import Warmup
from nlsq_dask.core.model import Model
from nlsq_dask.core.model_check import check_row_wise
from nlsq_dask.core.normalize import ParameterNormalizer
from nlsq_dask.core.prediction import PredictionKernel
from nlsq_dask.core.rows import Rows
from nlsq_dask.core.sums import NormalEquations

Vector = NDArray[np.float64]

_REMEMBERED = 8  # points; forecasts come back to those that they have tried
_WARMUP_ROWS = 2**14  # enough for a start, and L-BFGS evaluates them some hundred times


class SampleProblem:
    """Rows in memory that can be reduced and handed to the warm-up.

    Parameters
    ----------
    model : Model
        In float64, whatever the arithmetic over all rows.
    kernel : NormalEquationsKernel
        Of this model.
    rows : Rows
        As they were read, unusable ones among them.
    start : ndarray, shape (p,)

    Attributes
    ----------
    kernel : NormalEquationsKernel
        The one given, measuring y from its mean.
    """

    def __init__(
        self, model: Model, kernel: NormalEquationsKernel, rows: Rows, start: Vector
    ) -> None:
        self._model = model
        self._start = start
        self._known: dict[bytes, NormalEquations] = {}
        self._all_rows, self._rows = rows, rows.usable()
        usable_y = self._rows.y.astype(np.float64)
        y_reference = float(usable_y.mean()) if len(usable_y) else 0.0
        self.kernel = replace(kernel, y_reference=y_reference)
        prediction = PredictionKernel.trace(model, BLOCK_ROWS)
        # Not the other kernel's, which depends on the chunks, too.
        self._fingerprint = prediction.program.fingerprint
        if len(self._rows):
            check_row_wise(model, prediction, self._rows, start)

    @property
    def is_informative(self) -> bool:
        """Whether there are more usable rows than parameters."""
        return len(self._rows) > self._model.n_params

    @property
    def n_used(self) -> int:
        """Number of usable rows."""
        return len(self._rows)

    @property
    def variance(self) -> float:
        """What the loss of the warm-up is divided by, positive in any case."""
        sums = self.at_start
        return (sums.total_variation or sums.signal or sums.n_used) / max(sums.n_used, 1)

    @property
    def at_start(self) -> NormalEquations:
        """The sums at ``start``; they also count the unusable rows."""
        return self.reduce(self._start)

    def reduce(self, params: Vector) -> NormalEquations:
        """Sum over the sample; the last few results are remembered."""
        key = params.tobytes()
        if key not in self._known:
            if len(self._known) == _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = self.kernel(self._all_rows, params)
        return self._known[key]

    def exchange(self, rows: Rows) -> None:
        """Go on with other rows, which are spread better over the data set."""
        self._all_rows, self._rows = rows, rows.usable()
        self._known.clear()

    def factors(self, params: Vector) -> tuple[float, ...]:
        """Return powers of two that bring Jacobian and residual at ``params`` near one."""
        sums = self.reduce(params)
        squares = np.append(np.diag(sums.jtj), sums.chi2) / max(sums.n_used, 1)
        usable = np.isfinite(squares) & (squares > 0.0)
        exponents = -np.round(0.5 * np.log2(np.where(usable, squares, 1.0)))
        return tuple(np.exp2(exponents).tolist())

    def prepare_warmup(
        self, normalizer: ParameterNormalizer, first_step: float, config: HybridStreamingConfig
    ) -> Warmup:
        """Make the L-BFGS problem of the usable rows, padded by repetition to a power of two."""
        n_usable = len(self._rows)
        n_rows = min(n_usable, _WARMUP_ROWS)
        capacity = 1 << (n_rows - 1).bit_length()
        spread = np.arange(n_rows) * n_usable // n_rows
        return Warmup.prepare(
            self._model,
            self._rows.take(spread[np.arange(capacity) % n_rows]),
            n_rows,
            (normalizer.scales, normalizer.offsets),
            normalizer.transform_bounds(),
            self.variance,
            first_step,
            config,
            self.kernel.loss,
            self._fingerprint,
        )
