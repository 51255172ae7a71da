"""Evaluation of a function of many scalar parameters with one vector of parameters.

A model takes scalar parameters, ``model(x, *params)``. With thousands of them it usually stacks
them again, ``jnp.stack(params)``, and the derivative of this stacking has one operation per
parameter, which is slow to trace, compile and run. The model is therefore traced with scalars, and
wherever it stacks consecutive parameters, a slice of the vector replaces the stacked scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax


def call_with_vector(function: Callable[..., Any], params: Any) -> Any:
    """Return ``function(*params)``, using slices of ``params`` where the function stacks them.

    Parameters
    ----------
    function : callable
        Function of p scalars that returns an array and can be traced by JAX.
    params : array, shape (p,)
        The scalars as one vector.
    """
    numbers = [jax.ShapeDtypeStruct((), params.dtype)] * len(params)
    closed = jax.make_jaxpr(function)(*numbers)
    jaxpr = closed.jaxpr
    spans = {variable: range(i, i + 1) for i, variable in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        span = _span(equation, spans)
        if span is not None:
            spans[equation.outvars[0]] = span
    inputs: dict[Any, Any] = {}
    needed, kept = set(jaxpr.outvars), []
    for equation in reversed(jaxpr.eqns):
        made = [v for v in equation.outvars if v in needed]
        span = spans.get(made[0]) if made else None
        if span is not None and len(span) > 1:
            inputs[made[0]] = params[span.start : span.stop]
        elif made or equation.effects:
            kept.append(equation)
            needed.update(v for v in equation.invars if not hasattr(v, "val"))
    inputs |= {v: params[i] for i, v in enumerate(jaxpr.invars) if v in needed}
    unnamed = jaxpr.debug_info._replace(arg_names=("",) * len(inputs))
    rest = jaxpr.replace(invars=list(inputs), eqns=kept[::-1], debug_info=unnamed)
    (result,) = jax.core.eval_jaxpr(rest, closed.consts, *inputs.values())
    return result


def _span(equation: Any, spans: dict[Any, range]) -> range | None:
    """Return the range of parameters that a jaxpr equation stacks; None if it does anything else.

    ``spans`` has the range of parameters that each variable of the jaxpr holds.
    """
    aval = equation.outvars[0].aval
    parts = [None if hasattr(atom, "val") else spans.get(atom) for atom in equation.invars]
    first = parts[0] if parts else None
    if first is None or aval.ndim > 1:
        return None
    if equation.primitive.name in ("broadcast_in_dim", "reshape", "convert_element_type"):
        is_same = aval.size == len(first) and aval.dtype == equation.invars[0].aval.dtype
        return first if is_same else None
    if equation.primitive.name not in ("stack", "concatenate"):
        return None
    for part, following in pairwise(parts):
        if part is None or following is None or part.stop != following.start:
            return None
    return range(first.start, first.start + aval.size)
