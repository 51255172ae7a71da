"""``Fits``: the most recent fits on a cluster, as their clients report them in messages."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from typing import Any

MAX_FITS = 20  # fits that are kept; more only while they are running
MAX_RUNNING = 200
_MAX_FORGOTTEN = 1_000  # dropped fits whose counters are still kept separately
_MAX_ITERATIONS = 5000
_MAX_RATES = 2000
_MAX_NOTES = 200
_RATE_INTERVAL = 0.4  # minimum seconds over which a rate is measured
# In a message about a pass and about a map: complete units, all units, and what a rate counts.
_AMOUNTS = (("blocks", "n_blocks", "bytes"), ("pixels", "n_pixels", "fitted"))


class Fit:
    """State of one fit; all times are by the clock of the scheduler."""

    def __init__(self, number: int, client: str, ahead: float = 0.0) -> None:
        self.number = number  # 1 for the first fit on this scheduler
        self.client = client  # ID of the Dask client
        self.ahead = ahead  # seconds by which the scheduler's clock is ahead of the client's
        self.state = "running"  # or "finished", "no success", "stopped", "aborted", "lost"
        self.is_map = False  # whether it is a fit for every pixel
        self.text = ""  # message of the result or of the error, after the end
        self.began = self.heard = time.time()  # start of the fit, and time of the last message
        # Messages of the kinds "started", "phase", "iteration", "progress" or "tiles", "pass",
        # "map", "picture", "note".
        self.about: dict[str, Any] = {}
        self.phases: list[dict[str, Any]] = []
        self.iterations: deque[dict[str, Any]] = deque(maxlen=_MAX_ITERATIONS)
        self.progress: dict[str, Any] = {}  # empty between passes, and before the first tile
        self.last_pass: dict[str, Any] = {}
        self.map: dict[str, Any] = {}  # of the blocks of the data
        self.picture: dict[str, Any] = {}  # of the pixels of fit_each
        self.notes: deque[tuple[float, str]] = deque(maxlen=_MAX_NOTES)  # time and text
        # Time, and bytes or pixels per second.
        self.rates: deque[tuple[float, float]] = deque(maxlen=_MAX_RATES)
        self.metrics: dict[str, int] = {}  # counters by their names in Prometheus
        self._rated: dict[str, Any] = {}  # the progress up to which rates were measured

    @property
    def is_running(self) -> bool:
        """True until the fit ends or its client disconnects."""
        return self.state == "running"

    @property
    def share(self) -> float:
        """Complete share of the running pass, or of the map."""
        done, total = _AMOUNTS[self.is_map][:2]
        now = self.progress
        return float(now[done] / max(now[total], 1)) if now else 0.0

    @property
    def title(self) -> str:
        """Title of the fit on the page: its number and the name of the model."""
        return f"{self.number}: {self.about.get('model', 'fit')}"

    def take(self, message: dict[str, Any]) -> None:
        """Record a message about the fit; ignore kinds that only other versions know."""
        for key in ("time", "start"):
            if key in message:
                message = {**message, key: message[key] + self.ahead}
        self.is_map |= "n_pixels" in message
        match message.get("kind"):
            case "started":
                self.about = message
            case "phase":
                self.phases.append({**message, "duration": None, "failed": False})
                self.began = min(self.began, message["start"])
            case "phase ended":
                if self.phases:
                    self.phases[-1].update(message)
            case "iteration":
                self.iterations.append(message)
            case "progress" | "tiles":
                self._rate(message)
                self.progress = message
            case "pass":
                self.last_pass, self.progress = message, {}
            case "map":
                self.map = message
            case "picture":
                self.picture = message
            case "note":
                self.notes.append((message["time"], message["text"]))
            case "ended":
                self.end(message["state"], message["text"])

    def end(self, state: str, text: str) -> None:
        """Record that the fit ended, in which state, and with which message."""
        self.state, self.text = state, text
        if not self.is_map:  # no pass is running
            self.progress = {}

    def _rate(self, new: dict[str, Any]) -> None:
        done, total, amount = _AMOUNTS[self.is_map]
        # A map begins when its tiles do, a pass with a message.
        old = self._rated or ({done: 0, amount: 0, "seconds": 0.0} if self.is_map else {})
        is_same = all(old.get(key) == new.get(key) for key in ("pass", "subset"))
        if old and is_same and new[done]:
            if new[done] == old[done]:
                return  # blocks finish in groups
            seconds = new["seconds"] - old["seconds"]
            if seconds < _RATE_INTERVAL and new[done] < new[total]:
                return
            rate = (new[amount] - old[amount]) / max(seconds, 1e-3)
            self.rates.append((new["time"], rate))
        self._rated = new


class Fits:
    """The most recent fits on a scheduler, and counters summed over all its fits."""

    def __init__(self) -> None:
        self.recent: dict[str, Fit] = {}  # by ID, in order of their first message
        self.version = 0  # incremented with every change
        self._n_fits = 0
        # Numbers and counters of dropped fits by ID, in case such a fit sends messages again.
        self._forgotten: dict[str, tuple[int, dict[str, int]]] = {}
        self._of_others: Counter[str] = Counter()  # summed over older fits
        self._last_loss = math.nan

    def take(self, batch: dict[str, Any]) -> None:
        """Record a batch from a client: messages and the current counters of one fit."""
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
        """Mark the running fits of a client that disconnected as lost."""
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
        """Drop the oldest fits if there are too many, ended ones first; keep their counters."""
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
        """Return metrics by Prometheus name: counters summed over all fits, and the latest loss.

        The loss is the one that any of the fits reported last.
        """
        every = [fit.metrics for fit in list(self.recent.values())]
        every += [metrics for _, metrics in list(self._forgotten.values())]
        totals = Counter(self._of_others)
        for metrics in every:
            totals.update(metrics)
        return {**totals, "nlsq_last_loss": self._last_loss}
