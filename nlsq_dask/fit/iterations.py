"""``Iterations``: counts iterations and reports them to observers and the callback."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.events import Event, IterationFinished, NonFiniteTrial, Observer
from nlsq_dask.model.transform import ParameterTransform

Vector = NDArray[np.float64]

Callback = Callable[[Vector, float, int], Any]


class StoppedByCallbackError(Exception):
    """The caller's callback raised StopIteration, in an iteration on the sample of rows."""

    def __init__(self, params: Vector) -> None:
        super().__init__()
        self.params = params


class Iterations:
    """Counts the iterations of all phases and reports them.

    Parameters
    ----------
    emit : callable
        Called with an ``IterationFinished`` event for each report.
    callback : callable or None
        The caller's ``callback(params, loss, iteration)``.
    frequency : int
        Number of iterations between two calls of the callback.
    transform : ParameterTransform
        From the free parameters, which the fit reports, to all, which observers and callback get.

    Attributes
    ----------
    non_finite : Counter
        Number of rejected parameter vectors with a NaN or infinite model, by stage of the fit.
    latest : ndarray, shape (p,), or None
        Free parameters of the latest report, or the solution of the sample; None before both.
    """

    def __init__(
        self,
        emit: Observer,
        callback: Callback | None,
        frequency: int,
        transform: ParameterTransform,
    ) -> None:
        self._emit = emit
        self._callback = callback
        self._frequency = frequency
        self._transform = transform
        self._count = 0
        self.non_finite: Counter[str] = Counter()
        self.latest: Vector | None = None

    def count(self, event: Event) -> None:
        """Continue the counts of an earlier run, event by event, when its fit is resumed."""
        if isinstance(event, IterationFinished):
            self._count = event.iteration
            if event.params.size:
                self.latest = event.params[self._transform.is_free]
        elif isinstance(event, NonFiniteTrial):
            self.non_finite[event.stage] += 1

    def report_non_finite(self, stage: str, params: Vector, n_rows: int) -> None:
        """Emit and count a ``NonFiniteTrial`` event, whose fields are the arguments."""
        self.non_finite[stage] += 1
        self._emit(NonFiniteTrial(stage, self._transform.expand(params), n_rows))

    def report(
        self,
        stage: str,
        params: Vector,
        loss: float,
        gradient_norm: float,
        step_norm: float,
        trust_radius: float = np.nan,
        accepted: bool = True,
        n_iterations: int = 1,
    ) -> bool:
        """Report the state after ``n_iterations`` more iterations.

        The other arguments are fields of ``IterationFinished``, and described there.

        Returns
        -------
        bool
            True if the callback has raised StopIteration, so that the fit must stop.
        """
        self._count += n_iterations
        event = IterationFinished(
            stage,
            self._count,
            n_iterations,
            self._transform.expand(params),
            loss,
            gradient_norm,
            accepted,
            step_norm,
            trust_radius,
            time.time(),
        )
        self._emit(event)
        self.latest = params
        if self._callback is None or not event.reaches_multiple(self._frequency):
            return False
        try:
            self._callback(self._transform.expand(params), loss, self._count)
        except StopIteration:
            return True
        return False
