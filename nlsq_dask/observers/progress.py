"""``Progress``: the observer that prints events and shows a progress bar for each pass."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any, TextIO

from nlsq_dask.events import (
    ALL_ROWS,
    BlocksFinished,
    CheckpointWritten,
    Event,
    FitAborted,
    FitEnded,
    IterationFinished,
    NonFiniteTrial,
    PassFinished,
    SampleRead,
)
from nlsq_dask.observers.format import format_event, format_rate
from nlsq_dask.observers.logs import LOGGER

_BAR_DELAY = 0.5  # seconds until a bar is shown
_LINE_INTERVAL = 30.0  # seconds between lines of a pass without a bar
_COUNTS = "{n_fmt}/{total_fmt} blocks [{elapsed}<{remaining}{postfix}]"
_FORMAT = f"  {{desc}}: {{percentage:3.0f}}%|{{bar}}| {_COUNTS}"


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


def _shows_bars(stream: Any) -> bool:
    """Return whether output to the stream can be overwritten: in a terminal or a notebook."""
    is_terminal = getattr(stream, "isatty", None)
    return bool(is_terminal and is_terminal()) or "ipykernel" in type(stream).__module__


class Progress:
    """Observer that prints events as text.

    The progress of a pass over the data is shown as a bar in terminals and notebooks, and as a
    line every 30 seconds elsewhere.

    Parameters
    ----------
    log_frequency : int
        Number of iterations between printed lines.
    shows_sample : bool
        Whether to print also the reading of the sample, iterations of the warm-up and on the
        sample, and checkpoints.
    stream : file-like, optional
        Stream to print to; standard output by default.
    """

    def __init__(
        self, log_frequency: int = 1, shows_sample: bool = False, stream: TextIO | None = None
    ) -> None:
        self._log_frequency = log_frequency
        self._shows_sample = shows_sample
        self._stream = stream or sys.stdout  # None in a process without standard output
        self._is_on = self._stream is not None
        self._bar: Any = None
        self._pass_line_at = 0.0

    def __call__(self, event: Event) -> None:
        """Print the text of an event, or move the progress bar.

        Events that ``log_frequency`` or ``shows_sample`` excludes are ignored.
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
        if isinstance(event, BlocksFinished):
            self._move(event)
            return
        if isinstance(event, PassFinished | FitEnded | FitAborted):
            self.close()
        line = format_event(event) if self._is_shown(event) else None
        if line is not None:
            self._print(line)

    def close(self) -> None:
        """Remove the progress bar from the screen."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError, ValueError):  # of a stream that is closed
                bar.close()

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def _move(self, event: BlocksFinished) -> None:
        if not _shows_bars(self._stream):
            self._print_now_and_then(event)
            return
        if self._bar is None:
            self._bar = _bar_class()(
                total=event.n_blocks,
                initial=event.blocks,
                desc=f"pass {event.number}",
                file=self._stream,
                leave=False,
                delay=_BAR_DELAY,
                dynamic_ncols=True,
                bar_format=_FORMAT,
            )
        if event.seconds > 0.0:
            rate = format_rate(event.rows / event.seconds)
            self._bar.set_postfix_str(f"{rate} rows/s", refresh=False)
        self._bar.update(event.blocks - self._bar.n)

    def _print_now_and_then(self, event: BlocksFinished) -> None:
        now = time.monotonic()
        if not event.blocks or event.blocks == event.n_blocks:
            self._pass_line_at = now
        elif now - self._pass_line_at >= _LINE_INTERVAL:
            self._pass_line_at = now
            self._print(str(format_event(event)))

    def _is_shown(self, event: Event) -> bool:
        match event:
            case IterationFinished():
                is_visible = self._shows_sample or event.stage == ALL_ROWS
                return is_visible and event.reaches_multiple(self._log_frequency)
            case NonFiniteTrial():
                return self._shows_sample or event.stage != "sample"
            case SampleRead() | CheckpointWritten():
                return self._shows_sample
            case FitAborted():  # the error is raised
                return False
        return True
