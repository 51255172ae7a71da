"""``Solver``: a method of phase 2, which asks for sums over the rows and is told them.

A state holds all that a solver knows, so it is what a checkpoint holds, and a reduction is all that
an iteration costs. A solver does not know where the sums come from: the sample in memory and the
whole data set are fitted by the same lines.
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
    """An accepted iterate with its sums, and what a solver remembers of the way there."""

    @property
    def params(self) -> Vector:
        """The iterate."""

    @property
    def sums(self) -> S_co:
        """The sums there."""

    @property
    def radius(self) -> float:
        """The trust radius, NaN for a solver without."""

    @property
    def iteration(self) -> int:
        """Number of trials that were judged."""

    @property
    def stop(self) -> Status | None:
        """Why the solve has ended; None before that."""

    @property
    def solution(self) -> Vector | None:
        """Where it has ended, beyond the iterate if a last step was taken without sums."""


T = TypeVar("T", bound=SolverState[Sums])


class Solver(Protocol[T, S_contra]):
    """A method, as functions of its state."""

    def init(self, params: Vector, sums: S_contra) -> T:
        """Begin at parameters whose sums are known."""

    def ask(self, state: T) -> Request:
        """Return the sums that are needed next; only where ``stop`` is None."""

    def tell(self, state: T, sums: S_contra) -> T:
        """Return the state that follows from the sums that were asked for."""

    def restart(self, state: T, params: Vector) -> T:
        """Return a state that asks for fresh sums at parameters and begins there again.

        For sums over other rows than those before, with which they must not be compared.
        """

    def resume(self, state: T) -> T:
        """Return the state of an earlier process as one of this solver, which may go on longer."""

    def end(self, state: T, stop: Status) -> T:
        """End the solve at the iterate, for a reason that comes from outside."""


def may_resume(stop: Status | None, iteration: int, max_iterations: int) -> bool:
    """Whether a solve that had ended for this reason goes on when the fit is resumed."""
    if stop is Status.ITERATION_LIMIT:
        return iteration < max_iterations
    return stop is Status.USER_STOP
