"""Files that are open as one array, memory maps and HDF5 datasets: read by name, where a task runs.

A task carries what it takes to find the bytes, never the bytes themselves. So the files must be at
the same path for every worker, as a Zarr store must.
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

# Entries in a block of what can be cut anywhere: small enough for every thread to get some.
_BLOCK_ENTRIES = 2**18
# Chunks of HDF5 are often of some kB, which take longer to ask for than to read.
_BLOCK_BYTES = 2**22


def block_rows(shape: tuple[int, ...]) -> int:
    """Return how many leading rows make a block of an array that can be cut anywhere.

    A power of two: the blocks of x with k features then fit into those of y without remainders.
    """
    rows = max(_BLOCK_ENTRIES * shape[0] // max(math.prod(shape), 1), 1)
    return 1 << (rows.bit_length() - 1)


@dataclass(frozen=True)
class MappedArray:
    """An array in a file: where its entries are. A block is read when it is indexed.

    Attributes
    ----------
    path : str
    dtype : numpy.dtype
    shape, strides : tuple of int
        Strides in bytes, of any sign.
    offset : int
        Position of the first entry in the file, in bytes.
    """

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

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
        # A copy: the mapping is closed, and reading is done here and not in the kernel.
        return np.array(whole[index])


class Hdf5Array:
    """An HDF5 dataset: the open one where it was opened, elsewhere opened for each block.

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
        import h5py  # of use to those alone who have such a file

        try:
            # No file is left open on a worker: blocks are large enough for that to cost nothing.
            with h5py.File(self._path, "r") as file:
                return file[self._name][index]
        except (OSError, KeyError) as error:
            raise _read_error("HDF5 file", self._path, error) from error


def _read_error(what: str, path: str, error: Exception) -> OSError:
    return OSError(
        f"the {what} {path!r} cannot be read by a worker: {error}. Put it where every worker finds "
        f"it under this path, and open it in read mode ('r'): others cannot read a file that is "
        f"being written."
    )


def is_file(value: Any) -> bool:
    """Whether the values are in a file that is open as one array."""
    return _as_file(value) is not None


def from_file(value: Any) -> da.Array | None:
    """Return a Dask array over a memory map or an HDF5 dataset; None for anything else."""
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
    """Replace the open files that ``da.from_array`` has put into a graph, so that it can be sent.

    Otherwise the client would read a memory map and send it whole, and an HDF5 dataset could not
    be sent at all.
    """
    graph = array.__dask_graph__()
    if not isinstance(graph, HighLevelGraph):
        return array
    replaced: dict[str, Any] = {}
    for name, layer in graph.layers.items():
        # Such a layer is one value, under the name that it has in Dask's from_array.
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
    h5py = sys.modules.get("h5py")  # whoever has a dataset has imported it
    if h5py is not None and isinstance(value, h5py.Dataset):
        return Hdf5Array(value)
    return _as_mapped(value) if isinstance(value, np.ndarray) else None


def _as_mapped(array: np.ndarray[Any, Any]) -> MappedArray | None:
    """Find out where in a file the entries of a memory map, or of a view of one, are."""
    if isinstance(array, np.ma.MaskedArray):
        return None
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    # What is written in mode "c" is in memory alone, and a file without a name cannot be found.
    is_mapped = isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap)
    if not is_mapped or root.mode == "c" or not os.path.isfile(root.filename or ""):
        return None
    # By addresses, since a slice of a memory map keeps the offset of the whole.
    address, start = (a.__array_interface__["data"][0] for a in (array, root))
    offset = root.offset + address - start
    return MappedArray(os.fspath(root.filename), array.dtype, array.shape, array.strides, offset)


def _merge_chunks(
    chunks: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> tuple[int, ...]:
    """Double small chunks, along the last dimension first, as they are stored in C order."""
    block = list(chunks)
    for axis in reversed(range(len(block))):
        while block[axis] < shape[axis] and 2 * math.prod(block) * itemsize <= _BLOCK_BYTES:
            block[axis] *= 2
        block[axis] = min(block[axis], shape[axis])
    return tuple(block)
