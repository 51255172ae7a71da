"""Memory maps and HDF5 datasets as Dask arrays, read by path in the worker that runs a task.

A task carries the location of the bytes, never the bytes themselves. The files must therefore have
the same path on every worker.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import DataNode
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

# Elements per block of arrays that can be split anywhere: small enough to occupy every thread.
_BLOCK_ENTRIES = 2**18
_MAX_MEMORY_BLOCKS = 64  # of arrays in memory, up to a factor of two
# HDF5 chunks are often a few kB, which take longer to request than to read.
_BLOCK_BYTES = 2**22


def block_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows per block of an array that has no chunks of its own.

    It is a power of two, so that each block of y is made of whole blocks of an x of shape (n, k).
    """
    rows = max(_BLOCK_ENTRIES * shape[0] // max(math.prod(shape), 1), 1)
    return 1 << (rows.bit_length() - 1)


def memory_block_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows per block of an array in memory, a power of two.

    There are at most 128 blocks: more would take time, above all on a GPU.
    """
    return max(block_rows(shape), 1 << (max(shape[0] // _MAX_MEMORY_BLOCKS, 1).bit_length() - 1))


@dataclass(frozen=True)
class MappedArray:
    """Location of an array in a memory-mapped file; indexing reads the selected elements."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of any sign
    offset: int  # bytes to the first element

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Any:
        try:
            mapped = np.memmap(self.path, np.uint8, "r")
            whole: Any = np.ndarray(self.shape, self.dtype, mapped, self.offset, self.strides)
        except (OSError, ValueError, TypeError) as error:
            raise _read_error("memory-mapped file", self.path, error) from error
        # A copy, so that the mapping is closed and reading happens here, not in the kernel.
        return np.array(whole[index])


class Hdf5Array:
    """HDF5 dataset that other processes can read: they open its file for each block.

    Parameters
    ----------
    dataset : h5py.Dataset
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._path = os.path.abspath(dataset.file.filename)
        self._name = dataset.name
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype
        self.ndim = len(dataset.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}

    def __getitem__(self, index: Any) -> Any:
        if self._dataset is not None:
            return self._dataset[index]
        import h5py  # optional

        try:
            # No file stays open on a worker; opening is cheap compared to reading a block.
            with h5py.File(self._path, "r") as file:
                return file[self._name][index]
        except (OSError, KeyError) as error:
            raise _read_error("HDF5 file", self._path, error) from error


def _read_error(what: str, path: str, error: Exception) -> OSError:
    return OSError(
        f"the {what} {path!r} cannot be read by a worker: {error}. Make it available to every "
        f"worker under this path, and open it in read mode ('r'): a file open for writing cannot "
        f"be read by other processes."
    )


def is_file(value: Any) -> bool:
    """Return whether the value is a memory map or an HDF5 dataset."""
    return _as_file(value) is not None


def from_file(value: Any) -> da.Array | None:
    """Return a Dask array of a memory map or an HDF5 dataset; None for other values."""
    file = _as_file(value)
    if file is None:
        return None
    if isinstance(file, Hdf5Array) and value.chunks:
        chunks = _merge_chunks(value.chunks, file.shape, file.dtype.itemsize)
    else:
        chunks = (*(block_rows(file.shape) for _ in file.shape[:1]), *file.shape[1:])
    lazy: da.Array = da.from_array(
        file,
        chunks=chunks,
        name=False,
        inline_array=True,
        fancy=False,
        meta=np.empty((0,) * file.ndim, file.dtype),
    )
    return lazy


def reopen_by_name(array: da.Array) -> da.Array:
    """Return the array with paths instead of open files in its graph, so that it can be sent.

    Otherwise the client would send the contents of a whole memory map to the workers, and could not
    send an HDF5 dataset at all. Only graphs of ``da.from_array`` are changed.
    """
    graph = array.__dask_graph__()
    if not isinstance(graph, HighLevelGraph):
        return array
    replaced: dict[str, Any] = {}
    for name, layer in graph.layers.items():
        # The layer in which Dask's from_array keeps the array.
        if isinstance(layer, MaterializedLayer) and name.startswith("original-"):
            for key, node in layer.mapping.items():
                file = _as_file(node.value if isinstance(node, DataNode) else node)
                if file is not None:
                    replaced[name] = MaterializedLayer({key: DataNode(key, file)})
    if not replaced:
        return array
    renamed = HighLevelGraph({**graph.layers, **replaced}, graph.dependencies)
    return da.Array(renamed, array.name, array.chunks, meta=array._meta)


def _as_file(value: Any) -> MappedArray | Hdf5Array | None:
    h5py = sys.modules.get("h5py")  # imported if there is a dataset
    if h5py is not None and isinstance(value, h5py.Dataset):
        return Hdf5Array(value)
    return _as_mapped(value) if isinstance(value, np.ndarray) else None


def _as_mapped(array: np.ndarray[Any, Any]) -> MappedArray | None:
    """Return where a memory map, or a view of one, is in its file; None for other arrays."""
    if isinstance(array, np.ma.MaskedArray):
        return None
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    # Mode "c" keeps changes in memory only, and a file without a name cannot be opened again.
    is_mapped = isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap)
    if not is_mapped or root.mode == "c" or not os.path.isfile(root.filename or ""):
        return None
    # From addresses: a slice of a memory map keeps the offset of the whole.
    address, start = (a.__array_interface__["data"][0] for a in (array, root))
    offset = root.offset + address - start
    return MappedArray(os.fspath(root.filename), array.dtype, array.shape, array.strides, offset)


def _merge_chunks(
    chunks: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> tuple[int, ...]:
    """Return larger chunks made of several small ones, each of which is slow to request.

    The last dimension is enlarged first, because its elements are neighbors in the file.
    """
    block = list(chunks)
    for axis in reversed(range(len(block))):
        while block[axis] < shape[axis] and 2 * math.prod(block) * itemsize <= _BLOCK_BYTES:
            block[axis] *= 2
        block[axis] = min(block[axis], shape[axis])
    return tuple(block)
