"""``Fits``: the last fits, from the messages of their clients."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from typing import Any

MAX_FITS = 20  # unless more are running
MAX_RUNNING = 200
_MAX_FORGOTTEN = 1_000  # fits with separate counters
_MAX_ITERATIONS = 5000
_MAX_RATES = 2000
_MAX_NOTES = 200
_RATE_INTERVAL = 0.4  # minimum seconds over which a rate is measured


class Fit:
    """One fit, with times of the clock of the scheduler."""

    def __init__(self, number: int, client: str, ahead: float = 0.0) -> None:
        self.number = number  # from 1 on this scheduler
        self.client = client
        self.ahead = ahead  # seconds by which this clock is ahead of that of the client
        self.state = "running"  # or "finished", "no success", "aborted", "lost"
        self.text = ""
        self.began = self.heard = time.time()
        self.about: dict[str, Any] = {}
        self.phases: list[dict[str, Any]] = []
        self.iterations: deque[dict[str, Any]] = deque(maxlen=_MAX_ITERATIONS)
        self.progress: dict[str, Any] = {}
        self.rates: deque[tuple[float, float]] = deque(maxlen=_MAX_RATES)
        self.last_pass: dict[str, Any] = {}
        self.map: dict[str, Any] = {}
        self.notes: deque[tuple[float, str]] = deque(maxlen=_MAX_NOTES)
        self.metrics: dict[str, int] = {}
        self._rated: dict[str, Any] = {}

    @property
    def is_running(self) -> bool:
        """Whether the fit is running."""
        return self.state == "running"

    @property
    def title(self) -> str:
        """Title of the fit on the page."""
        return f"{self.number}: {self.about.get('model', 'fit')}"

    def take(self, message: dict[str, Any]) -> None:
        """Record a message; unknown kinds of other versions are ignored."""
        for key in ("time", "start"):
            if key in message:
                message = {**message, key: message[key] + self.ahead}
        match message.get("kind"):
            case "started":
                # A resumed fit began earlier.
                self.about = message
            case "phase":
                self.phases.append({**message, "duration": None, "failed": False})
                self.began = min(self.began, message["start"])
            case "phase ended":
                if self.phases:
                    self.phases[-1].update(message)
            case "iteration":
                self.iterations.append(message)
            case "progress":
                self._rate(message)
                self.progress = message
            case "pass":
                self.last_pass, self.progress = message, {}
            case "map":
                self.map = message
            case "note":
                self.notes.append((message["time"], message["text"]))
            case "ended":
                self.end(message["state"], message["text"])

    def end(self, state: str, text: str) -> None:
        """Record the end of the fit."""
        self.state, self.text, self.progress = state, text, {}

    def _rate(self, new: dict[str, Any]) -> None:
        old = self._rated
        if old and old["pass"] == new["pass"] and new["blocks"]:
            if new["blocks"] == old["blocks"]:
                return  # blocks finish in groups
            seconds = new["seconds"] - old["seconds"]
            if seconds < _RATE_INTERVAL and new["blocks"] < new["n_blocks"]:
                return
            rate = (new["bytes"] - old["bytes"]) / max(seconds, 1e-3)
            self.rates.append((new["time"], rate))
        self._rated = new


class Fits:
    """The last fits, and the counters of all fits."""

    def __init__(self) -> None:
        self.recent: dict[str, Fit] = {}  # by ID, in order of their start
        self.version = 0  # incremented with every change
        self._n_fits = 0
        # Number and counters by ID, in case a fit sends messages again.
        self._forgotten: dict[str, tuple[int, dict[str, int]]] = {}
        self._of_others: Counter[str] = Counter()  # sums
        self._last_loss = math.nan

    def take(self, batch: dict[str, Any]) -> None:
        """Record a batch of a client: messages, and the current counters of a fit."""
        name = batch["fit"]
        if name not in self.recent:
            # The first batch was sent just now.
            now = time.time()
            self._add(name, batch["client"], now - batch.get("time", now))
        fit = self.recent[name]
        if fit.state == "lost":  # its client reconnected
            fit.state, fit.text = "running", ""
        fit.heard = time.time()
        for message in batch["messages"]:
            fit.take(message)
        metrics = batch["metrics"]
        fit.metrics = {name: metrics[name] for name in metrics if name.endswith("_total")}
        last_loss = metrics.get("nlsq_last_loss", math.nan)
        if not math.isnan(last_loss):
            self._last_loss = last_loss
        self.version += 1

    def client_left(self, client: str) -> None:
        """Mark the running fits of a disconnected client as lost."""
        for fit in self.recent.values():
            if fit.client == client and fit.is_running:
                fit.end("lost", "its client disconnected")
                self.version += 1

    def _add(self, name: str, client: str, ahead: float) -> None:
        number, metrics = self._forgotten.pop(name, (self._n_fits + 1, {}))
        self._n_fits = max(self._n_fits, number)
        self.recent[name] = Fit(number, client, ahead)
        self.recent[name].metrics = metrics
        self._forget()

    def _forget(self) -> None:
        """Drop the oldest fits that ended, but not their counters."""
        ended = [name for name, fit in self.recent.items() if not fit.is_running]
        for name in ended[: max(len(self.recent) - MAX_FITS, 0)]:
            self._drop(name)
        while len(self.recent) > MAX_RUNNING:
            self._drop(next(iter(self.recent)))

    def _drop(self, name: str) -> None:
        gone = self.recent.pop(name)
        self._forgotten[name] = gone.number, gone.metrics
        if len(self._forgotten) > _MAX_FORGOTTEN:
            _, metrics = self._forgotten.pop(next(iter(self._forgotten)))
            self._of_others.update(metrics)

    def metrics(self) -> dict[str, float]:
        """Return a dict of metric names to values: counters over all fits, and the last loss."""
        every = [fit.metrics for fit in list(self.recent.values())]
        every += [metrics for _, metrics in list(self._forgotten.values())]
        totals = Counter(self._of_others)
        for metrics in every:
            totals.update(metrics)
        return {**totals, "nlsq_last_loss": self._last_loss}
