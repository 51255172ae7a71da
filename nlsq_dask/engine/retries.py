"""Reading can fail: what is tried again, and what is known of that which stays unreadable."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask._task_spec import GraphNode, Task, TaskRef

from nlsq_dask.data.sources.from_zarr import failing_chunk
from nlsq_dask.errors import DataError

Key = Any

# Seconds before a step is tried again, growing with each try: long enough for a server to recover.
_FIRST_PAUSE, _GROWTH, _LONGEST_PAUSE = 0.1, 4.0, 10.0
# These say that a program is wrong, not that a store is: trying again would not help, and to leave
# out rows would hide it.
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
_MAX_TEXT = 500  # characters of an error that are quoted


@dataclass(frozen=True)
class ReadPolicy:
    """What happens where reading fails.

    Attributes
    ----------
    retries : int
        How often a step that has failed is tried again.
    skips_unreadable : bool
        Whether blocks that stay unreadable are left out; if not, the first of them is an error.
    """

    retries: int = 0
    skips_unreadable: bool = False


@dataclass(frozen=True)
class ReadError:
    """Why a step of the graph has no value; it stands for the value, also in what is made of it.

    Attributes
    ----------
    key : key
        Of the step.
    error : str
        Type and text.
    chunk : str or None
        What the store could not give.
    tries : int
    """

    key: Key
    error: str
    chunk: str | None
    tries: int


class ReadFailedError(Exception):
    """A step has failed for good; made for the way from a worker to where the blocks have names."""

    def __init__(self, read_error: ReadError, cause: Exception | None) -> None:
        super().__init__(read_error.error)
        self.read_error = read_error
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.read_error, _if_sendable(self.cause))


def _if_sendable(error: Exception | None) -> Exception | None:
    """Return the error if it survives pickling, which those of libraries not always do."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the classes of others do
        return None
    return error


def run_step(node: GraphNode, values: Mapping[Key, Any], policy: ReadPolicy) -> tuple[Any, int]:
    """Run one step of the caller's graph, again if it fails.

    Parameters
    ----------
    node : GraphNode
    values : mapping
        Of the steps that it depends on, faults among them.
    policy : ReadPolicy

    Returns
    -------
    value
        A ``ReadError`` if there is none and it may be left out.
    retries : int

    Raises
    ------
    ReadFailedError
        If it has no value.
    """
    for key in node.dependencies:
        if isinstance(values[key], ReadError):
            return values[key], 0
    retries = 0
    while True:
        try:
            return node(values), retries
        except (MemoryError, DataError):
            raise  # DataError: it was read, and cannot be used
        except Exception as error:
            # A store, a codec, a file system over a network: each raises what it likes.
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
    """A step that stands on its own in the graph, because several groups need it.

    Attributes
    ----------
    node : GraphNode
    dependencies : tuple of key
        In the order in which their values are passed.
    policy : ReadPolicy
    """

    node: GraphNode
    dependencies: tuple[Key, ...]
    policy: ReadPolicy

    @classmethod
    def wrap(cls, node: GraphNode, policy: ReadPolicy) -> GraphNode:
        """Return a node that runs another one as a step; constants and names stay as they are."""
        if not isinstance(node, Task):
            return node
        dependencies = tuple(node.dependencies)
        step = cls(node, dependencies, policy)
        return Task(node.key, step, *map(TaskRef, dependencies))

    def __call__(self, *inputs: Any) -> Any:
        """Run it on the values of its dependencies."""
        values, _ = unwrap(zip(self.dependencies, inputs, strict=True))
        value, retries = run_step(self.node, values, self.policy)
        return Retried(value, {self.node.key: retries}) if retries else value


@dataclass(frozen=True)
class Retried:
    """A value of a shared step, with how many more tries than one it took, by the step's key."""

    value: Any
    retries: dict[Key, int] = field(default_factory=dict)


def unwrap(values: Iterable[tuple[Key, Any]]) -> tuple[dict[Key, Any], dict[Key, int]]:
    """Return values of steps, and the tries that they took."""
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
    """A block that could not be read, in the caller's terms.

    Attributes
    ----------
    block, grid : tuple of int
        Its position, and the number of blocks along each dimension of y.
    rows : int
    part : tuple of (int, int)
        Which part of y it is, by start and end along each dimension.
    array : str
        Names of the arrays that could not be read there.
    chunk : str or None
        Where the store holds what could not be read.
    error : str
    tries : int
    """

    block: tuple[int, ...]
    grid: tuple[int, ...]
    rows: int
    part: tuple[tuple[int, int], ...]
    array: str
    chunk: str | None
    error: str
    tries: int

    @property
    def sentence(self) -> str:
        """What a person should know of it."""
        part = ", ".join(f"{start}:{end}" for start, end in self.part)
        where = "" if self.chunk is None else f"{self.chunk}: "
        attempts = "1 attempt" if self.tries == 1 else f"{self.tries} attempts"
        return (
            f"{self.array} could not be read after {attempts} in block {self.block} of the grid "
            f"{self.grid}, y_data[{part}]: {where}{self.error}"
        )

    def record(self) -> dict[str, Any]:
        """Return what a result keeps of it."""
        return {
            "block": self.block,
            "rows": self.rows,
            "array": self.array,
            "chunk": self.chunk,
            "error": self.error,
        }


@dataclass(frozen=True)
class ReadReport:
    """What was read, and what went wrong with it."""

    rows_read: int = 0
    bytes_read: int = 0
    rows_cached: int = 0  # in a worker's memory from an earlier pass
    n_blocks: int = 0  # read, not cached
    errors: dict[int, ReadError] = field(default_factory=dict)  # blocks not read, by flat index
    retries: dict[Key, int] = field(default_factory=dict)  # by step

    @classmethod
    def concatenate(cls, reports: Iterable[ReadReport]) -> ReadReport:
        """Return what all of them say; what several groups have waited for counts once."""
        reports = list(reports)
        return cls(
            sum(report.rows_read for report in reports),
            sum(report.bytes_read for report in reports),
            sum(report.rows_cached for report in reports),
            sum(report.n_blocks for report in reports),
            {
                index: read_error
                for report in reports
                for index, read_error in report.errors.items()
            },
            {key: count for report in reports for key, count in report.retries.items()},
        )

    @property
    def n_retries(self) -> int:
        """How often something was tried again."""
        return sum(self.retries.values())
