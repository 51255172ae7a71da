"""``Outcome``: parameters, status and statistics at the end of a fit."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.engine.block_sums import BlockSums
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.model import Mode
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers.covariance import Covariance
from nlsq_dask.status import Status

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class ReadCounts:
    """Number of passes over all rows, and amount of data read."""

    n_passes: int = 0
    rows_read: int = 0
    bytes_read: int = 0
    rows_cached: int = 0  # rows used from the memory of the workers, not read
    retries: int = 0  # of failed reads

    def __add__(self, other: ReadCounts) -> ReadCounts:
        return ReadCounts(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class UndefinedPoint:
    """Parameters at which the model or its derivative is not finite, with the pass there."""

    params: Vector
    sums: Sums
    blocks: BlockSums | None


@dataclass(frozen=True)
class Outcome:
    """State at the end of a fit. The solver sets the first fields, later phases the others."""

    params: Vector  # the parameters reached, shape (p,)
    stop: Status  # why the fit ended
    sums: Sums | None = None  # over all rows; None before the first pass
    sums_at: Vector | None = None  # parameters at which ``sums`` are computed
    blocks: BlockSums | None = None  # statistics of each block, at ``sums_at``
    iterations: int = 0  # of Gauss-Newton over all rows
    covariance: Covariance | None = None
    # Standard errors and non-identifiable parameters, if not from the covariance.
    errors: Vector | None = None
    non_identifiable: NDArray[np.bool_] | None = None
    # Estimated distance from the minimum, in standard errors, after a single pass over all rows.
    step_error: float | None = None
    cause: str = ""  # message that takes the place of that of ``stop``, where more is known
    mode: Mode | None = None  # of differentiation, if not the preferred one
    counts: ReadCounts = ReadCounts()
    checkpoint: str | None = None  # path to resume from
    diagnostics: dict[str, Any] = field(default_factory=dict)
    sample: tuple[Rows, Vector] | None = None  # usable rows and the model values, for plots
    # Which parameters change with the free ones, shape (p,); None before ``expanded``.
    varies: NDArray[np.bool_] | None = None

    def expanded(self, transform: ParameterTransform) -> Outcome:
        """Return the outcome of the free parameters as one of all parameters.

        Fixed parameters have errors of zero; those of tied ones follow from their derivatives by
        the free ones (delta method). ``sums`` remain those of the free parameters.
        """
        if transform.is_identity:
            return replace(self, varies=np.ones(len(self.params), bool))
        rates = transform.rates(self.params)
        varies = transform.scatter(np.ones(transform.n_free, bool), tied=(rates != 0.0).any(axis=1))
        changes: dict[str, Any] = {}
        if self.covariance is not None:
            changes["covariance"] = _expanded(self.covariance, transform, rates, varies)
        if self.errors is not None:
            changes["errors"] = transform.scatter(self.errors)
        if self.non_identifiable is not None:
            changes["non_identifiable"] = transform.scatter(self.non_identifiable)
        if self.sums_at is not None:
            changes["sums_at"] = transform.expand(self.sums_at)
        diagnostics = dict(self.diagnostics)
        for name in ("candidates", "start"):
            if name in diagnostics.get("multistart", {}):
                multistart = diagnostics["multistart"]
                points = transform.expand(multistart[name])
                diagnostics["multistart"] = {**multistart, name: points}
        return replace(
            self,
            params=transform.expand(self.params),
            diagnostics=diagnostics,
            varies=varies,
            **changes,
        )


def _expanded(
    covariance: Covariance,
    transform: ParameterTransform,
    rates: NDArray[np.float64],
    varies: NDArray[np.bool_],
) -> Covariance:
    """Return the covariance of all parameters, with ``root`` padded to shape (p, p)."""
    root, p, free = covariance.root, len(varies), np.flatnonzero(transform.is_free)
    if np.isfinite(root).all():
        with np.errstate(invalid="ignore", over="ignore"):
            tied = rates @ root
        # Where the derivative of a tied parameter is not finite, its error is not either.
        is_finite = np.isfinite(tied).all(axis=1, keepdims=True)
        root = transform.scatter(root, tied=np.where(is_finite, tied, np.inf))
    else:
        root = np.where(varies[:, None], np.inf, np.zeros((p, len(root))))
    return replace(
        covariance,
        root=np.pad(root, ((0, 0), (0, p - root.shape[1]))),
        non_identifiable=transform.scatter(covariance.non_identifiable),
        confounded=tuple(tuple(free[list(group)].tolist()) for group in covariance.confounded),
    )
