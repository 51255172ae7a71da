"""Zarr arrays as Dask arrays, and which chunks of a store a step of a graph reads."""

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
from zarr.core.sync import sync

Key = Any
Region = tuple[slice, ...]

_METADATA = {"zarr.json", ".zarray", ".zattrs"}
_MAX_PROBED = 256  # chunks that are read one by one to find the one that cannot be


def from_zarr(array: zarr.Array[Any]) -> da.Array:
    """Return a Dask array whose chunks are what the store holds as one object.

    That is a shard where the array is sharded, otherwise a chunk. (Dask alone would take the
    inner chunks of a shard, and so read every shard many times.) The array itself is written into
    each task, so that reading does not depend on one shared task.
    """
    lazy: da.Array = da.from_zarr(array, chunks=array.shards or array.chunks, inline_array=True)
    return lazy


@dataclass(frozen=True)
class StoredRegion:
    """A part of a Zarr array.

    Attributes
    ----------
    array : zarr.Array
    region : tuple of slice
        With starts and stops, in order.
    hides_fill : bool
        Whether the fill value is decoded to NaN.
    """

    array: zarr.Array[Any]
    region: Region
    hides_fill: bool

    @property
    def _objects(self) -> tuple[int, ...]:
        """Shape of what the store holds as one object."""
        return self.array.shards or self.array.chunks

    def chunks(self) -> Iterator[tuple[str, Region]]:
        """Yield the key of each stored object that the region touches, and its part in it."""
        ranges = [
            range(part.start // size, -(part.stop // -size))
            for part, size in zip(self.region, self._objects, strict=True)
        ]
        for index in itertools.product(*ranges):
            part = tuple(
                slice(max(i * size, whole.start), min((i + 1) * size, whole.stop))
                for i, size, whole in zip(index, self._objects, self.region, strict=True)
            )
            yield self.array.metadata.encode_chunk_key(index), part

    @property
    def n_chunks(self) -> int:
        """How many stored objects it touches."""
        return math.prod(
            -(part.stop // -size) - part.start // size
            for part, size in zip(self.region, self._objects, strict=True)
        )

    def chunk_at(self, position: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
        """Name the object that holds an entry, counted from the region's first.

        None where the region has another shape, because something was made of what was read.
        """
        if shape != tuple(part.stop - part.start for part in self.region):
            return None
        index = tuple(
            (part.start + i) // size
            for part, i, size in zip(self.region, position, self._objects, strict=True)
        )
        return _chunk_name(self.array, self.array.metadata.encode_chunk_key(index))


def failing_chunk(node: GraphNode, values: Mapping[Key, Any]) -> str | None:
    """Say which stored object a step fails at, as far as that can be found out.

    Where it reads several, they are read one by one.
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
        except Exception:  # as many kinds as there are stores and codecs
            return _chunk_name(stored.array, key)
    names = dict.fromkeys(f"{stored.array.store_path}" for stored in regions)
    return f"a chunk of {' or '.join(names)}"


def _chunk_name(array: zarr.Array[Any], key: str) -> str:
    return f"chunk {key} of {array.store_path}"


def stored_regions(node: GraphNode, values: Mapping[Key, Any]) -> Iterator[StoredRegion]:
    """Yield what a step, fused ones inside it included, reads from Zarr arrays.

    Parameters
    ----------
    node : GraphNode
    values : mapping
        What is known of the values of other steps.
    """
    if not isinstance(node, Task):
        return
    arguments = [_resolve(argument, values) for argument in node.args]
    if len(arguments) >= 2 and isinstance(arguments[1], tuple):
        stored = _stored_region(arguments[0], arguments[1])
        if stored is not None:
            yield stored
            return
    inner = arguments[0] if arguments else None
    if isinstance(inner, dict) and all(isinstance(n, GraphNode) for n in inner.values()):
        # What Dask's fusion makes: a graph, the key of its result, and names for the rest.
        names = arguments[2] if len(arguments) > 2 else ()
        known = {**values, **dict(zip(names, arguments[3:], strict=False))}
        known |= {key: n.value for key, n in inner.items() if isinstance(n, DataNode)}
        for step in inner.values():
            yield from stored_regions(step, known)


def _resolve(argument: Any, values: Mapping[Key, Any]) -> Any:
    if isinstance(argument, Alias):
        return values.get(argument.target)
    if isinstance(argument, TaskRef):
        return values.get(argument.key)
    return argument.value if isinstance(argument, DataNode) else argument


def _stored_region(source: Any, index: tuple[Any, ...]) -> StoredRegion | None:
    """Return what an index into an array, or into xarray's wrappers of one, reads."""
    hides_fill = False
    offsets: list[tuple[Any, ...]] = [index]
    while not isinstance(source, zarr.Array):
        inner = getattr(source, "array", None)
        if inner is None:  # where xarray has its own store's array
            inner = getattr(source, "_array", None)
        if inner is None or isinstance(source, np.ndarray):
            return None
        keywords = getattr(getattr(source, "func", None), "keywords", {})
        hides_fill = hides_fill or "encoded_fill_values" in keywords
        if hasattr(source, "key"):  # a selection that was made before Dask's
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
    """Return the keys of the objects that are read from an array and are not in its store.

    The store is asked for a list of the array's objects, a thousand or so a request. Nothing is
    missing where the fill value is NaN or decoded to NaN, which does not pass for a value; nor can
    anything be known of a store that does not list what it holds.

    Parameters
    ----------
    regions : sequence of StoredRegion
        Of one array.
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
    except Exception:  # of the store's own library: no right to list, no connection
        return ()
    if not keys & _METADATA:  # a web server gives what it is asked for by name, and no list
        return ()
    present = keys - _METADATA
    sizes = array.shards or array.chunks
    if len(present) >= math.prod(-(n // -size) for n, size in zip(array.shape, sizes, strict=True)):
        return ()
    touched = dict.fromkeys(key for stored in regions for key, _ in stored.chunks())
    return tuple(key for key in touched if key not in present)
