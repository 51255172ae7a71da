"""Hints in messages about models that raise an error or return a wrong shape when traced."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax import errors

if TYPE_CHECKING:
    from nlsq_dask.model.model import Model

_USE_JAX = (
    "Write it with jax.numpy instead of numpy or math (jnp.exp for np.exp and math.exp), with "
    "jax.scipy instead of scipy (jax.scipy.special for scipy.special)"
)
_NOT_IN_JAX_HINT = f"{_USE_JAX}, and without float(), int() and .item() on x or the parameters."
_BRANCH_HINT = (
    "It uses values of x or of the parameters as conditions, as 'if', 'and', 'or', 'not', min() "
    "and max() do. Write jnp.where(x > 3, this, that) instead of 'if', & and | instead of 'and' "
    "and 'or', jnp.minimum and jnp.maximum instead of min() and max()."
)
_GENERAL_HINT = f"{_USE_JAX}, and with jnp.where instead of 'if' on values."
_MASK_HINT = (
    "Rows cannot be selected by a boolean mask: jnp.where(x > 3, this, that) gives a value for "
    "each row."
)
_SCALAR_PARAMS_HINT = (
    "Each parameter is a separate argument: write `def model(x, a, b)`, or `def model(x, *p)` "
    "for a tuple p of them."
)
_UNPACK_HINT = (
    "To unpack x into k arrays, pass x_data as a tuple of k arrays, or of the names of k "
    "coordinates of y_data."
)
_TRUTH_VALUE = "truth value of an array"  # NumPy's message for an array as a condition
# JAX's messages for a scalar parameter that is indexed or unpacked.
_SCALAR_ERROR = re.compile(r"\b0-d(imensional)?\b")
# Messages of Python and JAX for arithmetic with a tuple or a dict; unpacking a dict gives its keys,
# which are strings.
_TUPLE_ERROR = re.compile(r"\btuple\b|can't multiply sequence")
_DICT_ERROR = re.compile(r"\bdict\b|\bstr\b|can't multiply sequence|to a scalar index")


def tracing_hint(error: Exception) -> str:
    """Return a hint if the model failed because JAX traces it without values; otherwise ""."""
    if isinstance(error, errors.TracerBoolConversionError) or _TRUTH_VALUE in str(error):
        return _BRANCH_HINT
    needs_values = (
        errors.TracerArrayConversionError,
        errors.ConcretizationTypeError,
        errors.TracerIntegerConversionError,
    )
    return _NOT_IN_JAX_HINT if isinstance(error, needs_values) else ""


def derivative_hint(error: Exception, blamed: Sequence[str]) -> str:
    """Return a hint on how to mend a model that has no derivative.

    Parameters
    ----------
    error : Exception
        Error that JAX raised when it differentiated the model.
    blamed : sequence of str
        Names of the parameters without derivative; empty if each alone has one.
    """
    text = str(error).partition("\n")[0].rstrip(".")
    if "callback" in text.lower():
        return (
            "It calls a Python function by a callback such as jax.pure_callback, which has no "
            f"derivative and cannot be sent to workers. {_USE_JAX}. Values that do not depend on "
            "the parameters can be computed beforehand and passed as another x."
        )
    hint = f"JAX reports: {text}. Use another expression"
    if "custom_vjp" not in text:
        hint += ", or define its derivative with jax.custom_jvp"
    if not blamed:
        return f"{hint}."
    example = ", ".join(f"{name!r}: 2.0" for name in blamed)
    return f"{hint}, or fix {' and '.join(map(repr, blamed))} (such as fixed={{{example}}})."


def error_hint(model: Model, error: Exception, x_labels: Sequence[str]) -> str:
    """Return a hint on how to mend a model that raised an error; empty if the error is clear.

    Parameters
    ----------
    model : Model
    error : Exception
        Error that the model raised.
    x_labels : sequence of str
        Names of the x arrays; an empty string for an array without a name.
    """
    text, names = str(error), model.layout.x_names
    if re.match(r"module '(jax|numpy)\b.*' has no attribute", text):
        return ""  # a misspelled name
    if "boolean indices must be concrete" in text:
        return _MASK_HINT
    if "positional argument" in text:
        return "The arguments after x are the parameters, one for each value of p0."
    if isinstance(names, int) and _TUPLE_ERROR.search(text):
        return tuple_hint(names, x_labels)
    if isinstance(names, tuple) and (isinstance(error, KeyError) or _DICT_ERROR.search(text)):
        return f"The model receives x as one argument, a dict with the arrays {_items(names)}."
    if _SCALAR_ERROR.search(text):
        return _SCALAR_PARAMS_HINT
    if "unpack" in text:
        return columns_hint(model) or _UNPACK_HINT
    return _GENERAL_HINT


def tuple_hint(n: int, x_labels: Sequence[str]) -> str:
    """Return a hint on how a model unpacks an x that is a tuple of ``n`` arrays."""
    are_names = len(set(x_labels)) == n and all(map(str.isidentifier, x_labels))
    names = x_labels if are_names else [f"x{i}" for i in range(n)]
    return (
        f"The model receives x as one argument, a tuple of {n} arrays: begin with "
        f"`{', '.join(names)}{',' * (n == 1)} = x`."
    )


def columns_hint(model: Model) -> str:
    """Return a hint on how a model accesses the columns of x; empty unless x is a 2-d array."""
    if model.layout.x_names is not None or model.layout.x_features == ((),):
        return ""
    ((n,),) = model.layout.x_features
    columns = (
        " and ".join(f"x[:, {i}]" for i in range(n)) if n <= 2 else f"x[:, 0] to x[:, {n - 1}]"
    )
    names = ", ".join(f"x{i}" for i in range(n)) if n <= 4 else "x0, x1, ..."
    begins = f"; `{names} = x.T` unpacks them" if n > 1 else ""
    return f"x is a block of rows with shape (b, {n}) and columns {columns}{begins}."


def _items(names: Sequence[str]) -> str:
    return ", ".join(f"x[{name!r}]" for name in names)
