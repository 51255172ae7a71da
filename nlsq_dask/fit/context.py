"""``FitContext``: what the phases of one fit share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.events import Observer
from nlsq_dask.fit.iterations import Iterations
from nlsq_dask.fit.parameters import Parameters
from nlsq_dask.fit.passes import Passes
from nlsq_dask.fit.starts import StartFinder
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.model import Model
from nlsq_dask.status import Status
from nlsq_dask.warmup.normalize import ParameterNormalizer

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class FitContext:
    """What the phases of one fit share.

    Attributes
    ----------
    model : Model
        In the arithmetic of the passes over all rows.
    parameters : Parameters
    config : HybridStreamingConfig
    loss : Loss
    absolute_sigma : bool
    penalty : GroupVariance
    normalizer : ParameterNormalizer
    passes : Passes
    iterations : Iterations
    start_finder : StartFinder
    emit : callable
        Receives every event.
    journal : Journal
    sample_rows : int
        Wanted for the sample.
    piece_rows : int
        Rows that a kernel is given at once.
    platforms : tuple of str
        Of the workers.
    """

    model: Model
    parameters: Parameters
    config: HybridStreamingConfig
    loss: Loss
    absolute_sigma: bool
    penalty: GroupVariance
    normalizer: ParameterNormalizer
    passes: Passes
    iterations: Iterations
    start_finder: StartFinder
    emit: Observer
    journal: Journal
    sample_rows: int
    piece_rows: int
    platforms: tuple[str, ...]

    @property
    def exact_model(self) -> Model:
        """The model in float64, as it is evaluated on the sample."""
        return replace(self.model, dtype="float64")

    @property
    def is_exact(self) -> bool:
        """Whether all rows are evaluated in float64, too."""
        return self.model.dtype == "float64"


def may_go_on(stop: Status | None, iteration: int, max_iterations: int) -> bool:
    """Whether a solve that had ended for this reason goes on when the fit is resumed."""
    if stop is Status.ITERATION_LIMIT:
        return iteration < max_iterations
    return stop is Status.USER_STOP


@dataclass(frozen=True)
class Solved:
    """Where phase 2 has ended.

    Attributes
    ----------
    params : ndarray, shape (p,)
    stop : Status
    sums : Sums
        Over all rows, at ``sums_at``.
    sums_at : ndarray, shape (p,)
        Differs from ``params`` if a last step was taken without a pass.
    iterations : int
    undetermined : ndarray of bool, shape (p,), or None
        Parameters that the data are known not to determine, where no covariance says so.
    """

    params: Vector
    stop: Status
    sums: Sums
    sums_at: Vector
    iterations: int
    undetermined: NDArray[np.bool_] | None = None
