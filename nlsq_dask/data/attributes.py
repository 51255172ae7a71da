"""What the attributes of an array say of its values, and nobody has heeded.

xarray moves such an attribute to ``encoding`` when it has done what it says. Where it is still
among ``attrs``, values are as they are stored.
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
_PACKED = {"scale_factor": 1.0, "add_offset": 0.0}  # with the values that change nothing


def attribute_notices(value: Any, name: str) -> Iterator[str]:
    """Yield sentences on values that stand for others, or for none.

    Parameters
    ----------
    value : array
        As the caller gave it.
    name : str
        What the caller calls it.
    """
    attributes = _attributes(value)
    opened = (
        f"open it without mask_and_scale=False, or, if this is done, take it away with "
        f"{name}.attrs.pop(...)"
        if is_xarray(value)
        else "open it with xarray, such as xarray.open_zarr(path)['name'], which does that"
    )
    packed = [key for key, none in _PACKED.items() if _number(attributes.get(key, none)) != none]
    if packed:
        yield (
            f"{name} has the attribute {' and '.join(packed)}, which nobody has applied: its "
            f"values are fitted as they are stored. To unpack them {opened}."
        )
    for key in _FILLS:
        fill = _number(attributes.get(key))
        if fill is not None and np.isfinite(fill) and _may_hold(value, fill):
            yield (
                f"{name} has the attribute {key}={fill:.9g}, and nobody has masked that value: "
                f"rows that hold it are fitted as if it had been measured. To mask them {opened}; "
                f"and fit with nan_policy='omit'."
            )
            return


def _attributes(value: Any) -> Mapping[str, Any]:
    attributes = getattr(value, "attrs", {})
    if not isinstance(attributes, Mapping):
        return {}
    # In Zarr 2 xarray writes _FillValue as Zarr's own, which without its mark may be a default.
    is_by_xarray = isinstance(value, zarr.Array) and "_ARRAY_DIMENSIONS" in attributes
    if is_by_xarray and value.metadata.zarr_format == 2 and value.fill_value is not None:
        return {"_FillValue": value.fill_value, **attributes}
    return attributes


def _number(given: Any) -> float | None:
    """Return a number, which HDF5 has in an array and xarray, in Zarr 3, as the text of bytes."""
    try:
        if isinstance(given, str):
            return float(struct.unpack("<d", base64.b64decode(given, validate=True))[0])
        return float(np.ravel(given)[0])
    except (TypeError, ValueError, IndexError, struct.error):
        return None


def _may_hold(value: Any, fill: float) -> bool:
    """Whether a value occurs, as far as that can be told without reading."""
    if not is_in_memory(value):
        return True
    with np.errstate(all="ignore"):  # of one that the dtype cannot hold
        return bool((np.asarray(value) == np.asarray(fill).astype(value.dtype)).any())
