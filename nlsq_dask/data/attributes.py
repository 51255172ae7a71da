"""Notices on CF attributes, such as ``scale_factor``, that have not been decoded.

xarray moves an attribute from ``attrs`` to ``encoding`` when it decodes the values. If the
attribute is still among ``attrs``, the values are the stored numbers, not the physical ones.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import zarr

from nlsq_dask.data.sources.from_array import is_in_memory
from nlsq_dask.data.sources.from_xarray import is_xarray

_FILLS = "_FillValue", "missing_value"
_PACKED = {"scale_factor": 1.0, "add_offset": 0.0}  # with their neutral values


def attribute_notices(value: Any, name: str) -> Iterator[str]:
    """Yield a sentence if values are not unpacked, and one if fill values are not masked.

    Parameters
    ----------
    value : array
        Array as passed by the caller.
    name : str
        Name of the array in messages.
    """
    attributes = _attributes(value)
    opened = (
        f"open it without mask_and_scale=False, or, if the values are decoded already, remove the "
        f"attribute with {name}.attrs.pop(...)"
        if is_xarray(value)
        else "open it with xarray, such as xarray.open_zarr(path)['name']"
    )
    packed = [key for key, none in _PACKED.items() if _number(attributes.get(key, none)) != none]
    if packed:
        several = len(packed) > 1
        yield (
            f"{name} has {'CF attributes' if several else 'a CF attribute'} "
            f"{' and '.join(map(repr, packed))} that {'have' if several else 'has'} not been "
            f"decoded; the raw values will be fitted. To decode them, {opened}."
        )
    for key in _FILLS:
        fill = _number(attributes.get(key))
        if fill is not None and np.isfinite(fill) and _may_hold(value, fill):
            yield (
                f"{name} has a CF attribute {key}={fill:.9g} that has not been decoded; rows with "
                f"this value will be fitted like any other. To mask them, {opened}, and fit with "
                f"nan_policy='omit'."
            )
            return


def _attributes(value: Any) -> Mapping[str, Any]:
    attributes = getattr(value, "attrs", {})
    if not isinstance(attributes, Mapping):
        return {}
    # xarray writes _FillValue to Zarr 2 as Zarr's fill value, which otherwise may be a default.
    is_by_xarray = isinstance(value, zarr.Array) and "_ARRAY_DIMENSIONS" in attributes
    if is_by_xarray and value.metadata.zarr_format == 2 and value.fill_value is not None:
        return {"_FillValue": value.fill_value, **attributes}
    return attributes


def _number(given: Any) -> float | None:
    """Return the number in an attribute, or None if it holds no number.

    HDF5 stores the number as an array, and xarray writes it to Zarr 3 as base64 text.
    """
    try:
        if isinstance(given, str):
            return float(struct.unpack("<d", base64.b64decode(given, validate=True))[0])
        return float(np.ravel(given)[0])
    except (TypeError, ValueError, IndexError, struct.error):
        return None


def _may_hold(value: Any, fill: float) -> bool:
    """Return whether the array may contain the fill value; True if it is not in memory."""
    if not is_in_memory(value):
        return True
    with np.errstate(all="ignore"):  # the dtype may not represent the fill value
        return bool((np.asarray(value) == np.asarray(fill).astype(value.dtype)).any())
