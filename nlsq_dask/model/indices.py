"""Constant indices outside of an array, which JAX replaces by the nearest index without an error.

NumPy raises an IndexError for the third column of a table with two columns. JAX does so in few
cases; in the others, the value of the second column is returned, or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

# Computes the value of a variable of a jaxpr; None if it is not constant.
_Lookup = Callable[[Any], Any]

# Operations that JAX applies to a constant index, such as adding the length to a negative one. The
# shape of the result is not needed.
_FOLDED: dict[str, Callable[..., Any]] = {
    "lt": np.less,
    "add": np.add,
    "sub": np.subtract,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
    "convert_element_type": lambda value: value,
    "broadcast_in_dim": lambda value: value,
}


_CALLS = {"jit", "pjit"}


def index_outside(closed: Any, n_rows: int) -> tuple[int, int] | None:
    """Return the first constant index outside of an array, with the length of its axis.

    Parameters
    ----------
    closed : ClosedJaxpr
        Jaxpr of a model, traced for ``n_rows`` rows.
    n_rows : int
        Axes of this length are not checked, because they may be those of the rows.
    """
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    for index, length in _extreme_indices(closed.jaxpr, constants.get):
        if length != n_rows and not 0 <= index < length:
            return (index if index >= 0 else index - length), length
    return None


def _extreme_indices(jaxpr: Any, outer: _Lookup) -> Iterator[tuple[int, int]]:
    """Yield smallest and largest constant index of each operation, with the length of the axis.

    The length has been added to negative indices. ``outer`` returns the values of the inputs.
    """
    value = _lookup(jaxpr, outer)
    for equation in jaxpr.eqns:
        for atom, axis in _index_operands(equation):
            index = value(atom)
            if index is not None and np.size(index):
                extent = equation.params["slice_sizes"][axis] - 1
                length = equation.invars[0].aval.shape[axis]
                yield int(np.min(index)), length
                yield int(np.max(index)) + extent, length
        for inner in _inner(equation):
            yield from _extreme_indices(inner, _inputs(equation, inner, value))


def _index_operands(equation: Any) -> Iterator[tuple[Any, int]]:
    """Yield the operands of an operation that are indices, each with the axis it refers to."""
    name = equation.primitive.name
    if name == "dynamic_slice":
        yield from ((atom, axis) for axis, atom in enumerate(equation.invars[1:]))
    elif name == "gather":
        numbers = equation.params["dimension_numbers"]
        axes = numbers.start_index_map
        # JAX turns slices under vmap into gathers that clip, without removing an axis.
        is_slice = not numbers.collapsed_slice_dims
        is_clipped = equation.params["mode"] == GatherScatterMode.CLIP and not is_slice
        if len(axes) == 1 and not is_clipped:
            yield equation.invars[1], int(axes[0])


def _lookup(jaxpr: Any, outer: _Lookup) -> _Lookup:
    """Return the function that computes the values of the variables of a jaxpr."""
    equations = {v: equation for equation in jaxpr.eqns for v in equation.outvars}
    known: dict[Any, Any] = {}

    def value(atom: Any) -> Any:
        if hasattr(atom, "val"):
            return atom.val
        if atom not in known:
            known[atom] = compute(equations[atom], atom) if atom in equations else outer(atom)
        return known[atom]

    def compute(equation: Any, atom: Any) -> Any:
        name = equation.primitive.name
        if name in _CALLS:
            (inner,) = _inner(equation)
            position = equation.outvars.index(atom)
            return _lookup(inner, _inputs(equation, inner, value))(inner.outvars[position])
        if name not in _FOLDED:
            return None
        values = []
        for operand in equation.invars:
            values.append(value(operand))
            if values[-1] is None:
                return None
        return _FOLDED[name](*values)

    return value


def _inner(equation: Any) -> Iterator[Any]:
    """Yield the jaxprs inside an operation, such as the body of a loop."""
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, tuple | list) else (parameter,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _inputs(equation: Any, inner: Any, value: _Lookup) -> _Lookup:
    """Return the function for the inputs of an inner jaxpr, known only for calls of functions."""
    if equation.primitive.name not in _CALLS:
        return lambda atom: None
    outside = dict(zip(inner.invars, equation.invars, strict=True))
    return lambda atom: value(outside[atom]) if atom in outside else None
