"""``derive``: functions of parameters and their covariance, by the delta method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.named_values import NamedValues

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_EXAMPLE = "lambda p: jnp.log(2) / p['rate']"


def derive(
    function: Callable[[Mapping[str, Any]], Any],
    names: Sequence[str],
    params: Vector,
    pcov: Matrix,
) -> tuple[dict[Any, Any], dict[Any, Any], Matrix]:
    """Return values of a function of the parameters, their standard errors and covariance matrix.

    Parameters
    ----------
    function : callable
        Function of a mapping of the parameters by name, written with jax.numpy. It returns a
        number, an array, or a dict of them.
    names : sequence of str
    params : ndarray, shape (p,)
    pcov : ndarray, shape (p, p)
        Covariance of the parameters, which may have infinite elements.

    Returns
    -------
    values, errors : dict
        By the keys of the dict that the function returns; by None if it returns no dict.
    covariance : ndarray, shape (m, m)
        Covariance of all m numbers in the values, in order. It is infinite where pcov is infinite
        for a parameter on which the number depends.
    """
    keys: list[Any] = []

    def of_vector(vector: Any) -> list[Any]:
        named = NamedValues(dict(zip(names, vector, strict=True)), "The function of derive")
        result = named.call(function, _EXAMPLE)
        parts = result if isinstance(result, Mapping) else {None: result}
        if not parts:
            raise ValueError(
                "The function of derive returned an empty dict; it must have a number."
            )
        keys[:] = parts
        return [_as_real(part) for part in parts.values()]

    with x64():
        point = jnp.asarray(params)
        values = [np.asarray(part)[()] for part in of_vector(point)]
        try:
            rates = jax.jacfwd(of_vector)(point)
        except TypeError:  # a function with derivatives in reverse mode only
            rates = jax.jacrev(of_vector)(point)
    rows = [np.reshape(part, (-1, len(names))) for part in rates]
    covariance = _propagated(np.concatenate(rows), pcov)
    ends = np.cumsum([np.size(value) for value in values])[:-1]
    parts = np.split(np.sqrt(np.diag(covariance)), ends)
    errors = [part.reshape(np.shape(value))[()] for part, value in zip(parts, values, strict=True)]
    by_key = dict(zip(keys, values, strict=True)), dict(zip(keys, errors, strict=True))
    return (*by_key, covariance)


def _as_real(leaf: Any) -> Any:
    array = jnp.asarray(leaf)
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"The function of derive must return real numbers; it returned dtype {array.dtype}."
        )
    return array.astype(np.float64)


def _propagated(rates: Matrix, pcov: Matrix) -> Matrix:
    """Return ``rates @ pcov @ rates.T``, where an infinite variance times zero is zero."""
    is_infinite = ~np.isfinite(np.diag(pcov))
    finite = np.where(is_infinite, 0.0, rates) @ np.where(np.isfinite(pcov), pcov, 0.0)
    covariance = finite @ np.where(is_infinite, 0.0, rates).T
    reach = (rates[:, is_infinite] != 0.0).any(axis=1)
    covariance[np.outer(reach, reach)] = np.inf
    return covariance
