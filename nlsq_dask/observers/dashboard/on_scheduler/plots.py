"""Plots of the dashboard page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nlsq_dask.observers.dashboard.on_scheduler.fits import Fit
from nlsq_dask.observers.dashboard.on_scheduler.tables import (
    Image,
    Line,
    bars_of_pass,
    bars_of_phases,
    curve,
    image,
    profile,
)

SLOTS = 6  # number of fits that are shown together; a fit's number modulo it gives its color
# The palette of Okabe and Ito, for all kinds of color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PHASES = ("#999999", "#E69F00", "#0072B2", "#009E73")  # by number
# Short forms of events.PHASES, which cannot be imported here.
_PHASE_NAMES = ("normalization", "warm-up", "Gauss-Newton", "covariance")


def _figure(title: str, **options: Any) -> Any:
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


def _above(figure: Any, legend: Any) -> Any:
    """Place the legend above the figure and return the legend."""
    legend.orientation = "horizontal"
    legend.label_text_font_size = "9pt"
    legend.border_line_color = legend.background_fill_color = None
    legend.padding, legend.margin, legend.spacing = 0, 0, 12
    legend.glyph_height = legend.glyph_width = 14
    figure.add_layout(legend, "above")
    return legend


class Curves:
    """Figure with one curve per fit; ``name`` and the other arguments are as in ``CURVES``."""

    def __init__(self, name: str, title: str, x: str, y: str, is_log: bool = False) -> None:
        from bokeh.models import ColumnDataSource, Legend, LegendItem

        self.figure = _figure(
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
        self._legend = _above(self.figure, Legend(items=self._items, click_policy="hide"))

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


class Bars:
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
        self.figure = _figure(title, name=name, y_range=self._rows, **options)
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
        _above(self.figure, Legend(items=items))

    def show(self, fits: list[Fit]) -> None:
        """Show these fits, on an axis that starts at 0 seconds."""
        super().show(fits)
        self.figure.x_range.start = 0


class RunningPass(Bars):
    """Progress bar of each fit: the share of the blocks that its current pass has completed."""

    def __init__(self) -> None:
        super().__init__(
            "Completed blocks of the running pass",
            "pass",
            lambda fits: bars_of_pass(fits, COLORS),
            x_range=(0, 100),
            x_axis_label="% of the blocks",
            tools="",
        )
        self._add_bars(left=0, right=100, color="#eeeeee")
        self._add_bars(left=0, right="share", color="color", alpha=0.45)
        self._add_labels(x=0, x_offset=6, text_color="#222222")


# Text of the tooltip: the block, or range of blocks, at the pointer.
_WHICH = """
const {blocks, size} = about.data
const first = Math.floor(value / blocks[axis]) * blocks[axis]
const last = Math.min(first + blocks[axis], size[axis]) - 1
return last > first ? `${first} to ${last}` : `${first}`
"""
_BLOCKS = "Reduced chi-square of each block"


class BlockPlot:
    """Figure of the reduced chi-square of each block of data, for one fit.

    ``data`` returns what is drawn for a fit, or None if its blocks need another kind of figure.
    """

    def __init__(self, name: str, data: Callable[[Fit], Any], **options: Any) -> None:
        self._data = data
        self.figure = _figure(_BLOCKS, name=name, height=330, visible=False, **options)

    def show(self, fits: list[Fit]) -> None:
        """Show the first running fit for which ``data`` is not None, otherwise the last such fit.

        The figure is hidden if there is none.
        """
        measured = [fit for fit in fits if fit.map]
        running = [fit for fit in measured if fit.is_running]
        fit = next(iter(running or reversed(measured)), None)
        data = None if fit is None else self._data(fit)
        self.figure.visible = data is not None
        if fit is not None and data is not None:
            self._draw(data)
            self.figure.title.text = f"{_BLOCKS}: {fit.title}, pass {fit.map['pass']}{data.note}"

    def _draw(self, data: Any) -> None:
        raise NotImplementedError


class Map(BlockPlot):
    """Heat map of the blocks, for data that are divided along two or more dimensions."""

    def __init__(self) -> None:
        from bokeh.models import (
            BasicTicker,
            ColorBar,
            ColumnDataSource,
            CustomJSHover,
            HoverTool,
            LinearColorMapper,
            Range1d,
        )

        super().__init__("map", image, x_range=Range1d(), y_range=Range1d())
        self._table = ColumnDataSource({"image": [], "w": [], "h": []})
        self._about = ColumnDataSource({"blocks": [1, 1], "size": [0, 0]})
        self._mapper = LinearColorMapper(palette="Viridis256", nan_color="#dddddd", low=0, high=1)
        picture = self.figure.image(
            "image", x=0, y=0, dw="w", dh="h", source=self._table, color_mapper=self._mapper
        )
        bar = ColorBar(
            color_mapper=self._mapper, title="reduced chi-square of each block", width=12,
            title_text_font_size="9pt", title_text_font_style="normal", padding=6,
        )  # fmt: skip
        self.figure.add_layout(bar, "right")
        self.figure.grid.visible = False
        self.figure.axis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
        # The block's indices in the order of the data's dimensions: down, then across.
        tips = [("block", "$y{custom}, $x{custom}"), ("reduced chi-square", "@image{0.0000}")]
        which = {
            name: CustomJSHover(args={"about": self._about, "axis": axis}, code=_WHICH)
            for axis, name in enumerate(("$x", "$y"))
        }
        self.figure.add_tools(HoverTool(renderers=[picture], tooltips=tips, formatters=which))

    def _draw(self, block_map: Image) -> None:
        width, height = block_map.drawn
        self._table.data = {"image": [block_map.table], "w": [width], "h": [height]}
        about = {"blocks": block_map.blocks, "size": list(block_map.size)}
        if about != dict(self._about.data):  # otherwise keep the zoom of the user
            self._about.data = about
            _fix(self.figure.x_range, 0, block_map.size[0])
            _fix(self.figure.y_range, block_map.size[1], 0)
        self._mapper.low, self._mapper.high = block_map.low, block_map.high
        self.figure.xaxis.axis_label, self.figure.yaxis.axis_label = block_map.axes


def _fix(axis: Any, start: int, end: int) -> None:
    """Set the visible range of an axis, and the limits for panning, to the same interval."""
    axis.bounds = None  # a browser clips the new range to the old bounds
    axis.update(start=start, end=end, reset_start=start, reset_end=end)
    axis.bounds = (min(start, end), max(start, end))


class Profile(BlockPlot):
    """Step plot of the blocks, for data that are divided along one dimension."""

    def __init__(self) -> None:
        from bokeh.models import ColumnDataSource

        super().__init__("profile", profile, y_axis_label="reduced chi-square")
        self._table = ColumnDataSource({"x": [], "y": []})
        self.figure.step("x", "y", source=self._table, mode="after", color=COLORS[0], width=1.5)

    def _draw(self, line: Line) -> None:
        self._table.data = {"x": line.x, "y": line.y}
        self.figure.xaxis.axis_label = line.axis
