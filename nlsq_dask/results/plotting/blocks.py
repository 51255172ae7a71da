"""``FitResult.plot_blocks``: plots of ``block_statistics``, as a profile or a map."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._figures import FIT, MEAN, QUIET, label, prepare_figure

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from nlsq_dask.results.result import FitResult

# Label, reduction over the dimensions that are not drawn, and whether low values are bad.
_QUANTITIES = {
    "reduced_chi2": ("reduced χ² of a block", "maximum", False),
    "largest_residual": ("largest weighted residual of a block", "maximum", False),
    "chi2": ("χ² of a block", "sum", False),
    "n_points": ("rows used in a block", "sum", True),
}


def plot_blocks(
    result: FitResult, quantity: str, dims: Any, figure: Figure | SubFigure | None
) -> Figure | SubFigure:
    """Plot a variable of ``block_statistics``; see ``FitResult.plot_blocks``."""
    if quantity not in _QUANTITIES:
        allowed = ", ".join(map(repr, _QUANTITIES))
        raise ValueError(f"quantity must be one of {allowed}; got {quantity!r}.")
    statistics = result.block_statistics
    if statistics is None:
        raise ValueError(
            "there is nothing to plot: this result has no block_statistics, because no pass over "
            "all rows was completed."
        )
    values = statistics[quantity].astype(float)  # its dimensions are strings
    along = _choose_dims(values, dims)
    usable = values.where(statistics.n_points > 0) if quantity != "n_points" else values
    if not np.isfinite(usable).any():
        raise ValueError(f"there is nothing to plot: {quantity} is not finite in any block.")
    text, how, low_is_bad = _QUANTITIES[quantity]
    further = [dim for dim in values.dims if dim not in along]
    reduced = usable
    if further:
        reduced = usable.max(further) if how == "maximum" else usable.sum(further, min_count=1)
    worst = _extreme(usable, low_is_bad)
    is_map = len(along) == 2
    figure = prepare_figure(figure, 7.5, 5.2 if is_map else 4.0)
    axes = figure.add_subplot()
    if is_map:
        _draw_map(figure, axes, reduced.transpose(*along), text, worst)
    else:
        _draw_profile(axes, reduced, str(along[0]), text, worst)
    reduced_dims = [str(dim) for dim in further if values.sizes[dim] > 1]
    title = f"{text}, {how} over {', '.join(reduced_dims)}" if reduced_dims else text
    title += f"\n{_extreme_text(usable, worst, low_is_bad)}"
    axes.set_title(label(title), fontsize="medium")
    return figure


def _choose_dims(values: xr.DataArray, dims: Any) -> tuple[str, ...]:
    """Return the dimensions to draw: ``dims``, or by default the one or two with most blocks."""
    available = tuple(map(str, values.dims))
    if dims is None:
        many = sorted(available, key=lambda dim: -values.sizes[dim])[:2]
        shown = [dim for dim in available if dim in many and values.sizes[dim] > 1]
        return tuple(shown) or available[:1]
    several = isinstance(dims, Iterable) and not isinstance(dims, str)
    chosen = tuple(map(str, dims)) if several else (str(dims),)
    if len(chosen) not in (1, 2) or len(set(chosen) & set(available)) < len(chosen):
        raise ValueError(
            f"dims must be one or two different dimensions of {', '.join(map(repr, available))}; "
            f"got {dims!r}."
        )
    return chosen


def _extreme(values: xr.DataArray, is_minimum: bool) -> dict[str, int]:
    """Return the indices, by dimension, of the largest or smallest value."""
    index = values.argmin(values.dims) if is_minimum else values.argmax(values.dims)
    return {str(dim): int(i) for dim, i in index.items()}


def _extreme_text(values: xr.DataArray, at: dict[str, int], is_minimum: bool) -> str:
    block = values.isel(at)
    where = ", ".join(f"{dim} {int(block[dim])}" for dim in at)
    return f"{'least' if is_minimum else 'largest'}: {float(block):.4g}, in the block from {where}"


def _edges(coordinate: xr.DataArray) -> NDArray[np.float64]:
    """Return where the blocks along a dimension begin and where the last one ends."""
    starts = np.asarray(coordinate, float)
    last = starts[-1] - starts[-2] if len(starts) > 1 else 1.0
    edges: NDArray[np.float64] = np.append(starts, coordinate.attrs.get("size", starts[-1] + last))
    return edges


def _draw_map(
    figure: Figure | SubFigure, axes: Axes, values: xr.DataArray, text: str, worst: dict[str, int]
) -> None:
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    down, across = map(str, values.dims)
    x, y = _edges(values[across]), _edges(values[down])
    colors = mpl.colormaps["viridis"].with_extremes(bad=(0.5, 0.5, 0.5, 0.5))
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(values.values), cmap=colors)
    figure.colorbar(mesh, ax=axes, label=text)
    i, j = worst[down], worst[across]
    axes.add_patch(
        Rectangle(
            (x[j], y[i]), x[j + 1] - x[j], y[i + 1] - y[i], fill=False, ec=FIT, lw=2, clip_on=False
        )
    )
    axes.set(xlabel=label(across, "position"), ylabel=label(down, "position"))
    axes.invert_yaxis()
    if not np.isfinite(values.values).all():
        axes.plot([], [], "s", color=(0.5, 0.5, 0.5, 0.5), label="no rows were used")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)


def _draw_profile(
    axes: Axes, values: xr.DataArray, dim: str, text: str, worst: dict[str, int]
) -> None:
    edges, heights = _edges(values[dim]), np.asarray(values.values, float)
    axes.stairs(heights, edges, color=MEAN, lw=1.4, baseline=None)
    if len(heights) <= 200:
        centers = 0.5 * (edges[1:] + edges[:-1])
        axes.plot(centers, heights, "o", color=MEAN, ms=3.5)
    i = worst[dim]
    axes.plot(0.5 * (edges[i] + edges[i + 1]), heights[i], "o", ms=10, mfc="none", mec=FIT, mew=2)
    median = float(np.median(heights[np.isfinite(heights)]))
    axes.axhline(median, color=QUIET, lw=1, ls=(0, (4, 3)), label=f"median {median:.4g}")
    axes.legend(fontsize="small")
    axes.set(xlabel=label(dim, "position"), ylabel=text)
    axes.set_xlim(edges[0], edges[-1])
