"""Zarr arrays as Dask arrays, and the chunks of a Zarr store that a Dask task reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import zarr
from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef
from dask.array.core import getter, getter_inline, getter_nofancy
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, ZipStore

Key = Any
Region = tuple[slice, ...]

# Of functions that Dask and xarray apply to chunks.
_PLAIN_MODULES = {"_operator", "numpy", "dask.array.chunk", "xarray.core.duck_array_ops"}
_GETTERS = (getter, getter_nofancy, getter_inline)
_LOCAL_STORES = (LocalStore, MemoryStore, ZipStore)
_LOCAL_PROTOCOLS = {"file", "local", "memory"}
_METADATA = {"zarr.json", ".zarray", ".zattrs"}
_MAX_PROBED = 256  # chunks read one by one to find an unreadable one


def from_zarr(array: zarr.Array[Any]) -> da.Array:
    """Return a Dask array whose chunks are the objects of the store: shards, or chunks.

    By default, Dask uses the chunks inside the shards, so that it reads each shard once per chunk.
    The Zarr array is part of every task, so that the tasks do not depend on one that they share.
    """
    lazy: da.Array = da.from_zarr(array, chunks=_object_shape(array), inline_array=True)
    return lazy


def _object_shape(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Return the shape of the objects of the store: shards, or chunks if there are none."""
    return array.shards or array.chunks


@dataclass(frozen=True)
class StoredRegion:
    """Region of a Zarr array that a task reads.

    The objects of the store are shards, or chunks if the array has no shards.
    """

    array: zarr.Array[Any]
    region: Region  # slices with starts and stops
    hides_fill: bool  # whether the fill value is decoded to NaN

    def _ranges(self) -> list[range]:
        """Return, per dimension, which stored chunks or shards the region overlaps."""
        return [
            range(part.start // size, -(part.stop // -size))
            for part, size in zip(self.region, _object_shape(self.array), strict=True)
        ]

    def chunks(self) -> Iterator[tuple[str, Region]]:
        """Yield the key of each stored object that the region overlaps.

        The key comes with the slices of the Zarr array that select the overlap.
        """
        sizes = _object_shape(self.array)
        for index in itertools.product(*self._ranges()):
            part = tuple(
                slice(max(i * size, whole.start), min((i + 1) * size, whole.stop))
                for i, size, whole in zip(index, sizes, self.region, strict=True)
            )
            yield self.array.metadata.encode_chunk_key(index), part

    @property
    def n_chunks(self) -> int:
        """Number of objects that the region overlaps."""
        return math.prod(map(len, self._ranges()))

    def chunk_at(self, position: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
        """Return the name of the object that contains a position, or None if it is unknown.

        Parameters
        ----------
        position : tuple of int
            Position in the block that was read, relative to its start.
        shape : tuple of int
            Shape of this block. If it is not the shape of the region, the values were processed
            after reading, so that the object is unknown.
        """
        if shape != tuple(part.stop - part.start for part in self.region):
            return None
        sizes = _object_shape(self.array)
        index = tuple(
            (part.start + i) // size
            for part, i, size in zip(self.region, position, sizes, strict=True)
        )
        return _chunk_name(self.array, self.array.metadata.encode_chunk_key(index))


def failing_chunk(node: GraphNode, values: Mapping[Key, Any]) -> str | None:
    """Return the name of the chunk or shard of a Zarr store that a task fails to read.

    None if the task reads no Zarr array. If it reads several chunks, they are read one by one to
    find the one that fails. ``values`` are the known results of other tasks, by key.
    """
    regions = list(stored_regions(node, values))
    if not regions:
        return None
    if len(regions) == 1 and regions[0].n_chunks == 1:
        ((key, _),) = regions[0].chunks()
        return _chunk_name(regions[0].array, key)
    probes = ((stored, chunk) for stored in regions for chunk in stored.chunks())
    for stored, (key, part) in itertools.islice(probes, _MAX_PROBED):
        try:
            stored.array[part]
        except Exception:  # depends on the store and codec
            return _chunk_name(stored.array, key)
    names = dict.fromkeys(f"{stored.array.store_path}" for stored in regions)
    return f"a chunk of {' or '.join(names)}"


def _chunk_name(array: zarr.Array[Any], key: str) -> str:
    return f"chunk {key} of {array.store_path}"


def is_store_read(node: GraphNode, values: Mapping[Key, Any]) -> bool:
    """Return whether a task only reads Zarr arrays, and applies functions of NumPy to the values.

    Other functions may be the caller's. ``values`` are the known results of other tasks, by key.
    """
    return all(map(_is_plain, _unfused(node))) and any(True for _ in stored_regions(node, values))


def _unfused(node: Any) -> Iterator[Task]:
    """Yield the tasks that Dask has fused into one; the task itself if there are none."""
    if not isinstance(node, Task):
        return
    graph = _resolve(node.args[0], {}) if node.args else None
    if isinstance(graph, dict) and all(isinstance(n, GraphNode) for n in graph.values()):
        for step in graph.values():
            yield from _unfused(step)
    else:
        yield node


def _is_plain(task: Task) -> bool:
    """Return whether a task calls a function that is known to call none of the caller's."""
    function, arguments = task.func, (*task.args, *task.kwargs.values())
    given = (_resolve(argument, {}) for argument in arguments)
    if isinstance(function, np.vectorize) or any(map(callable, given)):
        return False
    if function in _GETTERS or getattr(np, getattr(function, "__name__", ""), None) is function:
        return True
    return getattr(function, "__module__", None) in _PLAIN_MODULES


def is_remote_read(node: GraphNode, values: Mapping[Key, Any]) -> bool:
    """Return whether a task reads a Zarr store that is neither in memory nor on a file system."""
    return any(not _is_local(stored.array.store) for stored in stored_regions(node, values))


def _is_local(store: Any) -> bool:
    if isinstance(store, _LOCAL_STORES):
        return True
    protocols = getattr(getattr(store, "fs", None), "protocol", ())  # of fsspec
    return not _LOCAL_PROTOCOLS.isdisjoint([protocols] if isinstance(protocols, str) else protocols)


def stored_regions(node: GraphNode, values: Mapping[Key, Any]) -> Iterator[StoredRegion]:
    """Yield the regions of Zarr arrays that a task reads, including tasks fused into it by Dask.

    Parameters
    ----------
    node : GraphNode
    values : mapping
        Known results of other tasks, by key.
    """
    if not isinstance(node, Task):
        return
    match [_resolve(argument, values) for argument in node.args]:
        case [source, tuple(index), *_] if stored := _stored_region(source, index):
            yield stored
        # A fused task of Dask: a graph, the key of its result, keys and values of its inputs.
        case [dict(graph), _, keys, *inputs] if all(
            isinstance(n, GraphNode) for n in graph.values()
        ):
            known = {**values, **dict(zip(keys, inputs, strict=False))}
            known |= {key: n.value for key, n in graph.items() if isinstance(n, DataNode)}
            for step in graph.values():
                yield from stored_regions(step, known)


def _resolve(argument: Any, values: Mapping[Key, Any]) -> Any:
    if isinstance(argument, Alias):
        return values.get(argument.target)
    if isinstance(argument, TaskRef):
        return values.get(argument.key)
    return argument.value if isinstance(argument, DataNode) else argument


def _stored_region(source: Any, index: tuple[Any, ...]) -> StoredRegion | None:
    """Return the region that an index selects from a Zarr array; None for other arrays.

    xarray wraps a Zarr array in several objects, which may select a region of it as well.
    """
    hides_fill = False
    offsets: list[tuple[Any, ...]] = [index]
    while not isinstance(source, zarr.Array):
        # "_array" in xarray's Zarr backend.
        inner = getattr(source, "array", getattr(source, "_array", None))
        if inner is None or isinstance(source, np.ndarray):
            return None
        keywords = getattr(getattr(source, "func", None), "keywords", {})
        hides_fill = hides_fill or "encoded_fill_values" in keywords
        if hasattr(source, "key"):  # a selection applied before that of Dask
            offsets.append(source.key.tuple)
        source = inner
    shape = source.shape
    if any(
        len(part) != len(shape)
        or not all(isinstance(s, slice) and s.step in (None, 1) for s in part)
        for part in offsets
    ):
        return None
    region = [(0, size) for size in shape]
    for part in reversed(offsets):
        region = [
            (low + start, low + stop)
            for (low, high), s in zip(region, part, strict=True)
            for start, stop, _ in [s.indices(high - low)]
        ]
    return StoredRegion(source, tuple(slice(*ends) for ends in region), hides_fill)


def missing_chunks(regions: Sequence[StoredRegion]) -> tuple[str, ...]:
    """Return the keys of the objects in the regions that are missing from the store.

    Zarr reads a missing object as the fill value, which would be fitted like data. The result is
    empty if the fill value is read as NaN, which is noticed anyway, and for stores that cannot list
    their objects. Listing returns about a thousand objects per request.

    Parameters
    ----------
    regions : sequence of StoredRegion
        Regions of one array.
    """
    array, hides_fill = regions[0].array, regions[0].hides_fill
    fill = array.fill_value
    if hides_fill or fill is None or fill != fill or not array.store.supports_listing:
        return ()
    prefix = f"{array.path}/" if array.path else ""

    async def listed() -> set[str]:
        return {key.removeprefix(prefix) async for key in array.store.list_prefix(prefix)}

    try:
        keys: set[str] = sync(listed())
    except Exception:  # depends on the store: no permission to list, no connection
        return ()
    if not keys & _METADATA:  # a web server serves objects by name but does not list them
        return ()
    present = keys - _METADATA
    whole = StoredRegion(array, tuple(slice(0, n) for n in array.shape), hides_fill)
    if len(present) >= whole.n_chunks:
        return ()
    touched = dict.fromkeys(key for stored in regions for key, _ in stored.chunks())
    return tuple(key for key in touched if key not in present)
