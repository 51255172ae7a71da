"""``SampleProblem``: the problem of a fit for a sample of rows in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import DataError
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.fit.settings import multistart_settings, warmup_settings
from nlsq_dask.kernels.in_memory import SampleObjective
from nlsq_dask.kernels.losses import LARGEST, SMALLEST
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.check import check_row_wise
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.model.rounding import rounding_scale
from nlsq_dask.rows.rows import STRIP_ROWS, Array, Rows
from nlsq_dask.warmup.lbfgs import Warmup
from nlsq_dask.warmup.multistart import SuccessiveHalving
from nlsq_dask.warmup.normalized_sample import NormalizedSample

Vector = NDArray[np.float64]

_MAX_WARMUP_ROWS = 2**14  # enough for a start; L-BFGS evaluates them some hundred times
_CHANCE = 5.0  # standard deviations of a mean square attributed to chance
_MAX_PLOT_ROWS, _MAX_PLOT_BYTES = 2000, 2**22  # kept in a result for plots
# Batches of the sample, from which the variance of its sums is estimated: at most, and more than
# parameters, which are fitted to them.
_MAX_BATCHES, _MORE_BATCHES = 32, 12
_ROUNDINGS = 8  # rounding errors that add up in a residual
_MAX_ROUNDING = 2**22  # derivatives that are computed to estimate them


def _check_units(y: NDArray[np.float64], sigma: Array | None) -> None:
    """Raise a DataError if squares of y / sigma overflow or underflow in float64."""
    positive = np.ones(len(y), bool) if sigma is None else sigma > 0.0
    weighted = y[positive] if sigma is None else y[positive] / sigma[positive]
    largest = float(np.abs(weighted).max(initial=0.0))
    if largest and not SMALLEST < largest < LARGEST:
        raise DataError(
            f"y_data divided by sigma has magnitude {largest:.0e}; its squares cannot be summed in "
            f"float64, which requires magnitudes between {SMALLEST:g} and {LARGEST:g}. Use other "
            f"units."
        )


R = TypeVar("R", bound=SampleObjective[Sums])


class SampleProblem(Generic[R]):
    """The problem of a fit for a sample of rows, evaluated in float64.

    Parameters
    ----------
    problem : FitProblem
    make_objective : callable
        Returns the ``SampleObjective`` for rows and a value near the mean of y.
    rows : Rows
        Rows as read, including masked and non-finite ones.
    n_blocks : int
        Number of blocks from which they were drawn, one after another.
    check : callable
        Called before each evaluation; an exception that it raises ends the solve.

    Attributes
    ----------
    y_reference : float
        Mean of y.
    objective : SampleObjective
        Function from parameters to the sums over all rows of the sample.
    objective_few : SampleObjective
        The same over fewer rows, for choosing between starting points.
    is_complete : bool
        Whether the sample has all rows of the data.
    """

    def __init__(
        self,
        problem: FitProblem,
        make_objective: Callable[[Rows, float], R],
        rows: Rows,
        n_blocks: int,
        check: Callable[[], None],
    ) -> None:
        self._n_blocks = n_blocks
        self._check = check
        self._problem = problem
        self._model = problem.exact_model
        self._start = problem.parameters.start
        usable = rows.usable()
        y = usable.y.astype(np.float64)
        _check_units(y, usable.sigma)
        self._make_objective = make_objective
        self.y_reference = float(y.mean()) if len(y) else 0.0
        self._set_rows(rows, usable)
        self._prediction = PredictionKernel.trace(self._model, STRIP_ROWS)
        # Not that of the objective's kernel, which also depends on the chunks.
        identified = self._prediction
        if identified.has_custom_rules:
            identified = PredictionKernel.trace(self._model, STRIP_ROWS, with_std=True)
        self._fingerprint = identified.program.fingerprint
        if len(usable):
            check_row_wise(self._model, self._prediction, usable, self._start)

    def _set_rows(self, rows: Rows, usable: Rows) -> None:
        self._rows = usable
        self.is_complete = len(rows) >= self._problem.blocks.n_rows
        few = usable.take(self._spread(min(self.n_used, _MAX_WARMUP_ROWS)))
        self.objective = self._objective(rows)
        self.objective_few = self._objective(few)

    def _spread(self, n_rows: int) -> NDArray[np.int64]:
        """Return evenly spaced indices of ``n_rows`` usable rows."""
        return np.arange(n_rows) * self.n_used // max(n_rows, 1)

    @property
    def is_informative(self) -> bool:
        """Whether there are more usable rows than parameters, or no other rows."""
        return len(self._rows) > (0 if self.is_complete else self._model.n_params)

    @property
    def rows(self) -> Rows:
        """The usable rows."""
        return self._rows

    @property
    def n_used(self) -> int:
        """Number of usable rows."""
        return len(self._rows)

    @property
    def chance(self) -> float:
        """Factor by which residuals of all rows may exceed those of the sample by chance.

        It applies to mean squares at the solution on the sample. With p parameters and n rows, the
        mean square of the sample is on average 1 - p / n times the variance, and the mean square of
        other rows 1 + p / n times. The factor is the ratio of both, with a margin for chance.
        """
        n_rows = max(self.n_used, 1)
        fitted = self._model.n_params / n_rows if n_rows > self._model.n_params else 0.0
        return (1.0 + _CHANCE * math.sqrt(2.0 / n_rows)) * (1.0 + fitted) / (1.0 - fitted)

    def max_expected(self, params: Vector) -> float:
        """Return the largest mean square of the residuals of all rows that chance explains.

        ``params`` is the solution on the sample.
        """
        return self.objective(params).variance(0) * self.chance if self.n_used else 0.0

    @property
    def variance(self) -> float:
        """Weighted variance of y, positive; the loss of the warm-up is relative to it."""
        sums = self.at_start
        return (sums.total_variation or sums.signal or sums.n_used) / max(sums.n_used, 1)

    @property
    def at_start(self) -> Sums:
        """Sums over the sample at p0, with the numbers of masked and non-finite rows."""
        return self.objective(self._start)

    def resolution(self, params: Vector, epsilon: float) -> float:
        """Return the largest mean square by which rounding errors may change the residuals.

        ``epsilon`` is the machine epsilon of the dtype in which all rows are evaluated.
        """
        size = self._model.n_params + sum(leaf[:1].size for leaf in self._rows.x)
        few = self._rows.take(self._spread(min(self.n_used, max(_MAX_ROUNDING // size, 1))))
        with np.errstate(over="ignore"):  # infinity is handled by the caller
            changes = _ROUNDINGS * epsilon * rounding_scale(self._model, few, params)
            return float(np.mean(changes**2))

    @property
    def lacked_derivatives(self) -> bool:
        """Whether derivatives were not finite at any point so far, although the model was."""
        return self.objective.lacked_derivatives or self.objective_few.lacked_derivatives

    def renew(self, problem: FitProblem) -> None:
        """Use another mode of differentiation, that of the model of ``problem``, from now on."""
        self._problem, self._model = problem, problem.exact_model
        self._set_rows(self._rows, self._rows)

    def replace_rows(self, rows: Rows) -> None:
        """Use other rows as the sample from now on."""
        self._set_rows(rows, rows.usable())

    def by_block(self) -> list[R]:
        """Return the objective of the rows of each block, approximately if rows are unusable."""
        parts = np.array_split(np.arange(self.n_used), self._n_blocks)
        return [self._objective(self._rows.take(part)) for part in parts]

    def mirrored(self, params: Vector) -> Iterator[tuple[R, R]]:
        """Yield pairs of objectives: with the residuals at ``params``, and with their negatives.

        The first pair is of all rows of the sample, the others are of batches of them. Each
        objective caches p-by-p matrices, so a caller should not keep the pairs of all batches.
        """
        rows, kernel = self._rows, self._prediction
        values = kernel(rows.batches(kernel.batch_rows), params)[0]
        # Integers could not hold the values.
        dtype = rows.y.dtype if rows.y.dtype.kind == "f" else np.dtype(np.float64)
        other = replace(rows, y=(2.0 * values - rows.y).astype(dtype))
        yield self.objective, self._objective(other)
        n_batches = min(_MAX_BATCHES, self._model.n_params + _MORE_BATCHES)
        for i in range(n_batches):
            index = np.arange(i, self.n_used, n_batches)
            yield self._objective(rows.take(index)), self._objective(other.take(index))

    def _objective(self, rows: Rows) -> R:
        objective = self._make_objective(rows, self.y_reference)
        objective.check = self._check
        return objective

    def draw_rows(self, params: Vector, seed: int) -> tuple[Rows, Vector] | None:
        """Return random usable rows for plots, with values of the model; None if there are none.

        Evenly spaced rows would hide oscillations at a multiple of their frequency.
        """
        max_rows = max(min(_MAX_PLOT_ROWS, _MAX_PLOT_BYTES // self._model.layout.row_bytes), 1)
        indices = np.random.default_rng(seed).permutation(self.n_used)[:max_rows]
        if not indices.size:
            return None
        rows = replace(self._rows.take(np.sort(indices)), mask=None)
        kernel = self._prediction
        return rows, kernel(rows.batches(kernel.batch_rows), params)[0]

    def prepare_warmup(self, first_step: float) -> Warmup:
        """Return L-BFGS for evenly spaced rows of the sample."""
        sample = self._normalized(self._spread(min(self.n_used, _MAX_WARMUP_ROWS)))
        settings = warmup_settings(self._problem.config)
        return Warmup.build(sample, self.variance, first_step, settings)

    def prepare_halving(self) -> SuccessiveHalving:
        """Return successive halving for random rows of the sample.

        Evenly spaced rows would not distinguish a frequency from its aliases.
        """
        config = self._problem.config
        order = np.random.default_rng(config.random_seed).permutation(self.n_used)
        return SuccessiveHalving.build(
            self._normalized(order[: multistart_settings(config).max_rows])
        )

    def _normalized(self, index: NDArray[np.int64]) -> NormalizedSample:
        """Return the rows at ``index`` for the warm-up, padded by repetition to a power of two.

        Padding limits the number of shapes for which JAX compiles; padded rows do not count.
        """
        padded = np.resize(index, 1 << (len(index) - 1).bit_length())
        problem = self._problem
        return NormalizedSample(
            self._model,
            self._rows.take(padded),
            len(index),
            problem.normalizer,
            problem.loss,
            problem.penalty,
            self._fingerprint,
        )
