"""Observers that log events: to a Python logger, and to a file of JSON lines."""

from __future__ import annotations

import logging
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nlsq_dask.errors import warn_caller
from nlsq_dask.events import (
    ALL_ROWS,
    BlocksFinished,
    BlocksMeasured,
    BlocksSkipped,
    CheckpointWritten,
    Event,
    FitAborted,
    FitEnded,
    IterationFinished,
    MapDrawn,
    MapEnded,
    NonFiniteTrial,
    TileFinished,
    WaitingForWorkers,
    WorkersPaused,
    without_many_params,
)
from nlsq_dask.observers.format import format_event

LOGGER = logging.getLogger("nlsq_dask")
LOGGER.addHandler(logging.NullHandler())  # print nothing unless configured

_INTERVAL = 10.0  # seconds between records of a running pass or map


class _RateLimit:
    """Limits how often the progress of a running pass or map is logged."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def allows(self, event: Event) -> bool:
        """Return whether to log an event.

        Block statistics and pictures are never logged, and progress only ten seconds after the
        last that was logged.
        """
        if isinstance(event, BlocksMeasured | MapDrawn):
            return False
        if not isinstance(event, BlocksFinished | TileFinished):
            return True
        now = time.monotonic()
        if now - self._last < _INTERVAL:
            return False
        self._last = now
        return True


class LogRecords:
    """Observer that logs events to the logger "nlsq_dask".

    The level is ERROR if the fit ends in an exception; WARNING for skipped blocks, workers that are
    missing or paused, a fit that ends without success, and a map that is not complete; DEBUG for
    checkpoints (unless others could not be written before), progress within a pass or a map, and
    iterations of the warm-up and on the sample; INFO for all other events.
    """

    def __init__(self) -> None:
        self._rate_limit = _RateLimit()

    def __call__(self, event: Event) -> None:
        """Log the text of an event; an event without text is ignored."""
        level = _level(event)
        if LOGGER.isEnabledFor(level) and self._rate_limit.allows(event):
            text = format_event(event)
            if text is not None:
                LOGGER.log(level, "%s", text.strip())


def _level(event: Event) -> int:
    match event:
        case FitAborted():
            return logging.ERROR
        case BlocksSkipped() | FitEnded(success=False) | MapEnded(is_complete=False):
            return logging.WARNING
        case WaitingForWorkers() | WorkersPaused():
            return logging.WARNING
        case IterationFinished() | NonFiniteTrial() if event.stage != ALL_ROWS:
            return logging.DEBUG
        case CheckpointWritten(n_failed=0) | BlocksFinished() | TileFinished():
            return logging.DEBUG
    return logging.INFO


class JsonLines:
    """Observer that appends one JSON line per event to a file.

    A line has the time, an ID of the fit, the name of the event's class, and the event's fields.
    The progress of a running pass or map is written every ten seconds, pictures are not.
    Non-finite numbers become null, and parameters are omitted if there are more than 1,000.

    Parameters
    ----------
    path : path-like
        Path of the file, which is created if it does not exist.

    Raises
    ------
    OSError
        If the file cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).expanduser()
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            raise OSError(  # the subclass for this errno
                error.errno,
                f"could not open log_file for writing ({error.strerror}); pass a path in a "
                f"writable directory",
                str(self._path),
            ) from error
        self._rate_limit = _RateLimit()
        self._fit = uuid.uuid4().hex[:8]
        self._is_broken = False

    def __call__(self, event: Event) -> None:
        """Append the event to the file."""
        if self._is_broken or not self._rate_limit.allows(event):
            return
        fields = msgspec.to_builtins(without_many_params(event), enc_hook=_plain)
        name = type(event).__name__
        record = {"time": time.time(), "fit": self._fit, "event": name, **fields}
        try:
            self._file.write(_as_json(record) + b"\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end the fit
            self._is_broken = True
            warn_caller(
                f"Could not write to log_file={str(self._path)!r}: {error}. Logging to this file "
                f"is disabled."
            )

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # already reported
            self._file.close()


def _as_json(record: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(record)
    except UnicodeEncodeError:  # a lone surrogate, as in an undecodable file name
        return msgspec.json.encode(_escaped(record))


def _escaped(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_escaped(key): _escaped(entry) for key, entry in value.items()}
        case list() | tuple():
            return list(map(_escaped, value))
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)
