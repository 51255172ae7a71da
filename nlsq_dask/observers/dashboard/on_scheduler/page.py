"""The dashboard page: a Bokeh document, updated every half second."""

from __future__ import annotations

import html
import time
from typing import Any

from nlsq_dask.observers.dashboard.on_scheduler.fits import Fit, Fits
from nlsq_dask.observers.dashboard.on_scheduler.pictures import (
    Map,
    ParameterMap,
    Profile,
    StatusMap,
)
from nlsq_dask.observers.dashboard.on_scheduler.plots import (
    COLORS,
    SLOTS,
    Completed,
    Curves,
    MapCurves,
    Phases,
    Plot,
)
from nlsq_dask.observers.dashboard.on_scheduler.tables import (
    CURVES,
    MAP_CURVES,
    describe_progress,
)

_PERIOD = 500  # milliseconds
_STATES = {
    "running": "#0072B2",
    "finished": "#1a7f37",
    "no success": "#b35900",
    "stopped": "#b35900",
    "aborted": "#b00020",
    "lost": "#b00020",
}
_ALL = "all"

# The menu is sticky, because a fixed one of two lines covers the page. The roots themselves are the
# elements of the grid, so that one that is hidden takes no place.
_TEMPLATE = """
{% extends "base.html" %}
{% block extra_resources %}
<style>
  body { padding-top: 0; height: auto; }
  .navbar { position: sticky; margin: 0 -10px 0.6rem; z-index: 5; }
  .nlsq { display: grid; gap: 14px; max-width: 2000px; }
  .nlsq { grid-template-columns: repeat(auto-fit, minmax(560px, 1fr)); }
  @media (max-width: 620px) { .nlsq { grid-template-columns: 100%; } }
</style>
{% endblock %}
{% block content %}
<div class="nlsq">
  {% for root in roots %}
  <div id="{{ root.elementid }}" data-root-id="{{ root.id }}" style="display: contents"></div>
  {% endfor %}
</div>
{{ plot_script }}
{% endblock %}
"""


def show_fits(fits: Fits, scheduler: Any, variables: dict[str, Any], doc: Any) -> None:
    """Build the page in the Bokeh document of a new browser session."""
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


class View:
    """The page in one browser session; ``roots`` are its Bokeh models from top to bottom."""

    def __init__(self, fits: Fits) -> None:
        from bokeh.models import Div, Select

        self._fits = fits
        self._seen: tuple[Any, ...] = ()
        self._choice = Select(
            value=_ALL, options=[(_ALL, "all fits")], width=260, name="choice", styles=_WIDE
        )
        self._choice.on_change("value", lambda attribute, old, new: self.update())
        self._head = Div(
            sizing_mode="stretch_width", name="head", stylesheets=[_FULL_WIDTH], styles=_WIDE
        )
        self._notes = Div(sizing_mode="stretch_width", name="notes", stylesheets=[_FULL_WIDTH])
        curves = [Curves(name, *about) for name, about in CURVES.items()]
        rates = [MapCurves(name, *about) for name, about in MAP_CURVES.items()]
        # Only one of the first two pictures, the map of blocks and their profile, is visible.
        pictures = [Map(), Profile(), StatusMap(), ParameterMap()]
        self._plots: list[Plot] = [Completed(), *rates, Phases(), *curves, *pictures]
        figures = [plot.figure for plot in self._plots]
        self.roots = [self._choice, self._head, *figures, self._notes]

    def update(self) -> None:
        """Update the page if a fit is running or a message has arrived."""
        every = list(self._fits.recent.values())
        is_running = any(fit.is_running for fit in every)
        seen = (self._fits.version, self._choice.value, time.time() if is_running else 0)
        if seen == self._seen:
            return
        self._seen = seen
        self._offer(every)
        chosen = [fit for fit in every if str(fit.number) == self._choice.value]
        shown = chosen or every[-SLOTS:]
        self._notes.visible = bool(shown)
        for plot in self._plots:
            plot.update(shown)
        if not shown:
            self._head.text = _NOTHING
            return
        self._head.text = "".join(map(_fit_html, reversed(shown)))
        self._notes.text = _notes_html(shown)

    def _offer(self, every: list[Fit]) -> None:
        label = f"all fits (the last {SLOTS})" if len(every) > SLOTS else "all fits"
        options = [(_ALL, label)]
        options += [(str(fit.number), f"{fit.title}, {fit.state}") for fit in reversed(every)]
        if options != self._choice.options:
            self._choice.options = options
        self._choice.visible = len(every) > 1
        if self._choice.value not in [value for value, _ in options]:
            self._choice.value = _ALL


_WIDE = {"grid-column": "1 / -1"}  # of the grid of all roots
_FULL_WIDTH = ".bk-clearfix { width: 100%; }"
_NOTHING = (
    '<div style="font-size: 15px; color: #555; padding: 2rem 0.5rem">'
    "<b>No fit yet.</b> Fits on this cluster appear here.</div>"
)


def _fit_html(fit: Fit) -> str:
    about = fit.about
    state = f'<b style="color: {_STATES.get(fit.state, "#333")}">{fit.state}</b>'
    words = []
    if about:
        names = ", ".join(about["names"])
        more = about["n_params"] - len(about["names"])
        names += f" and {more:,} more parameters" if more else ""
        grid = " x ".join(f"{n:,}" for n in about["grid"])
        if fit.is_map:
            sizes = [f"{about['n_pixels']:,} pixels of {about['n_points']:,} points"]
            words = [names, *sizes, f"tiles: {grid}"]
        else:
            words = [names, f"{about['n_rows']:,} rows", f"blocks: {grid}"]
    words += [f"loss {entry['loss']:.6g}" for entry in list(fit.iterations)[-1:]]
    started = time.strftime("%H:%M:%S", time.localtime(fit.began))
    text = " &middot; ".join(html.escape(word) for word in [f"since {started}", *words])
    color = COLORS[fit.number % SLOTS]
    end = html.escape(describe_progress(fit) or fit.text)
    totals = html.escape(fit.progress.get("totals", "")) if fit.is_running else ""
    return (
        f'<div style="margin: 2px 0 6px; font-size: 14px; border-left: 5px solid {color}; '
        f'padding-left: 8px"><b>{html.escape(fit.title)}</b>: {state} '
        f'<span style="color: #555">{text}</span><br>{end}{totals and f"; {totals}"}</div>'
    )


def _notes_html(shown: list[Fit]) -> str:
    entries = [(at, fit, text) for fit in shown for at, text in fit.notes]
    lines = []
    for at, fit, text in sorted(entries, key=lambda entry: entry[0], reverse=True)[:30]:
        clock = time.strftime("%H:%M:%S", time.localtime(at))
        which = f"{html.escape(fit.title)}: " if len(shown) > 1 else ""
        color = COLORS[fit.number % SLOTS]
        lines.append(
            f'<tr><td style="color: #777; padding-right: 10px">{clock}</td><td>'
            f'<span style="color: {color}">{which}</span>{html.escape(text)}</td></tr>'
        )
    table = "".join(lines) or '<tr><td style="color: #777">nothing yet</td></tr>'
    return (
        '<div style="font-size: 13px; background: white; border: 1px solid #ccc; padding: 8px">'
        '<div style="font-size: 15px; margin-bottom: 4px">Events of the fits</div>'
        f'<div style="max-height: 240px; overflow-y: auto"><table>{table}</table></div></div>'
    )
