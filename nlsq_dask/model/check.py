"""Whether a model can be used: traced by JAX, real, one value a row, and from that row alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import ModelError
from nlsq_dask.model.advice import (
    BRANCH_HINT,
    NOT_IN_JAX_HINT,
    columns_hint,
    error_hint,
    is_truth_value_error,
)
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.rows.rows import Rows

# Two numbers of rows at which the result's shape is looked at; any two that differ will do.
_PROBE_ROWS = (7, 12)


def check_trace(model: Model, x_labels: Sequence[str] = ()) -> None:
    """Raise a ModelError unless the function can be traced and returns one real value a row.

    Parameters
    ----------
    model : Model
    x_labels : sequence of str
        What the arrays of x call themselves, for messages; empty where they do not.
    """
    params = jax.ShapeDtypeStruct((model.n_params,), np.dtype(model.dtype))
    with x64():
        for n_rows in _PROBE_ROWS:
            try:
                out = jax.eval_shape(model.raw, model.x_specs(n_rows), params)
            except jax.errors.TracerBoolConversionError as error:
                raise _tracing_error(model, BRANCH_HINT) from error
            except (
                jax.errors.TracerArrayConversionError,
                jax.errors.ConcretizationTypeError,
                jax.errors.TracerIntegerConversionError,
            ) as error:
                raise _tracing_error(model, NOT_IN_JAX_HINT) from error
            except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                if is_truth_value_error(error):
                    raise _tracing_error(model, BRANCH_HINT) from error
                message = str(error).partition("\n")[0].rstrip(".")  # JAX goes on with its manual
                raise ModelError(
                    f"The model {model.name!r} raised {type(error).__name__}: {message}. It was "
                    f"called as model(x, *params) with {_describe_x(model)} of b rows, here "
                    f"{n_rows}, and {model.n_params} single numbers. "
                    f"{error_hint(model, error, x_labels)}".rstrip()
                ) from error
            _check_output(model, out, n_rows)


def _tracing_error(model: Model, hint: str) -> ModelError:
    return ModelError(f"The model {model.name!r} cannot be traced by JAX: {hint}")


def _describe_x(model: Model) -> str:
    names = model.layout.x_names
    if names is None:
        (features,) = model.layout.x_features
        shape = ", ".join(map(str, ("b", *features)))
        return f"x as one array of shape ({shape}{'' if features else ','})"
    if isinstance(names, int):
        return f"x as a tuple of {names} arrays, in the order of x_data,"
    return f"x as a dict of {', '.join(map(repr, names))}"


def _check_output(model: Model, out: object, n_rows: int) -> None:
    if not hasattr(out, "shape") or not hasattr(out, "dtype"):
        raise ModelError(
            f"The model {model.name!r} must return an array of one value a row; it returned "
            f"{type(out).__name__}."
        )
    if out.shape != (n_rows,):
        given = ", ".join(str((n_rows, *features)) for features in model.layout.x_features)
        raise ModelError(
            f"The model {model.name!r} must return one value a row: for x of shape {given} it "
            f"returned shape {out.shape}, expected ({n_rows},). {columns_hint(model)}".rstrip()
        )
    if np.dtype(out.dtype).kind != "f":
        raise ModelError(
            f"The model {model.name!r} returned {out.dtype} values; expected real floating-point "
            f"numbers, which have a derivative with respect to the parameters."
        )


def check_row_wise(
    model: Model, kernel: PredictionKernel, rows: Rows, params: NDArray[np.float64]
) -> None:
    """Raise a ModelError if the value at a row depends on the other rows of its block.

    A few rows, the extremes among them, are evaluated in a block of many different rows and each
    in a block of copies of itself, at the start and at a point beside it.

    Parameters
    ----------
    model : Model
    kernel : PredictionKernel
        Of this model.
    rows : Rows
        Some rows of the data, all finite.
    params : ndarray, shape (p,)
    """
    n = kernel.piece_rows
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
                    f"The model {model.name!r} is not row-wise: its value at a row depends on the "
                    f"other rows of the block, or on the row's position in it. It is called with "
                    f"blocks of rows in any size and order, so operations across rows (mean, max, "
                    f"cumsum, sort, indexing by position) are not possible; compute such "
                    f"quantities beforehand and pass them as another x or as constants."
                )


def float32_constants(model: Model) -> list[str]:
    """Name the float32 JAX arrays that the function takes from outside.

    Such an array was made where 64-bit values were off, so it has lost digits already.
    """
    function = inspect.unwrap(model.function)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    try:
        outside = inspect.getclosurevars(function)
    except TypeError:  # a callable object or a builtin
        return []
    values = {**outside.globals, **outside.nonlocals}
    return sorted(
        name
        for name, value in values.items()
        if isinstance(value, jax.Array) and value.dtype == jnp.float32
    )
