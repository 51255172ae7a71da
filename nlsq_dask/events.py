"""Events of a fit: records that observers receive.

An observer is a callable with one argument, an ``Event``. It is called in the thread that called
``fit``, with each event in order, and cannot change the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

PHASES = ("normalization", "L-BFGS warm-up", "Gauss-Newton", "covariance")  # by number
ALL_ROWS = "all rows"  # the stage of phase 2 in which an iteration is a pass


@dataclass(frozen=True)
class Event:
    """Base class of all events; their arrays are read-only.

    Attributes
    ----------
    is_transient : bool
        True if the event matters only while a fit runs; it is omitted from checkpoints.
    """

    is_transient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                read_only = value.view()
                read_only.flags.writeable = False
                object.__setattr__(self, name, read_only)


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
    dims : tuple of str
        Names of the dimensions.
    notes : tuple of str
        Sentences on unexpected interpretations of the arguments.
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
    """A phase, 0 to 3, began at ``start_time``, in seconds since the epoch."""

    phase: int
    name: str
    start_time: float


@dataclass(frozen=True)
class PhaseEnded(Event):
    """A phase ended.

    Attributes
    ----------
    duration : float
        Seconds.
    failed : bool
        True if the phase ended in an error.
    details : dict
        What the phase did, as in ``FitResult.phase_history``.
    """

    phase: int
    name: str
    duration: float
    failed: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HalvingRound(Event):
    """A round of successive halving over the candidate starts ended.

    Attributes
    ----------
    round : int
        Counted from 1.
    rows : int
        Number of rows of the minibatch.
    n_remaining : int
        Number of candidates that remain.
    best_loss : float
        Mean squared weighted residual of the best candidate over these rows.
    """

    round: int
    rows: int
    n_remaining: int
    best_loss: float


@dataclass(frozen=True)
class WarmupStarted(Event):
    """The warm-up of a start began or was skipped, as layers 1 and 2 decided.

    Attributes
    ----------
    start : str
        "p0", or "winner" of the successive halving.
    relative_loss : float
        Mean squared weighted residual at the start, relative to the variance of y.
    mode : str or None
        Choice of the first step size: "refinement", "careful", "exploration" or "fixed". None if
        the warm-up is skipped, because the start already fits, ``max_warmup_iterations`` is 0, or
        the model or its gradient is not finite at the start.
    is_warm_start : bool
        True if the warm-up is skipped because the start already fits.
    """

    start: str
    relative_loss: float
    mode: str | None
    is_warm_start: bool


@dataclass(frozen=True)
class WarmupEnded(Event):
    """The warm-up of a start ended.

    Attributes
    ----------
    reason : str
        The criterion that ended it.
    iterations : int
        Number of L-BFGS iterations, restarts included.
    loss : float
        Mean squared weighted residual at the best point.
    cost_guard : bool
        True if layer 3 ended the warm-up.
    clipped : int
        Number of updates clipped by layer 4.
    history_filled : bool
        True if the history of L-BFGS was filled.
    restarts : int
        Number of restarts from the best point, with smaller steps, after a value that was not
        finite.
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
    """Gauss-Newton on the sample ended; ``loss`` is its mean squared weighted residual."""

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
        Number of the iteration, counted through all stages.
    n_iterations : int
        Number of iterations since the last event: several in the warm-up, otherwise one.
    params : ndarray, shape (p,)
        Current parameters.
    loss : float
        Mean squared weighted residual over the rows of the stage.
    gradient_norm : float
        Norm of the gradient of the relative loss in normalized parameters.
    accepted : bool
        True if the trial point was accepted.
    step_norm : float
        Distance of the trial point in normalized parameters.
    trust_radius : float
        Radius of the trust region for the next step, in parameters scaled so that a unit of each
        changes the norm of the residuals by one; NaN in a stage without a trust region.
    time : float
        Seconds since the epoch.
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
        """Return whether a multiple of ``frequency`` was reached since the last event."""
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
        Number of rows with finite data at which the model was not finite; 0 if only sums were not.
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
        Counted from 1.
    params : ndarray, shape (p,)
        Parameters at which the sums were computed.
    cost : float
        Half the sum of squared weighted residuals, or of their losses; infinite if not finite.
    rows, bytes : int
        Rows and bytes read from the source.
    rows_cached : int
        Rows taken from the memory of the workers.
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
class BlocksFinished(Event):
    """Some blocks of the running pass are complete; also emitted at the start of a pass.

    Attributes
    ----------
    number : int
        Number of the pass.
    blocks, n_blocks : int
        Complete blocks, those of an interrupted pass included, and all blocks.
    rows, n_rows : int
        Likewise for rows.
    bytes : int
        Size of the complete blocks, read or cached.
    seconds : float
        Duration of the pass so far, the time before an interruption included.
    """

    is_transient: ClassVar[bool] = True

    number: int
    blocks: int
    n_blocks: int
    rows: int
    n_rows: int
    bytes: int
    seconds: float


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

    Costs of earlier passes were over more rows.

    Attributes
    ----------
    sentences : tuple of str
        The error of each block.
    rows : int
        Number of rows skipped, earlier ones included.
    """

    sentences: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class SampleRead(Event):
    """The sample was read from a few blocks.

    Attributes
    ----------
    rows : int
        Number of rows in the sample.
    blocks : int
        Number of blocks that were read.
    rows_read, bytes : int
        Rows and bytes read from the source.
    retries : int
        Number of reads that were retried.
    """

    rows: int
    blocks: int
    rows_read: int
    bytes: int
    retries: int


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint was written to ``path``; saving took ``seconds``."""

    is_transient: ClassVar[bool] = True

    path: str
    seconds: float


@dataclass(frozen=True)
class FitResumed(Event):
    """The fit was resumed from a checkpoint.

    Attributes
    ----------
    started : FitStarted or None
        The first event of the fit.
    path : str
        Path of the checkpoint.
    n_passes : int
        Number of passes that are complete.
    notes : tuple of str
        Sentences on what is unexpected about the checkpoint.
    is_within_pass : bool
        True if a further pass is partly complete; the first ``BlocksFinished`` says how far.
    """

    started: FitStarted | None
    path: str
    n_passes: int
    notes: tuple[str, ...]
    is_within_pass: bool


@dataclass(frozen=True)
class FitEnded(Event):
    """The fit ended with a result, whose ``success`` and ``message`` these are."""

    is_transient: ClassVar[bool] = True

    success: bool
    message: str


@dataclass(frozen=True)
class FitAborted(Event):
    """The fit ended in an exception, whose type and message are ``error``."""

    is_transient: ClassVar[bool] = True

    error: str


_MANY = 1000  # parameters, too many to record at every iteration


def without_many_params(event: Event) -> Event:
    """Return the event, without its parameters if they are many."""
    if isinstance(event, IterationFinished | NonFiniteTrial | PassFinished):
        return replace(event, params=event.params[:0]) if len(event.params) > _MANY else event
    return event


Observer = Callable[[Event], None]

# Event classes by name, to decode them.
EVENTS = {kind.__name__: kind for kind in Event.__subclasses__()}
