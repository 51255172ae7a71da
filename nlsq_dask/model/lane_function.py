"""``LaneFunction``: a function of one pixel, compiled for many pixels at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program

Array = NDArray[Any]


@dataclass(frozen=True)
class LaneFunction:
    """Program that evaluates ``function(x, *arrays)`` of one pixel for many pixels."""

    program: Program
    dtype: str
    n_lanes: int  # pixels per call
    x_varies: tuple[bool, ...]  # which x arrays vary over the map

    @classmethod
    def trace(
        cls,
        function: Callable[..., Any],
        model: Model,
        n_points: int,
        n_lanes: int,
        x_varies: Sequence[bool],
        sizes: Sequence[int],
    ) -> LaneFunction:
        """Trace a function of the x arrays of one pixel, a tuple, and of further 1-d arrays.

        Parameters
        ----------
        function : callable
            Returns a 1-d array.
        model : Model
            Its layout and dtype are those of x.
        n_points, n_lanes : int
            Points of a pixel, and pixels per call.
        x_varies : sequence of bool
            Which x arrays vary over the map.
        sizes : sequence of int
            Those of the further arrays of a pixel.
        """
        dtype = np.dtype(model.dtype)
        x_axes = tuple(1 if varies else None for varies in x_varies)
        axes = (x_axes, *(1 for _ in sizes))
        of_lanes = jax.vmap(function, in_axes=axes, out_axes=1)
        x = tuple(
            jax.ShapeDtypeStruct((n_points, n_lanes) if varies else (n_points, *features), dtype)
            for features, varies in zip(model.layout.x_features, x_varies, strict=True)
        )
        others = (jax.ShapeDtypeStruct((size, n_lanes), dtype) for size in sizes)
        with x64():
            program = Program.trace(of_lanes, x, *others)
        return cls(program, model.dtype, n_lanes, tuple(x_varies))

    def __call__(self, x: Sequence[Array], *arrays: Array) -> Array:
        """Return the values for m pixels, with the pixels last.

        Parameters
        ----------
        x : sequence of ndarray
            Each of shape (n, m), or (n,) or (n, k) if it does not vary over the map.
        *arrays : ndarray, shape (size, m)
        """
        m = arrays[0].shape[1]
        parts = []
        for first in range(0, m, self.n_lanes):
            index = np.minimum(np.arange(first, first + self.n_lanes), m - 1)
            some = tuple(
                np.asarray(leaf[:, index] if varies else leaf, self.dtype)
                for leaf, varies in zip(x, self.x_varies, strict=True)
            )
            rest = (np.asarray(array[:, index], self.dtype) for array in arrays)
            parts.append(np.asarray(self.program(some, *rest))[:, : m - first])
        return np.concatenate(parts, axis=1)
