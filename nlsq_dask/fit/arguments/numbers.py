"""Checks of numbers in arguments, and of the names by which they are given."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._text import join_first

Vector = NDArray[np.float64]

ORDER = "The order of arguments is model, x, y, p0."


def vector(values: Any, what: str, instead_of_none: str = "", names: Sequence[str] = ()) -> Vector:
    """Return ``values`` as a vector, or raise a ValueError if they are not real numbers.

    Parameters
    ----------
    values : Any
    what : str
        Words for the values in messages, such as "lower bounds".
    instead_of_none : str
        Advice in the message if an entry is None.
    names : sequence of str
        Names of the parameters, with which messages refer to entries.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # of lists in a list
        raise ValueError(
            f"{what} must be a sequence of real numbers; got {reprlib.repr(values)}."
        ) from error
    if array.ndim <= 1 and array.dtype.kind == "O":
        _reject_first_not_real(array, what, instead_of_none, names)
    array = np.atleast_1d(array)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{what} must be a sequence of real numbers; got shape {array.shape} and dtype "
            f"{array.dtype}. {ORDER if what == 'p0' and array.ndim > 1 else ''}".rstrip()
        )
    return array.astype(np.float64)


def _reject_first_not_real(
    array: NDArray[Any], what: str, instead_of_none: str, names: Sequence[str]
) -> None:
    for i, entry in enumerate(array.reshape(-1)):
        if not is_real(entry):
            where = f" as entry {i}" if array.ndim else ""
            where = f" for parameter {names[i]!r}" if array.size == len(names) else where
            advice = f" {instead_of_none}" if entry is None else ""
            sentence = f"{what} must be real numbers; got {reprlib.repr(entry)}{where}.{advice}"
            raise ValueError(sentence.rstrip())


def as_real(value: Any, what: str) -> float:
    """Return ``value`` as a number, or raise a ValueError; ``what`` names it in the message."""
    if not is_real(value):
        raise ValueError(f"{what} must be a real number; got {value!r}.")
    return float(value)


def is_real(value: Any) -> bool:
    """Whether ``value`` is a single real number; an array without dimensions is one."""
    try:
        array = np.asarray(value)
    except ValueError:  # of lists in a list
        return False
    return array.ndim == 0 and array.dtype.kind in "biuf"


def reject_unknown(given: Iterable[str], names: Sequence[str], what: str) -> None:
    """Raise a ValueError if ``given`` has names that no parameter has; ``what`` is the argument."""
    known = set(names)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"unknown parameter names in {what}: {join_first([*map(repr, unknown)])}. The "
            f"parameters are {join_first(names)}."
        )
