"""``evaluate``: lazy values of a function of the x arrays, a task per block."""

from __future__ import annotations

import operator
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import Task
from dask.delayed import Delayed
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.engine.serialization import OpaqueWhenPickled
from nlsq_dask.rows.declared import as_declared

Array = NDArray[Any]
Shape = tuple[int, ...]


def evaluate(
    blocks: RowBlocks,
    names: Sequence[str],
    function: Callable[[Shape, list[Array]], Array],
    n_outputs: int,
    dtype: str = "float64",
) -> da.Array:
    """Return the values of a function at all rows, along a new first axis; NaN where x is masked.

    A scheduler that receives the graph needs neither this package nor JAX for the function.

    Parameters
    ----------
    blocks : RowBlocks
        y gives shape and chunks of the result; its values are not used.
    names : sequence of str
        Names of the x arrays in messages.
    function : callable
        ``function(shape, x)`` with the shape of a block and the x arrays of the block; each has the
        dimensions of y, of size 1 where it does not vary, and then its columns. It returns an array
        of shape ``(n_outputs, *shape)``, and is sent to each worker once.
    n_outputs : int
    dtype : str
        That of the values.
    """
    rows = tuple(range(blocks.y.ndim))
    arguments: list[Any] = [blocks.y, rows]
    declared = []
    for i, array in enumerate(blocks.x):
        features = array.shape[blocks.y.ndim :]
        varies = tuple(n == m for n, m in zip(array.shape, blocks.y.shape, strict=False))
        declared.append(_Declared(names[i], blocks.layout.x_dtypes[i], varies, features))
        axes = [
            axis if array.shape[axis] == blocks.y.shape[axis] else blocks.y.ndim + axis
            for axis in rows
        ]
        columns = [2 * blocks.y.ndim + i] * len(features)
        arguments += [array, (*axes, *columns)]
    first = max(i for index in arguments[1::2] for i in index) + 1
    token = uuid.uuid4().hex
    key = f"nlsq-model-{token}"
    of_block = OpaqueWhenPickled(_OfBlock(function, tuple(declared)))
    values: da.Array = da.blockwise(
        operator.call,
        (first, *rows),
        Delayed(key, {key: Task(key, of_block)}),
        None,
        *arguments,
        name=f"nlsq-predict-{token}",
        new_axes={first: n_outputs},
        concatenate=True,
        align_arrays=False,
        dtype=np.dtype(dtype),
        meta=np.empty((0,) * (1 + blocks.y.ndim), dtype),
    )
    return values


@dataclass(frozen=True)
class _Declared:
    """Declared properties of the blocks of an x array."""

    name: str  # in messages
    dtype: str
    varies: tuple[bool, ...]  # along each dimension of the result, whether it has more than 1 value
    features: Shape  # shape of one row

    def checked(self, block: Array, shape: Shape) -> Array:
        """Return a block, checked; ``shape`` is that of the block of the result."""
        rows = tuple(n if varies else 1 for n, varies in zip(shape, self.varies, strict=True))
        return as_declared(self.name, block, self.dtype, rows + self.features)


@dataclass(frozen=True)
class _OfBlock:
    """The function of the tasks: it gets the block of y and those of the x arrays."""

    function: Callable[[Shape, list[Array]], Array]
    declared: tuple[_Declared, ...]

    def __call__(self, y: Array, *x: Array) -> Array:
        arrays, mask = [], np.zeros(y.shape, bool)
        for block, array in zip(x, self.declared, strict=True):
            arrays.append(array.checked(np.ma.getdata(block), y.shape))
            if np.ma.is_masked(block):
                columns = tuple(range(y.ndim, block.ndim))
                mask |= np.ma.getmaskarray(block).any(axis=columns)
        values = self.function(y.shape, arrays)
        if mask.any():
            values[:, mask] = np.nan
        return values
