"""``MemoryPlan``: memory that a fit needs on a worker, computed without reading data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dask.utils import format_bytes

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.engine.workers import Workers
from nlsq_dask.errors import DataError

# Python with its libraries, compiled programs and overhead of the scheduler; measured.
BASE_BYTES = 350 * 2**20
# While a chunk is decoded, encoded and decoded bytes are in memory together.
_COPIES = 2
MAX_FILLED = 0.8  # of a worker's memory, where distributed pauses it
_AUTO_CACHE = 0.2  # of a worker's memory
_SMALL_BLOCK_BYTES = 2**16  # requesting a smaller block takes longer than reading it
_MANY_BLOCKS = 1000


def small_blocks(blocks: RowBlocks) -> str:
    """Return a sentence, without a full stop, if there are many small blocks; else ""."""
    n_blocks = math.prod(blocks.grid)
    mean = int(blocks.block_bytes().sum()) // n_blocks
    if n_blocks <= _MANY_BLOCKS or mean >= _SMALL_BLOCK_BYTES or blocks.in_memory:
        return ""
    return (
        f"{n_blocks:,} blocks of {format_bytes(mean)} on average: requesting them takes longer "
        f"than reading them. Use chunks of 10 to 100 MB"
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that a fit needs and that a worker has, in bytes."""

    group_bytes: tuple[int, ...]  # of each group: the blocks that one task reads
    task_bytes: int  # peak of one running task
    threads: int  # concurrent tasks per worker
    cache_bytes: int  # maximum for cached blocks, per worker
    all_fits: bool  # whether the workers can cache all blocks
    limit: int  # memory of the smallest worker

    @classmethod
    def of(
        cls,
        blocks: RowBlocks,
        groups: Sequence[Sequence[tuple[int, ...]]],
        workers: Workers,
        cache: int | str,
    ) -> MemoryPlan:
        """Compute the plan.

        Parameters
        ----------
        blocks : RowBlocks
        groups : sequence of sequences of tuple of int
            Positions in the grid of the blocks that each task reads.
        workers : Workers
        cache : int or "auto"
            Maximum bytes of cached blocks, over all workers; "auto" is a fifth of their memory.
        """
        block_bytes = blocks.block_bytes()
        group_bytes = tuple(int(sum(block_bytes[i] for i in group)) for group in groups)
        # The next block is read ahead, in this process from the next group as well.
        reads_ahead = max(map(len, groups)) > 1 or workers.shares_memory
        at_once = 2 if reads_ahead else 1
        read_bytes = max(at_once * int(block_bytes.max()), blocks.split_bytes)
        task_bytes = 0 if blocks.in_memory else _COPIES * read_bytes
        threads, limit = min(workers.max_threads, len(groups)), workers.memory_limit
        free = int(MAX_FILLED * limit) - BASE_BYTES - threads * task_bytes
        requested = _AUTO_CACHE * limit if isinstance(cache, str) else cache // workers.n_processes
        is_useful = workers.is_persistent and not blocks.in_memory
        cache_bytes = max(min(int(requested), free), 0) if is_useful else 0
        all_fits = sum(group_bytes) <= cache_bytes * workers.n_processes
        return cls(group_bytes, task_bytes, threads, cache_bytes, all_fits, limit)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of all blocks; each pass over the data needs all of them once."""
        return sum(self.group_bytes)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a worker, with cached blocks."""
        cached = min(self.cache_bytes, self.bytes_per_pass)
        return BASE_BYTES + self.threads * self.task_bytes + cached

    @property
    def problem(self) -> str | None:
        """Sentence, without a full stop, on why a worker has too little memory; None if enough."""
        needed = BASE_BYTES + self.threads * self.task_bytes
        if needed <= MAX_FILLED * self.limit:
            return None
        return (
            f"a worker needs {format_bytes(needed)} of memory and has {format_bytes(self.limit)}: "
            f"each of its {self.threads} threads reads blocks of up to "
            f"{format_bytes(self.task_bytes // _COPIES)}. Use smaller chunks (rechunk the arrays, "
            f"or open them with chunks=...), fewer threads per worker, or workers with more memory"
        )

    def check(self) -> None:
        """Raise a DataError if the memory of a worker is too small."""
        if self.problem is not None:
            raise DataError(f"{self.problem}.")
