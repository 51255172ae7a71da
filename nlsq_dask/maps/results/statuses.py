"""``status_table``: how many pixels of a map have which status, and what it means."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from dask.base import compute
from dask.delayed import delayed

from nlsq_dask.maps.results.variables import variable_of
from nlsq_dask.solvers.lanes.records import LaneStatus

if TYPE_CHECKING:
    import pandas as pd

# By flag, short enough for a table in a terminal; docs/howto_maps.md has them, too.
MEANINGS = {
    "converged": "a solution",
    "at_bound": "a solution, parameter at bound",
    "singular": "parameters not determined",
    "iteration_limit": "too many iterations",
    "no_data": "no valid point",
    "too_few_points": "fewer points than needed",
    "non_finite": "model not finite, or bad sigma",
    "stalled": "no step improves the fit",
    "bad_start": "start or bounds not valid",
    "not_read": "data could not be read",
    "not_fitted": "not fitted yet",
}


def successes_first(status: int) -> tuple[bool, int]:
    """Return the key by which statuses are sorted: successes, then failures."""
    return status <= 0, abs(status)


def format_share(share: float) -> str:
    """Return a fraction of the pixels in percent; a small one does not become zero."""
    return "<0.1%" if 0 < share < 5e-4 else f"{share:.1%}"


def status_table(ds: xr.Dataset | xr.DataArray) -> pd.DataFrame:
    """Count the pixels of a map by status.

    Parameters
    ----------
    ds : Dataset or DataArray
        Result of ``fit_each`` or ``curvefit``, or its variable ``status``. A lazy one is computed
        chunk by chunk.

    Returns
    -------
    pandas.DataFrame
        One row per status that occurs, those of success first. The index has the flags, such as
        "converged"; the columns are

        - status: number in ``ds.status``, positive for success
        - pixels: number of pixels with this status
        - share: fraction of all pixels
        - meaning: a few words on it

        The sum of ``pixels`` is the number of all pixels. Pixels without a status (NaN, as after
        ``ds.where``) are not counted.

    Raises
    ------
    TypeError, ValueError
        If ``ds`` is no such result, or has a status that its attributes do not name.

    See Also
    --------
    plot_map : Draws where the pixels are.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import xarray as xr
    >>> import nlsq_dask
    >>> time = np.linspace(0, 4, 50)
    >>> y = np.stack([2 * np.exp(-0.7 * time), np.full(50, np.nan), 3 * np.exp(-time)])
    >>> da = xr.DataArray(y, dims=("x", "time"), coords={"time": time})
    >>> def decay(t, height, rate):
    ...     return height * jnp.exp(-rate * t)
    >>> fits = da.nlsq.fit_each(decay, "time", dims="time", verbose=0)
    >>> nlsq_dask.status_table(fits).pixels
    flag
    converged    2
    no_data      1
    Name: pixels, dtype: int64
    """
    import pandas as pd

    status = ds if isinstance(ds, xr.DataArray) else variable_of(ds, "status")
    counts = count_statuses(status)
    n = sum(counts.values())
    names = flags_of(status)
    rows = [
        (names[value], value, count, count / n, MEANINGS.get(names[value], ""))
        for value, count in counts.items()
    ]
    columns = ["flag", "status", "pixels", "share", "meaning"]
    return pd.DataFrame(rows, columns=columns).set_index("flag")


def is_determined(status: xr.DataArray) -> xr.DataArray:
    """Return where the fits have a solution that the data determine."""
    return status.isin([int(LaneStatus.CONVERGED), int(LaneStatus.AT_BOUND)])


def flags_of(status: xr.DataArray) -> dict[int, str]:
    """Return the flags by number, from the CF attributes if there are any."""
    attrs = status.attrs
    if "flag_values" not in attrs or "flag_meanings" not in attrs:
        return {int(each): each.name.lower() for each in LaneStatus}
    values = np.atleast_1d(attrs["flag_values"]).tolist()
    return dict(zip(map(int, values), str(attrs["flag_meanings"]).split(), strict=True))


def count_statuses(status: xr.DataArray) -> dict[int, int]:
    """Return the number of pixels by status, for those that occur, successes first.

    Raises
    ------
    ValueError
        For a value that is no status.
    """
    flags = flags_of(status)
    found: Counter[float] = Counter()
    for values, numbers in _unique(status):
        found.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    n_unknown = sum(n for value, n in found.items() if value not in flags and not math.isnan(value))
    order = sorted(flags, key=successes_first)
    if n_unknown:
        raise ValueError(
            f"the status of {n_unknown:,} pixels is none of {', '.join(map(str, order))}, the "
            f"flag_values of a result of fit_each. Pass the variable 'status' as it was returned."
        )
    return {value: found[value] for value in order if found[value]}


def _unique(status: xr.DataArray) -> Sequence[tuple[Any, Any]]:
    """Return the values that occur, and their numbers, for each chunk."""
    if status.chunks is None:
        return [np.unique(status.values, return_counts=True)]
    count = delayed(partial(np.unique, return_counts=True))
    computed: tuple[Any, ...] = compute(*map(count, status.data.to_delayed().ravel()))
    return computed
