"""``Plan``: size, tasks and memory of a fit, computed without reading data."""

from __future__ import annotations

from dataclasses import dataclass

from dask.utils import format_bytes

from nlsq_dask import _html as html
from nlsq_dask._text import wrap
from nlsq_dask.data.sampling import plan_sample
from nlsq_dask.data.subsets import plan_subsets
from nlsq_dask.engine.memory import MemoryPlan, memory_text, small_blocks, workers_text
from nlsq_dask.engine.reduction_tree import count_tree, group_blocks
from nlsq_dask.engine.workers import Workers
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.model.check import check_derivative, check_trace
from nlsq_dask.model.jacobian import choose_mode
from nlsq_dask.model.jax_scope import x64

_CONCURRENT_SUMS = 40  # partial sums in a worker before they are combined
_LARGE_FRACTION = 0.2  # of a worker's memory; more for partial sums is reported as a problem


@dataclass(frozen=True)
class Plan:
    """Size, tasks and memory of a fit, computed without reading data.

    Attributes
    ----------
    n_rows : int
        Number of rows (observations).
    grid : tuple of int
        Number of blocks along each dimension of ``y_data``. A block is a chunk of ``y_data``,
        with the elements of the other arrays that belong to it.
    n_blocks : int
        Number of blocks.
    n_tasks : int
        Number of Dask tasks per pass over the data: a task sums over one or more blocks, and
        further tasks add up these sums.
    bytes_per_pass : int
        Bytes of all blocks in memory, decoded.
    sample_rows_read : int
        Number of rows read before the first pass, to draw a random sample of rows.
    subset_rows_read : tuple of int
        Number of rows in each of the subsets of the blocks over which the fit sums before it sums
        over all rows; empty if it uses none. With them, most fits need one pass over all rows,
        otherwise two. Subsets are omitted if the fit needs QR factorizations, or if they have few
        blocks and the blocks differ.
    n_workers, threads : int
        Number of processes, and the maximum number of threads per process. A cluster that has no
        workers yet has 0; the plan is then for one worker with one thread.
    peak_memory : int
        Maximum bytes per worker: Python with its libraries, the blocks of running tasks, and the
        cached blocks.
    memory_limit : int or None
        Bytes of memory of the smallest worker; None if the cluster has no workers yet.
    cache_per_worker : int
        Maximum bytes of blocks kept in a worker between passes.
    jacobian : {"forward", "reverse"}
        Mode of automatic differentiation for the Jacobian of the model.
    realigned : tuple of str
        One text per array whose chunks are split to match the chunks of the other arrays.
    problems : tuple of str
        Texts on whatever would stop the fit, slow it down, or may be unintended.
    not_free : tuple of str
        Texts on the parameters that are fixed or tied, with their values; empty if there are none.
    """

    n_rows: int
    grid: tuple[int, ...]
    n_blocks: int
    n_tasks: int
    bytes_per_pass: int
    sample_rows_read: int
    subset_rows_read: tuple[int, ...]
    n_workers: int
    threads: int
    peak_memory: int
    memory_limit: int | None
    cache_per_worker: int
    jacobian: str
    realigned: tuple[str, ...]
    problems: tuple[str, ...]
    not_free: tuple[str, ...] = ()

    @property
    def expected_reads(self) -> float:
        """Rows that most fits of this kind read, divided by the number of rows.

        It counts the sample, the subsets, and one pass after subsets, otherwise two.
        """
        n_passes = 1 if self.subset_rows_read else 2
        before = self.sample_rows_read + sum(self.subset_rows_read)
        return n_passes + before / max(self.n_rows, 1)

    def _lines(self) -> list[tuple[str, str]]:
        grid = " x ".join(map(str, self.grid))
        return [
            ("Rows", f"{self.n_rows:,}"),
            ("Blocks", f"{self.n_blocks:,} ({grid})"),
            ("Tasks per pass", f"{self.n_tasks:,}"),
            ("Bytes per pass", format_bytes(self.bytes_per_pass)),
            ("Rows read for the sample", f"{self.sample_rows_read:,}"),
            ("Rows read for subsets", ", ".join(f"{n:,}" for n in self.subset_rows_read) or "none"),
            ("Expected reads", f"{self.expected_reads:.2f} x all rows"),
            ("Workers", workers_text(self.n_workers, self.threads)),
            ("Peak memory per worker", memory_text(self.peak_memory, self.memory_limit)),
            ("Cache per worker", format_bytes(self.cache_per_worker)),
            *([("Parameters", " ".join(self.not_free))] if self.not_free else []),
            ("Jacobian", f"{self.jacobian} mode"),
            ("Rechunked arrays", "; ".join(self.realigned) or "none"),
            ("Problems", "; ".join(self.problems) or "none"),
        ]

    def __str__(self) -> str:
        return "\n".join(wrap(f"{name:<26}{text}", " " * 26) for name, text in self._lines())

    def _repr_html_(self) -> str:
        return html.plan(self.problems, self._lines()[:-1])


def build_plan(problem: FitProblem) -> Plan:
    """Return the plan of a fit on the current Dask workers, or on threads if there are none."""
    blocks, model, config = problem.blocks, problem.model, problem.config
    check_trace(model, blocks.x_labels)
    if not problem.is_without_matrices:
        check_derivative(model, problem.parameters.names)
    block_rows = blocks.block_rows()
    groups = group_blocks(block_rows)
    workers = Workers.active()
    memory = MemoryPlan.of(blocks, groups, workers, config.cache)
    sample = plan_sample(block_rows, problem.sample_rows, config.random_seed, blocks.in_memory)
    subsets: tuple[frozenset[int], ...] = ()
    if problem.may_end_after_one_pass and config.gauss_newton_solver != "qr":
        subsets = plan_subsets(block_rows, sample.blocks, config.random_seed, blocks.in_memory)
    with x64():
        mode = choose_mode(model, model.jaxpr())
    return Plan(
        n_rows=blocks.n_rows,
        grid=blocks.grid,
        n_blocks=block_rows.size,
        n_tasks=len(groups) + count_tree(len(groups)),
        bytes_per_pass=memory.bytes_per_pass,
        sample_rows_read=int(sum(block_rows[block] for block in sample.blocks)),
        subset_rows_read=tuple(int(block_rows.flat[list(blocks)].sum()) for blocks in subsets),
        n_workers=len(workers.threads),
        threads=workers.max_threads,
        peak_memory=memory.peak_bytes,
        memory_limit=memory.limit,
        cache_per_worker=memory.cache_bytes,
        jacobian=mode.value,
        realigned=blocks.realigned,
        problems=_problems(problem, memory, workers),
        not_free=problem.all_parameters.not_free,
    )


def _problems(problem: FitProblem, memory: MemoryPlan, workers: Workers) -> tuple[str, ...]:
    blocks, n_params = problem.blocks, problem.model.n_params
    texts = (problem.all_parameters.notice, workers.import_problem, memory.problem)
    problems = [text for text in texts if text]
    if small := small_blocks(blocks):
        problems.append(small)
    if idle := workers.idle_problem(len(memory.group_bytes)):
        problems.append(idle)
    matrix = 0 if problem.is_without_matrices else 8 * n_params**2
    if memory.limit is not None and _CONCURRENT_SUMS * matrix > _LARGE_FRACTION * memory.limit:
        problems.append(
            f"each partial sum holds a {n_params:,} x {n_params:,} matrix "
            f"({format_bytes(matrix)}), and a worker holds dozens of them. Lower "
            f"`cg_param_threshold` to avoid matrices"
        )
    return tuple(problems)
