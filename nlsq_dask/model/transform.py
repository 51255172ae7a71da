"""``ParameterTransform``: all parameters of a model, fixed and tied ones too, from the free ones.

Solvers, kernels, warm-up and sampling see a model of the free parameters only. ``Model`` applies
the transform while it is traced, so that derivatives with respect to the free parameters follow
from the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.named_values import NamedValues, as_real_array

Vector = NDArray[np.float64]

# Returns the value of a tied parameter from a mapping of the values of the others by name.
Tie = Callable[[Mapping[str, Any]], Any]

_EXAMPLE = "lambda p: 2 * p['width']"
MIN_VECTOR_PARAMS = 64  # from here on, tracing parameters one by one is slow


@dataclass(frozen=True, eq=False)
class ParameterTransform:
    """Map from the f free parameters of a model to all of its p parameters."""

    names: tuple[str, ...]  # of all parameters
    is_free: NDArray[np.bool_]  # shape (p,)
    values: Vector  # values of the fixed parameters, shape (p,); those of the others are not used
    ties: Mapping[str, Tie] = field(default_factory=dict)  # by name of the tied parameter

    @classmethod
    def of_fixed(cls, names: Sequence[str], values: Vector, fixed: Sequence[str]) -> Self:
        """Return the transform that fixes the parameters named ``fixed`` at their ``values``."""
        held = set(fixed)
        is_free = np.array([name not in held for name in names], bool)
        return cls(tuple(names), is_free, np.asarray(values, np.float64))

    def with_constant_ties(self, values: Vector) -> Self:
        """Return the transform that fixes tied parameters at their elements of ``values``."""
        return replace(self, values=np.where(self.is_tied, values, self.values), ties={})

    @cached_property
    def is_identity(self) -> bool:
        """Whether all parameters are free."""
        return bool(self.is_free.all())

    @cached_property
    def is_tied(self) -> NDArray[np.bool_]:
        """Which parameters are tied, shape (p,)."""
        return np.array([name in self.ties for name in self.names], bool)

    @cached_property
    def is_fixed(self) -> NDArray[np.bool_]:
        """Which parameters are fixed, shape (p,)."""
        return np.asarray(~(self.is_free | self.is_tied))

    @property
    def n_free(self) -> int:
        """Number f of free parameters."""
        return int(np.count_nonzero(self.is_free))

    def __call__(self, params: Any, dtype: Any = None) -> Any:
        """Return all parameters, in JAX, while a model is traced.

        ``params`` are the free ones: an array of shape (f,) or a sequence of f scalars. The result
        is a list of p scalars, or for an array with many parameters an array of shape (p,).
        """
        if self.is_identity:
            return params
        if isinstance(params, Sequence) or len(self.names) < MIN_VECTOR_PARAMS:
            return self._scalars(params, dtype)
        full = jnp.asarray(self.values, params.dtype)
        full = _replaced(full, np.flatnonzero(self.is_free), params)
        if not self.ties:
            return full
        tied = self._tied([full[i] for i in range(len(self.names))], dtype)
        return _replaced(full, np.array(list(tied)), jnp.stack(list(tied.values())))

    def _scalars(self, params: Any, dtype: Any) -> list[Any]:
        numbers = iter(range(self.n_free))
        values = [
            params[next(numbers)] if is_free else jnp.asarray(value, dtype)
            for is_free, value in zip(self.is_free, self.values, strict=True)
        ]
        for i, value in self._tied(values, dtype).items():
            values[i] = value
        return values

    def _tied(self, values: Sequence[Any], dtype: Any) -> dict[int, Any]:
        """Return the values of the tied parameters by position, given the values of all others."""
        if not self.ties:
            return {}
        pairs = zip(self.names, values, strict=True)
        others = {name: value for name, value in pairs if name not in self.ties}
        return {
            i: _tied_value(
                self.ties[name], NamedValues(others, f"ties[{name!r}]", self.ties), name, dtype
            )
            for i, name in enumerate(self.names)
            if name in self.ties
        }

    def expand(self, params: Vector) -> Vector:
        """Return all parameters, shape (..., p), of free ones, shape (..., f), as a new array."""
        if self.is_identity:
            return params.copy()
        full = np.broadcast_to(self.values, (*params.shape[:-1], len(self.names))).copy()
        full[..., self.is_free] = params
        if self.ties:
            rows = params.reshape(-1, params.shape[-1])
            with x64():
                tied = np.array([np.asarray(self._tied_of_free(row)) for row in rows])
            full[..., self.is_tied] = tied.reshape(*params.shape[:-1], -1)
        return full

    @cached_property
    def _tied_of_free(self) -> Callable[[Any], Any]:
        def tied(params: Any) -> Any:
            values = self._scalars(params, params.dtype)
            return jnp.stack([values[i] for i in np.flatnonzero(self.is_tied)])

        return jax.jit(tied)

    def rates(self, params: Vector) -> NDArray[np.float64]:
        """Return the derivatives of the tied parameters by the free ones, shape (t, f)."""
        if not self.ties:
            return np.zeros((0, self.n_free))
        with x64():
            try:
                return np.asarray(jax.jacfwd(self._tied_of_free)(jnp.asarray(params)))
            except TypeError:  # a function with derivatives in reverse mode only
                return np.asarray(jax.jacrev(self._tied_of_free)(jnp.asarray(params)))

    def scatter(self, values: NDArray[Any], tied: Any = 0) -> NDArray[Any]:
        """Return an array over all parameters from ``values`` of the free ones, along axis 0.

        It is zero for fixed parameters, and has the rows ``tied`` for the tied ones.
        """
        full = np.zeros((len(self.names), *values.shape[1:]), values.dtype)
        full[self.is_free] = values
        full[self.is_tied] = tied
        return full


def _replaced(array: Any, indices: NDArray[np.int64], values: Any) -> Any:
    """Return ``array`` with ``values`` at different ``indices`` in increasing order."""
    return array.at[indices].set(values, indices_are_sorted=True, unique_indices=True)


def _tied_value(tie: Tie, others: NamedValues, name: str, dtype: Any) -> Any:
    """Return the value of the parameter ``name``, a scalar of ``dtype``."""
    value, what = as_real_array(others.call(tie, _EXAMPLE))
    if value is None or value.ndim:
        raise ValueError(
            f"ties[{name!r}] must return one real number; it returned {what}. It is called with a "
            f"mapping of parameters by name. Write it like {_EXAMPLE}."
        )
    return value.astype(dtype)
