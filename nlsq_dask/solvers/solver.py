"""``Solver``: interface of the methods of phase 2, with ask and tell.

A state contains everything that a solver has learned, so it can be saved in a checkpoint. Each
request costs one reduction over the rows. A solver does not know where the sums come from: the same
code fits the sample in memory and all rows.
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
    """Iterate with its sums and the history of a solve."""

    @property
    def params(self) -> Vector:
        """Parameters of the iterate."""

    @property
    def sums(self) -> S_co:
        """Sums at the iterate."""

    @property
    def radius(self) -> float:
        """Trust radius; NaN for a solver without one."""

    @property
    def iteration(self) -> int:
        """Number of trials evaluated."""

    @property
    def stop(self) -> Status | None:
        """Status of the end; None while running."""

    @property
    def solution(self) -> Vector | None:
        """Parameters at the end, beyond the iterate after a last step without sums."""


T = TypeVar("T", bound=SolverState[Sums])


class Solver(Protocol[T, S_contra]):
    """A method as functions of its state."""

    def init(self, params: Vector, sums: S_contra) -> T:
        """Return the initial state at ``params``."""

    def ask(self, state: T) -> Request:
        """Return the request for the next sums, while ``stop`` is None."""

    def tell(self, state: T, sums: S_contra) -> T:
        """Return the next state given the requested sums."""

    def restart(self, state: T, params: Vector) -> T:
        """Return a state that requests fresh sums at ``params`` and continues from there.

        Used when the set of rows has changed, so that sums are not comparable with earlier ones.
        """

    def resume(self, state: T) -> T:
        """Return a state of an earlier process with the settings of this solver."""

    def end(self, state: T, stop: Status) -> T:
        """Return the state, ended at the iterate with status ``stop``."""


def may_resume(stop: Status | None, iteration: int, max_iterations: int) -> bool:
    """Whether a solve that ended with this status continues when the fit is resumed."""
    if stop is Status.ITERATION_LIMIT:
        return iteration < max_iterations
    return stop is Status.USER_STOP
