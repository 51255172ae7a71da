"""``row_model``: a model and Jacobian of SciPy's form as a model of blocks of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from nlsq_dask.errors import ModelError

Function = Callable[..., Any]


def row_model(f: Function, jac: Function | None, is_stacked: bool) -> Function:
    """Return the model that ``fit`` expects, which calls ``f``.

    Parameters
    ----------
    f : callable
        ``f(x, *params)``, written with jax.numpy.
    jac : callable or None
        ``jac(x, *params)``, the Jacobian of shape (M, p), written with jax.numpy.
    is_stacked : bool
        Whether ``fit`` passes a tuple of k variables, which ``f`` expects as one array (k, M).
    """
    if not callable(f):  # ``fit`` raises the error
        return f
    function = f if jac is None else _with_jacobian(f, jac)

    @functools.wraps(f)
    def model(x: Any, *params: Any) -> Any:
        stacked = jnp.stack(x) if is_stacked else x
        values = function(stacked, *params)
        if jnp.ndim(values) or isinstance(x, dict):
            return values
        first = x[0] if isinstance(x, tuple) else x
        return jnp.broadcast_to(values, first.shape[:1])  # a constant model, as in SciPy

    return model


def _with_jacobian(f: Function, jac: Function) -> Function:
    """Return ``f`` with ``jac`` as its derivatives with respect to the parameters."""
    function = jax.custom_jvp(lambda x, *params: jnp.asarray(f(x, *params)))

    def derivative(primals: Any, tangents: Any) -> Any:
        x, *params = primals
        x_tangent, *rates = tangents
        values = jnp.asarray(f(x, *params))
        matrix = _jacobian(jac, x, params, values.shape).astype(values.dtype)
        change = jnp.zeros_like(values)
        for i, rate in enumerate(rates):
            if not _is_zero(rate):
                change = change + matrix[:, i] * rate
        if not all(map(_is_zero, jax.tree.leaves(x_tangent))):
            # jac says nothing about the derivatives with respect to x.
            tangent = jax.tree.map(
                lambda rate, leaf: jnp.zeros_like(leaf) if _is_zero(rate) else rate, x_tangent, x
            )
            change = change + jax.jvp(lambda x: f(x, *params), (x,), (tangent,))[1]
        return values, change

    function.defjvp(derivative, symbolic_zeros=True)
    return function


def _is_zero(rate: Any) -> bool:
    return isinstance(rate, SymbolicZero)


def _jacobian(jac: Function, x: Any, params: list[Any], shape: tuple[int, ...]) -> Any:
    """Return ``jac(x, *params)``; raise a ModelError if it fails or has the wrong shape."""
    advice = (
        "Write it with jax.numpy, or omit it: derivatives of the model are exact without it, "
        "because JAX computes them."
    )
    try:
        matrix = jnp.asarray(jac(x, *params))
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        message = str(error).partition("\n")[0].rstrip(".")
        raise ModelError(f"jac raised {type(error).__name__}: {message}. {advice}") from error
    expected = (*shape, len(params))
    if matrix.shape != expected:
        raise ModelError(
            f"jac must return one row per value of the model and one column per parameter; for "
            f"a block of {shape[0]} values and {len(params)} parameters it returned shape "
            f"{matrix.shape}, expected {expected}. {advice}"
        )
    return matrix
