"""``Status``: the reasons why a fit ends, each with a code and a message for the user."""

from __future__ import annotations

from enum import Enum
from typing import Self

FIX_EXAMPLE = "such as fixed={'b': 2.0}"
# Instead of the sentence of LAST_STEP, if the step followed the first pass over all rows.
ONE_PASS = (
    "Converged: after the last step, the distance from the minimum is about {:.1g} standard errors "
    "or less, below what `gauss_newton_tol` allows. That step took no pass over the data; grad and "
    "block_statistics are those before this step."
)


class Status(Enum):
    """Reason why a fit ended, with a status code (positive for success) and sentences for it."""

    cause: str  # what happened
    remedy: str  # what to do about it, empty for a success

    def __new__(cls, code: int, cause: str, remedy: str = "") -> Self:
        """Create a member of the enumeration; its value is the code."""
        member = object.__new__(cls)
        member._value_ = code
        member.cause, member.remedy = cause, remedy
        return member

    REDUCTION = (
        2,
        "Converged: the predicted relative reduction of the cost is below `gauss_newton_tol`.",
    )
    STEP = (3, "Converged: the predicted relative step is below `gauss_newton_tol`.")
    LAST_STEP = (
        4,
        "Converged: the estimated error after the last step is below `gauss_newton_tol`. That step "
        "took no pass over the data; cost and grad are those before this step.",
    )
    FLOOR = (
        1,
        "Converged: the predicted reduction of the cost and the predicted step are below the "
        "floating-point resolution (rounding errors) for this number of rows.",
    )
    ITERATION_LIMIT = (
        0,
        "Not converged: `gauss_newton_max_iterations` was reached.",
        "Start closer to the solution or raise the limit.",
    )
    SLOW_PROGRESS = (
        -7,
        "Not converged: slow progress; each of many short steps along a curved or flat valley "
        "reduced the cost a little, and more would do so.",
        "Raise `gauss_newton_max_iterations` (the steps that are allowed without much progress "
        f"increase with it), start closer to the solution, fix one of the parameters "
        f"({FIX_EXAMPLE}), or rewrite the model in less correlated parameters.",
    )
    STUCK = (
        -10,
        "Not converged: no progress; many short steps along a curved or flat valley have left "
        "five digits of the cost unchanged, and more of them would hardly help.",
        f"Start elsewhere, fix one of the parameters ({FIX_EXAMPLE}), or rewrite the model in less "
        "correlated parameters.",
    )
    STALLED = (
        -1,
        "Not converged: no step reduces the cost although the gradient is not zero.",
        "Check that the model is smooth and that the data constrain its parameters, or try another "
        "start.",
    )
    NO_SENSITIVITY = (
        -5,
        "Not converged: the model is insensitive to some of its parameters, so they cannot be "
        "estimated.",
        f"Start them closer to the solution, remove them or fix them ({FIX_EXAMPLE}).",
    )
    ILL_CONDITIONED = (
        -6,
        "Not converged: the problem is ill-conditioned; float64 cannot resolve the minimum along a "
        "flat valley of the cost.",
        f"Remove or fix one parameter that the data do not constrain ({FIX_EXAMPLE}), or center "
        "and scale x.",
    )
    NON_FINITE_START = (
        -2,
        "Not converged: the model or its derivative is not finite at the start.",
        "Choose another p0, or bounds within which the model is defined.",
    )
    NON_FINITE_STEP = (
        -3,
        "Not converged: the model or its derivative is not finite at any trial point.",
        "Set bounds within which the model is defined.",
    )
    WALLTIME = (-8, "Stopped: `max_walltime` was reached; the parameters are the best so far.")
    TERMINATED = (-9, "Stopped by SIGTERM; the parameters are the best so far.")
    NO_PROGRESS = (
        -11,
        "Stopped: `max_walltime` was reached before this call could add anything to the "
        "checkpoints; the parameters are the best so far.",
        "Resuming would do the same work again: allow more time, or correct `checkpoint_dir` if a "
        "warning says that it could not be written.",
    )
    USER_STOP = (-4, "Stopped by the callback; the parameters are the best so far.")

    @property
    def code(self) -> int:
        """Status code of ``FitResult``; positive for success, as in SciPy."""
        return int(self.value)

    @property
    def is_success(self) -> bool:
        """Whether the fit converged."""
        return self.code > 0

    @property
    def suggests_another_start(self) -> bool:
        """Whether another p0 may help, because p0 may be too far from the solution."""
        return self in (
            Status.ITERATION_LIMIT,
            Status.SLOW_PROGRESS,
            Status.STUCK,
            Status.STALLED,
            Status.NO_SENSITIVITY,
        )

    @property
    def is_interruption(self) -> bool:
        """Whether ``max_walltime`` or SIGTERM ended the fit, which can then be resumed."""
        return self in (Status.WALLTIME, Status.TERMINATED, Status.NO_PROGRESS)
