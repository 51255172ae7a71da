"""What happens during a fit, as records; observers receive them and never change the fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.block_sums import BlockSums

PHASES = ("normalization", "L-BFGS warm-up", "Gauss-Newton", "covariance")  # by number
ALL_ROWS = "all rows"  # the stage of phase 2 in which an iteration is a pass


@dataclass(frozen=True)
class Event:
    """Base of all records.

    Attributes
    ----------
    is_transient : bool
        Whether the event is omitted from checkpoints, because it matters only while a fit runs.
    """

    is_transient: ClassVar[bool] = False


@dataclass(frozen=True)
class FitStarted(Event):
    """The arguments were understood; ``n_rows`` rows in a grid of blocks will be fitted.

    ``dims`` are the names of the grid's dimensions; ``notes`` are sentences on how the arguments
    were understood, where that may surprise.
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
    """A phase began; ``start_time`` in seconds since the epoch."""

    phase: int
    name: str
    start_time: float


@dataclass(frozen=True)
class PhaseEnded(Event):
    """A phase ended after ``duration`` seconds; ``details`` says what it did."""

    phase: int
    name: str
    duration: float
    failed: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TournamentRound(Event):
    """A round of the tournament of starts ended; ``survivors`` go on.

    ``best_loss`` is the mean squared weighted residual of the best of them over the ``rows`` of the
    round.
    """

    round: int
    rows: int
    survivors: int
    best_loss: float


@dataclass(frozen=True)
class WarmupStarted(Event):
    """Layers 1 and 2 have decided.

    ``start`` is "p0" or the "winner" of a tournament; ``mode`` is None when the warm-up is skipped:
    because the start already fits (``is_warm_start``), ``max_warmup_iterations`` is 0, or the model
    or its gradient is not finite at the start.
    """

    start: str
    relative_loss: float
    mode: str | None
    is_warm_start: bool


@dataclass(frozen=True)
class WarmupEnded(Event):
    """The L-BFGS loop ended; what layers 3 and 4 and the line search did.

    ``restarts`` times it went on from its best point with smaller steps, because something was not
    finite; what is counted is counted over all runs, each of which begins a history of its own.
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
    """Gauss-Newton on the sample ended, with this mean squared weighted residual."""

    iterations: int
    loss: float


@dataclass(frozen=True)
class IterationFinished(Event):
    """An iteration of any phase.

    Attributes
    ----------
    stage : str
        "warm-up", "sample" or "all rows".
    iteration : int
        Counted through all stages.
    n_iterations : int
        Since the last report: several in the warm-up, else one.
    params : ndarray, shape (p,)
        The current point.
    loss : float
        Its mean squared weighted residual over the rows that the stage works on.
    gradient_norm : float
        Norm of the gradient of the relative loss, in normalized parameters.
    accepted : bool
        Whether the trial became the current point.
    step_norm : float
        How far away the trial was, in normalized parameters.
    trust_radius : float
        For the next step, in parameters each of which changes the residuals' norm by one a unit;
        NaN in a stage without.
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
        """Whether a multiple of ``frequency`` was reached since the last report.

        The count itself need not be one: a warm-up may begin at any number.
        """
        return self.iteration // frequency > (self.iteration - self.n_iterations) // frequency


@dataclass(frozen=True)
class NonFiniteTrial(Event):
    """At a trial point model, derivative or cost were not finite.

    ``n_rows`` rows of finite data had a model that was not; 0 if it is the sums that were not.
    """

    stage: str
    params: NDArray[np.float64]
    n_rows: int


@dataclass(frozen=True)
class PassFinished(Event):
    """All rows were reduced once, at ``params`` with the result ``cost``.

    ``rows`` and ``bytes`` were read for it; ``rows_cached`` were in the workers' memory. What could
    not be read at once was tried again, ``retries`` times in all.
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
    """So much of a pass is done; at its start nothing, or what was done before it was cut.

    ``seconds`` it took, the time before a cut included; ``bytes`` are those of the blocks, read or
    kept from an earlier pass.
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
    """What a pass has found of the residuals of each block."""

    is_transient: ClassVar[bool] = True

    number: int
    sums: BlockSums


@dataclass(frozen=True)
class BlocksLeftOut(Event):
    """Blocks could not be read, as ``sentences`` say, and are left out from now on.

    ``rows`` are left out in all, earlier ones included. Costs from before were over more rows.
    """

    sentences: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class SampleRead(Event):
    """A few blocks were read, and rows taken from them; ``bytes`` and ``rows_read`` for it."""

    rows: int
    blocks: int
    rows_read: int
    bytes: int
    retries: int


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """The state of the fit is in a file; writing it took some seconds."""

    is_transient: ClassVar[bool] = True

    path: str
    seconds: float


@dataclass(frozen=True)
class FitResumed(Event):
    """The fit goes on from a checkpoint that was written after so many passes.

    ``started`` is what was said at its beginning; ``notes`` say what was unexpected about the
    checkpoint. ``is_within_pass`` tells that it holds a part of one more pass, of which the first
    ``BlocksFinished`` says how much.
    """

    started: FitStarted | None
    path: str
    n_passes: int
    notes: tuple[str, ...]
    is_within_pass: bool


@dataclass(frozen=True)
class FitEnded(Event):
    """The fit is over."""

    is_transient: ClassVar[bool] = True

    success: bool
    message: str


@dataclass(frozen=True)
class FitAborted(Event):
    """The fit has ended in an error."""

    is_transient: ClassVar[bool] = True

    error: str


_MANY = 1000  # parameters, of which those of every iteration would fill a record


def without_many_params(event: Event) -> Event:
    """Return the event, without its parameters if they are too many to be kept of each."""
    if isinstance(event, IterationFinished | NonFiniteTrial | PassFinished):
        return replace(event, params=event.params[:0]) if len(event.params) > _MANY else event
    return event


Observer = Callable[[Event], None]

# By name, to read them back.
EVENTS = {kind.__name__: kind for kind in Event.__subclasses__()}
