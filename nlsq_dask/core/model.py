"""``Model``: the caller's function together with all that is needed to trace it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlsq_dask.core.precision import x64
from nlsq_dask.core.rows import Layout
from nlsq_dask.errors import ModelError

# Two numbers of rows at which the result's shape is looked at; any two that differ will do.
_PROBE_ROWS = (7, 12)


@dataclass(frozen=True)
class Model:
    """A row-wise function ``f(x, *params)`` of jax.numpy, on rows of a known layout.

    Attributes
    ----------
    function : callable
    n_params : int
    layout : Layout
    dtype : {"float64", "float32"}
        Arithmetic in which x reaches the function.
    """

    function: Callable[..., Any]
    n_params: int
    layout: Layout
    dtype: str

    @property
    def name(self) -> str:
        """Name of the function, for messages."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def x_specs(self, n_rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return shapes and stored dtypes of the x arrays of so many rows."""
        return tuple(
            jax.ShapeDtypeStruct((n_rows, *shape), np.dtype(dtype))
            for shape, dtype in zip(self.layout.x_features, self.layout.x_dtypes, strict=True)
        )

    def __call__(self, x: Sequence[Any], params: Any) -> Any:
        """Evaluate the function on flat x arrays; ``params`` is one array of shape (p,)."""
        rows = self.layout.assemble([jnp.asarray(leaf).astype(self.dtype) for leaf in x])
        values = self.function(rows, *(params[i] for i in range(self.n_params)))
        return jnp.asarray(values).astype(self.dtype)

    def check(self) -> None:
        """Raise a ModelError unless the function can be traced and returns one value a row."""
        params = jax.ShapeDtypeStruct((self.n_params,), np.dtype(self.dtype))
        with x64():
            for n_rows in _PROBE_ROWS:
                try:
                    out = jax.eval_shape(self, self.x_specs(n_rows), params)
                except (
                    jax.errors.TracerArrayConversionError,
                    jax.errors.ConcretizationTypeError,
                    jax.errors.TracerBoolConversionError,
                    jax.errors.TracerIntegerConversionError,
                ) as error:
                    raise ModelError(
                        f"The model {self.name!r} cannot be traced by JAX: write it with "
                        f"jax.numpy instead of numpy or math, and with jnp.where instead of "
                        f"'if' on values of x or of the parameters."
                    ) from error
                self._check_shape(out.shape, n_rows)

    def _check_shape(self, shape: tuple[int, ...], n_rows: int) -> None:
        if shape == (n_rows,):
            return
        given = ", ".join(str((n_rows, *features)) for features in self.layout.x_features)
        raise ModelError(
            f"The model {self.name!r} must return one value a row: for x of shape {given} it "
            f"returned shape {shape}, expected ({n_rows},)."
        )

    def float32_constants(self) -> list[str]:
        """Name the float32 JAX arrays that the function takes from outside.

        Such an array was made where 64-bit values were off, so it has lost digits already.
        """
        try:
            outside = inspect.getclosurevars(self.function)
        except TypeError:  # a callable object or a builtin
            return []
        values = {**outside.globals, **outside.nonlocals}
        return sorted(
            name
            for name, value in values.items()
            if isinstance(value, jax.Array) and value.dtype == jnp.float32
        )
