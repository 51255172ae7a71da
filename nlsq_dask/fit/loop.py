"""``iterate``: the loop that runs a solver, on a sample or over all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.solvers.solver import Solver, SolverState
from nlsq_dask.status import Status

S = TypeVar("S", bound=Sums)
T = TypeVar("T", bound=SolverState[Any])

# Called with request, sums, and the states before and after; returns whether to stop.
Report = Callable[[Request, Sums, SolverState[Sums], SolverState[Sums]], bool]


def iterate(
    solver: Solver[T, S],
    state: T,
    evaluate: Callable[[Request], S | None],
    report: Report,
    remember: Callable[[T], None] = lambda state: None,
) -> T:
    """Run a solver until it ends, and return its final state.

    In each turn, the solver asks for sums, ``evaluate`` computes them, and the solver takes a step.

    Parameters
    ----------
    solver : Solver
    state : SolverState
        Initial state.
    evaluate : callable
        Returns the requested sums, or None if blocks were skipped, so that the sums cannot be
        compared with earlier ones; the solver then restarts from its last accepted point.
    report : callable
        Called after each request with the states before and after; may end the solve.
    remember : callable
        Called with each new state, to save it.
    """
    while state.stop is None:
        request = solver.ask(state)
        sums = evaluate(request)
        if sums is None:
            state = solver.restart(state, state.params)
        else:
            before, state = state, solver.tell(state, sums)
            if report(request, sums, before, state):
                state = solver.end(state, Status.USER_STOP)
        remember(state)
    return state
