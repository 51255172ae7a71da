"""``Model``: the caller's model function, with the shapes and dtypes required to trace it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.call import call_model
from nlsq_dask.model.transform import MIN_VECTOR_PARAMS, ParameterTransform
from nlsq_dask.model.vectorized import call_with_vector
from nlsq_dask.rows.rows import Layout

TRACED_ROWS = 1024  # number of rows in a jaxpr; larger than any other dimension of a model


class Mode(Enum):
    """Mode of differentiation of the Jacobian."""

    FORWARD = "forward"
    REVERSE = "reverse"


@dataclass(frozen=True)
class Model:
    """The caller's function ``f(x, *params)`` of jax.numpy; it returns one value per row of x.

    With a ``transform``, the parameters of the model are the free ones among those of the function.
    """

    function: Callable[..., Any]
    n_params: int  # of the model: the free ones
    layout: Layout  # structure of x, shapes and dtypes of its arrays
    dtype: str  # in which values are computed: "float64" or "float32"
    mode: Mode | None = None  # of differentiation; None for the one that ``choose_mode`` prefers
    transform: ParameterTransform | None = None  # None if all parameters are free

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # no traced form

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
        """Return the jaxpr of the function with scalar parameters; call it in ``x64()``.

        The function is traced once per model object, so once per fit: what it computes may depend
        on variables that its caller changes between fits.
        """
        return self._jaxpr

    @cached_property
    def _jaxpr(self) -> Any:
        return jax.make_jaxpr(self.__call__)(self.x_specs(TRACED_ROWS), self._scalars)

    @cached_property
    def accepts_one_row(self) -> bool:
        """Whether the function can be called with a single row, as reverse mode requires."""
        try:
            out = jax.eval_shape(self.raw, self.x_specs(1), self._scalars)
        except (TypeError, ValueError, IndexError):  # a squeeze, for instance, removes the row axis
            return False
        return bool(out.shape == (1,))

    @property
    def _scalars(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((), np.dtype(self.dtype)) for _ in range(self.n_params)]

    def __call__(self, x: Sequence[Any], params: Any) -> Any:
        """Return the values of the function, shape (b,), in ``dtype``.

        ``x`` is a tuple of arrays of b rows, even if the function receives a single array or a
        dict. ``params`` is one array of shape (p,), or a sequence of p scalars.
        """
        arguments = self._arguments(params)
        if self.n_arguments < MIN_VECTOR_PARAMS or isinstance(arguments, Sequence):
            return jnp.asarray(self._call(x, arguments)).astype(self.dtype)
        values = call_with_vector(lambda *numbers: jnp.asarray(self._call(x, numbers)), arguments)
        return values.astype(self.dtype)

    def raw(self, x: Sequence[Any], params: Any) -> Any:
        """Return the output of the function, without checks and conversion to ``dtype``."""
        return self._call(x, self._arguments(params))

    def with_fixed(
        self, names: Sequence[str], values: NDArray[np.float64], fixed: Sequence[str]
    ) -> Model:
        """Return the model in which the parameters named ``fixed`` are fixed, and none is tied.

        ``names`` and ``values`` are those of all parameters of the function.
        """
        if not fixed:
            return replace(self, n_params=len(names), transform=None)
        transform = ParameterTransform.of_fixed(names, values, fixed)
        return replace(self, n_params=transform.n_free, transform=transform)

    @property
    def free_function(self) -> Callable[..., Any]:
        """The function of x and the parameters of the model, which are the free ones."""
        transform, function = self.transform, self.function
        if transform is None:
            return function
        return lambda x, *params: call_model(function, x, transform(params))

    @property
    def n_arguments(self) -> int:
        """Number of parameters of the function, including fixed and tied ones."""
        return self.n_params if self.transform is None else len(self.transform.names)

    def _arguments(self, params: Any) -> Any:
        return params if self.transform is None else self.transform(params, self.dtype)

    def _call(self, x: Sequence[Any], arguments: Any) -> Any:
        rows = self.layout.assemble([jnp.asarray(leaf).astype(self.dtype) for leaf in x])
        return call_model(self.function, rows, (arguments[i] for i in range(self.n_arguments)))
