"""``Plan``: what a fit would do, from metadata alone."""

from __future__ import annotations

from dataclasses import dataclass

from dask.utils import format_bytes

from nlsq_dask import _html as html
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.sampling import plan_sample
from nlsq_dask.engine.memory import MemoryPlan
from nlsq_dask.engine.reduction_tree import count_tree, group_blocks
from nlsq_dask.engine.workers import Workers
from nlsq_dask.model.check import check_trace
from nlsq_dask.model.jacobian import choose_mode
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model

_SMALL_BLOCK_BYTES = 2**16  # reading one takes as long as asking for it
_MANY_BLOCKS = 1000
_CONCURRENT_SUMS = 40  # in a worker, until they are combined
_LARGE_FRACTION = 0.2  # of a worker's memory


@dataclass(frozen=True)
class Plan:
    """What a fit would do; nothing but metadata was read to find it out.

    Attributes
    ----------
    n_rows : int
    grid : tuple of int
        Number of blocks along each dimension of ``y_data``.
    n_blocks : int
    n_tasks : int
        Tasks of a pass: one a group of blocks, and those that combine their sums.
    bytes_per_pass : int
        Bytes of all blocks in memory, decoded.
    sample_rows_read : int
        Rows that are read for the sample before the first pass.
    n_workers, threads : int
        Processes, and the most threads that one of them has.
    peak_memory : int
        Bytes that a worker needs at most: Python with its libraries, what its running tasks read,
        and the cache, which is ``cache_per_worker`` or all data if these are less.
    memory_limit : int
        Bytes that the smallest worker has.
    cache_per_worker : int
        Most bytes of blocks that may stay in a worker between passes.
    jacobian : {"forward", "reverse"}
        Mode of differentiation.
    realigned : tuple of str
        Arrays whose chunks are split to agree with the others, and how.
    problems : tuple of str
        What would stop the fit or make it slow, and what may not be meant.
    """

    n_rows: int
    grid: tuple[int, ...]
    n_blocks: int
    n_tasks: int
    bytes_per_pass: int
    sample_rows_read: int
    n_workers: int
    threads: int
    peak_memory: int
    memory_limit: int
    cache_per_worker: int
    jacobian: str
    realigned: tuple[str, ...]
    problems: tuple[str, ...]

    def _lines(self) -> list[tuple[str, str]]:
        grid = " x ".join(map(str, self.grid))
        return [
            ("rows", f"{self.n_rows:,}"),
            ("blocks", f"{self.n_blocks:,} ({grid})"),
            ("tasks a pass", f"{self.n_tasks:,}"),
            ("bytes a pass", format_bytes(self.bytes_per_pass)),
            ("rows read for the sample", f"{self.sample_rows_read:,}"),
            ("workers", f"{self.n_workers}, with up to {self.threads} threads"),
            (
                "peak memory a worker",
                f"{format_bytes(self.peak_memory)} of {format_bytes(self.memory_limit)}",
            ),
            ("cache a worker", format_bytes(self.cache_per_worker)),
            ("Jacobian", f"{self.jacobian} mode"),
            ("realigned", "; ".join(self.realigned) or "nothing"),
            ("problems", "; ".join(self.problems) or "none"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<26}{text}" for name, text in self._lines())

    def _repr_html_(self) -> str:
        n = len(self.problems)
        badge = f"{n} problem{'s' if n > 1 else ''}" if n else "no problems"
        return html.page(
            html.paragraph(html.badge(badge, html.CAUTION if n else html.GOOD)),
            html.bullets(self.problems),
            html.facts(self._lines()[:-1]),
        )


def build_plan(
    blocks: RowBlocks, model: Model, config: HybridStreamingConfig, notice: str = ""
) -> Plan:
    """Say what a fit of this model to these blocks would do on the active workers.

    Parameters
    ----------
    blocks : RowBlocks
    model : Model
    config : HybridStreamingConfig
    notice : str
        What the caller may not have meant, which is a problem of the plan's.
    """
    check_trace(model, blocks.x_labels)
    block_rows = blocks.block_rows()
    groups = group_blocks(block_rows)
    workers = Workers.active()
    memory = MemoryPlan.of(blocks, groups, workers, config.cache)
    notices = [notice] if notice else []
    sample = plan_sample(
        block_rows,
        config.sample_size(blocks.n_rows, blocks.layout.row_bytes, model.n_params),
        config.random_seed,
        blocks.in_memory,
    )
    with x64():
        mode = choose_mode(model, model.jaxpr())
    return Plan(
        n_rows=blocks.n_rows,
        grid=blocks.grid,
        n_blocks=block_rows.size,
        n_tasks=len(groups) + count_tree(len(groups)),
        bytes_per_pass=memory.bytes_per_pass,
        sample_rows_read=int(sum(block_rows[block] for block in sample.blocks)),
        n_workers=workers.n_processes,
        threads=workers.most_threads,
        peak_memory=memory.peak_bytes,
        memory_limit=memory.limit,
        cache_per_worker=memory.cache_bytes,
        jacobian=mode.value,
        realigned=blocks.realigned,
        problems=(*notices, *_problems(blocks, memory, workers, model.n_params, config)),
    )


def _problems(
    blocks: RowBlocks,
    memory: MemoryPlan,
    workers: Workers,
    n_params: int,
    config: HybridStreamingConfig,
) -> list[str]:
    problems = [] if memory.problem is None else [memory.problem]
    n_blocks = int(blocks.block_rows().size)
    mean = memory.bytes_per_pass // n_blocks
    if n_blocks > _MANY_BLOCKS and mean < _SMALL_BLOCK_BYTES and not blocks.in_memory:
        problems.append(
            f"{n_blocks:,} blocks of {format_bytes(mean)} on average: asking for them takes "
            f"longer than reading them. Chunks of 10 to 100 MB are read faster"
        )
    n_tasks, n_threads = len(memory.group_bytes), sum(workers.threads.values())
    if n_tasks < n_threads:
        problems.append(
            f"{n_tasks} task{'s' if n_tasks > 1 else ''} for {n_threads} threads: some would have "
            f"nothing to do. Smaller chunks give more tasks"
        )
    matrix = 8 * n_params**2
    if (
        not config.is_without_matrices(n_params)
        and _CONCURRENT_SUMS * matrix > _LARGE_FRACTION * memory.limit
    ):
        problems.append(
            f"a sum over rows holds a matrix of {n_params:,} x {n_params:,} parameters, "
            f"{format_bytes(matrix)}, and a worker holds some dozens of sums. A lower "
            f"cg_param_threshold does without matrices"
        )
    return problems
