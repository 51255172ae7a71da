"""Pictures of the blocks of the data and of the pixels of a map, on the dashboard page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nlsq_dask.observers.dashboard.on_scheduler.fits import Fit
from nlsq_dask.observers.dashboard.on_scheduler.plots import COLORS, Plot, new_figure, place_above
from nlsq_dask.observers.dashboard.on_scheduler.tables import (
    STATUSES,
    Image,
    Line,
    image,
    profile,
    status_image,
    value_image,
)

# Text of the tooltip: the block or pixel, or their range, at the pointer.
_WHICH = """
const {step, size} = about.data
const first = Math.floor(value / step[axis]) * step[axis]
const last = Math.min(first + step[axis], size[axis]) - 1
return last > first ? `${first} to ${last}` : `${first}`
"""
_NAME = "return names[value - lowest] ?? 'not fitted yet'"
_NUMBER = "return Number.isFinite(value) ? `${Number(value.toPrecision(5))}` : 'none'"
_BLOCKS = "Reduced chi-square of each block"
_NO_VALUE, _NOT_FITTED = "#dddddd", "#FFFFFF"  # colors of cells
# Colors by status, those of plot_map.
STATUS_COLORS = {
    3: "#0072B2",
    2: "#56B4E9",
    1: "#009E73",
    0: "#F0E442",
    -1: "#E0E0E0",
    -2: "#A6A6A6",
    -3: "#D55E00",
    -4: "#E69F00",
    -5: "#CC79A7",
    -6: "#7A0019",
}


class Picture(Plot):
    """Figure of the parts of one fit: blocks of data, or pixels of a map.

    Parameters
    ----------
    name : str
    data : callable
        Returns what is drawn for a fit, an ``Image`` or a ``Line``; None if there is nothing yet.
    """

    def __init__(self, name: str, data: Callable[[Fit], Any], **options: Any) -> None:
        self._data = data
        self.figure = new_figure("", name=name, height=330, visible=False, **options)

    def show(self, fits: list[Fit]) -> None:
        """Show the first running fit of which there is something, otherwise the last such fit.

        The figure is hidden if there is none.
        """
        known = [fit for fit in fits if fit.picture or fit.map]
        running = [fit for fit in known if fit.is_running]
        fit = next(iter(running or reversed(known)), None)
        data = None if fit is None else self._data(fit)
        self.figure.visible = data is not None
        if fit is not None and data is not None:
            self._draw(data, fit)
            self.figure.title.text = f"{self._title(fit)}{data.note}"

    def _title(self, fit: Fit) -> str:
        return f"{_BLOCKS}: {fit.title}, pass {fit.map['pass']}"

    def _draw(self, data: Any, fit: Fit) -> None:
        raise NotImplementedError


class HeatMap(Picture):
    """Picture with a cell per block or pixel, or per several of them.

    Parameters
    ----------
    mapper : ColorMapper
        Bokeh's model for the colors of the cells.
    format_value : str, optional
        Code in JavaScript that returns the text of a tooltip for a ``value``. By default, a number
        has four decimals.
    **arguments
        Variables of that code.
    """

    def __init__(
        self,
        name: str,
        data: Callable[[Fit], Image | None],
        mapper: Any,
        format_value: str = "",
        **arguments: Any,
    ) -> None:
        from bokeh.models import BasicTicker, ColumnDataSource, CustomJSHover, HoverTool, Range1d

        super().__init__(name, data, x_range=Range1d(), y_range=Range1d())
        self._mapper = mapper
        self._table = ColumnDataSource({"image": [], "w": [], "h": []})
        self._about = ColumnDataSource({"step": [1, 1], "size": [0, 0]})
        picture = self.figure.image(
            "image", x=0, y=0, dw="w", dh="h", source=self._table, color_mapper=mapper
        )
        self.figure.grid.visible = False
        self.figure.axis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
        formatters: dict[str, Any] = {
            name: CustomJSHover(args={"about": self._about, "axis": axis}, code=_WHICH)
            for axis, name in enumerate(("$x", "$y"))
        }
        if format_value:
            formatters["@image"] = CustomJSHover(args=arguments, code=format_value)
        self._value = "@image{custom}" if format_value else "@image{0.0000}"
        self._hover = HoverTool(renderers=[picture], formatters=formatters)
        self.figure.add_tools(self._hover)

    def _add_color_bar(self, **options: Any) -> Any:
        from bokeh.models import ColorBar

        bar = ColorBar(
            color_mapper=self._mapper, width=12, title_text_font_size="9pt",
            title_text_font_style="normal", padding=6, **options,
        )  # fmt: skip
        self.figure.add_layout(bar, "right")
        return bar

    def _tips(self, data: Image, fit: Fit) -> list[tuple[str, str]]:
        """Return the lines of the tooltip: names, and where their values come from."""
        raise NotImplementedError

    def _draw(self, data: Image, fit: Fit) -> None:
        width, height = data.drawn
        self._table.data = {"image": [data.table], "w": [width], "h": [height]}
        about = {"step": data.step, "size": list(data.size)}
        if about != dict(self._about.data):  # otherwise keep the zoom of the user
            self._about.data = about
            _fix(self.figure.x_range, 0, data.size[0])
            _fix(self.figure.y_range, data.size[1], 0)
        tips = self._tips(data, fit)
        if tips != self._hover.tooltips:
            self._hover.tooltips = tips
        self.figure.xaxis.axis_label, self.figure.yaxis.axis_label = data.axes
        self.figure.yaxis.visible = bool(data.dims[1])


def _fix(axis: Any, start: int, end: int) -> None:
    """Set the visible range of an axis, and the limits for panning, to the same interval."""
    axis.bounds = None  # a browser clips the new range to the old bounds
    axis.update(start=start, end=end, reset_start=start, reset_end=end)
    axis.bounds = (min(start, end), max(start, end))


def _continuous() -> Any:
    from bokeh.models import LinearColorMapper

    return LinearColorMapper(palette="Viridis256", nan_color=_NO_VALUE, low=0, high=1)


class Map(HeatMap):
    """Heat map of the blocks, for data that are divided along two or more dimensions."""

    def __init__(self) -> None:
        super().__init__("map", image, _continuous())
        self._add_color_bar(title="reduced chi-square of each block")

    def _tips(self, data: Image, fit: Fit) -> list[tuple[str, str]]:
        # The block's indices in the order of the data's dimensions: down, then across.
        return [("block", "$y{custom}, $x{custom}"), ("reduced chi-square", self._value)]

    def _draw(self, data: Image, fit: Fit) -> None:
        super()._draw(data, fit)
        self._mapper.update(low=data.low, high=data.high)


class Profile(Picture):
    """Step plot of the blocks, for data that are divided along one dimension."""

    def __init__(self) -> None:
        from bokeh.models import ColumnDataSource

        super().__init__("profile", profile, y_axis_label="reduced chi-square")
        self._table = ColumnDataSource({"x": [], "y": []})
        self.figure.step("x", "y", source=self._table, mode="after", color=COLORS[0], width=1.5)

    def _draw(self, data: Line, fit: Fit) -> None:
        self._table.data = {"x": data.x, "y": data.y}
        self.figure.xaxis.axis_label = data.axis


class PixelMap(HeatMap):
    """Heat map of the pixels of ``fit_each``, which fills while tiles finish."""

    of_fits, of_maps = False, True

    def _tips(self, data: Image, fit: Fit) -> list[tuple[str, str]]:
        places = zip(reversed(data.dims), ("$y{custom}", "$x{custom}"), strict=True)
        return [*((dim, at) for dim, at in places if dim), (self._quantity(fit), self._value)]

    def _quantity(self, fit: Fit) -> str:
        raise NotImplementedError

    def _title(self, fit: Fit) -> str:
        return f"{self._quantity(fit).capitalize()} of the pixels: {fit.title}"


class StatusMap(PixelMap):
    """Heat map of the statuses, with a legend of those that occur."""

    def __init__(self) -> None:
        from bokeh.models import Legend, LegendItem, LinearColorMapper

        codes = sorted(STATUSES)
        mapper = LinearColorMapper(
            palette=[STATUS_COLORS[code] for code in codes],
            low=codes[0] - 0.5, high=codes[-1] + 0.5, nan_color=_NOT_FITTED,
        )  # fmt: skip
        names = [STATUSES[code] for code in codes]
        super().__init__("status", status_image, mapper, _NAME, names=names, lowest=codes[0])
        nowhere = [float("nan")]
        self._items = {
            code: LegendItem(
                label=STATUSES[code],
                renderers=[
                    self.figure.scatter(
                        nowhere, nowhere, marker="square", color=STATUS_COLORS[code], size=10
                    )
                ],
                visible=False,
            )
            for code in reversed(codes)
        }
        place_above(self.figure, Legend(items=list(self._items.values())))

    def _quantity(self, fit: Fit) -> str:
        return "status"

    def _draw(self, data: Image, fit: Fit) -> None:
        super()._draw(data, fit)
        for code, item in self._items.items():
            item.visible = bool((data.table == code).any())


class ParameterMap(PixelMap):
    """Heat map of a parameter."""

    def __init__(self) -> None:
        super().__init__("parameter", value_image, _continuous(), _NUMBER)
        self._bar = self._add_color_bar(title="")

    def _quantity(self, fit: Fit) -> str:
        return str(fit.picture["parameter"])

    def _title(self, fit: Fit) -> str:
        return f"Parameter {self._quantity(fit)} of the pixels: {fit.title}"

    def _draw(self, data: Image, fit: Fit) -> None:
        super()._draw(data, fit)
        self._mapper.update(low=data.low, high=data.high)
        self._bar.title = self._quantity(fit)
