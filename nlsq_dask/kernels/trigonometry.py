"""``vectorized``: a function with sines and cosines by SIMD instructions, equal operations once.

XLA on a CPU calls a scalar library for each sine, which takes ten times as long as a vectorized
exponential. Inside a loop it does not recognize that operations are equal once it has moved what
they share out of the loop: the exponential of a decay, which the model and two of its derivatives
contain, was computed three times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import factorial, pi
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LARGEST = 1e5  # beyond, the argument cannot be reduced by pi / 2 in three parts
# pi / 2 as a sum, whose first two terms have 33 bits, so that their multiples are exact.
_PARTS = (float.fromhex("0x1.921fb544p+0"), float.fromhex("0x1.0b4611a6p-34"))
_LAST_PART = float.fromhex("0x1.3198a2e037073p-69")
_N_TERMS = 9  # of the series on [-pi / 4, pi / 4]


def vectorized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays with the same results, except for rounding."""

    def call(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), {})
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return call


def _inner(equation: Any) -> Any:
    """Return the jaxpr that an equation only calls, or None."""
    if equation.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
        return equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return None


def _evaluate(jaxpr: Any, constants: Any, args: Any, known: dict[Any, Any]) -> list[Any]:
    """Evaluate a jaxpr, each operation once for the same inputs.

    ``known`` has the inputs and the outputs of operations, by what the operation is; they are kept,
    so that no other array gets the identity of one of them.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        inputs, inner = [read(atom) for atom in equation.invars], _inner(equation)
        if inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, known)
        else:
            is_sine = equation.primitive in (lax.sin_p, lax.cos_p) and _is_suitable(inputs[0])
            key = _key(equation, inputs, is_sine)
            if key not in known:
                compute = _sine_and_cosine if is_sine else partial(_apply, jaxpr, equation)
                known[key] = inputs, compute(*inputs)
            _, outputs = known[key]
            if is_sine:
                outputs = [outputs[equation.primitive is lax.cos_p]]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _key(equation: Any, inputs: list[Any], is_sine: bool) -> Any:
    """Return what identifies the result of an equation: its operation and its inputs."""
    pairs = zip(equation.invars, inputs, strict=True)
    atoms = tuple(
        (str(atom.aval), np.asarray(value).tobytes()) if hasattr(atom, "val") else id(value)
        for atom, value in pairs
    )
    if is_sine:
        return "sine and cosine", atoms
    params = tuple((name, str(value)) for name, value in sorted(equation.params.items()))
    # Values of these may differ although they are written alike.
    is_plain = not equation.effects and all(_is_plain(v) for v in equation.params.values())
    return equation.primitive, atoms, params, None if is_plain else id(equation)


def _is_plain(value: Any) -> bool:
    """Return whether a parameter of an operation is known from how it is written."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.integer, np.dtype))


def _apply(jaxpr: Any, equation: Any, *inputs: Any) -> list[Any]:
    """Evaluate one equation of a jaxpr."""
    pairs = zip(equation.invars, inputs, strict=True)
    values = {atom: value for atom, value in pairs if not hasattr(atom, "val")}
    info = jaxpr.debug_info._replace(arg_names=("",) * len(values), result_paths=None)
    alone = jaxpr.replace(
        constvars=[],
        invars=list(values),
        outvars=equation.outvars,
        eqns=[equation],
        debug_info=info,
    )
    outputs: list[Any] = jax.core.eval_jaxpr(alone, [], *values.values())
    return outputs


def _is_suitable(x: Any) -> bool:
    return x.ndim > 0 and x.dtype in (jnp.float32, jnp.float64)


def _sine_and_cosine(x: Any) -> tuple[Any, Any]:
    is_large = ~(jnp.abs(x) <= _LARGEST).all()  # also if one is NaN
    result: tuple[Any, Any] = lax.cond(is_large, lambda x: (jnp.sin(x), jnp.cos(x)), _by_series, x)
    return result


def _by_series(x: Any) -> tuple[Any, Any]:
    """Return sine and cosine of arguments that are not large, by Taylor series."""
    wide = x.astype(jnp.float64)
    quarter = jnp.round(wide * (2 / pi))
    rest = ((wide - quarter * _PARTS[0]) - quarter * _PARTS[1]) - quarter * _LAST_PART
    rest = rest.astype(x.dtype)
    square = rest * rest
    sine = rest + rest * square * _series(square, 3)
    cosine = 1 + square * _series(square, 2)
    turn = quarter - 4 * jnp.floor(0.25 * quarter)
    is_swapped = (turn == 1) | (turn == 3)
    of_sine = jnp.where(is_swapped, cosine, sine)
    of_cosine = jnp.where(is_swapped, sine, cosine)
    return (
        jnp.where(turn >= 2, -of_sine, of_sine),
        jnp.where((turn == 1) | (turn == 2), -of_cosine, of_cosine),
    )


def _series(square: Any, first: int) -> Any:
    """Return ``-1 / first! + square / (first + 2)! - ...``."""
    total = jnp.zeros_like(square)
    for i in reversed(range(_N_TERMS)):
        total = total * square + (-1.0) ** (i + 1) / factorial(first + 2 * i)
    return total
