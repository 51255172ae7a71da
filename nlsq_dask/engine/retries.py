"""Retries of failed reads and writes, and records of data that remain unreadable."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from dask._task_spec import GraphNode, Task, TaskRef

from nlsq_dask.data.sources.from_zarr import failing_chunk
from nlsq_dask.errors import CheckpointError, DataError

Key = Any

# Seconds before a retry, growing with each: long enough for a server to recover.
_FIRST_PAUSE, _GROWTH, _LONGEST_PAUSE = 0.1, 4.0, 10.0
# Errors of a program, not of a store: a retry does not help, and skipping rows would hide them.
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
_MAX_TEXT = 500  # characters of an error that are quoted


@dataclass(frozen=True)
class ReadPolicy:
    """How failed reads are handled."""

    retries: int = 0  # how often a failed task of the caller's graph is repeated
    skips_unreadable: bool = False  # if False, the first unreadable block is an error


@dataclass(frozen=True)
class ReadError:
    """Error of a task that reads data; it stands in for the results that need this task."""

    key: Key  # of the task that failed
    error: str  # class and message
    chunk: str | None  # name of the unreadable chunk; None if unknown
    attempts: int  # number of times that the task was run


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
    retries = 0
    while True:
        try:
            return node(values), retries
        except (MemoryError, DataError):
            raise  # a DataError is not a failure to read
        except Exception as error:
            # Stores, codecs and network file systems raise errors of any class.
            is_program = isinstance(error, _PROGRAM_ERRORS)
            if is_program or retries >= policy.retries:
                read_error = ReadError(
                    node.key, _text(error), failing_chunk(node, values), retries + 1
                )
                if policy.skips_unreadable and not is_program:
                    return read_error, retries
                raise ReadFailedError(read_error, error) from error
        _pause(retries)
        retries += 1


def write_with_retries(write: Callable[[], None], n_retries: int) -> None:
    """Call a function that writes to a store, and repeat it if it fails."""
    for retry in range(n_retries + 1):
        try:
            write()
            return
        except (*_PROGRAM_ERRORS, CheckpointError):
            raise
        except Exception:
            if retry == n_retries:
                raise
        _pause(retry)


def _pause(n_before: int) -> None:
    """Wait before the next attempt, given the number of retries before it."""
    time.sleep(min(_FIRST_PAUSE * _GROWTH**n_before, _LONGEST_PAUSE))


def _text(error: Exception) -> str:
    text = str(error).rstrip(".")
    return f"{type(error).__name__}: {text[:_MAX_TEXT]}" if text else type(error).__name__


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

    @property
    def sentence(self) -> str:
        """Sentence about the block and its error, without a full stop."""
        slices = ", ".join(f"{start}:{end}" for start, end in self.slices)
        where = "" if self.chunk is None else f"{self.chunk}: "
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return (
            f"{self.array} could not be read after {attempts} in block {self.block} of the grid "
            f"{self.grid}, y_data[{slices}]: {where}{self.error}"
        )

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
