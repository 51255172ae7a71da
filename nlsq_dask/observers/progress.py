"""``Progress``: the observer that prints events and shows progress bars of passes and maps."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any, TextIO

from nlsq_dask._text import wrap
from nlsq_dask.events import (
    ALL_ROWS,
    BlocksFinished,
    CheckpointWritten,
    Event,
    FitAborted,
    FitEnded,
    IterationFinished,
    MapEnded,
    MapResumed,
    MapStarted,
    NonFiniteTrial,
    PassFinished,
    SampleRead,
    SubsetFinished,
    TileFinished,
)
from nlsq_dask.observers.format import (
    format_event,
    format_fit_rate,
    format_pass,
    format_rate,
    format_totals,
)
from nlsq_dask.observers.logs import LOGGER

_BAR_DELAY = 0.5  # seconds until a bar is shown
_LINE_INTERVAL = 30.0  # seconds between lines of a pass or map without a bar
_MAX_STATUSES = 3  # in a bar
_LEAST_BAR = 8  # columns of a bar; in a terminal with fewer, the text after it is shortened
_BAR = "  {desc}: {percentage:3.0f}%|{bar}|"
_FORMAT = f"{_BAR} {{n:,}}/{{total:,}} {{unit}} [{{elapsed}}<{{remaining}}{{postfix}}]"
_SHORT_FORMAT = f"{_BAR} {{n:,}}/{{total:,}} [{{remaining}} left{{postfix}}]"


@cache
def _bar_class() -> Any:
    """Return tqdm's class for a terminal or a notebook, without tqdm's thread and process lock."""
    if find_spec("ipywidgets") is None:  # tqdm.auto would warn in a notebook
        from tqdm.std import tqdm
    else:
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar


def _is_terminal(stream: Any) -> bool:
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty())


def _shows_bars(stream: Any) -> bool:
    """Return whether output to the stream can be overwritten: in a terminal or a notebook."""
    return _is_terminal(stream) or "ipykernel" in type(stream).__module__


class _Meter:
    """Progress of a pass or a map: a bar in terminals and notebooks, elsewhere a line now and then.

    Parameters
    ----------
    stream : file-like
    desc, unit : str
        What is measured, and in which unit.
    total, done : int
        Number of units, and of those that were complete before. Rates do not include the latter.
    smoothing : float
        Weight of recent units in the rate from which the remaining time follows; 0 for their mean.
    waiting : str
        Text of a bar in a terminal that is shown before the first unit is complete. Without it,
        there is no such bar.
    """

    def __init__(
        self,
        stream: Any,
        desc: str,
        unit: str,
        total: int,
        done: int,
        smoothing: float = 0.3,
        waiting: str = "",
    ) -> None:
        self._stream, self._total = stream, total
        self._line_at = time.monotonic()
        self._bar: Any = None
        self._timer: threading.Timer | None = None
        if _shows_bars(stream):
            self._bar = _bar_class()(
                total=total,
                initial=done,
                desc=desc,
                unit=unit,
                smoothing=smoothing,
                file=stream,
                leave=False,
                delay=_BAR_DELAY,
                dynamic_ncols=True,
                bar_format=_FORMAT,
            )
            if waiting and _is_terminal(stream):
                self._set_text((waiting, ""), done)
                self._timer = threading.Timer(_BAR_DELAY, self._draw)
                self._timer.daemon = True
                self._timer.start()

    def move(self, done: int, postfixes: Sequence[str], line: Callable[[], str | None]) -> None:
        """Show how much is done: the bar with a postfix, or ``line`` if it is time for one.

        The postfix is the first one that leaves room for the bar in the terminal, or the last.
        """
        if self._bar is not None:
            self._stop_timer()
            self._set_text(postfixes, done)
            self._bar.update(done - self._bar.n)
        elif done < self._total and time.monotonic() - self._line_at >= _LINE_INTERVAL:
            self.print(line())

    def print(self, line: str | None) -> None:
        """Print a line, above the bar."""
        self._line_at = time.monotonic()
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def _set_text(self, postfixes: Sequence[str], done: int) -> None:
        """Choose the format and the postfix of the bar; it is not drawn."""
        self._bar.bar_format, postfix = self._fitting(postfixes, done)
        self._bar.set_postfix_str(postfix, refresh=False)

    def _fitting(self, postfixes: Sequence[str], done: int) -> tuple[str, str]:
        """Return the format and the postfix with which a bar fits into the terminal."""
        choices = [(_FORMAT, postfixes[0]), *((_SHORT_FORMAT, text) for text in postfixes)]
        state = self._bar.format_dict
        columns = state.pop("ncols")
        if not isinstance(columns, int):  # not known, as in a notebook
            return choices[0]
        for layout, text in choices:
            state |= {"bar_format": layout.replace("{bar}", ""), "postfix": text, "n": done}
            if len(self._bar.format_meter(**state)) + _LEAST_BAR <= columns:
                return layout, text
        return choices[-1]

    def _draw(self) -> None:
        with suppress(OSError, ValueError):  # of a stream that is closed
            self._bar.refresh()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()

    def close(self) -> None:
        """Remove the bar from the screen."""
        self._stop_timer()
        if self._bar is not None:
            with suppress(OSError, ValueError):  # of a stream that is closed
                self._bar.close()


class Progress:
    """Observer that prints events as text.

    The progress of a pass over the data, or of a map, is shown as a bar in terminals and notebooks,
    and as a line every 30 seconds elsewhere.

    Parameters
    ----------
    log_frequency : int
        Number of iterations, or of tiles, between printed lines.
    shows_details : bool
        Whether to print also the reading of the sample, iterations of the warm-up and on the
        sample, checkpoints, and tiles.
    stream : file-like, optional
        Stream to print to; standard output by default.
    """

    def __init__(
        self, log_frequency: int = 1, shows_details: bool = False, stream: TextIO | None = None
    ) -> None:
        self._log_frequency = log_frequency
        self._shows_details = shows_details
        self._stream = stream or sys.stdout  # None in a process without standard output
        self._is_on = self._stream is not None
        self._meter: _Meter | None = None

    def __call__(self, event: Event) -> None:
        """Print the text of an event, or move the progress bar.

        Events that ``log_frequency`` or ``shows_details`` excludes are ignored.
        """
        if not self._is_on:
            return
        try:
            self._show(event)
        except (OSError, ValueError) as error:
            # A closed stream, broken pipe, full disk or limited encoding must not end the fit.
            self._is_on = False
            LOGGER.warning("Could not print progress: %s. Printing is disabled.", error)

    def _show(self, event: Event) -> None:
        if isinstance(event, PassFinished | SubsetFinished | MapEnded | FitEnded | FitAborted):
            self.close()
        if self._is_shown(event) and (line := format_event(event)) is not None:
            self._print(line)
        match event:
            case BlocksFinished():
                self._move_pass(event)
            case MapStarted():
                self._begin_map(event.n_pixels, 0)
            case MapResumed():
                self._begin_map(event.n_pixels, event.pixels)
            case TileFinished():
                self._move_map(event)

    def close(self) -> None:
        """Remove the progress bar from the screen."""
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.close()

    def _print(self, line: str) -> None:
        line = wrap(line)
        if self._meter is None:
            print(line, file=self._stream, flush=True)
        else:
            self._meter.print(line)

    def _move_pass(self, event: BlocksFinished) -> None:
        if self._meter is None:
            desc = format_pass(event)
            self._meter = _Meter(self._stream, desc, "blocks", event.n_blocks, event.blocks)
        rate = ""
        if event.seconds > 0.0:
            rate = f"{format_rate(event.rows / event.seconds)} rows/s"
        self._meter.move(event.blocks, (rate, ""), lambda: format_event(event))

    def _begin_map(self, n_pixels: int, done: int) -> None:
        self.close()
        waiting = "first tile in progress"
        self._meter = _Meter(
            self._stream, "map", "pixels", n_pixels, done, smoothing=0.0, waiting=waiting
        )

    def _move_map(self, event: TileFinished) -> None:
        if self._meter is not None:
            rate = format_fit_rate(event)
            converged = event.totals.get("converged", 0) / max(event.pixels, 1)
            postfixes = (
                f"{rate}, {format_totals(event.totals, _MAX_STATUSES)}",
                f"{rate}, {converged:.0%} converged",
                rate,
                "",
            )
            self._meter.move(event.pixels, postfixes, lambda: format_event(event))

    def _is_shown(self, event: Event) -> bool:
        match event:
            case IterationFinished():
                is_visible = self._shows_details or event.stage == ALL_ROWS
                return is_visible and event.reaches_multiple(self._log_frequency)
            case NonFiniteTrial():
                return self._shows_details or event.stage != "sample"
            case SampleRead():
                return self._shows_details
            case CheckpointWritten():  # one that follows others that failed ends their warning
                return self._shows_details or event.n_failed > 0
            case TileFinished():
                return self._shows_details and event.tiles % self._log_frequency == 0
            case BlocksFinished() | FitAborted():  # shown by the meter; the error is raised
                return False
        return True
