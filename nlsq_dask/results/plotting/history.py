"""``FitResult.plot_history``: plots of the iterations of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._figures import (
    FIT,
    FOURTH,
    MEAN,
    QUIET,
    THIRD,
    prepare_figure,
    text_color,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from nlsq_dask.results.result import FitResult

Vector = NDArray[np.float64]

_MIN_LOG_SPAN = 3.0  # largest value over smallest; an axis with a smaller ratio is linear
_STAGES = {"warm-up": THIRD, "sample": MEAN, "all rows": FIT}


def plot_history(result: FitResult, figure: Figure | SubFigure | None) -> Figure | SubFigure:
    """Plot the iterations of a fit; see ``FitResult.plot_history``."""
    history = result.history
    if not history.sizes["iteration"]:
        raise ValueError(
            "there is nothing to plot: no iteration was recorded, because the fit converged or "
            "stopped before the first one."
        )
    figure = prepare_figure(figure, 7.5, 6.5)
    loss, gradient, step, passes = figure.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2, 2, 1)}
    )
    at = np.asarray(history.iteration, float)
    stages, accepted = np.asarray(history.stage), np.asarray(history.accepted, bool)
    radius = np.asarray(history.trust_radius, float)
    for axes, name in ((loss, "loss"), (gradient, "gradient_norm"), (step, "step_norm")):
        values = np.asarray(history[name], float)
        axes.set_ylabel(name.replace("_", " "))
        _draw(axes, at, values, stages, accepted)
        _set_log_scale(axes, np.append(values, radius) if axes is step else values)
    if np.isfinite(radius).any():
        single: dict[str, Any] = {"marker": "_", "ms": 12} if len(at) == 1 else {}
        (line,) = step.plot(
            at, radius, color=FOURTH, lw=1.2, ls=(0, (4, 2)), label="trust radius", **single
        )
        step.legend(handles=[line], fontsize="small")
    counts, color = np.asarray(history.n_passes, float), text_color()
    passes.plot(at, counts, "o-", drawstyle="steps-pre", color=color, ms=2.5, lw=1, clip_on=False)
    passes.set_ylim(0.0, 1.15 * max(counts.max(), 1.0))
    if len(at) == 1:  # avoid ticks at fractions of an iteration
        passes.set_xlim(at[0] - 1.0, at[0] + 1.0)
    passes.yaxis.get_major_locator().set_params(integer=True)
    _shade(passes, at, stages)
    passes.set(xlabel="iteration", ylabel="passes")
    passes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = loss.get_legend_handles_labels()
    loss.legend(handles, labels, fontsize="small", ncols=len(labels))
    figure.align_ylabels()
    iterations = f"{int(at[-1])} iteration{'' if at[-1] == 1 else 's'}"
    n_passes = f"{result.n_passes} pass{'' if result.n_passes == 1 else 'es'}"
    figure.suptitle(f"{iterations}, {n_passes} over all rows", fontsize="medium")
    return figure


def _draw(
    axes: Axes, at: Vector, values: Vector, stages: NDArray[np.str_], accepted: NDArray[np.bool_]
) -> None:
    """Draw a line per stage, and rejected trial points as crosses."""
    for stage, color in _STAGES.items():
        here = stages == stage
        if here.any():
            axes.plot(at[here], values[here], "-", color=color, lw=1.2, alpha=0.7)
            shown = here & accepted
            axes.plot(at[shown], values[shown], "o", color=color, ms=4, label=stage)
    rejected = ~accepted
    if rejected.any():
        color = text_color()
        axes.plot(
            at[rejected], values[rejected], "x", color=color, ms=6, mew=1.4, label="rejected trial"
        )
    _shade(axes, at, stages)


def _shade(axes: Axes, at: Vector, stages: NDArray[np.str_]) -> None:
    """Draw a vertical line wherever the stage changes."""
    for i in range(1, len(at)):
        if stages[i] != stages[i - 1]:
            axes.axvline(0.5 * (at[i - 1] + at[i]), color=QUIET, lw=0.8, ls=":")


def _set_log_scale(axes: Axes, values: Vector) -> None:
    """Draw grid lines, and use a logarithmic scale if the positive values span a large range."""
    positive = values[np.isfinite(values) & (values > 0.0)]
    if positive.size and positive.max() >= _MIN_LOG_SPAN * positive.min():
        axes.set_yscale("log")
    axes.grid(axis="y", color=QUIET, lw=0.4, alpha=0.4)
