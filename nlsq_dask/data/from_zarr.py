"""Zarr arrays become Dask arrays: one task a stored object, nothing read before it is needed."""

from __future__ import annotations

from typing import Any

import dask.array as da
import zarr


def from_zarr(array: zarr.Array[Any]) -> da.Array:
    """Return a Dask array whose chunks are what the store holds as one object.

    That is a shard where the array is sharded, otherwise a chunk. (Dask alone would take the
    inner chunks of a shard, and so read every shard many times.) The array itself is written into
    each task, so that reading does not depend on one shared task.
    """
    lazy: da.Array = da.from_zarr(array, chunks=array.shards or array.chunks, inline_array=True)
    return lazy
