"""``plot_map``: value, standard error and status of a map, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from nlsq_dask._figures import FIT, label, prepare_figure
from nlsq_dask.maps.results.statuses import count_statuses, flags_of, format_share, is_determined
from nlsq_dask.maps.results.variables import every_kth, has_variable, parameter_names, variable_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_MAX_PIXELS = 2**20  # of a panel, which has fewer dots on any screen
_MAX_MARKED = 200  # pixels of a line with a dot at each
_MASKED = (0.5, 0.5, 0.5, 0.5)  # gray, on light and on dark pages
# By flag, so that plots can be compared: blue and green for success, warm for failures, gray where
# no fit took place.
_COLORS = {
    "converged": "#009E73",
    "at_bound": "#56B4E9",
    "singular": "#0072B2",
    "iteration_limit": "#F0E442",
    "no_data": "#E0E0E0",
    "too_few_points": "#A6A6A6",
    "non_finite": "#D55E00",
    "stalled": "#E69F00",
    "bad_start": "#CC79A7",
    "not_read": "#7A0019",
    "not_fitted": "#FFFFFF",
}
_OTHER_COLOR = "#000000"


def plot_map(ds: xr.Dataset, name: str, *, figure: Figure | SubFigure | None = None) -> Any:
    """Plot a parameter of a map, its standard error and the status, side by side.

    Colors vary between the 2nd and the 98th percentile of the pixels with a solution that the data
    determine (status 1 and 2); the others are gray. A map with one dimension is drawn as a line
    with a band of one standard error, above a strip with the status. Of more than a million pixels,
    every k-th along each dimension is drawn.

    Parameters
    ----------
    ds : Dataset
        Result of ``fit_each`` or ``curvefit``, with a map of one or two dimensions. If it is lazy,
        the variables that are drawn are computed, once.
    name : str
        Name of a parameter, such as "lifetime", or of another variable of the map, such as
        "reduced_chi2", which has no standard error.
    figure : matplotlib Figure or SubFigure, optional
        Figure to draw into; by default a new one of pyplot.

    Returns
    -------
    matplotlib Figure or SubFigure

    Raises
    ------
    ValueError
        If there is no such parameter or variable, or the map has none or more than two dimensions.
    ImportError
        If matplotlib is not installed.

    See Also
    --------
    status_table : Counts the pixels by status.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import xarray as xr
    >>> import nlsq_dask
    >>> time, rates = np.linspace(0, 4, 50), np.linspace(0.5, 1, 12).reshape(3, 4)
    >>> y = 2 * np.exp(-rates * time[:, None, None])
    >>> da = xr.DataArray(y, dims=("time", "lat", "lon"), coords={"time": time})
    >>> def decay(t, height, rate):
    ...     return height * jnp.exp(-rate * t)
    >>> fits = da.nlsq.fit_each(decay, "time", dims="time", verbose=0)
    >>> figure = nlsq_dask.plot_map(fits, "rate")  # doctest: +SKIP
    >>> figure.savefig("rate.png")  # doctest: +SKIP
    """
    panels = _Panels.of(ds, name)
    figure = prepare_figure(figure, *((4.2 * panels.n, 3.8) if panels.ndim == 2 else (7.5, 4.6)))
    if panels.ndim == 2:
        _draw_maps(figure, panels)
    else:
        _draw_line(figure, panels)
    if panels.k > 1:
        figure.supxlabel(f"every k-th pixel, k = {panels.k}", fontsize="small")
    return figure


@dataclass(frozen=True)
class _Panels:
    """Arrays of the panels, in memory; NaN where the data determine no solution."""

    value: xr.DataArray
    error: xr.DataArray | None
    codes: xr.DataArray  # positions in ``flags``
    flags: list[tuple[str, float]]  # those that occur, and their shares
    k: int  # every k-th pixel is drawn

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def n(self) -> int:
        """Number of panels of a map with two dimensions."""
        return 2 if self.error is None else 3

    @classmethod
    def of(cls, ds: xr.Dataset, name: str) -> _Panels:
        """Select, check and compute them."""
        arrays = _select(ds, name)
        long = [dim for dim, n in arrays["status"].sizes.items() if n != 1]
        if len(long) not in (1, 2):
            sizes = ", ".join(f"{dim}: {n}" for dim, n in arrays["status"].sizes.items())
            advice = "Select some of them, such as ds.isel({}=0)."
            raise ValueError(
                f"a map with one or two dimensions can be drawn; this one has {len(long)} ({sizes})"
                f". {advice.format(long[0]) if long else 'Print its values instead.'}"
            )
        if not all(arrays["status"].sizes.values()):
            raise ValueError("there is nothing to plot: the map has no pixels.")
        data = xr.Dataset(arrays).squeeze(drop=True)
        some, k = every_kth(data, tuple(long), _MAX_PIXELS)
        drawn = _with_drawable_coordinates(some.compute(), long)
        status, is_solved = drawn["status"], is_determined(drawn["status"])
        counts = count_statuses(status)
        names, total = flags_of(status), sum(counts.values())
        codes = xr.full_like(status, np.nan, float)
        for i, number in enumerate(counts):
            codes = codes.where(status != number, i)
        shown = {
            key: drawn[key].where(is_solved & np.isfinite(drawn[key]))
            for key in ("value", "error")
            if key in drawn
        }
        flags = [(names[number], count / total) for number, count in counts.items()]
        return cls(shown["value"], shown.get("error"), codes, flags, k)


def _select(ds: xr.Dataset, name: str) -> dict[str, xr.DataArray]:
    """Return the lazy arrays of value, error and status, with attributes for labels."""
    status = variable_of(ds, "status")
    names = parameter_names(variable_of(ds, "popt")) if has_variable(ds, "popt") else []
    same_dims = (each for each in ds.data_vars if set(ds[each].dims) == set(status.dims))
    others = [each for each in same_dims if each != status.name]
    if name in names:
        arrays = {
            key: _of_parameter(variable_of(ds, variable), name)
            for key, variable in (("value", "popt"), ("error", "perr"))
            if has_variable(ds, variable)
        }
    elif name in others:
        arrays = {"value": ds[name]}
    else:
        listed, more = (", ".join(map(repr, each)) or "none" for each in (names, others))
        raise ValueError(
            f"ds has no parameter {name!r}. Its parameters are {listed}; other variables that can "
            f"be drawn are {more}."
        )
    title = {"value": name, "error": f"standard error of {name}"}
    named = {
        key: array.transpose(*status.dims)
        .assign_attrs(long_name=title[key])
        .reset_coords(drop=True)
        for key, array in arrays.items()
    }
    return {**named, "status": status.reset_coords(drop=True)}


def _of_parameter(array: xr.DataArray, name: str) -> xr.DataArray:
    return array.sel(param=name) if "param" in array.dims else array


def _with_drawable_coordinates(ds: xr.Dataset, dims: list[Any]) -> xr.Dataset:
    """Drop coordinates along which pixels cannot be placed, such as texts; positions remain."""
    for dim in dims:
        index = ds.indexes.get(dim)
        is_ordered = index is not None and (
            index.is_monotonic_increasing or index.is_monotonic_decreasing
        )
        if index is not None and not (
            is_ordered and index.is_unique and index.dtype.kind in "iufM"
        ):
            ds = ds.drop_vars([name for name, each in ds.coords.items() if dim in each.dims])
    return ds


def _draw_maps(figure: Figure | SubFigure, panels: _Panels) -> None:
    import matplotlib as mpl

    axes = figure.subplots(1, panels.n, sharex=True, sharey=True)
    colors = mpl.colormaps["viridis"].with_extremes(bad=_MASKED)
    shown = [panels.value] if panels.error is None else [panels.value, panels.error]
    for ax, array in zip(axes, shown, strict=False):
        array.plot.pcolormesh(
            ax=ax, cmap=colors, robust=True, center=False, cbar_kwargs={"label": ""}
        )
        ax.set_title(_title(array), fontsize="medium")
    _draw_status(figure, axes[-1], panels.codes, panels.flags, [axes[-1]])
    axes[-1].set_title("status", fontsize="medium")
    for ax in axes:
        ax.tick_params(labelsize="small")
    for ax in axes[1:]:
        ax.set_ylabel("")


def _draw_line(figure: Figure | SubFigure, panels: _Panels) -> None:
    grid = figure.add_gridspec(2, 1, height_ratios=(7, 1))
    upper = figure.add_subplot(grid[0])
    lower = figure.add_subplot(grid[1], sharex=upper)
    (dim,) = panels.value.dims
    x, values = panels.value[dim].values, panels.value.values
    upper.plot(x, values, color=FIT, lw=1.2, marker="." if len(x) <= _MAX_MARKED else "")
    if panels.error is not None:
        half = panels.error.values
        upper.fill_between(
            x, values - half, values + half, color=FIT, alpha=0.25, lw=0, label="± standard error"
        )
        upper.legend(fontsize="small")
    upper.set_title(_title(panels.value), fontsize="medium")
    upper.tick_params(labelbottom=False)
    rows = panels.codes.expand_dims(_row=[0, 1])
    _draw_status(figure, lower, rows, panels.flags, [upper, lower])
    lower.set(ylabel="", yticks=[])


def _title(array: xr.DataArray) -> str:
    return label(str(array.attrs["long_name"]), str(array.attrs.get("units", "")))


def _draw_status(
    figure: Figure | SubFigure,
    ax: Axes,
    codes: xr.DataArray,
    flags: list[tuple[str, float]],
    beside: list[Axes],
) -> None:
    """Draw the status, with a color bar that names the flags that occur."""
    from matplotlib.colors import ListedColormap

    colors = [_COLORS.get(flag, _OTHER_COLOR) for flag, _ in flags]
    mesh = codes.plot.pcolormesh(
        ax=ax,
        cmap=ListedColormap(colors or [_OTHER_COLOR]).with_extremes(bad=_MASKED),
        vmin=-0.5,
        vmax=max(len(colors), 1) - 0.5,
        add_colorbar=False,
    )
    bar = figure.colorbar(mesh, ax=beside, ticks=range(len(flags)))
    bar.ax.set_yticklabels([f"{flag} ({format_share(share)})" for flag, share in flags])
    bar.ax.tick_params(length=0)
    bar.ax.invert_yaxis()  # success on top, as in status_table
