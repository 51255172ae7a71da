"""The page: a Bokeh document that copies what is known of the fits every half second."""

from __future__ import annotations

import html
import time
from typing import Any

from nlsq_dask.dashboard.on_scheduler.fits import Fit, Fits
from nlsq_dask.dashboard.on_scheduler.tables import (
    CURVES,
    bars_of_pass,
    bars_of_phases,
    curve,
    image,
    pass_in_words,
    profile,
    rates,
)

_PERIOD = 500  # milliseconds
_SLOTS = 6  # fits that are shown side by side
# Of Okabe and Ito: told apart by everyone, on paper, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PHASES = ("#999999", "#E69F00", "#0072B2", "#009E73")  # by number
_STATES = {
    "running": "#0072B2",
    "finished": "#1a7f37",
    "no success": "#b35900",
    "aborted": "#b00020",
    "lost": "#b00020",
}
_ALL = "all"

# The menu is fixed at the top, and covers what is below it where it takes two lines.
_TEMPLATE = """
{% extends "base.html" %}
{% block extra_resources %}
<style>
  body { padding-top: 0; height: auto; }
  .navbar { position: sticky; margin: 0 -10px 0.6rem; z-index: 5; }
  .nlsq { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }
  .nlsq > .wide { grid-column: 1 / -1; }
  @media (max-width: 460px) { .nlsq { grid-template-columns: 100%; } }
</style>
{% endblock %}
{% block content %}
<div class="nlsq">
  {% for root in roots %}
  <div class="{{ 'wide' if root.name.startswith('wide') else '' }}" style="min-width: 0">
    <div id="{{ root.elementid }}" data-root-id="{{ root.id }}" style="display: contents"></div>
  </div>
  {% endfor %}
</div>
{{ plot_script }}
{% endblock %}
"""


def show_fits(fits: Fits, scheduler: Any, variables: dict[str, Any], doc: Any) -> None:
    """Fill the document of a browser that has opened the page."""
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    view = View(fits)
    view.update()
    for root in view.roots:
        doc.add_root(root)
    doc.title = "Dask: nonlinear fits"
    doc.template = env.from_string(_TEMPLATE)
    doc.template_variables.update(variables)
    doc.theme = BOKEH_THEME
    doc.add_periodic_callback(view.update, _PERIOD)


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


class View:
    """The models of one browser's page.

    Attributes
    ----------
    roots : list of Model
        In their order on the page.
    """

    def __init__(self, fits: Fits) -> None:
        from bokeh.models import Div, Select

        self._fits = fits
        self._seen: tuple[Any, ...] = ()
        self._choice = Select(
            value=_ALL, options=[(_ALL, "all fits")], width=260, name="wide choice"
        )
        self._choice.on_change("value", lambda attribute, old, new: self.update())
        self._head = Div(sizing_mode="stretch_width", name="wide head")
        self._curves = {name: Curves(name, *about) for name, about in CURVES.items()}
        self._rates = Curves("rate", "Data read a second", "seconds since the fit began", "MB/s")
        self._phases = Phases()
        self._pass = RunningPass()
        self._map = Map()
        self._profile = Profile()
        self._notes = Div(sizing_mode="stretch_width", name="wide notes")
        self._plots = [
            self._pass.figure,
            self._phases.figure,
            *(curves.figure for curves in self._curves.values()),
            self._rates.figure,
            self._map.figure,
            self._profile.figure,
            self._notes,
        ]
        self.roots = [self._choice, self._head, *self._plots]

    def update(self) -> None:
        """Copy what is new."""
        every = list(self._fits.recent.values())
        is_running = any(fit.is_running for fit in every)
        seen = (self._fits.version, self._choice.value, time.time() if is_running else 0)
        if seen == self._seen:
            return
        self._seen = seen
        self._offer(every)
        chosen = [fit for fit in every if str(fit.number) == self._choice.value]
        shown = chosen or every[-_SLOTS:]
        for plot in self._plots:
            plot.visible = bool(shown)
        if not shown:
            self._head.text = _NOTHING
            return
        self._head.text = "".join(map(_of_fit, reversed(shown)))
        self._phases.show(shown)
        self._pass.show(shown)
        for name, curves in self._curves.items():
            curves.show(shown, lambda fit, name=name: curve(fit, name))
        self._rates.show(shown, rates)
        running = [fit for fit in shown if fit.is_running and fit.map]
        mapped = [*running, *(fit for fit in reversed(shown) if fit.map)][:1]
        self._map.show(mapped)
        self._profile.show(mapped)
        self._notes.text = _notes_of(shown)

    def _offer(self, every: list[Fit]) -> None:
        label = f"all fits (the last {_SLOTS})" if len(every) > _SLOTS else "all fits"
        options = [(_ALL, label)]
        options += [(str(fit.number), f"{fit.title}, {fit.state}") for fit in reversed(every)]
        if options != self._choice.options:
            self._choice.options = options
        self._choice.visible = len(every) > 1
        if self._choice.value not in [value for value, _ in options]:
            self._choice.value = _ALL


_NOTHING = (
    '<div style="font-size: 15px; color: #555; padding: 2rem 0.5rem">'
    "<b>No fit yet.</b> A fit on this cluster shows up here by itself.</div>"
)


def _of_fit(fit: Fit) -> str:
    about = fit.about
    state = f'<b style="color: {_STATES.get(fit.state, "#333")}">{fit.state}</b>'
    words = []
    if about:
        names = ", ".join(about["names"])
        more = about["n_params"] - len(about["names"])
        names += f" and {more:,} more parameters" if more else ""
        grid = " x ".join(f"{n:,}" for n in about["grid"])
        words = [names, f"{about['n_rows']:,} rows", f"blocks: {grid}"]
    now = pass_in_words(fit)
    loss = [entry["loss"] for entry in list(fit.iterations)[-1:]]
    words += [f"loss {value:.6g}" for value in loss]
    started = time.strftime("%H:%M:%S", time.localtime(fit.began))
    text = " &middot; ".join(html.escape(word) for word in [f"since {started}", *words])
    colour = _COLOURS[fit.number % _SLOTS]
    end = html.escape(now or fit.text)
    return (
        f'<div style="margin: 2px 0 6px; font-size: 14px; border-left: 5px solid {colour}; '
        f'padding-left: 8px"><b>{html.escape(fit.title)}</b>: {state} '
        f'<span style="color: #555">{text}</span><br>{end}</div>'
    )


def _notes_of(shown: list[Fit]) -> str:
    entries = [(at, fit, text) for fit in shown for at, text in fit.notes]
    lines = []
    for at, fit, text in sorted(entries, key=lambda entry: entry[0], reverse=True)[:30]:
        clock = time.strftime("%H:%M:%S", time.localtime(at))
        which = f"{html.escape(fit.title)}: " if len(shown) > 1 else ""
        colour = _COLOURS[fit.number % _SLOTS]
        lines.append(
            f'<tr><td style="color: #777; padding-right: 10px">{clock}</td><td>'
            f'<span style="color: {colour}">{which}</span>{html.escape(text)}</td></tr>'
        )
    table = "".join(lines) or '<tr><td style="color: #777">nothing yet</td></tr>'
    return (
        '<div style="font-size: 13px; background: white; border: 1px solid #ccc; padding: 8px">'
        '<div style="font-size: 15px; margin-bottom: 4px">Defence layers and other events</div>'
        f'<div style="max-height: 240px; overflow-y: auto"><table>{table}</table></div></div>'
    )


class Curves:
    """A curve a fit, each drawn by itself: in one table, those of two fits would be joined."""

    def __init__(self, name: str, title: str, x: str, y: str, is_log: bool = False) -> None:
        from bokeh.models import ColumnDataSource, Legend, LegendItem

        self.figure = _figure(
            title,
            name=name,
            x_axis_label=x,
            y_axis_label=y,
            y_axis_type="log" if is_log else "auto",
        )
        self._tables, self._items = [], []
        for colour in _COLOURS:
            table = ColumnDataSource({"x": [], "y": [], "marker": [], "size": []})
            line = self.figure.line("x", "y", source=table, color=colour, width=2)
            points = self.figure.scatter(
                "x", "y", source=table, color=colour, marker="marker", size="size"
            )
            self._tables.append(table)
            self._items.append(LegendItem(label="", renderers=[line, points], visible=False))
        place = {
            "location": "top_right",
            "background_fill_alpha": 0.7,
            "label_text_font_size": "9pt",
        }
        self._legend = Legend(items=self._items, padding=4, spacing=0, **place)
        self._legend.click_policy = "hide"
        self.figure.add_layout(self._legend)

    def show(self, fits: list[Fit], data: Any) -> None:
        """Show these fits and no others."""
        of_slot = {fit.number % _SLOTS: fit for fit in fits}
        for slot, (table, item) in enumerate(zip(self._tables, self._items, strict=True)):
            fit = of_slot.get(slot)
            new = {"x": [], "y": [], "marker": [], "size": []} if fit is None else data(fit)
            if len(new["x"]) or len(table.data["x"]):
                table.data = new
            label = "" if fit is None else fit.title
            if item.label != {"value": label}:
                item.label = {"value": label}
                item.visible = bool(label)
        self._legend.visible = len(fits) > 1


class Bars:
    """Bars in a row a fit, with words beside them."""

    def __init__(self, title: str, name: str, **options: Any) -> None:
        from bokeh.models import ColumnDataSource, FactorRange

        self._rows = FactorRange()
        self.figure = _figure(title, name=name, y_range=self._rows, **options)
        self.figure.ygrid.grid_line_color = None
        self._table = ColumnDataSource()

    def _fill(self, fits: list[Fit], data: dict[str, list[Any]]) -> None:
        titles = [fit.title for fit in reversed(fits)]
        if titles != self._rows.factors:
            self._rows.factors = titles
            self.figure.height = 105 + 34 * max(len(titles), 2)
        self._table.data = data


class Phases(Bars):
    """The time line of the phases."""

    def __init__(self) -> None:
        from bokeh.models import HoverTool

        super().__init__(
            "Phases",
            "phases",
            x_axis_label="seconds since the fit began",
            tools="xpan,xwheel_zoom,reset,save",
        )
        self._table.data = bars_of_phases([], _PHASES)
        bars = self.figure.hbar(
            y="fit", left="left", right="right", height=0.62, color="color", source=self._table,
            line_color="white", legend_group="name",
        )  # fmt: skip
        self.figure.text(
            x="left", y="fit", text="label", source=self._table, text_font_size="9pt",
            text_baseline="middle", x_offset=5, text_color="white",
        )  # fmt: skip
        tips = [("phase", "@name"), ("seconds", "@seconds{0.00}"), ("state", "@state")]
        self.figure.add_tools(HoverTool(renderers=[bars], tooltips=tips))
        legend = self.figure.legend[0]
        self.figure.legend.orientation = "horizontal"
        legend.label_text_font_size = "8pt"
        legend.padding, legend.margin, legend.spacing = 2, 0, 8
        legend.border_line_color = None
        self.figure.center.remove(legend)
        self.figure.add_layout(legend, "above")

    def show(self, fits: list[Fit]) -> None:
        """Show these fits."""
        self._fill(fits, bars_of_phases(fits, _PHASES))
        self.figure.x_range.start = 0


class RunningPass(Bars):
    """How far the running pass of each fit is."""

    def __init__(self) -> None:
        super().__init__(
            "Blocks done in the running pass",
            "pass",
            x_range=(0, 100),
            x_axis_label="% of the blocks",
            tools="",
        )
        self._table.data = bars_of_pass([], _COLOURS)
        self.figure.hbar(
            y="fit", left=0, right=100, height=0.62, color="#eeeeee", source=self._table
        )
        self.figure.hbar(
            y="fit",
            left=0,
            right="share",
            height=0.62,
            color="color",
            alpha=0.45,
            source=self._table,
        )
        self.figure.text(
            x=0, y="fit", text="label", source=self._table, text_font_size="9pt",
            text_baseline="middle", x_offset=6, text_color="#222222",
        )  # fmt: skip

    def show(self, fits: list[Fit]) -> None:
        """Show these fits."""
        self._fill(fits, bars_of_pass(fits, _COLOURS))


_BLOCKS = "Reduced chi-square of each block"


class Map:
    """Reduced chi-square of the blocks of a grid of two or more dimensions."""

    def __init__(self) -> None:
        from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper

        self.figure = _figure(_BLOCKS, name="map", height=330, visible=False)
        self._table = ColumnDataSource({"image": [], "w": [], "h": []})
        self._mapper = LinearColorMapper(palette="Viridis256", nan_color="#dddddd", low=0, high=1)
        picture = self.figure.image(
            "image", x=0, y=0, dw="w", dh="h", source=self._table, color_mapper=self._mapper
        )
        bar = ColorBar(
            color_mapper=self._mapper, title="reduced chi-square of each block", width=12,
            title_text_font_size="9pt", title_text_font_style="normal", padding=6,
        )  # fmt: skip
        self.figure.add_layout(bar, "right")
        self.figure.x_range.range_padding = self.figure.y_range.range_padding = 0
        self.figure.grid.visible = False
        tips = [("block", "$x{0}, $y{0}"), ("reduced chi-square", "@image{0.0000}")]
        self.figure.add_tools(HoverTool(renderers=[picture], tooltips=tips))

    def show(self, fits: list[Fit]) -> None:
        """Show one fit, or none."""
        found = image(fits[0]) if fits else None
        self.figure.visible = found is not None
        if found is None:
            return
        self._table.data = {"image": [found.table], "w": [found.width], "h": [found.height]}
        self._mapper.low, self._mapper.high = found.low, found.high
        self.figure.xaxis.axis_label, self.figure.yaxis.axis_label = found.axes
        self.figure.title.text = (
            f"{_BLOCKS}: {fits[0].title}, pass {fits[0].map['pass']}{found.note}"
        )


class Profile:
    """Reduced chi-square of the blocks of a grid of one dimension."""

    def __init__(self) -> None:
        from bokeh.models import ColumnDataSource

        self.figure = _figure(
            _BLOCKS, name="profile", height=330, visible=False, y_axis_label="reduced chi-square"
        )
        self._table = ColumnDataSource({"x": [], "y": []})
        self.figure.step("x", "y", source=self._table, mode="after", color=_COLOURS[0], width=1.5)

    def show(self, fits: list[Fit]) -> None:
        """Show one fit, or none."""
        found = profile(fits[0]) if fits else None
        self.figure.visible = found is not None
        if found is None:
            return
        self._table.data = {"x": found.x, "y": found.y}
        self.figure.xaxis.axis_label = found.axis
        self.figure.title.text = (
            f"{_BLOCKS}: {fits[0].title}, pass {fits[0].map['pass']}{found.note}"
        )
