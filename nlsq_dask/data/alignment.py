"""``align`` converts x, y and sigma to ``RowBlocks``, Dask arrays with matching chunks."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

from nlsq_dask.data.attributes import attribute_notices
from nlsq_dask.data.dates import convert_date_objects, describe_units, rounding_notice, to_days
from nlsq_dask.data.labels import Label, label_of
from nlsq_dask.data.shapes import check_unambiguous, mismatch_error, rows_shape
from nlsq_dask.data.sources.from_array import check_numbers, is_in_memory, split_mask
from nlsq_dask.data.sources.from_pandas import pandas_to_numpy
from nlsq_dask.data.sources.from_xarray import is_xarray, lazy_data, like_dims, resolve_coordinates
from nlsq_dask.data.sources.objects import check_is_array
from nlsq_dask.data.weights import weighted_sigma
from nlsq_dask.errors import DataError
from nlsq_dask.rows.declared import same_values
from nlsq_dask.rows.rows import Layout, x_array_names

_SMALL_CHUNK = 2**20  # bytes; splitting smaller chunks, such as coordinates, is not reported


@dataclass(frozen=True)
class RowBlocks:
    """Data of a fit as Dask arrays with matching chunks.

    Each element of y is a row, that is, one observation. A block is one chunk of y with the
    matching chunks of the other arrays. All arrays have the dimensions of y, with size 1 where they
    do not vary; an x of shape (n, k) has one more dimension of size k, in a single chunk. A block
    is broadcast and flattened to rows only when it is in memory.

    Attributes
    ----------
    y : dask.array.Array
    x : tuple of dask.array.Array
        The x arrays, then those of ``layout.map_names``.
    sigma : dask.array.Array or None
    mask : dask.array.Array or None
        True for rows to be omitted; None if no array is masked.
    layout : Layout
        Dtypes and shapes of one row.
    in_memory : bool
        Whether all values are in the memory of this process.
    realigned : tuple of str
        One text for each array whose chunks were split to match the chunks of other arrays.
    split_bytes : int
        Bytes of the largest of these chunks. A block that needs a piece of it reads all of it.
    dims : tuple of str
        Names of the dimensions of y.
    x_units : dict of str to str
        Units of the x arrays that hold dates, by names such as "x_data[0]".
    unmeasured_dates : frozenset of str
        Names of those among them that are not in memory, so that only reading can show how much of
        their span float64 days round away.
    notices : tuple of str
        Sentences for the user on possible problems of the data.
    labels : tuple of Label
        Labels of y and of the x arrays, in this order.
    """

    y: da.Array
    x: tuple[da.Array, ...]
    sigma: da.Array | None
    mask: da.Array | None
    layout: Layout
    in_memory: bool
    realigned: tuple[str, ...]
    split_bytes: int
    dims: tuple[str, ...]
    x_units: dict[str, str]
    unmeasured_dates: frozenset[str]
    notices: tuple[str, ...]
    labels: tuple[Label, ...]

    @property
    def arrays(self) -> tuple[da.Array, ...]:
        """All arrays that are not None, in the order y, x..., sigma, mask."""
        optional = (self.sigma, self.mask)
        return (self.y, *self.x, *(array for array in optional if array is not None))

    @property
    def x_labels(self) -> list[str]:
        """Names that xarray or pandas give the x arrays; an empty string for an unnamed array."""
        return [label.name for label in self.labels[1:]]

    @property
    def n_rows(self) -> int:
        """Number of rows, which is the number of elements of y."""
        return int(self.y.size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each dimension of y."""
        return tuple(map(len, self.y.chunks))

    def date_notices(self) -> list[str]:
        """Return a text for each x array of dates: the units of the numbers that the model gets."""
        names = self.layout.array_names[1:]
        return [
            f"{name}{f' ({label})' if label else ''} holds dates, which the model receives as "
            f"{describe_units(self.x_units[name])}"
            for name, label in zip(names, self.x_labels, strict=False)
            if name in self.x_units
        ]

    @property
    def date_hint(self) -> str:
        """Hint to shift dates, whose numbers are far from zero; empty without dates."""
        notices = self.date_notices()
        if not notices:
            return ""
        return (
            f" Note that {'; '.join(notices)}. A decay or growth needs an origin near the data: in "
            f"the model, subtract a date near the data from x."
        )

    def block_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the number of rows of each block, as an array of shape ``grid``."""
        return _chunk_sizes(self.y.chunks)

    def block_bytes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the bytes of each block, over all arrays, as an array of shape ``grid``."""
        total = np.zeros(self.grid, np.int64)
        for array in self.arrays:
            n_features = math.prod(array.shape[self.y.ndim :])
            total += _chunk_sizes(array.chunks[: self.y.ndim]) * (n_features * array.itemsize)
        return total

    def block_slices(self, block: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the slices that select a block from y, given its position in the grid."""
        starts = (sum(sizes[:i]) for sizes, i in zip(self.y.chunks, block, strict=True))
        sizes = (sizes[i] for sizes, i in zip(self.y.chunks, block, strict=True))
        return tuple(slice(start, start + n) for start, n in zip(starts, sizes, strict=True))

    def keys(self, block: tuple[int, ...]) -> list[tuple[Any, ...]]:
        """Return the key of a block in the Dask graph of each of ``arrays``."""
        return [_block_key(array, block) for array in self.arrays]

    def shapes(self, block: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shape that a block has in each of ``arrays``."""
        return [
            tuple(sizes[i] for sizes, i in zip(array.chunks, key[1:], strict=True))
            for array, key in zip(self.arrays, self.keys(block), strict=True)
        ]


def _chunk_sizes(chunks: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the number of elements of each chunk, as an array of the shape ``numblocks``."""
    lengths = (np.asarray(lengths, np.int64) for lengths in chunks)
    return functools.reduce(np.multiply.outer, lengths, np.ones((), np.int64))


def _block_key(array: da.Array, block: tuple[int, ...]) -> tuple[Any, ...]:
    index = [0 if n == 1 else i for i, n in zip(block, array.numblocks[: len(block)], strict=True)]
    features = [0] * (array.ndim - len(block))
    return (array.name, *index, *features)


@dataclass(frozen=True)
class _Source:
    """Array of the caller, converted to Dask with the dimensions of y."""

    name: str  # in messages
    given: Any  # as passed by the caller
    values: da.Array
    mask: da.Array | None
    units: str = ""  # of the values, if they are dates
    notice: str = ""  # sentence on a possible problem, or ""


def align(
    x_data: Any,
    y_data: Any,
    sigma: Any = None,
    group_weights: Sequence[float] | None = None,
    x_name: str = "x_data",
    maps: Mapping[str, Any] | None = None,
    allows_columns: bool = False,
) -> RowBlocks:
    """Convert x, y and sigma to Dask arrays with matching chunks, without reading data.

    Parameters
    ----------
    x_data : array, tuple or dict of arrays, or names of coordinates of ``y_data``
    y_data : array
    sigma : array, optional
    group_weights : sequence of float, optional
        Weights of groups of rows, by which sigma is divided; see ``weighted_sigma``.
    x_name : str
        Name of x in messages.
    maps : mapping of str to array, optional
        Further arrays by their name in messages. They follow the x arrays in the result, whose
        ``layout.map_names`` lists them.
    allows_columns : bool
        Whether an x may have one dimension more than an N-d y, for its columns. For a 1-d y it
        always may.

    Raises
    ------
    DataError
        If an array is of an unsupported kind or dtype, or does not match y.
    """
    maps = maps or {}
    _check_kind("y_data", y_data)
    if sigma is not None:
        _check_kind("sigma", sigma)
    x_names, leaves = x_leaves(resolve_coordinates(x_data, y_data))
    array_names = [name.replace("x_data", x_name, 1) for name in x_array_names(x_names)]
    for name, leaf in zip(array_names, leaves, strict=True):
        check_is_array(name, leaf)
    named = [("y_data", y_data), *zip(array_names, leaves, strict=True), *maps.items()]
    labels = tuple(label_of(value) for _, value in named[: 1 + len(leaves)])
    if sigma is not None:
        named.append(("sigma", sigma))
    notices = [text for name, value in named for text in attribute_notices(value, name)]
    given = pandas_to_numpy(named)
    # Arrays in memory adopt the chunks of lazy ones; on their own they are split for the threads.
    split_chunks = all(map(is_in_memory, given))
    first = _first_source(given[0], split_chunks)
    sources = [first]
    for (name, _), value in zip(named[1:], given[1:], strict=True):
        allows_features = name in array_names and (allows_columns or first.values.ndim == 1)
        sources.append(_match(value, name, first, split_chunks, allows_features))
    by_position = [(s.name, s.given) for s in sources[1:] if not _are_named(s.given, first.given)]
    check_unambiguous(by_position, first.values.shape)
    after, mask = _unify(sources, first.values.ndim)
    y, x = after[0], tuple(after[1 : 1 + len(leaves) + len(maps)])
    deviation = None if sigma is None else after[-1]
    if group_weights is not None:
        deviation = weighted_sigma(x[0], y, deviation, mask, group_weights)
    layout = Layout(
        x_names,
        tuple(array.shape[y.ndim :] for array in x),
        tuple(map(_stored_dtype, x)),
        _stored_dtype(y),
        None if deviation is None else _stored_dtype(deviation),
        mask is not None,
        tuple(maps),
    )
    realigned, split_bytes = _split(sources, after)
    return RowBlocks(
        y,
        x,
        deviation,
        mask,
        layout,
        split_chunks,
        realigned,
        split_bytes,
        _dims(first.given, y.ndim),
        {source.name: source.units for source in sources if source.units},
        frozenset(s.name for s in sources if s.units and not is_in_memory(s.given)),
        (*notices, *(source.notice for source in sources if source.notice)),
        labels,
    )


def _check_kind(name: str, value: Any) -> None:
    """Raise a DataError for a string, and for several arrays where one array is expected."""
    if isinstance(value, str):
        raise DataError(
            f"{name} must be an array; got the string {value!r}. Pass the array itself, such as "
            f"dataset[{value!r}]. If the string is a path, open it with "
            f"xarray.open_zarr(path)['name'] or zarr.open_array(path)."
        )
    is_names = isinstance(value, list) and any(isinstance(each, str) for each in value)
    is_several = isinstance(value, tuple) and any(isinstance(v, str) or np.ndim(v) for v in value)
    if is_names or is_several or isinstance(value, dict):
        raise DataError(
            f"{name} must be one array; got a {type(value).__name__} of length {len(value)}. Only "
            f"x_data may be several arrays; the order of arguments is "
            f"fit(model, x_data, y_data, p0)."
        )
    check_is_array(name, value)


def _first_source(y_data: Any, split_chunks: bool) -> _Source:
    y, mask = _values(y_data, "y_data", split_chunks)
    check_numbers(y.dtype, "y_data")
    if y.ndim == 0:
        raise DataError("y_data must have at least one dimension; got a single number.")
    if y.size == 0:
        raise DataError(f"y_data has no rows (shape {y.shape}).")
    return _Source("y_data", y_data, y, mask)


def _split(sources: Sequence[_Source], after: Sequence[da.Array]) -> tuple[tuple[str, ...], int]:
    """Compare the chunks of the sources with those of the arrays made from them by ``_unify``.

    Returns
    -------
    realigned : tuple of str
        One text for each array whose chunks were split.
    split_bytes : int
        Bytes of the largest chunk that was split.
    """
    split = [
        (source, text)
        for source, new in zip(sources, after, strict=True)
        if not is_in_memory(source.given)
        and (text := realigned_text(source.name, source.values, new))
    ]
    realigned = tuple(text for _, text in split)
    return realigned, max((_chunk_bytes(source.values) for source, _ in split), default=0)


def realigned_text(name: str, before: da.Array, after: da.Array) -> str:
    """Return how the blocks of an array change; "" if they do not, or are small."""
    if before.numblocks == after.numblocks or _chunk_bytes(before) <= _SMALL_CHUNK:
        return ""
    return f"{name}: {_blocks_text(before)} become {_blocks_text(after)}"


def _dims(y_data: Any, ndim: int) -> tuple[str, ...]:
    if is_xarray(y_data):
        return tuple(map(str, y_data.dims))
    return tuple(f"dim_{axis}" for axis in range(ndim))


def _chunk_bytes(array: da.Array) -> int:
    return int(math.prod(array.chunksize) * array.itemsize)


def _blocks_text(array: da.Array) -> str:
    return f"{' x '.join(map(str, array.numblocks))} blocks"


def x_leaves(x_data: Any) -> tuple[int | tuple[str, ...] | None, list[Any]]:
    """Return the structure of x, as in ``Layout.x_names``, and its arrays."""
    if isinstance(x_data, tuple | dict) and not x_data:
        kind = type(x_data).__name__
        raise DataError(f"x_data is an empty {kind}; expected at least one array.")
    if isinstance(x_data, dict):
        return tuple(x_data), list(x_data.values())
    return (len(x_data), list(x_data)) if isinstance(x_data, tuple) else (None, [x_data])


def _values(value: Any, name: str, split_chunks: bool) -> tuple[da.Array, da.Array | None]:
    value = lazy_data(value, name, split_chunks) if is_xarray(value) else value
    return split_mask(value, name, split_chunks)


def _are_named(value: Any, y: Any) -> bool:
    return is_xarray(value) and is_xarray(y)


def _match(
    value: Any, name: str, first: _Source, split_chunks: bool, allows_features: bool
) -> _Source:
    """Match an x array or sigma to y: by dimension names if both have them, else by position.

    ``first`` is y; ``split_chunks`` is that of ``as_dask``. ``allows_features`` says whether the
    array may have one dimension more than y.
    """
    y, given, units, notice = first.values, value, "", ""
    both_named = _are_named(value, first.given)
    if name != "sigma":
        value, units = convert_date_objects(value, name, is_in_memory(value))
        if units and is_in_memory(value) and value.dtype.kind in "mM":
            notice = rounding_notice(value, name)
    if both_named:
        value = like_dims(value, first.given, name, split_chunks, allows_features)
    array, mask = _values(value, name, split_chunks)
    array = to_days(array, units, name)
    check_numbers(array.dtype, name)
    if name == "sigma" and array.shape == y.shape * 2:
        raise DataError(
            f"sigma has shape {array.shape} and y_data {y.shape}: a covariance matrix of the data "
            f"is not supported. Pass one standard deviation per observation, such as "
            f"np.sqrt(np.diag(sigma)), which neglects correlations."
        )
    rows = rows_shape(array.shape, y.shape, allows_features)
    if rows is None:
        is_lazy = not (is_in_memory(given) and is_in_memory(first.given))
        dims = (given.dims, first.given.dims) if both_named else None
        raise mismatch_error(name, given, array, y, is_lazy, dims)
    if 0 in array.shape[len(rows) :]:
        raise DataError(f"{name} has no columns (shape {array.shape}).")
    if mask is not None and mask.ndim > len(rows):  # one masked feature masks its row
        mask = mask.any(axis=-1)
    missing = (None,) * (y.ndim - len(rows))
    array, mask = array[missing], None if mask is None else mask[missing]
    return _Source(name, given, array, mask, units, notice)


def _unify(sources: Sequence[_Source], ndim: int) -> tuple[list[da.Array], da.Array | None]:
    """Split the chunks of all arrays so that they match along the dimensions of y.

    Returns
    -------
    arrays : list of dask.array.Array
        The values of the sources, in the same order.
    mask : dask.array.Array or None
        True where the value of any source is masked; None if no source has a mask.
    """
    rows = list(range(ndim))
    masks = [source.mask for source in sources if source.mask is not None]
    arguments: list[Any] = []
    for i, array in enumerate([*(source.values for source in sources), *masks]):
        features = [ndim + i] * (array.ndim - ndim)
        if features and array.numblocks[-1] > 1:
            name = sources[i].name if i < len(sources) else "the mask"
            array = _one_chunk_of_features(array, name)
        arguments += [array, (*rows, *features)]
    _, unified = da.core.unify_chunks(*arguments, warn=False)
    split_masks = unified[len(sources) :]
    mask = functools.reduce(operator.or_, split_masks) if split_masks else None
    return list(unified[: len(sources)]), mask


def _one_chunk_of_features(array: da.Array, name: str) -> da.Array:
    """Merge the chunks along the last dimension.

    Dask merges chunks in the dtype of the first one, so each is checked before.
    """
    dtype = str(array.dtype)
    checked = da.map_blocks(partial(same_values, name), array, dtype, meta=array._meta)
    merged: da.Array = checked.rechunk({array.ndim - 1: -1})
    return merged


def _stored_dtype(array: da.Array) -> str:
    """Return the dtype that compiled code receives: native byte order, and at most 64 bits."""
    dtype = array.dtype.newbyteorder("=")
    return str(np.dtype(np.float64) if dtype.itemsize > 8 else dtype)
