"""``Solver``: interface of the methods that minimize the cost, such as ``GaussNewton``.

A solver does not compute sums over the rows. It is asked which sums it needs, and gets them: the
same code fits a sample in memory and all rows. Everything that it has learned is in its state,
which is saved in checkpoints.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
S_contra = TypeVar("S_contra", bound=Sums, contravariant=True)
S_co = TypeVar("S_co", bound=Sums, covariant=True)


class SolverState(Protocol[S_co]):
    """Attributes that all states of solvers have."""

    @property
    def params(self) -> Vector:
        """Parameters that were accepted last."""

    @property
    def sums(self) -> S_co:
        """Sums over the rows at ``params``."""

    @property
    def radius(self) -> float:
        """Trust radius; NaN for a solver without one."""

    @property
    def iteration(self) -> int:
        """Number of trial points evaluated."""

    @property
    def stop(self) -> Status | None:
        """Why the solve ended; None while it runs."""

    @property
    def solution(self) -> Vector | None:
        """Parameters at the end: ``params``, or one step further, at which there are no sums."""


T = TypeVar("T", bound=SolverState[Sums])


class Solver(Protocol[T, S_contra]):
    """A minimization method, as functions from state to state."""

    def init(self, params: Vector, sums: S_contra) -> T:
        """Return the state at the start, given the sums at ``params``."""

    def ask(self, state: T) -> Request:
        """Return which sums are needed next; only called while ``stop`` is None."""

    def tell(self, state: T, sums: S_contra) -> T:
        """Return the next state, given the sums that were asked for."""

    def restart(self, state: T, params: Vector) -> T:
        """Return a state that asks for the sums at ``params`` and continues from there.

        It is called after a block was skipped, because earlier sums contain the rows of the block.
        """

    def resume(self, state: T) -> T:
        """Prepare a state that was read from a checkpoint for the resumed fit.

        It is adapted to the settings of this solver. A solve continues if the callback ended it, or
        an iteration limit that is higher now.
        """

    def end(self, state: T, stop: Status) -> T:
        """Return the state, ended with status ``stop`` at the last accepted parameters."""


def may_resume(stop: Status | None, iteration: int, max_iterations: int) -> bool:
    """Whether a solve with this status continues when its fit is resumed from a checkpoint.

    It continues if the callback ended it, or an iteration limit that is higher now.
    """
    if stop is Status.ITERATION_LIMIT:
        return iteration < max_iterations
    return stop is Status.USER_STOP
