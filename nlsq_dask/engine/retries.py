"""Retries of failed reads and writes, and records of data that remain unreadable."""

from __future__ import annotations

import logging
import pickle
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self, TypeVar

from dask._task_spec import GraphNode, Task, TaskRef
from distributed import warn

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.sources.from_zarr import failing_chunk
from nlsq_dask.engine.error_kinds import ErrorKind, classify, describe
from nlsq_dask.errors import CheckpointError, DataError

T = TypeVar("T")
Key = Any

# Seconds before a retry, growing with each: long enough for a server to recover.
_FIRST_PAUSE, _GROWTH, _LONGEST_PAUSE = 0.1, 4.0, 10.0
_SHORTEST_PAUSE = 1e-3  # before the last attempt, which is at the end of ``retry_seconds``
_MAX_GROWTHS = 10
_JITTER = 0.8, 1.0  # factors of a pause, so that tasks that failed together do not retry together
_LONG_OUTAGE = 10.0  # seconds after which an outage is reported

_random = random.Random()
_LOGGER = logging.getLogger("nlsq_dask")


@dataclass(frozen=True)
class ReadPolicy:
    """Rules for failed reads, and for failed writes of results."""

    retries: int = 0  # how often a failed task of the caller's graph is repeated
    outage_seconds: float = 0.0  # how long it is repeated while the network or a server fails
    skips_unreadable: bool = False  # if False, the first unreadable block is an error

    @classmethod
    def of(cls, config: HybridStreamingConfig) -> Self:
        """Return the policy that the options ask for."""
        if not config.enable_fault_tolerance:
            return cls()
        skips = config.min_success_rate < 1.0
        return cls(config.max_retries_per_batch, config.retry_seconds, skips)


class Attempts:
    """Attempts of one read or write: how many there were, and whether there is another one.

    Parameters
    ----------
    policy : ReadPolicy
    """

    def __init__(self, policy: ReadPolicy) -> None:
        self._policy = policy
        self._n_outages = self._n_others = 0  # retries after an outage, and after other errors
        self._outage_began: float | None = None  # time at which the first outage was noticed
        self._is_reported = False  # whether a warning says that the outage is long
        self.kind = ErrorKind.OTHER  # of the last error
        self.outage_seconds = 0.0  # from the first outage to the last error, if that is an outage

    @property
    def n_retries(self) -> int:
        """Number of retries so far."""
        return self._n_outages + self._n_others

    def pause_after(self, error: Exception) -> float | None:
        """Return the seconds to wait before the next attempt; None if there is none."""
        self.kind, self.outage_seconds = classify(error), 0.0
        if self.kind is ErrorKind.OUTAGE:
            return self._pause_after_outage(error)
        if self.kind is ErrorKind.OTHER and self._n_others < self._policy.retries:
            self._n_others += 1
            return _pause(self._n_others)
        return None

    def _pause_after_outage(self, error: Exception) -> float | None:
        now = time.monotonic()
        if self._outage_began is None:
            self._outage_began = now
        self.outage_seconds = now - self._outage_began
        remaining = self._policy.outage_seconds - self.outage_seconds
        if remaining < _SHORTEST_PAUSE:
            return None
        if self.outage_seconds > _LONG_OUTAGE and not self._is_reported:
            self._is_reported = True
            _report_outage(error, self.outage_seconds, self._policy.outage_seconds)
        self._n_outages += 1
        return min(_pause(self._n_outages), remaining)


def _pause(number: int) -> float:
    """Return the seconds to wait before a retry, given its number, which begins at 1."""
    growth = _GROWTH ** min(number - 1, _MAX_GROWTHS)
    return min(_FIRST_PAUSE * growth, _LONGEST_PAUSE) * _random.uniform(*_JITTER)


def _report_outage(error: Exception, seconds: float, most: float) -> None:
    """Warn that a store has not answered for some time; from a worker, also in the client."""
    _LOGGER.warning("A read or write has failed for %.0f s: %s", seconds, describe(error))
    # The same words for all tasks, so that Python shows them once; and never an error of the task.
    with suppress(Warning):
        warn(
            f"A store does not answer ({type(error).__name__}). Each read or write is retried for "
            f"up to retry_seconds={most:g}."
        )


@dataclass(frozen=True)
class ReadError:
    """Error of a task that reads data; it stands in for the results that need this task."""

    key: Key  # of the task that failed
    error: str  # class and message
    chunk: str | None  # name of the unreadable chunk; None if unknown
    attempts: int  # number of times that the task was run
    kind: ErrorKind = ErrorKind.OTHER
    outage_seconds: float = 0.0  # for which it was repeated because of an outage


class ReadFailedError(Exception):
    """A read failed after all retries; carries the ``ReadError`` from a worker to the client."""

    def __init__(self, read_error: ReadError, cause: Exception | None) -> None:
        super().__init__(read_error.error)
        self.read_error = read_error
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.read_error, _if_sendable(self.cause))


def _if_sendable(error: Exception | None) -> Exception | None:
    """Return the error if it can be pickled, otherwise None."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs code of any library
        return None
    return error


def run_step(node: GraphNode, values: Mapping[Key, Any], policy: ReadPolicy) -> tuple[Any, int]:
    """Run one task of the caller's graph, and repeat it if it fails.

    Parameters
    ----------
    node : GraphNode
        The task.
    values : mapping
        Values of the tasks that it needs, by key; a ``ReadError`` for those that failed.
    policy : ReadPolicy

    Returns
    -------
    value
        The result. If the task or one that it needs failed, and the policy skips unreadable blocks,
        a ``ReadError``.
    retries : int
        Number of repetitions.

    Raises
    ------
    ReadFailedError
        If the task failed and the policy does not skip, or the error is that of a program, such as
        a TypeError.
    """
    for key in node.dependencies:
        if isinstance(values[key], ReadError):
            return values[key], 0
    attempts = Attempts(policy)
    while True:
        try:
            return node(values), attempts.n_retries
        except (MemoryError, DataError):
            raise  # a DataError is not a failure to read
        except Exception as error:
            # Stores, codecs and network file systems raise errors of any class.
            pause = attempts.pause_after(error)
            if pause is None:
                read_error = ReadError(
                    node.key,
                    describe(error),
                    failing_chunk(node, values),
                    attempts.n_retries + 1,
                    attempts.kind,
                    attempts.outage_seconds,
                )
                if policy.skips_unreadable and attempts.kind is not ErrorKind.PROGRAM:
                    return read_error, attempts.n_retries
                raise ReadFailedError(read_error, error) from error
        time.sleep(pause)


def call_with_retries(function: Callable[[], T], policy: ReadPolicy) -> T:
    """Return the result of a function that reads or writes a store, repeated as a task is."""
    attempts = Attempts(policy)
    while True:
        try:
            return function()
        except (MemoryError, CheckpointError, DataError):
            raise
        except Exception as error:
            pause = attempts.pause_after(error)
            if pause is None:
                raise
        time.sleep(pause)


@dataclass(frozen=True)
class SharedStep:
    """Function that runs a task of the caller's graph with retries, as a Dask task of its own.

    It is for tasks whose result several groups of blocks need.
    """

    node: GraphNode  # the task of the caller's graph
    dependencies: tuple[Key, ...]  # keys of the results that the function is called with
    policy: ReadPolicy

    @classmethod
    def wrap(cls, node: GraphNode, policy: ReadPolicy) -> GraphNode:
        """Return a Dask task that runs ``node`` with retries; ``node`` itself if it is no task."""
        if not isinstance(node, Task):
            return node
        dependencies = tuple(node.dependencies)
        step = cls(node, dependencies, policy)
        return Task(node.key, step, *map(TaskRef, dependencies))

    def __call__(self, *inputs: Any) -> Any:
        """Run the task, given the results of its dependencies in order, and return its result.

        If it had to be repeated, the result is wrapped in a ``Retried``.
        """
        values, _ = separate_retries(zip(self.dependencies, inputs, strict=True))
        value, retries = run_step(self.node, values, self.policy)
        return Retried(value, {self.node.key: retries}) if retries else value


@dataclass(frozen=True)
class Retried:
    """Result of a ``SharedStep`` that was repeated."""

    value: Any
    retries: dict[Key, int] = field(default_factory=dict)  # number of repetitions, by key


def separate_retries(values: Iterable[tuple[Key, Any]]) -> tuple[dict[Key, Any], dict[Key, int]]:
    """Return results by key, with ``Retried`` replaced by its value, and the retries by key."""
    results: dict[Key, Any] = {}
    retries: dict[Key, int] = {}
    for key, value in values:
        results[key] = value
        if isinstance(value, Retried):
            results[key] = value.value
            retries |= value.retries
    return results, retries


@dataclass(frozen=True)
class SkippedBlock:
    """An unreadable block, described with the names and indices that the caller knows."""

    block: tuple[int, ...]  # position in the grid
    grid: tuple[int, ...]  # number of blocks along each dimension of y
    rows: int  # number of rows
    slices: tuple[tuple[int, int], ...]  # start and end along each dimension of y
    array: str  # names of the unreadable arrays
    chunk: str | None  # name of the unreadable chunk; None if unknown
    error: str  # class and message
    attempts: int  # to read the block
    kind: ErrorKind = ErrorKind.OTHER
    outage_seconds: float = 0.0  # for which it was tried because of an outage

    @property
    def sentence(self) -> str:
        """Sentence about the block and its error, without a full stop."""
        slices = ", ".join(f"{start}:{end}" for start, end in self.slices)
        where = "" if self.chunk is None else f"{self.chunk}: "
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        if self.outage_seconds >= 1.0:
            attempts += f" in {self.outage_seconds:.0f} s,"
        return (
            f"{self.array} could not be read after {attempts} in block {self.block} of the grid "
            f"{self.grid}, y_data[{slices}]: {where}{self.error}"
        )

    def remedy(self, otherwise: str) -> str:
        """Return one sentence on what to do; ``otherwise`` is the end of most of them."""
        where = f"{self.chunk} {self.error}"
        match self.kind:
            case ErrorKind.DENIED if "file://" in where:
                return "Permit all processes that read the data, also on other machines, to do so."
            case ErrorKind.DENIED:
                names = ""
                if "s3" in where.lower():
                    names = ", such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                return (
                    f"Check the credentials of the store. On a cluster, each worker needs them: "
                    f"set them in the environment of the workers{names}, or pass them where the "
                    f"store is opened."
                )
            case ErrorKind.OUTAGE:
                return f"Fit again when the store answers, increase retry_seconds, or {otherwise}."
        return f"Repair the stored data, or {otherwise}."

    def record(self) -> dict[str, Any]:
        """Return the block as an entry of ``FitResult.diagnostics["left_out"]``."""
        return {name: getattr(self, name) for name in ("block", "rows", "array", "chunk", "error")}


@dataclass(frozen=True)
class ReadReport:
    """Amount of data that tasks have read, with their errors and retries."""

    rows_read: int = 0
    bytes_read: int = 0
    rows_cached: int = 0  # rows used from the cache of a worker, not read
    n_blocks: int = 0  # number of blocks read
    errors: dict[int, ReadError] = field(default_factory=dict)  # by flat index of the block
    retries: dict[Key, int] = field(default_factory=dict)  # number by key of the repeated task

    @classmethod
    def concatenate(cls, reports: Iterable[ReadReport]) -> ReadReport:
        """Add up reports. The retries of a task count once, though several groups report them."""
        reports = list(reports)
        return cls(
            sum(report.rows_read for report in reports),
            sum(report.bytes_read for report in reports),
            sum(report.rows_cached for report in reports),
            sum(report.n_blocks for report in reports),
            dict(chain.from_iterable(report.errors.items() for report in reports)),
            dict(chain.from_iterable(report.retries.items() for report in reports)),
        )

    @property
    def n_retries(self) -> int:
        """Total number of retries."""
        return sum(self.retries.values())
