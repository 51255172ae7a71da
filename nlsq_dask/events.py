"""What happens during a fit, as records; observers receive them and never change the fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Event:
    """Base of all records."""


@dataclass(frozen=True)
class FitStarted(Event):
    """The arguments were understood; ``n_rows`` rows in ``n_blocks`` blocks will be fitted."""

    n_rows: int
    n_blocks: int
    param_names: tuple[str, ...]


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

    ``start`` is "p0" or the "winner" of a tournament; ``mode`` is None when the warm-up is skipped
    because the start already fits.
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

    ``loss`` is the mean squared weighted residual over the rows that ``stage`` works on, and
    ``accepted`` whether the trial became the current point.
    """

    stage: str
    iteration: int
    params: NDArray[np.float64]
    loss: float
    gradient_norm: float
    accepted: bool


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

    path: str
    seconds: float


@dataclass(frozen=True)
class FitResumed(Event):
    """The fit goes on from a checkpoint that was written after so many passes.

    ``notes`` say what was unexpected about it.
    """

    path: str
    n_passes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FitEnded(Event):
    """The fit is over."""

    success: bool
    message: str


Observer = Callable[[Event], None]

# By name, to read them back.
EVENTS = {kind.__name__: kind for kind in Event.__subclasses__()}
