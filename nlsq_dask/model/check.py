"""Checks of a model: JAX can trace it, and it returns one real value per row.

The value of a row must not depend on other rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask._text import join_first
from nlsq_dask.errors import ModelError
from nlsq_dask.model.advice import columns_hint, derivative_hint, error_hint, tracing_hint
from nlsq_dask.model.indices import index_outside
from nlsq_dask.model.jacobian import derivative_error, has_derivative
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.model.program import traced_once
from nlsq_dask.rows.rows import Rows

# Two different numbers of rows at which the shape of the result is checked.
_PROBE_ROWS = (7, 12)


def check_trace(model: Model, x_labels: Sequence[str] = ()) -> None:
    """Raise a ModelError unless JAX can trace the model and it returns one real value per row.

    A model that computes the same as one that was checked before is not checked again.

    Parameters
    ----------
    model : Model
    x_labels : sequence of str
        Names of the x arrays for messages; an empty string for an array without a name.
    """
    check = partial(_check_trace, model, x_labels)
    try:
        with x64():
            jaxpr = model.jaxpr()
    except Exception:  # which the check explains
        check()
        return
    traced_once((_check_trace, model.layout, model.dtype, model.n_params), jaxpr, check)


def _check_trace(model: Model, x_labels: Sequence[str]) -> bool:
    """Check a model as ``check_trace`` does; return True."""
    params = jax.ShapeDtypeStruct((model.n_params,), np.dtype(model.dtype))
    make_jaxpr = jax.make_jaxpr(model.raw, return_shape=True)
    with x64():
        for n_rows in _PROBE_ROWS:
            try:
                jaxpr, out = make_jaxpr(model.x_specs(n_rows), params)
            except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                hint = tracing_hint(error)
                if hint:
                    text = f"The model {model.name!r} cannot be traced by JAX. {hint}"
                    raise ModelError(text) from error
                message = str(error).partition("\n")[0].rstrip(".")  # JAX appends help texts
                raise ModelError(
                    f"The model {model.name!r} raised {type(error).__name__}: {message}. It was "
                    f"called as model(x, *params) with {_describe_x(model)}, for a block of "
                    f"b = {n_rows} rows, and {model.n_arguments} scalars. "
                    f"{error_hint(model, error, x_labels)}".rstrip()
                ) from error
            _check_output(model, out, n_rows)
            _check_indices(model, jaxpr, n_rows)
    return True


def _check_indices(model: Model, jaxpr: Any, n_rows: int) -> None:
    outside = index_outside(jaxpr, n_rows)
    if outside is None:
        return
    index, length = outside
    may_be_x = model.layout.x_features == ((length,),)
    raise ModelError(
        f"The model {model.name!r} reads index {index} of an axis of length {length}, whose last "
        f"index is {length - 1}. JAX would silently use another element. "
        f"{columns_hint(model) if may_be_x else ''}".rstrip()
    )


def _describe_x(model: Model) -> str:
    names = model.layout.x_names
    if names is None:
        (features,) = model.layout.x_features
        shape = ", ".join(map(str, ("b", *features)))
        return f"x as one array of shape ({shape}{'' if features else ','})"
    if isinstance(names, int):
        return f"x as a tuple of {names} arrays, in the order of x_data"
    return f"x as a dict of {', '.join(map(repr, names))}"


def _check_output(model: Model, out: object, n_rows: int) -> None:
    if not hasattr(out, "shape") or not hasattr(out, "dtype"):
        raise ModelError(
            f"The model {model.name!r} must return an array of one value per row; it returned "
            f"{type(out).__name__}."
        )
    if out.shape != (n_rows,):
        given = ", ".join(str((n_rows, *features)) for features in model.layout.x_features)
        raise ModelError(
            f"The model {model.name!r} must return one value per row: for x of shape {given} it "
            f"returned shape {out.shape}, expected ({n_rows},). {columns_hint(model)}".rstrip()
        )
    if np.dtype(out.dtype).kind != "f":
        raise ModelError(
            f"The model {model.name!r} must return real floating-point values; it returned "
            f"{out.dtype}, which has no derivative with respect to the parameters."
        )


def check_derivative(model: Model, names: Sequence[str]) -> None:
    """Raise a ModelError, with the parameters, if JAX cannot differentiate the model.

    Parameters
    ----------
    model : Model
        A model that ``check_trace`` accepts.
    names : sequence of str
        Names of the parameters.
    """
    error = derivative_error(model)
    if error is None:
        return
    if isinstance(error, ModelError):  # says what to write already
        raise error
    blamed = [name for i, name in enumerate(names) if not has_derivative(model, i)]
    of = join_first(list(map(repr, blamed or names)))
    raise ModelError(
        f"JAX cannot differentiate the model {model.name!r} with respect to {of}. "
        f"{derivative_hint(error, blamed)}"
    ) from error


def check_row_wise(
    model: Model, kernel: PredictionKernel, rows: Rows, params: NDArray[np.float64]
) -> None:
    """Raise a ModelError if the value at a row depends on the other rows of its block.

    A few rows are evaluated twice, in a block of different rows and in a block of copies of the
    row. The two values must agree, both at ``params`` and at parameters nearby.

    Parameters
    ----------
    model : Model
    kernel : PredictionKernel
        Compiled evaluation of ``model``.
    rows : Rows
        Rows of the data with finite values.
    params : ndarray, shape (p,)
        Parameters of the model.
    """
    n = kernel.batch_rows
    mixed = np.arange(n) % len(rows)
    first_x = rows.x[0].reshape(len(rows), -1)[mixed, 0]
    places = sorted({0, n // 3, n - 1, int(first_x.argmin()), int(first_x.argmax())})
    beside = params + 0.1 * np.where(params == 0.0, 1.0, params) * np.cos(np.arange(len(params)))
    tolerance = float(np.sqrt(np.finfo(model.dtype).eps))
    for point in (params, beside):
        among_others = kernel([(rows.take(mixed), n)], point)[0]
        scale = float(np.abs(among_others[np.isfinite(among_others)]).max(initial=0.0))
        for place in places:
            alone = kernel([(rows.take(np.full(n, mixed[place])), n)], point)[0]
            expected = np.full(n, among_others[place])
            if not np.allclose(alone, expected, tolerance, tolerance * scale, equal_nan=True):
                raise ModelError(
                    f"The model {model.name!r} is not row-wise: its value at a row depends on "
                    f"other rows of the block, or on the row's position in it. Blocks have any "
                    f"size and order, so operations across rows (mean, max, cumsum, sort, indexing "
                    f"by position) are not possible. Compute such quantities beforehand and pass "
                    f"them as another x or as constants."
                )


def float32_constants(model: Model) -> list[str]:
    """Return the names of float32 JAX arrays among the function's globals and closure.

    JAX creates arrays as float32 unless 64-bit values are enabled. Such a constant has only seven
    digits, which may limit the precision of a fit in float64.
    """
    function = inspect.unwrap(model.function)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    try:
        outside = inspect.getclosurevars(function)
    except TypeError:  # a callable object or a built-in
        return []
    values = {**outside.globals, **outside.nonlocals}
    return sorted(
        name
        for name, value in values.items()
        if isinstance(value, jax.Array) and value.dtype == jnp.float32
    )
