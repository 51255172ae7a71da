"""What runs on a worker: the sums of a group of blocks, rows for the sample; how they combine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.data.sampling import SamplePlan, subsample
from nlsq_dask.engine.block_group import Group, Kept
from nlsq_dask.engine.retries import ReadReport
from nlsq_dask.engine.source_graph import GroupReader, Index, ReadBlock
from nlsq_dask.kernels.kernel import RowKernel
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.rows.block import Block
from nlsq_dask.rows.rows import Rows


@dataclass(frozen=True)
class Sample:
    """Rows taken from a few blocks, and what it took to read them.

    Attributes
    ----------
    rows : Rows or None
        None if no block could be read.
    rows_read, bytes_read : int
    n_blocks : int
    reading : ReadReport
    """

    rows: Rows | None
    rows_read: int
    bytes_read: int
    n_blocks: int
    reading: ReadReport


@dataclass(frozen=True)
class PassRequest:
    """What is wanted of a pass.

    Attributes
    ----------
    params : ndarray, shape (p,)
        Where the sums are wanted.
    candidates : ndarray, shape (k, p), or None
        Where the cost alone is wanted.
    directions : ndarray, shape (k, p), or None
        Where products are wanted, of a kernel that makes them.
    is_first : bool
        Whether to sum what depends on the data alone.
    sample_share : float
        Share of the rows to bring back, taken evenly from all blocks.
    seed : int
    left_out : frozenset of int
        Flat indices of blocks that are not wanted.
    """

    params: NDArray[np.float64]
    candidates: NDArray[np.float64] | None = None
    directions: NDArray[np.float64] | None = None
    is_first: bool = True
    sample_share: float = 0.0
    seed: int = 0
    left_out: frozenset[int] = frozenset()


S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class PassResult(Generic[S]):
    """What a pass, or a part of one, brings back.

    Attributes
    ----------
    sums : Sums or None
        None if no block could be read.
    sample : Rows or None
    reading : ReadReport
    """

    sums: S | None
    sample: Rows | None
    reading: ReadReport


def reduce_group(
    group: Group, kernel: RowKernel[S], request: PassRequest, *inputs: Any
) -> PassResult[S]:
    """Sum over the blocks of a group, read now or kept from an earlier pass."""
    blocks = group.blocks(inputs, request.left_out, kernel.placed)
    parts = (_reduce_block(kernel, request, *block) for block in blocks)
    return reduce(combine, parts)


def _reduce_block(
    kernel: RowKernel[S],
    request: PassRequest,
    index: int,
    rows: Kept | None,
    read: ReadBlock | None,
) -> PassResult[S]:
    if rows is None:
        return PassResult(None, None, _report(read))
    further = {} if request.directions is None else {"directions": request.directions}
    sums = kernel(
        rows,
        request.params,
        index,
        candidates=request.candidates,
        wants_moments=request.is_first,
        **further,
    )
    block = rows if read is None else read.block
    if read is None:
        sums = replace(sums, rows_cached=len(rows))
    elif read.block is not None:
        sums = replace(sums, rows_read=len(read.block), bytes_read=read.block.nbytes)
    taken = subsample(len(rows), request.sample_share, request.seed, index)
    # Nothing is taken from a GPU's memory; the sample comes from the first pass, which reads.
    sample = block.take(taken) if isinstance(block, Block) and len(taken) else None
    return PassResult(sums, sample, _report(read))


def _report(read: ReadBlock | None) -> ReadReport:
    """Return what went wrong while a block was read; None stands for one that was there."""
    return ReadReport() if read is None else ReadReport.of(read.index, read.fault, read.retries)


def combine(*parts: PassResult[S]) -> PassResult[S]:
    """Combine parts of a pass, in the order of their rows."""
    sums = [part.sums for part in parts if part.sums is not None]
    rows = [part.sample for part in parts if part.sample is not None]
    return PassResult(
        reduce(lambda one, other: one.combine(other), sums) if sums else None,
        Rows.concatenate(rows) if rows else None,
        ReadReport.joined(part.reading for part in parts),
    )


def sample_block(reader: GroupReader, plan: SamplePlan, i: int, *inputs: Any) -> Sample:
    """Read the i-th block of a plan and take its rows."""
    (read,) = reader.read(inputs)
    block, report = read.block, _report(read)
    if block is None:
        return Sample(None, 0, 0, 0, report)
    return Sample(block.take(plan.rows_of(i, len(block))), len(block), block.nbytes, 1, report)


def not_finite(reader: GroupReader, *inputs: Any) -> tuple[int, Index, Index] | None:
    """Return which array of a block is not finite, where first, and that array's shape."""
    (read,) = reader.read(inputs)
    if read.block is None:
        return None
    *arrays, mask = read.block.arrays
    for i, array in enumerate(array for array in arrays if array is not None):
        bad = np.asarray(~np.isfinite(array))
        if mask is not None:
            bad = bad & ~mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
        if bad.any():
            # Where an array does not vary, an entry belongs to all rows along that dimension.
            repeated = tuple(i for i, n in enumerate(array.shape) if n < bad.shape[i])
            bad = np.asarray(bad.any(axis=repeated, keepdims=True))
            position = np.unravel_index(int(bad.argmax()), bad.shape)
            return i, tuple(map(int, position)), array.shape
    return None


def join_samples(*parts: Sample) -> Sample:
    """Put the rows of several blocks together, in their order."""
    rows = [part.rows for part in parts if part.rows is not None]
    return Sample(
        Rows.concatenate(rows) if rows else None,
        sum(part.rows_read for part in parts),
        sum(part.bytes_read for part in parts),
        sum(part.n_blocks for part in parts),
        ReadReport.joined(part.reading for part in parts),
    )
