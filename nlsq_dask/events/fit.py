"""Events of ``fit``: one fit to all rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.events.base import Event

PHASES = ("normalization", "L-BFGS warm-up", "Gauss-Newton", "covariance")  # by number
ALL_ROWS = "all rows"  # the stage in which each iteration takes a pass over the data


@dataclass(frozen=True)
class FitStarted(Event):
    """The arguments were validated and the fit begins.

    Attributes
    ----------
    model : str
        Name of the model.
    n_rows : int
        Number of rows to fit.
    grid : tuple of int
        Number of blocks along each dimension.
    dims, param_names : tuple of str
        Names of the dimensions of y, and of the parameters.
    notes : tuple of str
        Sentences on what the caller may not expect, such as how dates are converted to numbers.
    """

    model: str
    n_rows: int
    grid: tuple[int, ...]
    dims: tuple[str, ...]
    param_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase began: normalization (0), L-BFGS warm-up (1), Gauss-Newton (2) or covariance (3).

    ``start_time`` is in seconds since 1970.
    """

    phase: int
    name: str
    start_time: float


@dataclass(frozen=True)
class PhaseEnded(Event):
    """A phase of ``PhaseStarted`` ended after ``duration`` seconds, in an error if it ``failed``.

    ``details`` are facts that are added to its entry in ``FitResult.phase_history``.
    """

    phase: int
    name: str
    duration: float
    failed: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HalvingRound(Event):
    """A round of multistart ended: the worst starting points were dropped (successive halving).

    Attributes
    ----------
    round : int
        Number of the round, counted from 1.
    rows, n_remaining : int
        Number of rows on which starting points were compared, and of points that remain.
    best_loss : float
        Mean squared weighted residual at the best starting point, over ``rows`` rows.
    """

    round: int
    rows: int
    n_remaining: int
    best_loss: float


@dataclass(frozen=True)
class WarmupStarted(Event):
    """The L-BFGS warm-up from a starting point began or was skipped.

    Defense layer 1 skips the warm-up from a good start; layer 2 chooses the size of the first step.

    Attributes
    ----------
    start : str
        Starting point: "p0", or "winner" for the best one of multistart.
    relative_loss : float
        Mean squared weighted residual at the start, relative to the variance of y.
    mode : str or None
        Choice of the first step size: "refinement", "careful", "exploration" or "fixed". None if
        the warm-up is skipped, because the start is already good, ``max_warmup_iterations`` is 0,
        or the model or its gradient is not finite at the start.
    is_warm_start : bool
        True if the warm-up is skipped because the start is already good.
    """

    start: str
    relative_loss: float
    mode: str | None
    is_warm_start: bool


@dataclass(frozen=True)
class WarmupEnded(Event):
    """The L-BFGS warm-up from a starting point ended.

    Attributes
    ----------
    reason : str
        Criterion that ended the warm-up.
    iterations : int
        Number of L-BFGS iterations, restarts included.
    loss : float
        Mean squared weighted residual at the best point.
    cost_guard : bool
        True if defense layer 3 ended the warm-up, because the loss grew.
    clipped, line_search_failures : int
        Number of steps that defense layer 4 shortened, and of line searches that failed.
    history_filled : bool
        True if L-BFGS stored as many earlier steps as its history holds.
    restarts : int
        Number of restarts from the best point, with smaller steps, after the model was not finite.
    """

    reason: str
    iterations: int
    loss: float
    cost_guard: bool
    clipped: int
    line_search_failures: int
    history_filled: bool
    restarts: int


@dataclass(frozen=True)
class SampleSolved(Event):
    """Gauss-Newton on the sample of rows in memory ended.

    ``loss`` is the mean squared weighted residual over the sample.
    """

    iterations: int
    loss: float


@dataclass(frozen=True)
class IterationFinished(Event):
    """An iteration of any phase ended.

    Attributes
    ----------
    stage : str
        "warm-up", "sample" or "all rows".
    iteration : int
        Number of the iteration; counting continues from stage to stage.
    n_iterations : int
        Number of iterations that this event reports: several in the warm-up, otherwise one.
    params : ndarray, shape (p,)
        Current parameters.
    loss : float
        Mean squared weighted residual over the rows of the stage.
    gradient_norm : float
        Norm of the gradient, in normalized parameters, of the loss relative to the variance of y.
    accepted : bool
        True if the trial point became the current point.
    step_norm : float
        Distance from the previous point to the trial point, in normalized parameters.
    trust_radius : float
        Radius of the trust region for the next step, in parameters scaled so that a unit of each
        changes the norm of the residuals by one; NaN in a stage without a trust region.
    time : float
        Seconds since 1970.
    """

    stage: str
    iteration: int
    n_iterations: int
    params: NDArray[np.float64]
    loss: float
    gradient_norm: float
    accepted: bool
    step_norm: float
    trust_radius: float
    time: float

    def reaches_multiple(self, frequency: int) -> bool:
        """Return whether an iteration in this event has a number that ``frequency`` divides."""
        return self.iteration // frequency > (self.iteration - self.n_iterations) // frequency


@dataclass(frozen=True)
class NonFiniteTrial(Event):
    """The model, a derivative or the cost was not finite at a trial point.

    Attributes
    ----------
    stage : str
        "warm-up", "sample" or "all rows".
    params : ndarray, shape (p,)
        The trial point.
    n_rows : int
        Number of rows at which the model was not finite although the data are; 0 if the model was
        finite at every row but a sum over rows was not.
    """

    stage: str
    params: NDArray[np.float64]
    n_rows: int


@dataclass(frozen=True)
class PassFinished(Event):
    """A pass over all rows ended.

    Attributes
    ----------
    number : int
        Number of the pass, counted from 1.
    params : ndarray, shape (p,)
        Parameters at which the pass evaluated the model.
    cost : float
        Cost at ``params``, as defined in ``FitResult``; infinite if the model was not finite.
    seconds : float
        Duration of the pass.
    rows, bytes : int
        Number of rows and bytes read from the source.
    rows_cached : int
        Number of rows taken from the cache in the memory of the workers instead.
    retries : int
        Number of reads that were retried.
    """

    number: int
    params: NDArray[np.float64]
    cost: float
    seconds: float
    rows: int
    bytes: int
    rows_cached: int
    retries: int = 0


@dataclass(frozen=True)
class SubsetFinished(Event):
    """A pass over a subset of the blocks ended, which brings the fit closer to the solution.

    Attributes
    ----------
    number, n_subsets : int
        Number of the subset, counted from 1, and number of subsets.
    blocks : int
        Number of blocks in the subset.
    params : ndarray, shape (p,)
        Parameters at which the pass evaluated the model.
    loss : float
        Mean squared weighted residual over the rows of the subset at ``params``; infinite if the
        model was not finite, or rows were invalid.
    seconds : float
        Duration of the pass.
    rows, bytes : int
        Number of rows and bytes read from the source.
    rows_cached : int
        Number of rows taken from the cache in the memory of the workers instead.
    retries : int
        Number of reads that were retried.
    """

    number: int
    n_subsets: int
    blocks: int
    params: NDArray[np.float64]
    loss: float
    seconds: float
    rows: int
    bytes: int
    rows_cached: int
    retries: int = 0


@dataclass(frozen=True)
class BlocksFinished(Event):
    """Some blocks of the running pass are complete; also emitted at the start of a pass.

    Attributes
    ----------
    number : int
        Number of the pass.
    blocks, n_blocks : int
        Number of complete blocks, and of all blocks. If the pass was interrupted and resumed,
        blocks that were complete before the interruption count.
    rows, n_rows : int
        Number of rows in the complete blocks, and in all blocks.
    bytes : int
        Size of the complete blocks, read or cached.
    seconds : float
        Duration of the pass so far, including the time before an interruption.
    subset : int
        Number of the subset of the blocks over which the pass sums, counted from 1; 0 for a pass
        over all rows.
    """

    is_transient: ClassVar[bool] = True

    number: int
    blocks: int
    n_blocks: int
    rows: int
    n_rows: int
    bytes: int
    seconds: float
    subset: int = 0


@dataclass(frozen=True)
class BlocksMeasured(Event):
    """Statistics of the residuals of each block, computed by a pass.

    Attributes
    ----------
    number : int
        Number of the pass.
    index : ndarray of int, shape (m,)
        Flat index of each block in the grid.
    chi2 : ndarray, shape (m,)
        Sum of squared weighted residuals.
    n_used : ndarray of int, shape (m,)
        Number of rows used.
    largest : ndarray, shape (m,)
        Largest absolute weighted residual.
    """

    is_transient: ClassVar[bool] = True

    number: int
    index: NDArray[np.int64]
    chi2: NDArray[np.float64]
    n_used: NDArray[np.int64]
    largest: NDArray[np.float64]


@dataclass(frozen=True)
class BlocksSkipped(Event):
    """Blocks could not be read and are skipped from now on.

    Costs of earlier passes include the rows of these blocks, so they cannot be compared with later
    costs.

    Attributes
    ----------
    sentences : tuple of str
        One sentence per block, with its position and the error.
    rows : int
        Number of rows skipped in this fit so far.
    """

    sentences: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class SampleRead(Event):
    """A random sample of rows was read into memory, from some of the blocks.

    Attributes
    ----------
    rows : int
        Number of rows in the sample.
    blocks : int
        Number of blocks that were read.
    rows_read, bytes, retries : int
        Number of rows and bytes read, as blocks are read as a whole, and of repeated reads.
    """

    rows: int
    blocks: int
    rows_read: int
    bytes: int
    retries: int


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint was written to ``path``, in ``seconds``, while the fit continued.

    ``n_failed`` is the number of checkpoints that could not be written just before.
    """

    is_transient: ClassVar[bool] = True

    path: str
    seconds: float
    n_failed: int = 0


@dataclass(frozen=True)
class FitResumed(Event):
    """The fit was resumed from a checkpoint.

    Attributes
    ----------
    started : FitStarted or None
        First event of the fit, from before the interruption; None if it was not saved.
    path : str
        Path of the checkpoint.
    n_passes : int
        Number of complete passes in the checkpoint.
    notes : tuple of str
        Warnings about the checkpoint, such as other versions of libraries.
    is_within_pass : bool
        True if the checkpoint holds results of a partly complete pass, which continues. The first
        ``BlocksFinished`` event then has the number of complete blocks.
    """

    started: FitStarted | None
    path: str
    n_passes: int
    notes: tuple[str, ...]
    is_within_pass: bool


@dataclass(frozen=True)
class FitEnded(Event):
    """The fit ended and returns a ``FitResult`` with this ``success`` and ``message``."""

    is_transient: ClassVar[bool] = True

    success: bool
    message: str


@dataclass(frozen=True)
class FitAborted(Event):
    """The fit ended with an exception.

    Attributes
    ----------
    error : str
        Type and message of the exception.
    is_map : bool
        True for ``fit_each``.
    """

    is_transient: ClassVar[bool] = True

    error: str
    is_map: bool = False


_MANY = 1000  # parameters; more are not recorded at every iteration, to save memory


def without_many_params(event: Event) -> Event:
    """Return the event, or a copy with empty ``params`` if it has more than 1,000."""
    if isinstance(event, IterationFinished | NonFiniteTrial | PassFinished | SubsetFinished):
        return replace(event, params=event.params[:0]) if len(event.params) > _MANY else event
    return event
