"""Retries of failed reads, and records of what remains unreadable."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from dask._task_spec import GraphNode, Task, TaskRef

from nlsq_dask.data.sources.from_zarr import failing_chunk
from nlsq_dask.errors import DataError

Key = Any

# Seconds before a retry, growing with each: long enough for a server to recover.
_FIRST_PAUSE, _GROWTH, _LONGEST_PAUSE = 0.1, 4.0, 10.0
# Errors of a program, not of a store: a retry does not help, and skipping rows would hide them.
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
_MAX_TEXT = 500  # characters of an error that are quoted


@dataclass(frozen=True)
class ReadPolicy:
    """How failed reads are handled."""

    retries: int = 0  # of a failed step
    skips_unreadable: bool = False  # if False, the first unreadable block is an error


@dataclass(frozen=True)
class ReadError:
    """The error of a step of the graph; replaces its value and those of dependent steps."""

    key: Key  # of the step
    error: str  # type and message
    chunk: str | None  # the unreadable chunk, if known
    attempts: int


class ReadFailedError(Exception):
    """A step failed after all retries; carries the ``ReadError`` from a worker to the client."""

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
    """Run one step of the caller's graph, with retries.

    Parameters
    ----------
    node : GraphNode
    values : mapping
        Values or errors of its dependencies.
    policy : ReadPolicy

    Returns
    -------
    value
        A ``ReadError`` if the step failed and the policy skips unreadable blocks.
    retries : int

    Raises
    ------
    ReadFailedError
        If the step failed otherwise.
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
        time.sleep(min(_FIRST_PAUSE * _GROWTH**retries, _LONGEST_PAUSE))
        retries += 1


def _text(error: Exception) -> str:
    text = str(error).rstrip(".")
    return f"{type(error).__name__}: {text[:_MAX_TEXT]}" if text else type(error).__name__


@dataclass(frozen=True)
class SharedStep:
    """A step that several groups need, as a separate task."""

    node: GraphNode
    dependencies: tuple[Key, ...]  # in the order of the arguments
    policy: ReadPolicy

    @classmethod
    def wrap(cls, node: GraphNode, policy: ReadPolicy) -> GraphNode:
        """Wrap a task as a step; return other nodes unchanged."""
        if not isinstance(node, Task):
            return node
        dependencies = tuple(node.dependencies)
        step = cls(node, dependencies, policy)
        return Task(node.key, step, *map(TaskRef, dependencies))

    def __call__(self, *inputs: Any) -> Any:
        """Run the step on the values of its dependencies."""
        values, _ = unwrap(zip(self.dependencies, inputs, strict=True))
        value, retries = run_step(self.node, values, self.policy)
        return Retried(value, {self.node.key: retries}) if retries else value


@dataclass(frozen=True)
class Retried:
    """A value of a shared step, and the number of retries by key."""

    value: Any
    retries: dict[Key, int] = field(default_factory=dict)


def unwrap(values: Iterable[tuple[Key, Any]]) -> tuple[dict[Key, Any], dict[Key, int]]:
    """Return values and retries of steps by key."""
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
    """An unreadable block, in the terms of the caller."""

    block: tuple[int, ...]  # position in the grid
    grid: tuple[int, ...]  # number of blocks along each dimension of y
    rows: int
    slices: tuple[tuple[int, int], ...]  # start and end along each dimension of y
    array: str  # names of the unreadable arrays
    chunk: str | None  # the unreadable chunk, if known
    error: str
    attempts: int

    @property
    def sentence(self) -> str:
        """Description of the block and its error, without a full stop."""
        slices = ", ".join(f"{start}:{end}" for start, end in self.slices)
        where = "" if self.chunk is None else f"{self.chunk}: "
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return (
            f"{self.array} could not be read after {attempts} in block {self.block} of the grid "
            f"{self.grid}, y_data[{slices}]: {where}{self.error}"
        )

    def record(self) -> dict[str, Any]:
        """Return the entry of ``diagnostics["left_out"]``."""
        return {name: getattr(self, name) for name in ("block", "rows", "array", "chunk", "error")}


@dataclass(frozen=True)
class ReadReport:
    """Counts of what was read, with errors and retries."""

    rows_read: int = 0
    bytes_read: int = 0
    rows_cached: int = 0  # from the memory of a worker
    n_blocks: int = 0  # read, not cached
    errors: dict[int, ReadError] = field(default_factory=dict)  # by flat index of the block
    retries: dict[Key, int] = field(default_factory=dict)  # by step

    @classmethod
    def concatenate(cls, reports: Iterable[ReadReport]) -> ReadReport:
        """Combine reports; retries of a shared step count once."""
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
