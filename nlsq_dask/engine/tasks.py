"""Functions of Dask tasks: sum over a group of blocks, sample rows, combine results."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.data.sampling import SamplePlan, subsample
from nlsq_dask.engine.block_group import BlockGroup, CachedBlock
from nlsq_dask.engine.block_sums import BlockSums
from nlsq_dask.engine.retries import ReadReport
from nlsq_dask.engine.source_graph import GroupReader, Index, ReadBlock
from nlsq_dask.errors import DeviceMemoryError
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.rows.rows import Rows


@dataclass(frozen=True)
class PassRequest:
    """Specification of a pass (one sum over all rows)."""

    sums: Request  # the sums, and the parameters at which they are computed
    wants_moments: bool = True  # also compute the sums that depend on the data alone
    sample_share: float = 0.0  # fraction of the rows of each block to return
    seed: int = 0  # for choosing these rows
    skipped: frozenset[int] = frozenset()  # flat indices of blocks that are not read
    is_last: bool = False  # whether a further pass is unlikely, so that keeping blocks rarely pays


S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class PassResult(Generic[S]):
    """Sums over some or all blocks, or rows sampled from them."""

    sums: S | None  # None if no block could be read, or only a sample was requested
    rows: Rows | None  # sampled rows
    reading: ReadReport  # amount of data read
    blocks: BlockSums | None = None  # statistics of each block
    first_bad_block: int | None = None  # flat index of the first block with NaN or infinity


def reduce_group(
    group: BlockGroup, kernel: Kernel[S], request: PassRequest, *inputs: Any
) -> PassResult[S]:
    """Return sums over the blocks of a group, which are read or taken from the cache.

    ``inputs`` are the results of the tasks ``group.reader.inputs``, in that order. They are left
    out if the group is known to be cached; if it is not any more, a ``CacheLostError`` is raised.
    """

    def total() -> PassResult[S]:
        function = partial(_reduce_block, kernel, request)
        with closing(
            group.map_blocks(function, inputs, request.skipped, kernel, request.is_last)
        ) as results:
            return reduce(combine, results)  # one by one, because each may hold a large matrix

    if request.sample_share:
        group.read_again()
    try:
        return total()
    except DeviceMemoryError:
        group.leave_device()
    return total()


def _reduce_block(
    kernel: Kernel[S],
    request: PassRequest,
    index: int,
    rows: CachedBlock | None,
    read: ReadBlock | None,
) -> PassResult[S]:
    report = _report(read, rows)
    if rows is None:
        return PassResult(None, None, report)
    sums = kernel(rows, request.sums, request.wants_moments)
    block = rows if read is None else read.block
    taken = subsample(len(rows), request.sample_share, request.seed, index)
    sample = block.take(taken) if isinstance(block, Rows) and len(taken) else None
    chi2 = np.nan if sums.lacks_derivatives else sums.chi2
    measured = BlockSums.of(index, chi2, sums.n_used, sums.largest)
    return PassResult(sums, sample, report, measured, index if sums.n_bad else None)


def _report(read: ReadBlock | None, rows: CachedBlock | None) -> ReadReport:
    """Return the amount of data read for a block; ``read`` is None if the block was cached."""
    if read is None:
        return ReadReport(rows_cached=0 if rows is None else len(rows))
    if read.block is None:
        errors = {} if read.read_error is None else {read.index: read.read_error}
        return ReadReport(errors=errors, retries=read.retries)
    return ReadReport(len(read.block), read.block.nbytes, 0, 1, retries=read.retries)


def combine(*partials: PassResult[S]) -> PassResult[S]:
    """Combine the results of consecutive blocks, or of groups of blocks, in order."""
    sums = [partial.sums for partial in partials if partial.sums is not None]
    rows = [partial.rows for partial in partials if partial.rows is not None]
    blocks = [partial.blocks for partial in partials if partial.blocks is not None]
    bad = [partial.first_bad_block for partial in partials if partial.first_bad_block is not None]
    return PassResult(
        reduce(lambda one, other: one.combine(other), sums) if sums else None,
        Rows.concatenate(rows) if rows else None,
        ReadReport.concatenate(partial.reading for partial in partials),
        BlockSums.concatenate(blocks) if blocks else None,
        min(bad, default=None),
    )


def sample_block(reader: GroupReader, plan: SamplePlan, i: int, *inputs: Any) -> PassResult[Sums]:
    """Read the i-th block of a plan, and return the rows to take as ``PassResult.rows``.

    ``inputs`` are the results of the tasks ``reader.inputs``, in that order.
    """
    (read,) = reader.read_at_once(inputs)
    block = read.block
    rows = None if block is None else block.take(plan.rows_of(i, len(block)))
    return PassResult(None, rows, _report(read, block))


@dataclass(frozen=True)
class UndefinedRows:
    """Rows of a block at which the model is not finite or, if it is at all, its derivative."""

    n_rows: int
    n_used: int  # number of rows that are neither masked nor omitted for a NaN
    position: Index  # of the first of the rows
    first: Rows  # the first of the rows
    is_derivative: bool


def undefined_rows(
    reader: GroupReader, kernel: PredictionKernel, params: NDArray[np.float64], *inputs: Any
) -> UndefinedRows | None:
    """Read the only block of a reader, and return the rows at which the model is not finite.

    None if there are none. ``inputs`` are the results of the tasks ``reader.inputs``, in that
    order.
    """
    (read,) = reader.read(inputs)
    if read.block is None:
        return None
    block = read.block.take(np.arange(len(read.block)))
    index = block.usable_index()
    rows = block.take(index)
    values = kernel(rows.batches(kernel.batch_rows), params)
    for i, row in enumerate(~np.isfinite(values)):
        if row.any():
            first = int(row.argmax())
            position = np.unravel_index(int(index[first]), read.block.shape)
            at = tuple(map(int, position))
            return UndefinedRows(int(row.sum()), len(rows), at, rows.take(np.array([first])), i > 0)
    return None


def not_finite(reader: GroupReader, *inputs: Any) -> tuple[int, Index, Index] | None:
    """Read the only block of a reader, and return where its first NaN or infinity is.

    None if all elements are finite. ``inputs`` are the results of the tasks ``reader.inputs``, in
    that order.

    Returns
    -------
    array : int
        Index of the array in the order y, x..., sigma.
    position : tuple of int
        Position in this array.
    shape : tuple of int
        Shape of this array.
    """
    (read,) = reader.read(inputs)
    if read.block is None:
        return None
    *arrays, mask = read.block.arrays
    for i, array in enumerate(array for array in arrays if array is not None):
        bad = np.asarray(~np.isfinite(array))
        if mask is not None:
            bad = bad & ~mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
        if bad.any():
            # An element that is broadcast belongs to all rows along that dimension.
            repeated = tuple(i for i, n in enumerate(array.shape) if n < bad.shape[i])
            bad = np.asarray(bad.any(axis=repeated, keepdims=True))
            position = np.unravel_index(int(bad.argmax()), bad.shape)
            return i, tuple(map(int, position)), array.shape
    return None
