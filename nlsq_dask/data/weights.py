"""Weights of groups of rows: sigma is divided by the square root of the group's weight.

A row with weight w and residual r contributes ``w (r / sigma)^2`` to the cost. The weights act
wherever sigma does: on residuals, robust losses, chi-square and covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import DataError


def weighted_sigma(
    groups: da.Array,
    y: da.Array,
    sigma: da.Array | None,
    mask: da.Array | None,
    weights: Sequence[float],
) -> da.Array:
    """Return sigma (1 if None) divided by the square root of the weight of each row.

    Parameters
    ----------
    groups : dask.array.Array
        First x array, whose values (or, with shape (n, k), its first column) are the numbers of
        the groups, from 0.
    y : dask.array.Array
    sigma, mask : dask.array.Array or None
        In chunks that match y. Rows that are masked, or not finite in y, need no valid group.
    weights : sequence of float
        Weight of each group.
    """
    if groups.ndim > y.ndim:
        groups = groups[..., 0]
    varies = groups.shape == y.shape
    weighted: da.Array = da.map_blocks(
        _weigh,
        groups,
        1.0 if sigma is None else sigma,
        False if mask is None else mask,
        y if varies else 0.0,  # y would broadcast sigma to its own size
        varies=None if sigma is None else tuple(n > 1 for n in sigma.shape),
        inverse_roots=1.0 / np.sqrt(np.asarray(weights, np.float64)),
        dtype=np.float64,
        meta=np.empty((0,) * y.ndim),
    )
    return weighted


def _weigh(
    groups: NDArray[Any],
    sigma: NDArray[Any] | float,
    mask: NDArray[np.bool_] | bool,
    y: NDArray[Any] | float,
    *,
    varies: tuple[bool, ...] | None,
    inverse_roots: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return a block of sigma, weighted; ``varies`` says along which dimensions sigma varies."""
    if varies is not None:
        _check_shape(np.shape(sigma), groups.shape, varies)
    # Rows with non-finite x are handled by nan_policy. A mask that is not declared is an error when
    # the block is used, so masks of groups and sigma must not end here.
    numbers = np.asarray(np.ma.getdata(groups), np.float64)
    is_masked = np.asarray(mask) | np.ma.getmaskarray(groups) | np.ma.getmaskarray(y)
    has_group = np.isfinite(numbers) & ~is_masked & np.isfinite(np.ma.getdata(y))
    numbers = np.where(has_group, numbers, 0.0)
    is_wrong = (numbers != np.floor(numbers)) | (numbers < 0) | (numbers >= len(inverse_roots))
    if is_wrong.any():
        raise DataError(
            f"With enable_residual_weighting=True, the first column of x_data must hold group "
            f"numbers, integers from 0 to {len(inverse_roots) - 1} for the {len(inverse_roots)} "
            f"residual_weights; got {numbers[is_wrong][0]:g}."
        )
    weighted: NDArray[np.float64] = inverse_roots[numbers.astype(np.int64)] * sigma
    return weighted


def _check_shape(shape: tuple[int, ...], groups: tuple[int, ...], varies: tuple[bool, ...]) -> None:
    """Raise a DataError if a block of sigma has a wrong shape, which broadcasting would hide.

    Along dimensions in which the groups do not vary, the shape of the weighted sigma shows it.
    """
    expected = tuple(max(n, 1) if v else 1 for n, v in zip(groups, varies, strict=True))
    is_wrong = len(shape) != len(groups) or any(
        n != m for n, m, v in zip(shape, expected, varies, strict=True) if not (v and m == 1)
    )
    if is_wrong:
        raise DataError(
            f"sigma has shape {shape} in a block, but its Dask array declares {expected}. Pass the "
            f"actual shape to map_blocks or from_delayed."
        )
