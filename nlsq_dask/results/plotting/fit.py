"""``FitResult.plot``: plots of data, fit and residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._figures import (
    DATES,
    FIT,
    MEAN,
    QUIET,
    date_axis,
    label,
    prepare_figure,
    text_color,
)
from nlsq_dask.results.plotting.sampled import Quantity, Sampled, neighbor_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from nlsq_dask.results.result import FitResult

Vector = NDArray[np.float64]

_CURVE_POINTS = 1000  # points of a curve, in addition to those of the rows
_MAX_ERROR_BARS = 150  # rows; error bars are not drawn for more
_MIN_HISTOGRAM = 20  # residuals; no histogram is drawn of fewer
_MIN_FOR_MEANS = 200  # residuals; no means are drawn of fewer
_MAX_PANELS = 6  # of residuals, each against another quantity


def plot(result: FitResult, x: str | None, figure: Figure | SubFigure | None) -> Figure | SubFigure:
    """Plot data, fit and residuals; see ``FitResult.plot``."""
    sampled = Sampled.of(result)
    if x is None and len(sampled.quantities) > 1:
        return _plot_overview(result, sampled, figure)
    quantity = sampled.quantities[0] if x is None else sampled.quantity(x)
    figure = prepare_figure(figure, 7.5, 5.5)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1.2), width_ratios=(6, 1))
    upper = figure.add_subplot(grid[0, 0])
    lower = figure.add_subplot(grid[1, 0], sharex=upper)
    if len(sampled.quantities) == 1:
        _draw_curve(upper, result, sampled, quantity)
    else:
        _draw_means(upper, sampled, quantity)
    upper.set_ylabel(sampled.y_label)
    upper.tick_params(labelbottom=False)
    _draw_legend(upper, result, sampled)
    _draw_residuals(lower, sampled, quantity)
    _draw_histogram(figure.add_subplot(grid[1, 1], sharey=lower), sampled)
    _label_x(lower, quantity)
    _title(figure, result, sampled)
    return figure


def _plot_overview(
    result: FitResult, sampled: Sampled, figure: Figure | SubFigure | None
) -> Figure | SubFigure:
    """Plot data against fitted values, and residuals against each array or column of x."""
    shown = sampled.quantities[:_MAX_PANELS]
    columns = 2 if len(shown) in (2, 4) else 3
    rows = -(-len(shown) // columns)
    figure = prepare_figure(figure, 8.5, 3.6 + 2.1 * rows)
    grid = figure.add_gridspec(1 + rows, 6, height_ratios=(1.7, *(1,) * rows))
    upper = figure.add_subplot(grid[0, :4])
    _draw_observed(upper, sampled)
    _draw_legend(upper, result, sampled)
    histogram = figure.add_subplot(grid[0, 4:])
    _draw_histogram(histogram, sampled, is_upright=True)
    first: Axes | None = None
    width = 6 // columns
    for i, quantity in enumerate(shown):
        row, column = divmod(i, columns)
        place = grid[1 + row, column * width : (column + 1) * width]
        axes = figure.add_subplot(place, sharey=first)
        _draw_residuals(axes, sampled, quantity)
        if column > 0:  # only the leftmost panel of a row is labeled
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
        _label_x(axes, quantity)
        first = first or axes
    n_hidden = len(sampled.quantities) - len(shown)
    hidden = f"{len(shown)} of {len(sampled.quantities)} x are shown" if n_hidden else ""
    _title(figure, result, sampled, hidden)
    return figure


def _draw_curve(axes: Axes, result: FitResult, sampled: Sampled, quantity: Quantity) -> None:
    """Draw data and fitted curve, with bands of its standard error and of a measurement."""
    x, y, errors = quantity.values, sampled.y, sampled.errors
    if errors is not None and len(y) <= _MAX_ERROR_BARS:
        axes.errorbar(
            x, y, errors, fmt="o", ms=3.5, lw=0.9, color=text_color(), alpha=0.75, label="data"
        )
    else:
        _points(axes, x, y, label="data")
    places, curve, std = _curve(result, sampled, quantity)

    def draw_band(half: Any, **options: Any) -> None:
        axes.fill_between(places, curve - half, curve + half, color=FIT, lw=0, **options)

    if np.isfinite(sampled.spread):
        half = 2.0 * np.hypot(0.0 if std is None else std, sampled.spread)
        draw_band(half, alpha=0.16, zorder=0, label="± 2 s.d. of a measurement")
    if std is not None:
        draw_band(2.0 * std, alpha=0.4, zorder=2.5, label="± 2 standard errors of the fit")
    single: dict[str, Any] = {"marker": "_", "ms": 12} if len(places) == 1 else {}
    axes.plot(places, curve, color=FIT, lw=1.6, zorder=3, label="fit", **single)
    _set_y_limits(axes, np.concatenate([y, curve]))


def _curve(
    result: FitResult, sampled: Sampled, quantity: Quantity
) -> tuple[Vector, Vector, Vector | None]:
    """Return x, values of the fitted curve and their standard errors, None if not known."""
    x = quantity.values
    if not result.has_model:  # the curve is known at the rows only
        places, where = np.unique(x, return_index=True)
        return places, sampled.fitted[where], None
    places = np.unique(np.concatenate([x, np.linspace(x.min(), x.max(), _CURVE_POINTS)]))
    x_new: Any = places if sampled.is_flat else places[:, None]
    leaves = result._model.layout.assemble([x_new])
    if result._root is None or result.pcov is None or not np.isfinite(result.pcov).all():
        return places, np.asarray(result.predict(leaves)), None
    curve, std = result.predict(leaves, return_std=True)
    return places, np.asarray(curve), np.asarray(std)


def _draw_means(axes: Axes, sampled: Sampled, quantity: Quantity) -> None:
    """Draw the data, and means of data and fit over groups of rows with neighboring x."""
    x, y = quantity.values, sampled.y
    _points(axes, x, y, label="data")
    groups = neighbor_groups(x)
    places, fitted = _means(x, groups), _means(sampled.fitted, groups)
    axes.plot(places, fitted, color=FIT, lw=1.6, zorder=3, label="mean of the fit")
    text = "mean of the data, ± its standard error"
    _draw_group_means(axes, x, y, y - sampled.fitted, groups, ms=4, label=text)
    _set_y_limits(axes, np.concatenate([y, fitted]))


def _draw_observed(axes: Axes, sampled: Sampled) -> None:
    _points(axes, sampled.fitted, sampled.y, label="data")
    both = np.concatenate([sampled.y, sampled.fitted])
    both = both[np.isfinite(both)]
    ends = [both.min(), both.max()] if both.size else [0.0, 1.0]
    axes.plot(ends, ends, color=FIT, lw=1.6, zorder=3, label="data = fit")
    axes.set(xlabel="fit", ylabel=sampled.y_label)


def _draw_residuals(axes: Axes, sampled: Sampled, quantity: Quantity) -> None:
    """Draw residuals, and their means over groups of rows, against an array or column of x.

    Horizontal lines mark zero and plus and minus one standard deviation of the residuals.
    Outliers are drawn at the edge of the panel.
    """
    x, residuals, limit = quantity.values, sampled.residuals, sampled.limit
    far = np.abs(residuals) > limit
    _points(axes, x[~far], residuals[~far])
    edge = 1.12 * limit
    for sign, marker in ((1, "^"), (-1, "v")):
        out = far & (sign * residuals > 0)
        axes.plot(x[out], np.full(out.sum(), sign * edge), marker, color=FIT, ms=3.5, alpha=0.7)
    if far.any():
        is_above = (residuals[far] > 0).sum() * 2 >= far.sum()
        axes.annotate(
            f"{far.sum():,} beyond",
            (0.99, 0.04 if is_above else 0.96),
            xycoords="axes fraction",
            ha="right",
            va="bottom" if is_above else "top",
            fontsize="x-small",
            color=FIT,
        )
    axes.axhline(0.0, color=QUIET, lw=1)
    for sign in (-1, 1):
        if np.isfinite(sampled.expected):
            axes.axhline(sign * sampled.expected, color=QUIET, lw=0.8, ls=(0, (4, 3)))
    near, x_near = residuals[~far], x[~far]
    if len(near) >= _MIN_FOR_MEANS:
        _draw_group_means(axes, x_near, near, near, neighbor_groups(x_near), ms=2.5)
    axes.set_ylim(-1.2 * limit, 1.2 * limit)
    axes.set_ylabel(sampled.residual_label)


def _draw_histogram(axes: Axes, sampled: Sampled, is_upright: bool = False) -> None:
    """Draw a histogram of residuals, with the normal density of width ``sampled.expected``.

    Residuals are on the horizontal axis if ``is_upright``, otherwise on the vertical axis.
    """
    limit, residuals = sampled.limit, sampled.residuals
    inside = residuals[np.abs(residuals) <= limit]
    if len(inside) < _MIN_HISTOGRAM:
        axes.set_axis_off()
        return
    edges = np.linspace(-limit, limit, int(np.clip(2 * np.sqrt(len(inside)), 9, 41)))
    heights, *_ = axes.hist(
        inside,
        bins=edges.tolist(),
        weights=np.ones(len(inside)) / len(residuals),
        color=text_color(),
        alpha=0.35,
        orientation="vertical" if is_upright else "horizontal",
        label="residuals",
    )
    tallest = float(np.max(heights))
    top = tallest
    if np.isfinite(sampled.expected):
        places = np.linspace(-limit, limit, 200)
        density = np.exp(-0.5 * (places / sampled.expected) ** 2)
        density *= (edges[1] - edges[0]) / (sampled.expected * np.sqrt(2.0 * np.pi))
        pair = (places, density) if is_upright else (density, places)
        axes.plot(*pair, color=MEAN, lw=1.2, label="normal")
        # If sigma is far too small the density is a spike, which is clipped.
        top = max(tallest, min(float(density.max()), 2.0 * tallest))
    (axes.set_ylim if is_upright else axes.set_xlim)(0.0, 1.15 * top)
    if is_upright:
        axes.set_xlabel(sampled.residual_label)
        axes.set_yticks([])
        axes.legend(fontsize="x-small", frameon=False)
    else:
        axes.tick_params(labelleft=False)
        axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)


def _points(axes: Axes, x: Vector, y: Vector, **options: Any) -> None:
    """Draw small points, the more transparent the more there are."""
    alpha = float(np.clip(14.0 / np.sqrt(max(len(x), 1)), 0.3, 0.8))
    size = 4.0 if len(x) <= _MAX_ERROR_BARS else 2.5
    axes.plot(x, y, "o", ms=size, mew=0, color=text_color(), alpha=alpha, **options)


def _means(values: Vector, groups: list[NDArray[np.int64]]) -> Vector:
    return np.array([values[group].mean() for group in groups])


def _draw_group_means(
    axes: Axes, x: Vector, y: Vector, noise: Vector, groups: list[NDArray[np.int64]], **options: Any
) -> None:
    """Draw the mean of y in each group of rows; the scatter of ``noise`` gives its error bar."""
    errors = [
        noise[group].std(ddof=1) / np.sqrt(len(group)) if len(group) > 1 else 0.0
        for group in groups
    ]
    axes.errorbar(
        _means(x, groups), _means(y, groups), errors, fmt="o", lw=1, color=MEAN, zorder=4, **options
    )


def _set_y_limits(axes: Axes, values: Vector) -> None:
    """Fit the y axis to these values, not to a band that may be much wider."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _label_x(axes: Axes, quantity: Quantity) -> None:
    finite = quantity.values[np.isfinite(quantity.values)]
    if quantity.units == DATES and date_axis(axes, finite.min(), finite.max()):
        axes.set_xlabel(label(quantity.text))
    else:
        axes.set_xlabel(label(quantity.text, quantity.units))


def _draw_legend(axes: Axes, result: FitResult, sampled: Sampled) -> None:
    """Draw the legend, which says how many rows are drawn if not all are."""
    handles, labels = axes.get_legend_handles_labels()
    if len(sampled.y) < result.n_points:
        drawn = f"data ({len(sampled.y):,} of {result.n_points:,} rows)"
        labels = [drawn if text == "data" else text for text in labels]
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("data"))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        fontsize="small",
        frameon=False,
        ncols=2,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )


def _title(figure: Figure | SubFigure, result: FitResult, sampled: Sampled, more: str = "") -> None:
    name = result._model.name
    title = "" if name == "<lambda>" else f"{label(name)}: "
    if result.n_points:
        title += f"{result.n_points:,} points, reduced χ² = {result.reduced_chi2:.4g}"
    else:
        title += f"{sampled.y.size:,} rows of a sample"
    title += f"; {more}" if more else ""
    if result.success:
        figure.suptitle(title, fontsize="medium")
    else:
        figure.suptitle(f"FIT FAILED — {title}", fontsize="medium", color="#C8102E")
