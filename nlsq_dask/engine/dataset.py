"""``DataSet``: sums over all rows of the data, and samples of rows, computed on Dask."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from dask._task_spec import TaskRef
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.sampling import SamplePlan, plan_sample
from nlsq_dask.data.subsets import plan_subsets
from nlsq_dask.engine.block_group import BlockGroup, CacheLostError, ReadAhead
from nlsq_dask.engine.execution import (
    LOST_WORKERS,
    MAX_ATTEMPTS,
    PartialResults,
    Watch,
    execute,
    lost_message,
)
from nlsq_dask.engine.memory import MemoryPlan
from nlsq_dask.engine.reduction_tree import Node, TaskGraph, Tree, broadcast, group_blocks, pin
from nlsq_dask.engine.retries import ReadError, ReadFailedError, ReadPolicy, SkippedBlock
from nlsq_dask.engine.source_graph import Index, SourceGraph
from nlsq_dask.engine.tasks import (
    PassRequest,
    PassResult,
    S,
    UndefinedRows,
    combine,
    not_finite,
    reduce_group,
    sample_block,
    undefined_rows,
)
from nlsq_dask.engine.waiting import NoWorkersError, WorkerMonitor, WorkersReplacedError
from nlsq_dask.engine.workers import Workers, is_connected
from nlsq_dask.errors import BlockReadError, ClusterLostError
from nlsq_dask.events import Observer
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.prediction import PredictionKernel

_SKIP = "pass HybridStreamingConfig(min_success_rate=...) below 1 to skip unreadable blocks"


class DataSet:
    """Sums over all rows, and samples of rows, on the active Dask scheduler.

    The Dask graph of the data is analyzed once. Neighboring blocks form groups, each of which one
    task reads; ``open`` sends the groups to the workers, where they stay until ``close``.

    Parameters
    ----------
    blocks : RowBlocks
        The data.
    cache : int or "auto"
        Maximum bytes of blocks that all workers together keep in memory between passes.
    policy : ReadPolicy, optional
        How failed reads are handled. By default, the first one is an error.
    """

    def __init__(
        self, blocks: RowBlocks, cache: int | str, policy: ReadPolicy | None = None
    ) -> None:
        self.blocks = blocks
        self._block_rows = blocks.block_rows()
        self._cache = cache
        self._workers = Workers.active()
        self._source = SourceGraph(blocks, policy)
        self._literals = self._source.large_literals
        self._block_groups = group_blocks(self._block_rows)
        self._groups: list[Any] = []
        self._read_ahead: ReadAhead | None = None
        self._needs_inputs = False  # whether groups are no longer expected to stay cached
        self._kernel: tuple[Kernel[Any], Any] | None = None

    def open(
        self, emit: Observer = lambda event: None, check: Callable[[], None] = lambda: None
    ) -> None:
        """Send the data to the workers; wait while no worker runs tasks.

        Parameters
        ----------
        emit : callable, optional
            Called with events on the workers, until ``close``.
        check : callable, optional
            Called without arguments during the wait. An exception that it raises ends the wait.

        Raises
        ------
        DataError
            If a block is too large for the memory of a worker.
        ImportError
            If a worker cannot import this package.
        ClusterLostError
            If the connection to the scheduler is lost, or all workers stay paused.
        """
        self._check = check
        self._monitor = WorkerMonitor(emit)
        workers = self._workers = self._monitor.wait(check)
        workers.check_import()
        self.memory = MemoryPlan.of(self.blocks, self._block_groups, workers, self._cache)
        self.memory.check()
        self._all_needed = self._needed_groups(frozenset())
        fit = uuid.uuid4().hex
        self._budget = self.memory.budget(fit, workers, self._cache)
        self._limits = self.memory.prefetch_limits(fit)
        self._distribute(check)
        if workers.shares_memory and not self.blocks.in_memory:
            self._read_ahead = ReadAhead(workers.max_threads, self._limits)

    def _distribute(self, check: Callable[[], None]) -> None:
        """Send the groups of blocks, and the arrays that are in memory, to the workers."""
        self._source.replace(self._broadcast_literals(check))
        readers, self._shared = self._source.readers(self._block_groups)
        self._inputs = [reader.inputs for reader in readers]
        block_groups = [
            BlockGroup(
                reader,
                self.memory.group_bytes[number],
                self._budget,
                self._source.is_held(reader.inputs),
                self.memory.all_fits,
                number,
                self._limits,
            )
            for number, reader in enumerate(readers)
        ]
        self._groups = pin("group", block_groups, self._workers)

    def _broadcast_literals(self, check: Callable[[], None]) -> dict[Any, Any]:
        """Send the arrays that are in memory, as often as workers leave before they have them."""
        n_lost = 0
        while True:
            self._workers = self._monitor.wait(check)
            try:
                return broadcast(self._literals, self._workers.client)
            except NoWorkersError:
                continue
            except WorkersReplacedError as error:
                n_lost += 1
                if n_lost == MAX_ATTEMPTS:
                    raise ClusterLostError(lost_message(self._workers.client, error)) from error

    def close(self) -> None:
        """Release all data on the workers."""
        if self._read_ahead is not None:
            self._read_ahead.close()
        if self._workers.shares_memory and self._groups:
            # Errors may hold references, and tasks still run.
            self._budget.close_device()
            for group in self._groups:
                group.forget()
        self._groups, self._kernel, self._shared = [], None, {}
        del self._source

    @property
    def longest_block(self) -> int:
        """Number of rows of the largest block."""
        return int(self._block_rows.max())

    @property
    def platforms(self) -> tuple[str, ...]:
        """JAX platforms, such as "cpu" and "gpu", of the processes that run tasks."""
        return self._workers.platforms

    def reduce(
        self,
        kernel: Kernel[S],
        request: PassRequest,
        known: Mapping[Node, PassResult[S]] | None = None,
        watch: Watch = lambda partials: None,
    ) -> PassResult[S]:
        """Return sums over all rows, except those of skipped blocks: one pass over the data.

        Parameters
        ----------
        kernel : Kernel
            Computes the sums over one block.
        request : PassRequest
            The parameters at which sums are computed, and the blocks to skip.
        known : mapping of Node to PassResult, optional
            Partial results of an interrupted pass with the same kernel and request; they are not
            computed again.
        watch : callable, optional
            Called with the ``PartialResults`` at the start and whenever one is added. An exception
            that it raises ends the pass.

        Raises
        ------
        BlockReadError
            If a block cannot be read and the policy does not skip it.
        ClusterLostError
            If the connection to the scheduler is lost, or workers are lost repeatedly.
        """
        skipped = request.skipped
        groups, amounts = self._needed_groups(skipped) if skipped else self._all_needed
        partials = PartialResults(amounts, dict(known or {}))
        watch(partials)
        result: PassResult[S] = self._run_with_recovery(
            lambda: self._tree(kernel, request, groups, partials.values), watch, partials
        )
        return result

    def _run_with_recovery(
        self, make_tree: Callable[[], Tree], watch: Watch, partials: PartialResults | None = None
    ) -> Any:
        """Return the result of the tree that ``make_tree`` builds.

        If workers are lost, the data are sent again and the tree is rebuilt, up to
        ``MAX_ATTEMPTS`` times without progress. Results that are still in ``partials`` are not
        computed again.
        """
        if partials is None:  # of a tree with a single node
            partials = PartialResults(np.zeros((1, 3), np.int64))
        n_losses, n_kept = 0, partials.finished.blocks
        while True:
            try:
                return execute(make_tree(), self._workers, partials, watch, self._monitor)
            except ReadFailedError as failed:
                raise self._read_failure(failed.read_error) from failed.cause
            except CacheLostError:  # on a GPU, which ran out of memory
                self._needs_inputs = True
            except ImportError:  # perhaps of a worker that has joined
                if self._workers.client is not None:
                    Workers.active().check_import()
                raise
            except LOST_WORKERS as error:
                partials.drop_missing()
                # Only results that are kept are progress, so that losses come to an end.
                n_losses = 1 if partials.finished.blocks > n_kept else n_losses + 1
                n_kept = max(n_kept, partials.finished.blocks)
                self._recover(error, n_losses, partial(watch, partials))
                partials.drop_missing()

    def _recover(self, error: Exception, n_losses: int, check: Callable[[], None]) -> None:
        """Send the data to the workers again after some were lost, or raise a ClusterLostError.

        A scheduler recomputes the results of lost workers, but cannot restore the data that a
        client has sent to them.
        """
        client = self._workers.client
        if not is_connected(client) or n_losses == MAX_ATTEMPTS:
            raise ClusterLostError(lost_message(client, error)) from error
        self._kernel = None
        self._distribute(check)

    def _tree(
        self,
        kernel: Kernel[S],
        request: PassRequest,
        groups: Sequence[int],
        known: Mapping[Node, Any],
    ) -> Tree:
        cached = self._cached_groups(request.skipped)
        needed = (key for number in groups if number not in cached for key in self._inputs[number])
        graph = TaskGraph(self._shared, needed)
        if self._kernel is None or self._kernel[0] is not kernel:
            self._kernel = kernel, pin("kernel", [kernel], self._workers)[0]
        constants = (
            graph.constant("kernel", self._kernel[1]),
            graph.constant("request", request),
        )

        def leaf(i: int) -> TaskRef:
            number = groups[i]
            group = graph.constant(f"group-{number}", self._groups[number])
            inputs = () if number in cached else self._inputs[number]
            return graph.task("sum-rows", number, reduce_group, group, *constants, inputs=inputs)

        tree = graph.tree(len(groups), leaf, combine, known)
        if self._read_ahead is not None:
            turns = [self._groups[groups[i]] for i in tree.leaves_in_order()]
            self._read_ahead.arrange(turns, request.skipped, kernel)
        return tree

    def _cached_groups(self, skipped: frozenset[int]) -> set[int]:
        """Return the numbers of groups that are cached, so that they need no shared tasks."""
        if not self._workers.shares_memory or self._needs_inputs:
            return set()  # on a cluster, tasks may move to workers that have not cached the group
        pairs = enumerate(zip(self._groups, self._inputs, strict=True))
        return {i for i, (group, inputs) in pairs if inputs and group.is_cached(skipped)}

    def _needed_groups(self, skipped: frozenset[int]) -> tuple[Sequence[int], NDArray[np.int64]]:
        """Return the numbers of the groups with blocks to read, and how much there is to read.

        The second array has the shape (n, 3): blocks, rows and bytes of each of these groups.
        """
        group_sizes = [len(group) for group in self._block_groups]
        # Groups hold the blocks with rows in their order.
        rows = self._rows_without(skipped)[self._block_rows > 0]
        starts = np.cumsum([0, *group_sizes[:-1]])
        n_blocks = np.add.reduceat(rows > 0, starts, dtype=np.int64)
        n_bytes = n_blocks / group_sizes * self.memory.group_bytes
        amounts = np.stack([n_blocks, np.add.reduceat(rows, starts), n_bytes], axis=1)
        needed = np.flatnonzero(n_blocks)
        return needed.tolist(), amounts[needed].astype(np.int64)

    def sample(
        self,
        sample_rows: int,
        seed: int,
        skipped: frozenset[int] = frozenset(),
        watch: Watch = lambda partials: None,
    ) -> PassResult[Sums]:
        """Draw rows at random from a few blocks, and return them as ``PassResult.rows``.

        Parameters
        ----------
        sample_rows : int
            Number of rows to draw.
        seed : int
        skipped : frozenset of int
            Flat indices of blocks that are not read.
        watch : callable, optional
            Called as in ``reduce``.
        """
        plan = self._plan_sample(sample_rows, seed, skipped)

        def tree() -> Tree:
            readers, shared = self._source.readers([[block] for block in plan.blocks])
            graph = TaskGraph(shared)
            leaves = [
                graph.task("sample", i, sample_block, reader, plan, i, inputs=reader.inputs)
                for i, reader in enumerate(readers)
            ]
            return graph.of_one(graph.task("sample-join", 0, combine, *leaves))

        sample: PassResult[Sums] = self._run_with_recovery(tree, watch)
        return sample

    def subsets(
        self, sample_rows: int, seed: int, skipped: frozenset[int] = frozenset()
    ) -> tuple[frozenset[int], ...]:
        """Return nested subsets of the blocks, by flat index; see ``plan_subsets``.

        Arguments as for ``sample``, whose blocks are among them.
        """
        plan = self._plan_sample(sample_rows, seed, skipped)
        block_rows = self._rows_without(skipped)
        return plan_subsets(block_rows, plan.blocks, seed, self.blocks.in_memory)

    def _plan_sample(self, sample_rows: int, seed: int, skipped: frozenset[int]) -> SamplePlan:
        block_rows = self._rows_without(skipped)
        return plan_sample(block_rows, sample_rows, seed, self.blocks.in_memory)

    def _rows_without(self, skipped: frozenset[int]) -> NDArray[np.int64]:
        """Return the number of rows of each block, 0 for those in ``skipped``."""
        block_rows = self._block_rows.copy()
        block_rows.flat[list(skipped)] = 0
        return block_rows

    def rows_of(self, blocks: frozenset[int]) -> int:
        """Return the number of rows of some blocks, given by their flat indices."""
        return int(self._block_rows.flat[list(blocks)].sum())

    def other_blocks(self, blocks: frozenset[int]) -> frozenset[int]:
        """Return the flat indices of all blocks but the given ones."""
        return frozenset(range(self._block_rows.size)) - blocks

    def _read_failure(self, read_error: ReadError) -> BlockReadError:
        block = self._source.first_block_needing(read_error.key)
        bad = self.skipped_block(int(np.ravel_multi_index(block, self.blocks.grid)), read_error)
        return BlockReadError(
            f"{bad.sentence}. {bad.remedy(_SKIP)}",
            bad.array,
            bad.block,
            bad.chunk,
        )

    def skipped_block(self, index: int, read_error: ReadError) -> SkippedBlock:
        """Return the facts for a message on an unreadable block, given by its flat index."""
        block = tuple(map(int, np.unravel_index(index, self.blocks.grid)))
        names = self.blocks.layout.array_names
        arrays = [names[i] for i in self._source.arrays_needing(read_error.key, block)]
        return SkippedBlock(
            block=block,
            grid=self.blocks.grid,
            rows=int(self._block_rows[block]),
            slices=tuple((s.start, s.stop) for s in self.blocks.block_slices(block)),
            array=" and ".join(arrays),
            chunk=read_error.chunk,
            error=read_error.error,
            attempts=read_error.attempts,
            kind=read_error.kind,
            outage_seconds=read_error.outage_seconds,
        )

    def first_not_finite(self, index: int) -> tuple[Index, str]:
        """Read a block again and locate its first NaN or infinity.

        Parameters
        ----------
        index : int
            Flat index of the block.

        Returns
        -------
        block : tuple of int
            Position of the block in the grid.
        where : str
            End of a sentence, which names array, element and chunk; empty if all elements are
            finite now.
        """
        block = self._block(index)
        first: tuple[int, Index, Index] | None = self._run_on_block(block, not_finite)
        if first is None:
            return block, ""
        i, position, shape = first
        starts = [s.start for s in self.blocks.block_slices(block)]
        row = ", ".join(str(start + at) for start, at in zip(starts, position, strict=False))
        name = self.blocks.layout.array_names[i]
        where = f", beginning with {'' if name == 'y_data' else f'{name} at '}y_data[{row}]"
        where += "".join(f", column {at}" for at in position[len(starts) :])
        chunk = self._source.chunk_of(self.blocks.keys(block)[i], position, shape)
        return block, where if chunk is None else f"{where}, in {chunk}"

    def undefined_rows(
        self, index: int, kernel: PredictionKernel, params: NDArray[np.float64]
    ) -> tuple[Index, UndefinedRows | None]:
        """Read a block again and evaluate the model there.

        Parameters
        ----------
        index : int
            Flat index of the block.
        kernel : PredictionKernel
        params : ndarray, shape (p,)

        Returns
        -------
        block : tuple of int
            Position of the block in the grid.
        rows : UndefinedRows or None
            The rows at which the model or its derivative is not finite, with the element of y of
            the first of them; None if there are none.
        """
        block = self._block(index)
        rows: UndefinedRows | None = self._run_on_block(block, undefined_rows, kernel, params)
        if rows is None:
            return block, None
        starts = [s.start for s in self.blocks.block_slices(block)]
        position = tuple(start + at for start, at in zip(starts, rows.position, strict=True))
        return block, replace(rows, position=position)

    def _block(self, index: int) -> Index:
        """Return the position in the grid of a block, given by its flat index."""
        return tuple(map(int, np.unravel_index(index, self.blocks.grid)))

    def _run_on_block(self, block: Index, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(reader, *args, *inputs)`` for the reader of one block, in a task."""

        def tree() -> Tree:
            ((reader,), shared) = self._source.readers([[block]])
            graph = TaskGraph(shared)
            name = function.__name__.replace("_", "-")
            return graph.of_one(graph.task(name, 0, function, reader, *args, inputs=reader.inputs))

        return self._run_with_recovery(tree, lambda partials: self._check())

    def missing_chunks(self) -> list[str]:
        """Return a warning for each Zarr array that lacks chunks."""
        return list(self._source.missing_chunks())
