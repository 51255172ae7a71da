"""The rows in ``FitResult.sample`` and their residuals, prepared for plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._figures import label
from nlsq_dask._text import join_first

if TYPE_CHECKING:
    import xarray as xr

    from nlsq_dask.results.result import FitResult

Vector = NDArray[np.float64]

_OUTLIER_LIMIT = 8.0  # robust standard deviations; a larger residual is an outlier
_EDGE_LIMIT = 6.0  # robust standard deviations; where a panel ends if there are outliers
_ROWS_PER_MEAN = 60  # rows of a group, so that 2,000 rows have 33 means


@dataclass(frozen=True)
class Quantity:
    """Values on the horizontal axis: an x array of shape (n,), or a column of an array (n, k)."""

    name: str  # argument of ``plot(x=...)``
    text: str  # axis label
    units: str
    values: Vector


@dataclass(frozen=True)
class Sampled:
    """Sampled rows in float64, with their residuals; vectors have shape (n,)."""

    y: Vector
    fitted: Vector  # values of the model
    sigma: Vector | None
    quantities: list[Quantity]  # one per array or column of x
    is_flat: bool  # whether x is a single array of shape (n,)
    y_label: str  # axis label
    residuals: Vector  # y - fitted, divided by sigma if it is given
    # Standard deviation of the residuals: 1 if sigma is absolute, otherwise estimated by the fit,
    # or from the median of |residuals| if there are outliers. NaN if it is zero.
    expected: float
    spread: (
        float  # standard deviation of a measurement in y; NaN if it is zero or differs between rows
    )
    limit: float  # residuals with a larger absolute value are drawn at the edge of a panel

    @classmethod
    def of(cls, result: FitResult) -> Sampled:
        """Return the sampled rows of a result.

        Raises
        ------
        ValueError
            If the result holds no rows.
        """
        if result.sample is None:
            raise ValueError(
                "there is nothing to plot: this result holds no rows of the data, because the fit "
                "ended before reading usable rows."
            )
        sample = result.sample
        y, fitted = _float(sample["y_data"]), _float(sample["fitted"])
        sigma = _float(sample["sigma"]) if "sigma" in sample else None
        x = sorted(
            (array for array in sample.data_vars.values() if "position" in array.attrs),
            key=lambda array: int(array.attrs["position"]),
        )
        residuals = (y - fitted) if sigma is None else (y - fitted) / sigma
        sizes = np.abs(residuals[np.isfinite(residuals)])
        limit, estimated = float(sizes.max(initial=0.0)), float(np.sqrt(result.sigma_sq))
        robust = 1.4826 * float(np.median(sizes)) if sizes.size else 0.0
        if 0.0 < _OUTLIER_LIMIT * robust < limit:
            limit, estimated = _EDGE_LIMIT * robust, robust
        # As in pcov: a sigma that is not absolute is a relative weight.
        expected = 1.0 if sigma is not None and result.absolute_sigma else estimated
        if sigma is None:
            spread = expected
        else:
            spread = float(sigma[0]) * expected if np.ptp(sigma) == 0.0 else np.nan
        if expected < 3.0 * limit:
            limit = max(limit, 1.2 * expected)
        return cls(
            y=y,
            fitted=fitted,
            sigma=sigma,
            quantities=[quantity for array in x for quantity in _quantities(array)],
            is_flat=len(x) == 1 and x[0].ndim == 1,
            y_label=label(sample["y_data"].attrs.get("long_name", "y"), _units(sample.y_data)),
            residuals=residuals,
            expected=expected if expected > 0.0 else np.nan,
            spread=spread if spread > 0.0 else np.nan,
            limit=limit or 1.0,
        )

    @property
    def errors(self) -> Vector | None:
        """Standard deviation of each measurement in y; None if there is no sigma or no scatter."""
        if self.sigma is None or not np.isfinite(self.expected):
            return None
        return self.sigma * self.expected

    @property
    def residual_label(self) -> str:
        """Label of an axis of residuals."""
        return "data − fit" if self.sigma is None else "(data − fit) / σ"  # noqa: RUF001

    def quantity(self, name: Any) -> Quantity:
        """Return the array or column of x with this name.

        Raises
        ------
        ValueError
            If no array or column has this name.
        """
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        names = join_first([repr(quantity.name) for quantity in self.quantities])
        raise ValueError(f"x must be one of {names}, or None; got {name!r}.")


def neighbor_groups(values: Vector) -> list[NDArray[np.int64]]:
    """Return the indices of rows in groups with neighboring values, whose means are drawn.

    If there are few different values, a group has all rows of one value; otherwise groups have
    equal sizes.
    """
    order = np.argsort(values, kind="stable")
    different, first = np.unique(values[order], return_index=True)
    if len(values) >= _ROWS_PER_MEAN * len(different):
        return np.split(order, first[1:])
    return np.array_split(order, max(len(values) // _ROWS_PER_MEAN, 1))


def _column_names(name: str, n: int) -> list[str]:
    return [name] if n == 1 else [f"{name}[{i}]" for i in range(n)]


def _float(array: xr.DataArray) -> Vector:
    return np.asarray(array.values, np.float64)


def _units(array: xr.DataArray) -> str:
    return str(array.attrs.get("units", ""))


def _quantities(array: xr.DataArray) -> list[Quantity]:
    name, values, units = str(array.name), _float(array), _units(array)
    text = str(array.attrs.get("long_name", name))
    if values.ndim == 1:
        return [Quantity(name, text, units, values)]
    columns = array.attrs.get("columns", [])
    n = values.shape[1]
    names = list(columns) if len(columns) == n else _column_names(name, n)
    texts = names if len(columns) == n else _column_names(text, n)
    return [
        Quantity(one, text, units, values[:, i])
        for i, (one, text) in enumerate(zip(names, texts, strict=True))
    ]
