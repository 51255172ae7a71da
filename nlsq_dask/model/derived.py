"""``derive``: functions of parameters and their covariance, by the delta method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.named_values import NamedValues, as_real_array

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_EXAMPLE = "lambda p: jnp.log(2) / p['rate']"


def derive(
    function: Callable[[Mapping[str, Any]], Any],
    names: Sequence[str],
    params: Vector,
    pcov: Matrix,
    root: Matrix | None = None,
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
    root : ndarray, shape (p, k), optional
        Square root of ``pcov``, if it is known, which has more digits.

    Returns
    -------
    values, errors : dict
        By the keys of the dict that the function returns; by None if it returns no dict.
    covariance : ndarray, shape (m, m)
        Covariance of all m numbers in the values, in order. It is infinite where pcov is infinite
        for a parameter on which the number depends.
    """
    keys: list[Any] = []

    # Derivatives by the others have no effect, and one that is infinite would spoil all of them.
    varying = np.flatnonzero(np.diag(pcov) != 0.0)

    def of_vector(vector: Any) -> list[Any]:
        scalars: list[Any] = [jnp.asarray(value) for value in params]
        for i, scalar in zip(varying, vector, strict=True):
            scalars[i] = scalar
        named = NamedValues(dict(zip(names, scalars, strict=True)), "The function of derive")
        result = named.call(function, _EXAMPLE)
        parts = result if isinstance(result, Mapping) else {None: result}
        if not parts:
            raise ValueError(
                "The function of derive returned an empty dict; it must have a number."
            )
        keys[:] = parts
        return [_as_real(part) for part in parts.values()]

    with x64():
        point = jnp.asarray(params[varying])
        values = [np.asarray(part)[()] for part in of_vector(point)]
        try:
            rates = jax.jacfwd(of_vector)(point)
        except TypeError:  # a function with derivatives in reverse mode only
            rates = jax.jacrev(of_vector)(point)
    rows = np.concatenate([np.reshape(part, (-1, len(varying))) for part in rates])
    part_of = None if root is None else root[varying]
    covariance = _propagated(rows, pcov[np.ix_(varying, varying)], part_of)
    ends = np.cumsum([np.size(value) for value in values])[:-1]
    parts = np.split(np.sqrt(np.diag(covariance)), ends)
    errors = [part.reshape(np.shape(value))[()] for part, value in zip(parts, values, strict=True)]
    by_key = dict(zip(keys, values, strict=True)), dict(zip(keys, errors, strict=True))
    return (*by_key, covariance)


def _as_real(leaf: Any) -> Any:
    array, what = as_real_array(leaf)
    if array is None:
        raise ValueError(
            f"The function of derive must return real numbers; it returned {what}. Write it like "
            f"{_EXAMPLE}."
        )
    return array.astype(np.float64)


def _propagated(rates: Matrix, pcov: Matrix, root: Matrix | None) -> Matrix:
    """Return ``rates @ pcov @ rates.T``, where an infinite variance times zero is zero.

    A derivative that is not finite gives an infinite variance.
    """
    variances = np.diag(pcov)
    reach = ((rates != 0.0) & ~np.isfinite(variances)).any(axis=1)
    reach |= ~np.isfinite(rates).all(axis=1)
    finite = np.where(np.isfinite(variances) & np.isfinite(rates), rates, 0.0)
    if root is not None and np.isfinite(root).all():
        change = finite @ root
        covariance = change @ change.T
    else:
        covariance = finite @ np.where(np.isfinite(pcov), pcov, 0.0) @ finite.T
    covariance[np.outer(reach, reach)] = np.inf
    return np.asarray(covariance)
