"""Events of a fit: what happened, as objects that are passed to observers.

An observer is a function of one argument, an ``Event``. It is called with each event in order, in
the thread that called ``fit`` or ``fit_each``, and cannot change the fit.
"""

from __future__ import annotations

from nlsq_dask.events.base import Event, Observer
from nlsq_dask.events.fit import (
    ALL_ROWS,
    PHASES,
    BlocksFinished,
    BlocksMeasured,
    BlocksSkipped,
    CheckpointWritten,
    FitAborted,
    FitEnded,
    FitResumed,
    FitStarted,
    HalvingRound,
    IterationFinished,
    NonFiniteTrial,
    PassFinished,
    PhaseEnded,
    PhaseStarted,
    SampleRead,
    SampleSolved,
    SubsetFinished,
    WarmupEnded,
    WarmupStarted,
    without_many_params,
)
from nlsq_dask.events.maps import MapDrawn, MapEnded, MapResumed, MapStarted, TileFinished
from nlsq_dask.events.workers import WaitingForWorkers, WorkersPaused

# Event classes by name, to decode them.
EVENTS = {kind.__name__: kind for kind in Event.__subclasses__()}

__all__ = [
    "ALL_ROWS",
    "EVENTS",
    "PHASES",
    "BlocksFinished",
    "BlocksMeasured",
    "BlocksSkipped",
    "CheckpointWritten",
    "Event",
    "FitAborted",
    "FitEnded",
    "FitResumed",
    "FitStarted",
    "HalvingRound",
    "IterationFinished",
    "MapDrawn",
    "MapEnded",
    "MapResumed",
    "MapStarted",
    "NonFiniteTrial",
    "Observer",
    "PassFinished",
    "PhaseEnded",
    "PhaseStarted",
    "SampleRead",
    "SampleSolved",
    "SubsetFinished",
    "TileFinished",
    "WaitingForWorkers",
    "WarmupEnded",
    "WarmupStarted",
    "WorkersPaused",
    "without_many_params",
]
