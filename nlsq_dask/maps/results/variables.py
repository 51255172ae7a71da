"""``variable_of``: parameters, errors and status in a result of ``fit_each`` or ``curvefit``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

_NAMES = {  # of fit_each, and the ends of those of curvefit
    "popt": "curvefit_coefficients",
    "perr": "curvefit_stderr",
    "status": "curvefit_status",
}


def variable_of(ds: Any, name: str) -> xr.DataArray:
    """Return a variable of a result, by its name in a result of ``fit_each``.

    Raises
    ------
    TypeError
        If ``ds`` is not a Dataset.
    ValueError
        If it has no such variable, or those of several fits.
    """
    if not isinstance(ds, xr.Dataset):
        raise TypeError(
            f"ds must be the Dataset that fit_each or curvefit returns; got {type(ds).__name__}."
        )
    names = _names_in(ds, name)
    if len(names) > 1:
        one = names[0].removesuffix(_NAMES[name])
        raise ValueError(
            f"ds has the fits of several variables: {', '.join(map(repr, names))}. Keep those of "
            f"one: ds[[name for name in ds if name.startswith({one!r})]]."
        )
    if not names:
        listed = ", ".join(map(repr, ds.data_vars)) or "none"
        raise ValueError(
            f"ds has no variable {name!r}, so it is not a result of fit_each or curvefit. Its "
            f"variables are {listed}."
        )
    array: xr.DataArray = ds[names[0]]
    return array


def has_variable(ds: xr.Dataset, name: str) -> bool:
    """Return whether ``variable_of`` returns a variable."""
    return len(_names_in(ds, name)) == 1


def parameter_names(popt: xr.DataArray) -> list[str]:
    """Return the names of the parameters of a result, or of the one that was selected."""
    return list(map(str, np.atleast_1d(popt["param"].values))) if "param" in popt.coords else []


def _names_in(ds: xr.Dataset, name: str) -> list[str]:
    if name in ds.data_vars:
        return [name]
    return [str(each) for each in ds.data_vars if str(each).endswith(_NAMES[name])]


def every_kth(ds: xr.Dataset, dims: tuple[Any, ...], most: int) -> tuple[xr.Dataset, int]:
    """Return every k-th pixel along each dimension, about ``most`` of them at most, and k."""
    n_pixels, k = math.prod(ds.sizes[dim] for dim in dims), 1
    while n_pixels > most * k ** len(dims):
        k += 1
    return ds.isel(dict.fromkeys(dims, slice(None, None, k))), k
