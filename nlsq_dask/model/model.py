"""``Model``: the caller's model function, with the shapes and dtypes required to trace it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask.model.call import call_model
from nlsq_dask.model.vectorized import call_with_vector
from nlsq_dask.rows.rows import Layout

TRACED_ROWS = 1024  # number of rows in a jaxpr; larger than any other dimension of a model
_MIN_VECTOR_PARAMS = 64  # above, tracing parameters one by one is slow


class Mode(Enum):
    """Mode of differentiation of the Jacobian."""

    FORWARD = "forward"
    REVERSE = "reverse"


@dataclass(frozen=True)
class Model:
    """The caller's function ``f(x, *params)`` of jax.numpy; it returns one value per row of x."""

    function: Callable[..., Any]
    n_params: int
    layout: Layout  # structure of x, shapes and dtypes of its arrays
    dtype: str  # in which values are computed: "float64" or "float32"
    mode: Mode | None = None  # of differentiation; None for the one that ``choose_mode`` prefers

    @property
    def name(self) -> str:
        """Name of the function, for messages."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def x_specs(self, n_rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return the shapes of the x arrays for this number of rows, and their stored dtypes."""
        return tuple(
            jax.ShapeDtypeStruct((n_rows, *shape), np.dtype(dtype))
            for shape, dtype in zip(self.layout.x_features, self.layout.x_dtypes, strict=True)
        )

    def jaxpr(self) -> Any:
        """Trace the function with scalar parameters and return its jaxpr; call it in ``x64()``."""
        params = [jax.ShapeDtypeStruct((), np.dtype(self.dtype)) for _ in range(self.n_params)]
        return jax.make_jaxpr(self.__call__)(self.x_specs(TRACED_ROWS), params)

    def __call__(self, x: Sequence[Any], params: Any) -> Any:
        """Return the values of the function, shape (b,), in ``dtype``.

        ``x`` is a tuple of arrays of b rows, even if the function receives a single array or a
        dict. ``params`` is one array of shape (p,), or a sequence of p scalars.
        """
        if self.n_params < _MIN_VECTOR_PARAMS or isinstance(params, Sequence):
            return jnp.asarray(self.raw(x, params)).astype(self.dtype)
        values = call_with_vector(lambda *numbers: jnp.asarray(self.raw(x, numbers)), params)
        return values.astype(self.dtype)

    def raw(self, x: Sequence[Any], params: Any) -> Any:
        """Return the output of the function, without checks and conversion to ``dtype``."""
        rows = self.layout.assemble([jnp.asarray(leaf).astype(self.dtype) for leaf in x])
        return call_model(self.function, rows, (params[i] for i in range(self.n_params)))
