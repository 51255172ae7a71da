"""The Jacobian of a block of rows, in forward or reverse mode by a rule that looks at the model.

Forward mode pushes every parameter's tangent through the whole model; reverse mode pulls one
cotangent back for each row. Arithmetic favours forward mode for few parameters and reverse mode
for many, but what decides on a CPU is how often XLA evaluates anew what both share: in forward
mode it recomputes sines, and whatever is wider than a column, for every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nlsq_dask.model.model import TRACED_ROWS, Model

_MAX_FORWARD_PARAMS = 5  # parameters; up to there forward mode was never the slower one, see below
# Calls into a scalar library, ten times as dear as a vectorized exponential.
_EXPENSIVE_PRIMITIVES = {"sin", "cos", "tan"}
# Up to this many rows XLA fuses the stacking with all that it stacks, once for each row.
_MAX_UPDATED_ROWS = 8


class Mode(Enum):
    """How the Jacobian is made."""

    FORWARD = "forward"
    REVERSE = "reverse"


def choose_mode(model: Model, jaxpr: Any) -> Mode:
    """Return the mode in which the Jacobian of this model, traced as ``jaxpr``, is made.

    Forward mode for at most five parameters, if all that depends on them is one number a row and
    there is no sine, cosine or tangent; otherwise reverse mode. A model that can be differentiated
    in one mode only gets that one: a ``while_loop`` or a model that one row is too few for the
    forward mode, a ``custom_vjp`` the reverse mode.

    The rule looks at the traced model and never at a clock, because the two modes differ in bits.
    """
    n_leaves = len(model.layout.x_features)
    depends = [False] * n_leaves + [True] * model.n_params
    names, widest = set(), 0
    for name, size in _dependent_operations(jaxpr.jaxpr, depends):
        names.add(name)
        widest = max(widest, size)
    if any(name.startswith("custom_vjp") for name in names):
        return Mode.REVERSE
    if "while" in names or not _accepts_one_row(model):
        return Mode.FORWARD
    is_narrow = widest <= TRACED_ROWS and not names & _EXPENSIVE_PRIMITIVES
    return Mode.FORWARD if is_narrow and model.n_params <= _MAX_FORWARD_PARAMS else Mode.REVERSE


def _accepts_one_row(model: Model) -> bool:
    """Return whether the model gives one value for a block of one row, as reverse mode needs."""
    params = [jax.ShapeDtypeStruct((), model.dtype) for _ in range(model.n_params)]
    try:
        out = jax.eval_shape(model.raw, model.x_specs(1), params)
    except (TypeError, ValueError, IndexError):  # a squeeze, for instance, has taken the row away
        return False
    return bool(out.shape == (1,))


def _dependent_operations(jaxpr: Any, depends: Sequence[bool]) -> Iterator[tuple[str, int]]:
    """Yield name and largest result of every operation on which a marked input has influence."""
    reached = {v for v, is_reached in zip(jaxpr.invars, depends, strict=True) if is_reached}
    for equation in jaxpr.eqns:
        touched = [not hasattr(v, "val") and v in reached for v in equation.invars]
        if not any(touched):
            continue
        reached.update(equation.outvars)
        name = equation.primitive.name
        yield name, max((v.aval.size for v in equation.outvars), default=0)
        if name.startswith("custom_vjp"):  # whose inside is not differentiated
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                # Loops and branches order their inputs in ways of their own.
                same = len(inner.invars) == len(touched)
                yield from _dependent_operations(
                    inner, touched if same else [True] * len(inner.invars)
                )


Linearized = Callable[[Any, Any, Any, Any], Any]


def residual_and_jacobian(model: Model, mode: Mode) -> Linearized:
    """Return the function that stacks Jacobian and residual of some rows.

    Its arguments are the x arrays, y in the model's dtype, the parameters and factors, shape
    ``(p + 1,)``; its results the model's values, shape ``(b,)``, and ``[J^T; r]``, shape
    ``(p + 1, b)``, with each of its rows multiplied by its factor.
    """
    p = model.n_params

    def forward(x: Any, y: Any, params: Any, factors: Any) -> Any:
        values, push = jax.linearize(lambda *q: model(x, q), *(params[i] for i in range(p)))
        columns = jax.vmap(lambda t: push(*(t[i] for i in range(p))))(jnp.diag(factors[:p]))
        residual = values - y
        return values, jnp.concatenate([columns, residual[None] * factors[p]])

    def reverse(x: Any, y: Any, params: Any, factors: Any) -> Any:
        def of_row(row: Any, *q: Any) -> Any:
            return model(tuple(leaf[None] for leaf in row), q)[0]

        pull = jax.value_and_grad(of_row, argnums=tuple(range(1, p + 1)))
        q = tuple(params[i] for i in range(p))
        values, columns = jax.vmap(pull, (0, *(None for _ in q)))(x, *q)
        rows = [*columns, values - y]
        return values, _stack([row * factors[i] for i, row in enumerate(rows)])

    return forward if mode is Mode.FORWARD else reverse


def _stack(rows: list[Any]) -> Any:
    if len(rows) > _MAX_UPDATED_ROWS:
        return jnp.stack(rows)
    stacked = jnp.zeros((len(rows), *rows[0].shape), rows[0].dtype)
    for i, row in enumerate(rows):
        stacked = lax.dynamic_update_slice_in_dim(stacked, row[None], i, 0)
    return stacked
