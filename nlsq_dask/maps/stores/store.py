"""``MapStore``: the Zarr store of a map, whose tiles are written as they finish.

What makes a killed process harmless: the metadata of the group is written first with a mark, and
last without it, each time atomically, so that a store is recognized as half-made until it is
complete. Of a tile, the chunk of ``status`` is written last. All chunks have a checksum, so that a
part of one, which an older Zarr leaves if it is killed, is an error and never a number.
"""

from __future__ import annotations

import functools
import json
import math
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import dask.array as da
import msgspec
import numpy as np
import xarray as xr
import zarr
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from nlsq_dask._text import join_first
from nlsq_dask.checkpoints.identity import FitFingerprint
from nlsq_dask.errors import CheckpointError, DataError, warn_caller
from nlsq_dask.solvers.lanes.records import LaneStatus
from nlsq_dask.storage.backends import normalize_path, open_folder

Array = NDArray[Any]
Index = tuple[int, ...]
Sizes = tuple[tuple[int, ...], ...]

_ATTRIBUTE = "nlsq_dask"  # of the group; a text, because netCDF has no nested attributes
_FORMAT = 1
_ROOT = "zarr.json"
_STATUS = "status"
_MAX_CHUNKS_PER_TILE = 16


@dataclass(frozen=True)
class _Record:
    """Content of the attribute of the group, as JSON."""

    format: int
    uid: str  # of this store; a new one at the same path has another
    fingerprint: FitFingerprint | None = None  # None while the store is half-made


@dataclass(frozen=True)
class MapStore:
    """A Zarr store with a group of chunks per tile, to be used by one writer at a time.

    An instance can be pickled, and its methods can be called by many threads and processes.
    """

    path: str  # or URL
    tiles: Sizes  # sizes of the tiles along each dimension of the map
    names: tuple[str, ...]  # of the variables
    uid: str

    @classmethod
    def create_or_open(
        cls,
        path: str | os.PathLike[str],
        tiles: Sizes,
        dataset: xr.Dataset,
        fingerprint: FitFingerprint,
    ) -> MapStore:
        """Return the store at a path, which is created if there is none.

        A store that is not complete because its process was killed is created again. The caller
        holds the ``Lease``.

        Parameters
        ----------
        path : path or URL
        tiles : tuple of tuple of int
            Sizes of the tiles along each dimension of the map.
        dataset : Dataset
            Variables, coordinates and attributes of the result. Values of variables are not used.
        fingerprint : FitFingerprint

        Raises
        ------
        CheckpointError
            If something else is at this path, or the result of another fit.
        DataError
            If tiles or coordinates cannot be stored in Zarr.
        """
        normalized = normalize_path(path).rstrip("/")
        chunks = store_chunks(tiles, tuple(map(str, dataset[_STATUS].dims)))
        record = _existing(normalized)
        if record is None or record.fingerprint is None:
            record = _Record(_FORMAT, uuid.uuid4().hex, fingerprint)
            _create(normalized, dataset, chunks, record)
        else:
            notes = record.fingerprint.check(
                fingerprint,
                f"The store {normalized}",
                "pass another path as store, or delete this one,",
            )
            if notes:
                warn_caller(f"Resuming the fit in {normalized}: {'; '.join(notes)}.")
            _remove_partial_files(normalized)
        return cls(normalized, tiles, tuple(map(str, dataset.data_vars)), record.uid)

    def finished(self) -> set[Index]:
        """Return the tiles that are written, by position in their grid; lists the store once."""
        file_system, root = _file_system(self.path)
        file_system.invalidate_cache()
        chunks = store_chunks(self.tiles)
        sizes = [sum(own) for own in self.tiles]
        is_there = np.zeros([-(-n // c) for n, c in zip(sizes, chunks, strict=True)], bool)
        prefix = f"{root}/{_STATUS}/c/"
        for key in file_system.find(prefix.rstrip("/")):
            numbers = key.removeprefix(prefix).split("/")
            if all(map(str.isdecimal, numbers)):  # not a file of a killed process
                is_there[tuple(map(int, numbers))] = True
        for axis, (own, chunk) in enumerate(zip(self.tiles, chunks, strict=True)):
            starts = np.cumsum([0, *own[:-1]]) // chunk
            is_there = np.logical_and.reduceat(is_there, starts, axis=axis)
        return {tuple(map(int, index)) for index in np.argwhere(is_there)}

    def write(self, tile: Index, arrays: Mapping[str, Array]) -> None:
        """Write the arrays of a tile, by name of the variable.

        Parameters
        ----------
        tile : tuple of int
            Position in the grid of tiles.
        arrays : mapping of str to ndarray
            All variables, each of the shape of the tile and its own dimensions, as of ``Outputs``.

        Raises
        ------
        CheckpointError
            If the store is not there, or another one is.
        """
        # A task of a call that has ended may still run, when its store has been replaced.
        self._check_uid()
        stored, where = _arrays(self.path, self.uid), self._where(tile)
        for name in self.names:
            if name != _STATUS:
                stored[name][where] = arrays[name]
        self._check_uid()
        stored[_STATUS][where] = arrays[_STATUS]  # last, as it says that the tile is complete

    def _check_uid(self) -> None:
        """Raise a CheckpointError if this store is no longer at its path."""
        uid = None
        with suppress(FileNotFoundError):
            uid = _record_in(open_folder(self.path).read(_ROOT)).uid
        if uid is None:
            raise CheckpointError(
                f"The store {self.path} does not exist on {socket.gethostname()}, where a task "
                f"writes to it. If it was not deleted: pass a path on a file system that all "
                f"machines of the cluster share, or a URL."
            )
        if uid != self.uid:
            raise CheckpointError(f"The store {self.path} was replaced while it was written to.")

    def read(self, tile: Index) -> dict[str, Array] | None:
        """Return the arrays of a tile; None if a chunk is missing or damaged."""
        where = self._where(tile)
        arrays, stored = {}, _arrays(self.path, self.uid)
        for name in self.names:
            array = stored[name]
            keys = [f"{array.path}/{key}" for key in _chunk_keys(array, where)]
            if not all(sync(_exist(array.store, keys))):
                return None
            try:
                arrays[name] = np.asarray(array[where])
            except ValueError:  # of the checksum
                return None
        return arrays

    def open(self) -> xr.Dataset:
        """Return the store as a lazy Dataset; tiles that are not written are ``not_fitted``."""
        dataset: xr.Dataset = xr.open_zarr(self.path)
        del dataset.attrs[_ATTRIBUTE]  # for users of the file, not a part of the result
        return dataset[list(self.names)]

    def _where(self, tile: Index) -> tuple[slice, ...]:
        pairs = [(sum(own[:i]), own[i]) for own, i in zip(self.tiles, tile, strict=True)]
        return tuple(slice(start, start + n) for start, n in pairs)


def store_chunks(tiles: Sizes, dims: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Return the size of the chunks of a store along each dimension of the map.

    The chunks of a Zarr array have one size, and no two tiles share a chunk.

    Raises
    ------
    DataError
        If a tile would have too many chunks, because the sizes of tiles are too different.
    """
    # The last tile, and so its last chunk, may have any size.
    chunks = [math.gcd(*sizes[:-1]) or max(sizes[0], 1) for sizes in tiles]
    n_chunks = [-(-max(sizes) // chunk) for sizes, chunk in zip(tiles, chunks, strict=True)]
    if math.prod(n_chunks) > _MAX_CHUNKS_PER_TILE:
        axes = [axis for axis, n in enumerate(n_chunks) if n > 1]
        named = {dims[axis] if dims else f"dim_{axis}": tiles[axis] for axis in axes}
        found = join_first(
            [f"from {min(n)} to {max(n)} along {dim!r}" for dim, n in named.items()],
            separator=" and ",
        )
        sizes = ", ".join(f"{dim!r}: {max(n)}" for dim, n in named.items())
        raise DataError(
            f"The tiles of the map have sizes {found}, but the chunks of a Zarr store have one "
            f"size. Rechunk y_data before it is fitted with store, such as .chunk({{{sizes}}})."
        )
    return tuple(chunks)


def _file_system(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path in it."""
    options = {} if "://" in path else {"auto_mkdir": True}
    file_system, root = url_to_fs(path, **options)
    return file_system, root.rstrip("/")


def _existing(path: str) -> _Record | None:
    """Return the record of a store; None if there is nothing at this path.

    Raises
    ------
    CheckpointError
        If there is something else.
    """
    file_system, root = _file_system(path)
    file_system.invalidate_cache()
    if file_system.isfile(root):
        raise _foreign(path, "a file")
    folder = open_folder(path)
    # What remains of a process that was killed before it could write the first file is ignored.
    names = sorted(name for name in folder.names() if name and not name.endswith(".unfinished"))
    if not names:
        return None
    if _ROOT not in names:
        if {".zgroup", ".zarray"} & set(names):
            raise _foreign(path, "a Zarr store that nlsq_dask has not written")
        raise _foreign(path, f"a folder with other files ({', '.join(names[:3])})")
    try:
        record = _record_in(folder.read(_ROOT))
    except (ValueError, KeyError, TypeError, msgspec.MsgspecError):
        raise _foreign(path, "a Zarr store that nlsq_dask has not written") from None
    if record.format != _FORMAT:
        raise CheckpointError(
            f"The store {path} has format {record.format}; this version of nlsq_dask reads format "
            f"{_FORMAT}. Pass another path as store, or use the version that began it."
        )
    return record


def _record_in(root: bytes) -> _Record:
    """Return the record in the metadata of a group."""
    return msgspec.json.decode(json.loads(root)["attributes"][_ATTRIBUTE], type=_Record)


def _foreign(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The store {path} is {what}, which is not overwritten. Pass the path of a new store, or "
        f"of one that fit_each has started; or delete what is there."
    )


def _create(path: str, dataset: xr.Dataset, chunks: tuple[int, ...], record: _Record) -> None:
    """Write all metadata and coordinates; the store is valid when the last file is written."""
    by_dim = dict(zip(dataset[_STATUS].dims, chunks, strict=True))
    prepared = _prepared(dataset, by_dim)
    files = _skeleton(prepared, by_dim)
    folder = open_folder(path)
    folder.prepare("")
    root = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    mark = _with_record(root, _Record(record.format, record.uid))
    folder.write(_ROOT, mark)
    file_system, folder_path = _file_system(path)
    file_system.invalidate_cache()
    for name in set(folder.names()) - {_ROOT, ""}:  # of a process that was killed
        file_system.rm(f"{folder_path}/{name}", recursive=True)
    root = json.loads(files.pop(_ROOT))
    file_system.pipe({f"{folder_path}/{key}": data for key, data in files.items()})
    lazy = [name for name, coordinate in prepared.coords.items() if coordinate.chunks is not None]
    if lazy:
        prepared.drop_vars([name for name in prepared.variables if name not in lazy]).to_zarr(
            path, mode="r+", consolidated=False
        )
    # Consolidated, a store is opened with one request.
    root["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": {
            key.removesuffix(f"/{_ROOT}"): json.loads(data)
            for key, data in files.items()
            if key.endswith(f"/{_ROOT}")
        },
    }
    folder.write(_ROOT, _with_record(root, record))


def _with_record(root: dict[str, Any], record: _Record) -> bytes:
    """Return the metadata of the group with the record, as bytes."""
    text = json.dumps(asdict(record))
    attributes = {**root["attributes"], _ATTRIBUTE: text}
    return json.dumps({**root, "attributes": attributes}, indent=2).encode()


def _prepared(dataset: xr.Dataset, chunks: Mapping[Any, int]) -> xr.Dataset:
    """Return the dataset as it can be stored: without packing, and with lazy arrays in chunks."""
    dataset = dataset.drop_encoding()
    # One chunk per variable, because a graph with a task per tile would be of no use.
    empty = {
        name: (v.dims, da.zeros(v.shape, dtype=v.dtype, chunks=-1), v.attrs)
        for name, v in dataset.data_vars.items()
    }
    coordinates = {}
    for name, coordinate in dataset.coords.items():
        if coordinate.dtype.kind == "U":  # Zarr has no stable format for a fixed length
            coordinates[name] = coordinate.variable.astype(object)
        elif coordinate.chunks is not None:
            own = {dim: chunks[dim] for dim in coordinate.dims}
            coordinates[name] = coordinate.variable.chunk(own)
    return dataset.assign_coords(coordinates).assign(empty)


def _skeleton(dataset: xr.Dataset, chunks: Mapping[Any, int]) -> dict[str, bytes]:
    """Return the files of a store that has no chunks except those of coordinates, by key."""
    encoding: dict[Any, dict[str, Any]] = {}
    for name, variable in dataset.variables.items():
        encoding[name] = {"compressors": (ZstdCodec(level=3), Crc32cCodec())}
        if name in dataset.data_vars:
            fill = {_STATUS: int(LaneStatus.NOT_FITTED)}.get(str(name), 0)
            encoding[name] |= {
                "chunks": tuple(chunks.get(dim, n) for dim, n in variable.sizes.items()),
                "fill_value": np.nan if variable.dtype.kind == "f" else fill,
            }
    files: dict[str, Any] = {}
    store = MemoryStore(files)
    try:
        dataset.to_zarr(store, compute=False, encoding=encoding, zarr_format=3, consolidated=False)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise DataError(
            f"A coordinate of y_data cannot be stored in Zarr: {error} Remove it with "
            f"y_data.drop_vars, or replace it; of a MultiIndex, with y_data.reset_index."
        ) from error
    _check_decoded(dataset, xr.open_zarr(store, consolidated=False))
    return {key: buffer.to_bytes() for key, buffer in files.items()}


def _remove_partial_files(path: str) -> None:
    """Remove what writes of Zarr on a disk leave if the process is killed."""
    if "://" not in path:
        for file in Path(path).rglob("*.partial"):
            file.unlink(missing_ok=True)


def _check_decoded(dataset: xr.Dataset, opened: xr.Dataset) -> None:
    """Raise a DataError for a coordinate that xarray would change when it opens the store."""
    for name, coordinate in dataset.coords.items():
        kept = opened[name].attrs
        lost = [key for key in coordinate.attrs if key not in kept]
        if lost:
            raise DataError(
                f"The coordinate {name!r} of y_data has the attribute {lost[0]!r}, by which xarray "
                f"would change its values when it opens the store. Decode y_data, such as with "
                f"xarray.decode_cf, or delete the attribute: del y_data[{name!r}]"
                f".attrs[{lost[0]!r}]."
            )


@functools.lru_cache(maxsize=16)
def _arrays(path: str, uid: str) -> dict[str, zarr.Array[Any]]:
    """Return the arrays of the variables, opened once per process; ``uid`` is that of the store."""
    group = zarr.open_group(path, mode="r+")
    # Chunks that hold only the fill value are written, too.
    # Without ``with_config``, which the oldest supported Zarr lacks.
    config: Any = {"write_empty_chunks": True}
    return {
        name: zarr.Array(zarr.AsyncArray(array.metadata, array.store_path, config))
        for name, array in group.arrays()
    }


def _chunk_keys(array: zarr.Array[Any], where: tuple[slice, ...]) -> Iterator[str]:
    """Yield the keys of the chunks of a region, which spans the further dimensions."""
    ranges = [
        range(part.start // size, -(-part.stop // size))
        for part, size in zip(where, array.chunks, strict=False)
    ]
    ranges += [range(1)] * (array.ndim - len(where))
    for index in product(*ranges):
        yield array.metadata.encode_chunk_key(index)


async def _exist(store: Any, keys: list[str]) -> list[bool]:
    return [await store.exists(key) for key in keys]
