"""Descriptions of arrays as text, which are compared when a fit is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import dask.array as da
import numpy as np
import zarr


def describe_array(array: da.Array) -> str:
    """Return a text with dtype, shape, chunks, and digests of NumPy values and Zarr metadata."""
    sizes = [f"{len(s)} of {s[0]}" if len(set(s)) == 1 else digest(str(s)) for s in array.chunks]
    text = f"{array.dtype} {array.shape} in chunks {', '.join(sizes)}"
    metadata = sorted({digest(_metadata(store)) for store in _zarr_arrays(array)})
    # Sorted: names of arrays in memory, and so their order, differ between fits.
    values = sorted(_digests_in_memory(array))
    text += f", values {digest(' '.join(values))}" if values else ""
    return f"{text}, Zarr {' '.join(metadata)}" if metadata else text


def _digests_in_memory(array: da.Array) -> Iterable[str]:
    """Yield chunk position and digest of the values for each NumPy array in the graph."""
    for key, node in dict(array.__dask_graph__()).items():
        value = getattr(node, "value", node)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufmM":
            digest = hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view("u1").data)
            yield f"{key[1:] if isinstance(key, tuple) else ()} {digest.hexdigest()}"


def _zarr_arrays(array: da.Array) -> Iterable[zarr.Array[Any]]:
    """Return the Zarr arrays that the graph of a Dask array contains."""
    arrays = {}  # by identity
    for node in dict(array.__dask_graph__()).values():
        for part in (node, *getattr(node, "args", ())):
            value = getattr(part, "value", part)  # a node may hold a literal
            if isinstance(value, zarr.Array):
                arrays[id(value)] = value
    return arrays.values()


def _metadata(array: zarr.Array[Any]) -> str:
    metadata = array.metadata.to_dict()
    return json.dumps({**metadata, "attributes": {}}, sort_keys=True, default=str)


def digest(text: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
