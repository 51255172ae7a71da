"""Encoding of typed records as bytes; decoding never runs code.

msgspec encodes and validates dataclasses, enums, numbers and containers. This module adds numeric
NumPy arrays, which keep their memory order because the bits of later results may depend on it.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar, get_args

import msgspec
import numpy as np

from nlsq_dask.errors import RecordError

T = TypeVar("T")

_ARRAY_CODE = 1  # code of the extension type
_NUMERIC_DTYPE = re.compile(r"[<>|=][biufc]\d{1,2}")


def encode(value: Any) -> bytes:
    """Encode a value made of dataclasses, enums, numbers, text, containers and arrays."""
    return msgspec.msgpack.encode(value, enc_hook=_encode_array)


def decode(data: bytes, kind: type[T]) -> T:
    """Decode a value of type ``kind`` from the bytes returned by ``encode``.

    Raises
    ------
    RecordError
        If the bytes do not encode a value of this type.
    """
    try:
        return msgspec.msgpack.decode(
            data, type=kind, ext_hook=_decode_array, dec_hook=_check_array
        )
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, MemoryError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise RecordError(f"the file does not contain a valid {name}: {error}") from error


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray) or not _NUMERIC_DTYPE.fullmatch(value.dtype.str):
        raise NotImplementedError(f"A value of type {type(value).__name__} cannot be saved.")
    is_fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    order: Literal["C", "F"] = "F" if is_fortran else "C"
    header = (value.dtype.str, value.shape, order, value.tobytes(order))
    return msgspec.msgpack.Ext(_ARRAY_CODE, msgspec.msgpack.encode(header))


def _decode_array(code: int, data: memoryview) -> Any:
    if code != _ARRAY_CODE:
        raise ValueError(f"the data contain an unknown extension type, {code}")
    header = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, ...], str, bytes])
    dtype, shape, order, values = header
    if not _NUMERIC_DTYPE.fullmatch(dtype) or order not in ("C", "F"):
        raise ValueError(f"an array has the invalid dtype {dtype!r} or the invalid order {order!r}")
    return np.frombuffer(values, dtype).reshape(shape, order=order).copy(order="K")  # type: ignore[call-overload]


def _check_array(kind: Any, value: Any) -> Any:
    """Return the array ``value``, or raise a ValueError if it is not of type ``kind``."""
    (dtype,) = get_args(get_args(kind)[1]) or (Any,)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"expected an array, got {type(value).__name__}")
    if dtype is not Any and not np.issubdtype(value.dtype, dtype):
        raise ValueError(f"expected an array of {dtype.__name__}, got {value.dtype}")
    return value
