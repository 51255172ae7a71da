"""``FitContext``: objects shared by the phases of a fit."""

from __future__ import annotations

from dataclasses import dataclass

from nlsq_dask.checkpoints.journal import Journal
from nlsq_dask.events import Observer
from nlsq_dask.fit.iterations import Iterations
from nlsq_dask.fit.passes import Passes
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.fit.starts import StartFinder


@dataclass(frozen=True)
class FitContext:
    """Objects shared by the phases of a fit."""

    problem: FitProblem
    passes: Passes
    iterations: Iterations
    start_finder: StartFinder
    emit: Observer
    journal: Journal
    batch_rows: int  # rows per kernel call
    platforms: tuple[str, ...]  # of the workers
