"""``MemoryPlan``: memory that a fit needs on a worker, computed without reading data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dask.utils import format_bytes

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.engine.cache_budget import CacheBudget
from nlsq_dask.engine.prefetch import DECODING_COPIES, PrefetchLimits
from nlsq_dask.engine.workers import Workers
from nlsq_dask.errors import DataError

# Memory of a worker without data. Measured on Linux: 298 MiB after the import; the first fit added
# 126 MiB with 3 parameters, 166 MiB with 8; further models add 5 to 40 MiB each.
IMPORTED_BYTES = 300 * 2**20  # Python with its libraries; what is measured in a worker, if more
_COMPILED_BYTES = 150 * 2**20  # compiled programs, and what compiling leaves behind
MAX_FILLED = 0.8  # of a worker's memory, where distributed pauses it
_AUTO_CACHE = 0.2  # of a worker's memory
# Blocks that are read ahead where reading waits: per thread, per worker, and their share of memory.
_THREAD_BLOCKS, _MAX_BLOCKS, _MAX_AHEAD = 8, 32, 0.05
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


def workers_text(n_workers: int, threads: int) -> str:
    """Return the number of workers and of threads as a line of a plan."""
    if not n_workers:
        return "none yet; the plan is for one with one thread"
    return f"{n_workers}, with up to {threads} threads"


def memory_text(peak: int, limit: int | None) -> str:
    """Return the memory that a worker needs and has as a line of a plan."""
    return format_bytes(peak) + ("" if limit is None else f" of {format_bytes(limit)}")


def base_bytes(workers: Workers, compiled: int = _COMPILED_BYTES) -> int:
    """Return the memory of a worker without data: with libraries and compiled programs."""
    return max(IMPORTED_BYTES, workers.base_bytes) + compiled


def shortage(needed: int, limit: int | None) -> str:
    """Return the beginning of a sentence if a worker needs more memory than it has; else ""."""
    if limit is None or needed <= MAX_FILLED * limit:
        return ""
    return (
        f"a worker needs {format_bytes(needed)} of memory, but may use "
        f"{format_bytes(int(MAX_FILLED * limit))} ({MAX_FILLED:.0%} of its "
        f"{format_bytes(limit)}, where Dask pauses it)"
    )


def missing_workers(needed: int, limit: int | None) -> str:
    """Return a sentence, without a full stop, if the cluster has no workers yet; else ""."""
    if limit is not None:
        return ""
    return (
        f"the cluster has no workers yet, and a fit waits for them; a worker with one thread needs "
        f"a memory limit of {format_bytes(math.ceil(needed / MAX_FILLED))} or more"
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that a fit needs and that a worker has, in bytes."""

    group_bytes: tuple[int, ...]  # of each group: the blocks that one task reads
    task_bytes: int  # peak of one running task
    threads: int  # concurrent tasks per worker
    ahead_blocks: int  # maximum of blocks per worker that are read ahead of those that tasks use
    ahead_bytes: int  # maximum of their bytes, while they are decoded
    cache_bytes: int  # maximum for cached blocks, per worker
    all_fits: bool  # whether the workers can cache all blocks
    limit: int | None  # memory of the smallest worker; None if there are no workers yet
    base_bytes: int  # memory of a worker without data

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
        task_bytes = 0 if blocks.in_memory else DECODING_COPIES * read_bytes
        threads, limit = min(workers.max_threads, len(groups)), workers.memory_limit
        base, memory = base_bytes(workers), limit or 0
        free = int(MAX_FILLED * memory) - base - threads * task_bytes
        most = max(min(int(_MAX_AHEAD * memory), free), 0)
        one = DECODING_COPIES * int(block_bytes.max())
        ahead_blocks = min(
            _THREAD_BLOCKS * threads, _MAX_BLOCKS, block_bytes.size, most // max(one, 1)
        )
        if blocks.in_memory or not workers.is_persistent:
            ahead_blocks = 0
        free -= ahead_blocks * one
        requested = _AUTO_CACHE * memory if isinstance(cache, str) else cache // workers.n_processes
        is_useful = workers.is_persistent and not blocks.in_memory
        cache_bytes = max(min(int(requested), free), 0) if is_useful else 0
        all_fits = sum(group_bytes) <= cache_bytes * workers.n_processes
        return cls(
            group_bytes,
            task_bytes,
            threads,
            ahead_blocks,
            ahead_blocks * one,
            cache_bytes,
            all_fits,
            limit,
            base,
        )

    def budget(self, fit: str, workers: Workers, cache: int | str) -> CacheBudget:
        """Return the limits on cached blocks of a fit with a unique name; see ``of``."""
        on_device = None if isinstance(cache, str) else cache // workers.n_processes
        n_processes = workers.processes_per_device
        return CacheBudget(fit, self.cache_bytes, on_device, n_processes, isinstance(cache, str))

    def prefetch_limits(self, fit: str) -> PrefetchLimits:
        """Return the limits on blocks that are read ahead, of a fit with a unique name."""
        return PrefetchLimits(fit, self.threads, self.ahead_blocks, self.ahead_bytes)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of all blocks; each pass over the data needs all of them once."""
        return sum(self.group_bytes)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a worker, with cached blocks and those that are read ahead."""
        return self._needed + self.ahead_bytes + min(self.cache_bytes, self.bytes_per_pass)

    @property
    def _needed(self) -> int:
        return self.base_bytes + self.threads * self.task_bytes

    @property
    def problem(self) -> str | None:
        """Sentence, without a full stop, on why a worker has too little memory; None if enough."""
        if missing := missing_workers(self._needed, self.limit):
            return missing
        too_little = shortage(self._needed, self.limit)
        if not too_little:
            return None
        if shortage(self.base_bytes, self.limit):
            return (
                f"{too_little}: it has {format_bytes(self.base_bytes)} without data. Use workers "
                f"with more memory"
            )
        read_bytes = format_bytes(self.task_bytes // DECODING_COPIES)
        return (
            f"{too_little}: it has {format_bytes(self.base_bytes)} without data, and each of its "
            f"{self.threads} threads reads blocks of up to {read_bytes}. Use smaller chunks "
            f"(rechunk the arrays, or open them with chunks=...), fewer threads per worker, or "
            f"workers with more memory"
        )

    def check(self) -> None:
        """Raise a DataError if the memory of a worker is too small."""
        if self.problem is not None:
            raise DataError(f"{self.problem}.")
