"""``Outputs``: the variables of the Dataset, for a tile and as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._text import join_first
from nlsq_dask.solvers.lanes.records import LaneFits, LaneStatus

Array = NDArray[Any]

# Statuses that are no error: no data, a solution that is not unique, and a fit still to be made.
_NO_FAILURE = (LaneStatus.NO_DATA, LaneStatus.SINGULAR, LaneStatus.NOT_FITTED)


@dataclass(frozen=True)
class Variable:
    """A variable of the Dataset."""

    dims: tuple[str, ...]  # after those of the map
    dtype: str
    long_name: str


@dataclass(frozen=True)
class Outputs:
    """The variables, and how the result of a solver is written to them."""

    names: tuple[str, ...]  # of all parameters
    map_axes: tuple[int, ...]  # axes of y that are not fitted
    dtype: str  # of parameters and errors
    covariance: str | None  # "errors", "full" or None

    @property
    def variables(self) -> dict[str, Variable]:
        """The variables by name."""
        full = {
            "popt": Variable(("param",), self.dtype, "best-fit parameters"),
            "perr": Variable(("param",), self.dtype, "standard errors of the parameters"),
            "pcov": Variable(("cov_i", "cov_j"), self.dtype, "covariance of the parameters"),
            "chi2": Variable((), "float64", "sum of squared weighted residuals"),
            "reduced_chi2": Variable((), "float64", "chi2 per degree of freedom"),
            "n_points": Variable((), "int32", "number of points"),
            "n_iterations": Variable((), "int16", "number of trial points"),
            "status": Variable((), "int8", "why the fit ended; positive for success"),
        }
        omitted = {None: ("perr", "pcov"), "errors": ("pcov",), "full": ()}[self.covariance]
        return {name: variable for name, variable in full.items() if name not in omitted}

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all variables per pixel."""
        n = len(self.names)
        variables = self.variables.values()
        return sum(np.dtype(v.dtype).itemsize * n ** len(v.dims) for v in variables)

    def attrs_of(self, name: str) -> dict[str, Any]:
        """Return the attributes of a variable.

        Those of the status explain its numbers. ``parameters`` names what is along ``param``, for
        programs that cannot read an array of strings.
        """
        variable = self.variables[name]
        attrs: dict[str, Any] = {"long_name": variable.long_name}
        if variable.dims:
            attrs["parameters"] = " ".join(self.names)
        if name == "status":
            statuses = sorted(LaneStatus)
            attrs["flag_values"] = np.array([int(status) for status in statuses], np.int8)
            attrs["flag_meanings"] = " ".join(status.name.lower() for status in statuses)
        return attrs

    def of(self, fits: LaneFits, pixels: tuple[int, ...]) -> dict[str, Array]:
        """Return the arrays of a tile with the shape ``pixels``."""
        dof = fits.n_points.astype(np.float64) - fits.n_free
        positive = np.where(dof > 0, dof, 1.0)
        values = {
            "popt": fits.params.T,
            "perr": None if fits.errors is None else fits.errors.T,
            "pcov": None if fits.covariance is None else fits.covariance.transpose(2, 0, 1),
            "chi2": fits.chi2,
            "reduced_chi2": np.where(
                dof > 0, fits.chi2 / positive, np.where(np.isnan(fits.chi2), np.nan, np.inf)
            ),
            "n_points": fits.n_points,
            "n_iterations": fits.n_iterations,
            "status": fits.status,
        }
        arrays = {}
        for name, variable in self.variables.items():
            array = values[name]
            assert array is not None
            with np.errstate(over="ignore"):
                typed = np.ascontiguousarray(array, dtype=variable.dtype)
            arrays[name] = typed.reshape(*pixels, *typed.shape[1:])
        return arrays

    def failed(self, pixels: tuple[int, ...], status: LaneStatus) -> dict[str, Array]:
        """Return the arrays of a tile all of whose pixels have this status."""
        sizes = {"param": len(self.names), "cov_i": len(self.names), "cov_j": len(self.names)}
        arrays = {}
        for name, variable in self.variables.items():
            shape = (*pixels, *(sizes[dim] for dim in variable.dims))
            is_float = variable.dtype.startswith("float")
            arrays[name] = np.full(shape, np.nan if is_float else 0, variable.dtype)
        arrays["status"][...] = status
        return arrays


def counted(statuses: Array) -> dict[LaneStatus, int]:
    """Return the number of pixels by status."""
    values, counts = np.unique(statuses, return_counts=True)
    return {LaneStatus(v): int(n) for v, n in zip(values.tolist(), counts.tolist(), strict=True)}


def failure_text(counts: Mapping[LaneStatus, int]) -> str:
    """Return how many fits failed, by status; "" if none did."""
    failed = {s: n for s, n in sorted(counts.items()) if s <= 0 and s not in _NO_FAILURE}
    if not failed:
        return ""
    listed = join_first([f"{n:,} {status.name.lower()}" for status, n in failed.items()])
    return f"{sum(failed.values()):,} of {sum(counts.values()):,} fits failed ({listed})"
