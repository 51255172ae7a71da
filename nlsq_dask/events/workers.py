"""Events on the workers of a cluster, of ``fit`` and ``fit_each``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nlsq_dask.events.base import Event


@dataclass(frozen=True)
class WaitingForWorkers(Event):
    """No worker runs tasks; emitted after a second without one, then every 30 seconds.

    Attributes
    ----------
    seconds : float
        Time without a worker that runs tasks.
    scheduler : str
        Address of the scheduler.
    n_paused : int
        Number of workers, all of which are paused because their memory is almost full; 0 if the
        cluster has no workers.
    n_requested : int or None
        Number of workers that were requested from the cluster object of the client; None if it is
        not known.
    n_tasks : int
        Number of tasks of the client that are not finished.
    """

    is_transient: ClassVar[bool] = True

    seconds: float
    scheduler: str
    n_paused: int
    n_requested: int | None
    n_tasks: int


@dataclass(frozen=True)
class WorkersPaused(Event):
    """Workers stay paused: their memory is almost full, so that they begin no tasks.

    Attributes
    ----------
    sentences : tuple of str
        One sentence per worker, with its address, its memory and the limit. Each worker is
        reported once.
    """

    is_transient: ClassVar[bool] = True

    sentences: tuple[str, ...]
