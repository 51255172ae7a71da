"""The figure that is drawn into, its colours, and how it shows in a notebook."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Of Okabe and Ito, which everyone can tell apart.
FIT, MEAN, THIRD, FOURTH = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
QUIET = "0.5"  # grey lines, seen on white and on black
DATES = "days since 1970-01-01"
_DATE_LABEL_WIDTH = 0.5  # inches that a tick's label takes, with the gap beside it


def prepare_figure(
    figure: Figure | SubFigure | None, width: float, height: float
) -> Figure | SubFigure:
    """Return the given figure, or a new one of pyplot's, of this size in inches.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If ``figure`` is something else.
    """
    try:
        from matplotlib import pyplot as plt
        from matplotlib.figure import FigureBase
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install 'nlsq-dask[plot]'."
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
    """Keep the inline backend of a notebook from showing a figure twice.

    It shows all open figures at the end of a cell, and a figure that is the value of a cell as
    well: so what is being shown is closed, as the backend does after the cell in any case.
    NotImplementedError makes IPython show it in the way it would without this.
    """
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    if "inline" in mpl.get_backend():
        plt.close(figure)
    raise NotImplementedError


def label(text: str, units: str = "") -> str:
    r"""Return text of the data for a figure, with its units, if it has any.

    Matplotlib reads what is between two ``$`` as mathematics, and raises an error while drawing
    where it is none; ``\$`` is a dollar sign.
    """
    return (f"{text} ({units})" if units else text).replace("$", r"\$")


def text_color() -> Any:
    """Return the colour of text in the style that is in use, white on black ones."""
    import matplotlib as mpl

    return mpl.rcParams["text.color"]


def date_axis(axes: Axes, low: float, high: float) -> bool:
    """Make the x axis one of dates, from days since 1970; return whether it could show them."""
    from matplotlib import dates

    first, last = np.datetime64("0001-01-02"), np.datetime64("9999-12-30")
    days = np.array([first, last]).astype("datetime64[D]").astype(float)
    if not days[0] < low <= high < days[1] or dates.get_epoch() != "1970-01-01T00:00:00":
        return False
    width = axes.get_window_extent().width / axes.figure.dpi
    max_ticks = int(np.clip(width / _DATE_LABEL_WIDTH, 5, 11))
    # Below so few the locator takes the next shorter unit, two of whose longest intervals are one
    # of the longer, such as six months of a year: they must fit in as well.
    locator = dates.AutoDateLocator(minticks=(max_ticks - 1) // 2, maxticks=max_ticks)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    return True
