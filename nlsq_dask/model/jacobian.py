"""Jacobian of the model over a block of rows, by forward- or reverse-mode differentiation.

Forward mode evaluates a derivative of the model for each parameter, reverse mode a gradient for
each row. Forward mode needs less arithmetic for few parameters, reverse mode for many. On a CPU,
however, values that are computed repeatedly cost more than this arithmetic: in forward mode, XLA
computes sines, and arrays with more than one column, again for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.model.call import call_model
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import TRACED_ROWS, Mode, Model

_MAX_FORWARD_PARAMS = 5  # up to this number, forward mode was never slower in benchmarks
# Calls into a scalar library, ten times as expensive as a vectorized exponential.
_EXPENSIVE_PRIMITIVES = {"sin", "cos", "tan"}
# Up to this many rows, XLA would fuse the stacking with its inputs, once for each row.
_MAX_UPDATED_ROWS = 8


def choose_mode(model: Model, jaxpr: Any) -> Mode:
    """Return the mode of differentiation for this model, whose traced form is ``jaxpr``.

    Forward mode is used for at most five parameters, if everything that depends on them is one
    number per row and there is no sine, cosine or tangent; otherwise reverse mode. Models with a
    ``while_loop``, and models that cannot be called with a single row, support only forward mode;
    models with a ``custom_vjp`` only reverse mode. ``Model.mode`` takes precedence over all this.

    The choice depends on the traced model and not on timings, because results of the two modes
    differ in their last bits and a repeated fit must have equal results.
    """
    if model.mode is not None:
        return model.mode
    n_leaves = len(model.layout.x_features)
    depends = [False] * n_leaves + [True] * model.n_params
    names, widest = set(), 0
    for name, size in _dependent_operations(jaxpr.jaxpr, depends):
        names.add(name)
        widest = max(widest, size)
    if any(name.startswith("custom_vjp") for name in names):
        return Mode.REVERSE
    if "while" in names or not model.accepts_one_row:
        return Mode.FORWARD
    is_narrow = widest <= TRACED_ROWS and not names & _EXPENSIVE_PRIMITIVES
    return Mode.FORWARD if is_narrow and model.n_params <= _MAX_FORWARD_PARAMS else Mode.REVERSE


def with_other_mode(model: Model) -> Model | None:
    """Return the model with the mode of differentiation that is not in use; None if it has none.

    Where a branch of ``jnp.where`` that is not taken is not finite, its derivative is NaN in
    reverse mode, which multiplies it by zero, but not in forward mode, which discards it.
    """
    with x64():
        is_forward = choose_mode(model, model.jaxpr()) is Mode.FORWARD
    other = replace(model, mode=Mode.REVERSE if is_forward else Mode.FORWARD)
    return other if derivative_error(other) is None else None


def derivative_error(model: Model) -> Exception | None:
    """Return the error that JAX raises when it differentiates the model; None if it raises none."""
    p = model.n_params
    with x64():
        spec = partial(jax.ShapeDtypeStruct, dtype=np.dtype(model.dtype))
        y, params, factors = spec((TRACED_ROWS,)), spec((p,)), spec((p + 1,))
        linearized = residual_and_jacobian(model, choose_mode(model, model.jaxpr()))
        try:
            jax.eval_shape(linearized, model.x_specs(TRACED_ROWS), y, params, factors)
        except (ValueError, TypeError, IndexError, NotImplementedError) as error:
            return error
    return None


def has_derivative(model: Model, i: int) -> bool:
    """Return whether JAX can differentiate the model with respect to its i-th parameter alone."""

    def of_one(x: Any, q: Any) -> Any:
        params: list[Any] = [jnp.ones((), model.dtype)] * model.n_params
        params[i] = q
        return call_model(model.free_function, x, params)

    with x64():
        mode = choose_mode(model, model.jaxpr())
    alone = replace(model, function=of_one, n_params=1, mode=mode, transform=None)
    return derivative_error(alone) is None


def _dependent_operations(jaxpr: Any, depends: Sequence[bool]) -> Iterator[tuple[str, int]]:
    """Yield the operations that depend on marked inputs: name, and size of the largest output."""
    reached = {v for v, is_reached in zip(jaxpr.invars, depends, strict=True) if is_reached}
    for equation in jaxpr.eqns:
        touched = [not hasattr(v, "val") and v in reached for v in equation.invars]
        if not any(touched):
            continue
        reached.update(equation.outvars)
        name = equation.primitive.name
        yield name, max((v.aval.size for v in equation.outvars), default=0)
        if name.startswith("custom_vjp"):  # its body is not differentiated
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                # Loops and branches reorder their inputs.
                same = len(inner.invars) == len(touched)
                yield from _dependent_operations(
                    inner, touched if same else [True] * len(inner.invars)
                )


Linearized = Callable[[Any, Any, Any, Any], Any]


def residual_and_jacobian(model: Model, mode: Mode, is_stacked: bool = True) -> Linearized:
    """Return a function that computes the residuals of b rows and their Jacobian.

    The arguments of the function are the x arrays, y in the model's dtype, the parameters, and
    factors of shape ``(p + 1,)``. It returns the model's values, shape ``(b,)``, and an array of
    shape ``(p + 1, b)``: the transposed Jacobian, then the residuals ``model - y`` as its last row,
    with row ``i`` multiplied by ``factors[i]``. Unless ``is_stacked``, these rows are a list.
    """
    p = model.n_params

    def forward(x: Any, y: Any, params: Any, factors: Any) -> Any:
        values, push = jax.linearize(lambda *q: model(x, q), *(params[i] for i in range(p)))
        columns = jax.vmap(lambda t: push(*(t[i] for i in range(p))))(jnp.diag(factors[:p]))
        residual = (values - y) * factors[p]
        if not is_stacked:
            return values, [*columns, residual]
        return values, jnp.concatenate([columns, residual[None]])

    def forward_separately(x: Any, y: Any, params: Any, factors: Any) -> Any:
        q = [params[i] for i in range(p)]

        def column(i: int) -> Any:
            def of_one(value: Any) -> Any:
                return model(x, [*q[:i], value, *q[i + 1 :]])

            return jax.jvp(of_one, (q[i],), (factors[i],))[1]

        values = model(x, q)
        return values, [*map(column, range(p)), (values - y) * factors[p]]

    def reverse(x: Any, y: Any, params: Any, factors: Any) -> Any:
        def of_row(row: Any, *q: Any) -> Any:
            return model(tuple(leaf[None] for leaf in row), q)[0]

        pull = jax.value_and_grad(of_row, argnums=tuple(range(1, p + 1)))
        q = tuple(params[i] for i in range(p))
        values, columns = jax.vmap(pull, (0, *(None for _ in q)))(x, *q)
        rows = [row * factors[i] for i, row in enumerate([*columns, values - y])]
        return values, _stack(rows) if is_stacked else rows

    if mode is Mode.REVERSE:
        return reverse
    # XLA computes what these derivatives have in common once, and no products with zeros.
    is_separate = not is_stacked and p <= _MAX_FORWARD_PARAMS
    return forward_separately if is_separate else forward


def _stack(rows: list[Any]) -> Any:
    if len(rows) > _MAX_UPDATED_ROWS:
        return jnp.stack(rows)
    stacked = jnp.zeros((len(rows), *rows[0].shape), rows[0].dtype)
    for i, row in enumerate(rows):
        stacked = lax.dynamic_update_slice_in_dim(stacked, row[None], i, 0)
    return stacked
