"""Curves and bars of the dashboard page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nlsq_dask.observers.dashboard.on_scheduler.fits import Fit
from nlsq_dask.observers.dashboard.on_scheduler.tables import (
    bars_of_phases,
    bars_of_progress,
    curve,
)

SLOTS = 6  # number of fits that are shown together; a fit's number modulo it gives its color
# The palette of Okabe and Ito, for all kinds of color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PHASES = ("#999999", "#E69F00", "#0072B2", "#009E73")  # by number
# Short forms of events.PHASES, which cannot be imported here.
_PHASE_NAMES = ("normalization", "warm-up", "Gauss-Newton", "covariance")


_UNITS = ("blocks of the running pass", "pixels of the map")  # of a fit, and of fit_each


def new_figure(title: str, **options: Any) -> Any:
    """Return an empty figure in the style of the page."""
    from bokeh.plotting import figure

    settings = {
        "height": 270,
        "sizing_mode": "stretch_width",
        "tools": "pan,box_zoom,wheel_zoom,reset,save",
        "toolbar_location": "above",
        "output_backend": "canvas",
        "background_fill_color": "white",
        "border_fill_color": "white",
        "outline_line_color": "#cccccc",
    }
    made = figure(title=title, **{**settings, **options})
    made.title.text_font_size = "11pt"
    made.title.text_font_style = "normal"
    made.grid.grid_line_color = "#eeeeee"
    made.toolbar.autohide = True
    made.toolbar.logo = None
    return made


def place_above(figure: Any, legend: Any) -> Any:
    """Place the legend above the figure and return the legend."""
    legend.orientation = "horizontal"
    legend.label_text_font_size = "9pt"
    legend.border_line_color = legend.background_fill_color = None
    legend.padding, legend.margin, legend.spacing = 0, 0, 12
    legend.glyph_height = legend.glyph_width = 14
    figure.add_layout(legend, "above")
    return legend


class Plot:
    """Part of the page: a figure that shows fits to all rows, fits for every pixel, or both."""

    figure: Any
    of_fits, of_maps = True, False

    def update(self, fits: list[Fit]) -> None:
        """Show those of the fits to which the plot applies; hide it if there are none."""
        own = [fit for fit in fits if (self.of_maps if fit.is_map else self.of_fits)]
        self.figure.visible = bool(own)
        if own:
            self.show(own)

    def show(self, fits: list[Fit]) -> None:
        """Show only these fits."""
        raise NotImplementedError


class Curves(Plot):
    """Figure with one curve per fit; ``name`` and the other arguments are as in ``CURVES``."""

    def __init__(self, name: str, title: str, x: str, y: str, is_log: bool = False) -> None:
        from bokeh.models import ColumnDataSource, Legend, LegendItem

        self.figure = new_figure(
            title,
            name=name,
            x_axis_label=x,
            y_axis_label=y,
            y_axis_type="log" if is_log else "auto",
        )
        self._name = name
        self._tables, self._items = [], []
        for color in COLORS:  # a data source per fit: points of one source are joined
            table = ColumnDataSource(curve(None, name))
            line = self.figure.line("x", "y", source=table, color=color, width=2)
            points = self.figure.scatter(
                "x", "y", source=table, color=color, marker="marker", size="size"
            )
            self._tables.append(table)
            self._items.append(LegendItem(label="", renderers=[line, points], visible=False))
        self._legend = place_above(self.figure, Legend(items=self._items, click_policy="hide"))

    def show(self, fits: list[Fit]) -> None:
        """Show only these fits."""
        of_slot = {fit.number % SLOTS: fit for fit in fits}
        for slot, (table, item) in enumerate(zip(self._tables, self._items, strict=True)):
            fit = of_slot.get(slot)
            new = curve(fit, self._name)
            if len(new["x"]) or len(table.data["x"]):
                table.data = new
            label = "" if fit is None else fit.title
            if item.label != {"value": label}:
                item.label = {"value": label}
                item.visible = bool(label)
        self._legend.visible = len(fits) > 1


class MapCurves(Curves):
    """Figure with one curve per map; the arguments are as in ``MAP_CURVES``."""

    of_fits, of_maps = False, True


class Bars(Plot):
    """Figure with a row of bars per fit.

    ``data`` is a function that takes fits and returns the bars as a dict of columns.
    """

    def __init__(
        self,
        title: str,
        name: str,
        data: Callable[[list[Fit]], dict[str, list[Any]]],
        **options: Any,
    ) -> None:
        from bokeh.models import ColumnDataSource, FactorRange

        self._data = data
        self._rows = FactorRange()
        self.figure = new_figure(title, name=name, y_range=self._rows, **options)
        self.figure.ygrid.grid_line_color = None
        self._table = ColumnDataSource(data([]))

    def _add_bars(self, **style: Any) -> Any:
        return self.figure.hbar(y="fit", height=0.62, source=self._table, **style)

    def _add_labels(self, **style: Any) -> None:
        settings = {"text_font_size": "9pt", "text_baseline": "middle", **style}
        self.figure.text(y="fit", text="label", source=self._table, **settings)

    def show(self, fits: list[Fit]) -> None:
        """Show only these fits."""
        titles = [fit.title for fit in fits]  # from the bottom to the top
        if titles != self._rows.factors:
            self._rows.factors = titles
            self.figure.height = 130 + 34 * max(len(titles), 2)
        self._table.data = self._data(fits)


class Phases(Bars):
    """Timeline of each fit, with one bar per phase."""

    def __init__(self) -> None:
        from bokeh.models import HoverTool, Legend, LegendItem

        super().__init__(
            "Phases",
            "phases",
            lambda fits: bars_of_phases(fits, _PHASES),
            x_axis_label="seconds since the start of the fit",
            tools="xpan,xwheel_zoom,reset,save",
        )
        bars = self._add_bars(left="left", right="right", color="color", line_color="white")
        self._add_labels(x="left", x_offset=5, text_color="white")
        tips = [("phase", "@name"), ("seconds", "@seconds{0.00}"), ("state", "@state")]
        self.figure.add_tools(HoverTool(renderers=[bars], tooltips=tips))
        # Invisible squares, so that the legend has all phases from the start.
        nowhere = [float("nan")]
        squares = [
            self.figure.scatter(nowhere, nowhere, marker="square", color=c, size=10)
            for c in _PHASES
        ]
        named = zip(_PHASE_NAMES, squares, strict=True)
        items = [LegendItem(label=name, renderers=[square]) for name, square in named]
        place_above(self.figure, Legend(items=items))

    def show(self, fits: list[Fit]) -> None:
        """Show these fits, on an axis that starts at 0 seconds."""
        super().show(fits)
        self.figure.x_range.start = 0


class Completed(Bars):
    """Progress bar of each fit: the complete share of its current pass or of its map."""

    of_maps = True

    def __init__(self) -> None:
        super().__init__(
            "Completed blocks of the running pass",
            "pass",
            lambda fits: bars_of_progress(fits, COLORS),
            x_range=(0, 100),
            tools="",
        )
        self._add_bars(left=0, right=100, color="#eeeeee")
        self._add_bars(left=0, right="share", color="color", alpha=0.45)
        self._add_labels(x=0, x_offset=6, text_color="#222222")

    def show(self, fits: list[Fit]) -> None:
        """Show these fits, and say what is counted."""
        super().show(fits)
        units = [_UNITS[is_map] for is_map in sorted({fit.is_map for fit in fits})]
        self.figure.title.text = f"Completed {' and '.join(units)}"
        self.figure.xaxis.axis_label = f"% of the {' or '.join(u.split()[0] for u in units)}"
