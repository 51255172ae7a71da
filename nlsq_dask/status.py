"""``Status``: every way in which a fit can end, with the message that the user reads."""

from __future__ import annotations

from enum import Enum
from typing import Self

_FIX_EXAMPLE = "such as b at 2: lambda x, a, c: model(x, a, 2.0, c)"


class Status(Enum):
    """Why a fit ended: a status as SciPy counts (positive for success) and a message."""

    message: str

    def __new__(cls, code: int, message: str) -> Self:
        """Make a member whose value is its status."""
        member = object.__new__(cls)
        member._value_ = code
        member.message = message
        return member

    REDUCTION = (2, "Converged: the reduction of the cost that is left is below gauss_newton_tol.")
    STEP = (3, "Converged: the step that is left is below gauss_newton_tol.")
    LAST_STEP = (
        4,
        "Converged: the last step was taken without another pass, because the error that it "
        "leaves is below gauss_newton_tol; cost and grad stand at the point before it.",
    )
    FLOOR = (
        1,
        "Converged: reduction and step that are left are below what floating point can resolve "
        "for this number of rows.",
    )
    ITERATION_LIMIT = (
        0,
        "Not converged: gauss_newton_max_iterations was reached. Start closer to the solution, or "
        "raise the limit.",
    )
    SLOW_PROGRESS = (
        -7,
        "Not converged: the steps along a curved or flat valley have become so short that many of "
        "them brought hardly anything. Start closer to the solution, fix one of the parameters "
        f"({_FIX_EXAMPLE}), or write the model in parameters that depend less on each other.",
    )
    STALLED = (
        -1,
        "Not converged: no step reduces the cost any more, though the gradient says that one "
        "should. Check that the model is smooth, that its parameters can be told apart by the "
        "data, and try another start.",
    )
    NO_SENSITIVITY = (
        -5,
        "Not converged: at this point the model does not react to some of its parameters, so "
        "nothing can be said of them. Start them closer to the solution, leave them out, or fix "
        f"them ({_FIX_EXAMPLE}).",
    )
    ILL_CONDITIONED = (
        -6,
        "Not converged: the parameters lie in a valley so flat that float64 cannot tell where its "
        "lowest point is. Leave out or fix one of the parameters that are not determined "
        f"({_FIX_EXAMPLE}), or measure x from its mean and in units of its spread.",
    )
    NON_FINITE_START = (
        -2,
        "Not converged: the model or its derivative is not finite at the start. Choose another "
        "p0, or bounds that keep the parameters where the model is defined.",
    )
    NON_FINITE_STEP = (
        -3,
        "Not converged: the model or its derivative is not finite at every point that was tried "
        "from here. Set bounds that keep the parameters where the model is defined.",
    )
    WALLTIME = (-8, "Stopped: max_walltime was reached; the parameters are the best ones so far.")
    TERMINATED = (-9, "Stopped by SIGTERM; the parameters are the best ones so far.")
    USER_STOP = (-4, "Stopped by the callback; the parameters are the best ones so far.")

    @property
    def code(self) -> int:
        """Positive for success, as SciPy counts."""
        return int(self.value)

    @property
    def is_success(self) -> bool:
        """Whether the parameters are a solution."""
        return self.code > 0

    @property
    def suggests_another_start(self) -> bool:
        """Whether a start that is far off is a likely cause."""
        return self in (
            Status.ITERATION_LIMIT,
            Status.SLOW_PROGRESS,
            Status.STALLED,
            Status.NO_SENSITIVITY,
        )

    @property
    def is_interruption(self) -> bool:
        """Whether the fit was ended from outside and can go on."""
        return self in (Status.WALLTIME, Status.TERMINATED)
