"""Parts that all plots share: figures, colors, labels and date axes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# The color-blind safe palette of Okabe and Ito.
FIT, MEAN, THIRD, FOURTH = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
QUIET = "0.5"  # gray, visible on white and on black
DATES = "days since 1970-01-01"
_DATE_LABEL_WIDTH = 0.5  # inches per label of a tick, including the gap to the next


def prepare_figure(
    figure: Figure | SubFigure | None, width: float, height: float
) -> Figure | SubFigure:
    """Return the given figure, or if it is None a new pyplot figure of this size in inches.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If ``figure`` is not a figure.
    """
    try:
        from matplotlib import pyplot as plt
        from matplotlib.figure import FigureBase
    except ImportError as error:
        raise ImportError(
            "plots require matplotlib, which is not installed. Run pip install 'nlsq-dask[plot]'."
        ) from error
    if figure is None:
        new_figure = plt.figure(figsize=(width, height), layout="constrained")
        vars(new_figure)["_ipython_display_"] = partial(_display_once, new_figure)
        return new_figure
    if not isinstance(figure, FigureBase):
        raise TypeError(
            f"figure must be a matplotlib Figure or SubFigure, or None for a new one; got "
            f"{type(figure).__name__}."
        )
    return figure


def _display_once(figure: Figure) -> None:
    """Close a figure that a notebook is about to display, so that it is not shown twice.

    The inline backend shows every open figure at the end of a cell, in addition to a figure that is
    the value of the cell. IPython calls this function before it displays a figure. The function
    always raises NotImplementedError, upon which IPython displays the figure in its usual way.
    """
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    if "inline" in mpl.get_backend():
        plt.close(figure)
    raise NotImplementedError


def label(text: str, units: str = "") -> str:
    r"""Return a text for a figure, followed by units in parentheses if there are any.

    ``$`` becomes ``\$``, because Matplotlib typesets text between two ``$`` as mathematics and
    raises an error if it is invalid.
    """
    return (f"{text} ({units})" if units else text).replace("$", r"\$")


def text_color() -> Any:
    """Return the text color of the current Matplotlib style."""
    import matplotlib as mpl

    return mpl.rcParams["text.color"]


def date_axis(axes: Axes, low: float, high: float) -> bool:
    """Label an x axis in days since 1970 with dates; return False if it cannot have dates.

    Matplotlib draws dates of the years 1 to 9999 only. ``low`` and ``high`` are the limits in days.
    """
    from matplotlib import dates

    first, last = np.datetime64("0001-01-02"), np.datetime64("9999-12-30")
    days = np.array([first, last]).astype("datetime64[D]").astype(float)
    if not days[0] < low <= high < days[1] or dates.get_epoch() != "1970-01-01T00:00:00":
        return False
    width = axes.get_window_extent().width / axes.figure.dpi
    max_ticks = int(np.clip(width / _DATE_LABEL_WIDTH, 5, 11))
    # With fewer ticks the locator switches to the next shorter unit, whose longest interval is half
    # of the longer unit, such as six months of a year: these ticks must also fit.
    locator = dates.AutoDateLocator(minticks=(max_ticks - 1) // 2, maxticks=max_ticks)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    return True
