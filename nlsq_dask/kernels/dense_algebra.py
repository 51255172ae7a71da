"""Products and QR factorizations of a tall matrix ``[J r]``, for a strip or for a batch of rows.

XLA compiles the same expression well on one of them and poorly on the other. On a CPU, the columns
of a strip stay in a core's cache, and sums are vectorized only as partial sums of SIMD lanes. On a
GPU, columns have millions of rows, a matrix product with so few columns has to be split along the
rows, and for few columns separate sums, which XLA fuses, are faster than any product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax

from nlsq_dask.kernels.row_terms import lane_sums
from nlsq_dask.kernels.tsqr import append_rows

MAX_SEPARATE_SUMS = 6  # columns of [J r]; with more, a matrix product is faster, on a GPU too
_PRODUCT_ROWS = 4096  # rows per matrix product of a GPU; 1024 to 16384 were equally fast
_PANEL_ROWS = 512  # rows per QR factorization of a GPU


class Algebra(Protocol):
    """Representation of the columns of ``[J r]``, with their products and factorization."""

    @property
    def is_stacked(self) -> bool:
        """Whether the columns are the rows of one array, of shape (k, b), or a list of k arrays."""

    def join(self, jacobian: Any, residual: Any) -> Any:
        """Return the columns of J and the residual in this representation."""

    def gram(self, columns: Any, residual: Any, n_lanes: int) -> Any:
        """Return the product ``[J r]^T [J r]``, shape (k, k, n_lanes), as at ``Accumulation``.

        The last axis has partial sums. Element (k - 1, 0) is the largest square of ``residual``
        or, if that is None, of the last column.
        """

    def append_rows(self, triangle: Any, columns: Any) -> Any:
        """Return R of the QR factorization of ``triangle`` with rows appended."""


@dataclass(frozen=True)
class StripAlgebra:
    """For a strip of rows on a CPU."""

    panel_rows: int  # rows per QR factorization
    is_stacked = True

    def join(self, jacobian: Any, residual: Any) -> Any:
        """Return an array of shape (k, b) with the residual as last row."""
        return jnp.concatenate((jacobian, residual[None]))

    def gram(self, columns: Any, residual: Any, n_lanes: int) -> Any:
        """Return the upper triangle of the product; see ``Algebra``."""
        n_rows = len(columns)
        if n_lanes == 1:
            product = jnp.matmul(columns, columns.T, precision=lax.Precision.HIGHEST)[..., None]
            last_row = columns[-1] if residual is None else residual
            return product.at[-1, 0, 0].set((last_row**2).max())
        slices = columns.reshape(n_rows, -1, n_lanes)

        def row(i: int) -> Any:
            return lane_sums(slices.shape[1], lambda k: slices[i:, k] * slices[i, k])

        def last(k: int) -> Any:  # a slice of ``columns[-1]`` would not be fused
            return slices[-1, k] if residual is None else residual.reshape(-1, n_lanes)[k]

        squares = (last(k) * last(k) for k in range(slices.shape[1]))
        largest = reduce(lambda a, b: jnp.where(a > b, a, b), squares)
        rows = [jnp.pad(row(i), ((i, 0), (0, 0))) for i in range(n_rows - 1)]
        between = jnp.zeros((n_rows - 2, n_lanes), columns.dtype)
        return jnp.stack([*rows, jnp.concatenate([largest[None], between, row(n_rows - 1)])])

    def append_rows(self, triangle: Any, columns: Any) -> Any:
        """Return the new R, computed panel by panel."""
        return append_rows(triangle, columns, self.panel_rows)


@dataclass(frozen=True)
class DeviceAlgebra:
    """For a batch of some million rows on a GPU, in one expression without loops over rows."""

    is_stacked = False

    def join(self, jacobian: Sequence[Any], residual: Any) -> Any:
        """Return a list of k arrays of shape (b,), the residual last."""
        return [*jacobian, residual]

    def gram(self, columns: Sequence[Any], residual: Any, n_lanes: int) -> Any:
        """Return the upper triangle of the product in float64; see ``Algebra``."""
        assert n_lanes == 1
        k = len(columns)
        if k <= MAX_SEPARATE_SUMS:
            zero = jnp.zeros(())
            product = jnp.array(
                [
                    [
                        (a * b).sum(dtype=jnp.float64) if j >= i else zero
                        for j, b in enumerate(columns)
                    ]
                    for i, a in enumerate(columns)
                ]
            )
        else:
            panels = _panels(columns, _PRODUCT_ROWS).transpose(1, 0, 2)
            products = jnp.matmul(panels, panels.mT, precision=lax.Precision.HIGHEST)
            product = jnp.triu(products.sum(axis=0, dtype=jnp.float64))
        last = columns[-1] if residual is None else residual
        largest = (last**2).max().astype(product.dtype)
        return product.at[-1, 0].set(largest)[..., None]

    def append_rows(self, triangle: Any, columns: Sequence[Any]) -> Any:
        """Return the new R: panels are factorized at the same time, then their R in groups."""
        k = len(columns)
        panel_rows = max(_PANEL_ROWS, 1 << (4 * k - 1).bit_length())
        panels = _panels(columns, panel_rows).transpose(1, 2, 0)
        triangles = jnp.linalg.qr(panels, mode="r")
        while len(triangles) > 1:
            per_group = min(panel_rows // k, len(triangles))
            missing = -len(triangles) % per_group
            padded = jnp.pad(triangles, ((0, missing), (0, 0), (0, 0)))
            triangles = jnp.linalg.qr(padded.reshape(-1, per_group * k, k), mode="r")
        return jnp.linalg.qr(jnp.concatenate([triangle, triangles[0]]), mode="r")


def _panels(columns: Sequence[Any], panel_rows: int) -> Any:
    """Return columns as an array of shape (k, panels, panel_rows), padded with zeros."""
    stacked = jnp.stack(columns)
    padded = jnp.pad(stacked, ((0, 0), (0, -stacked.shape[1] % panel_rows)))
    return padded.reshape(len(columns), -1, panel_rows)
