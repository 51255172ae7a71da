"""The arguments ``fixed`` and ``ties`` of ``fit``: parameters that are not free."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._text import join_first
from nlsq_dask.fit.arguments.numbers import Vector, is_real, reject_unknown
from nlsq_dask.model.transform import Tie

# Value of each fixed parameter by name, None for its initial value; False for one that is free.
Fixed = dict[str, float | bool | None]

_FORMS = "fixed={{'{0}': 0.5}} for a value, or fixed=['{0}'] for the initial value"
_TIE = "ties={{{name!r}: lambda p: 2 * p['{other}']}}"


def parse_fixed(fixed: Any, names: tuple[str, ...]) -> Fixed:
    """Return what ``fixed`` says of each parameter that it names."""
    if fixed is None:
        return {}
    forms = _FORMS.format(names[-1])
    if isinstance(fixed, str):
        raise ValueError(f"fixed must be a dict or a list of names; got {fixed!r}. Write {forms}.")
    if isinstance(fixed, Mapping):
        reject_unknown(fixed, names, "fixed")
        return {name: _fixed_value(name, value) for name, value in fixed.items()}
    if not (isinstance(fixed, Collection) and all(isinstance(name, str) for name in fixed)):
        raise ValueError(
            f"fixed must be a dict or a list of names; got {reprlib.repr(fixed)}. Write {forms}."
        )
    reject_unknown(fixed, names, "fixed")
    return dict.fromkeys(fixed)


def _fixed_value(name: str, value: Any) -> float | bool | None:
    what = f"fixed[{name!r}]"
    if not is_real(value):
        shape = np.shape(value) if hasattr(value, "shape") else ()
        got = f"an array of shape {shape}" if shape else reprlib.repr(value)
        raise ValueError(
            f"{what} must be one real number, True for the initial value, or False for a free "
            f"parameter; got {got}."
        )
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return None if array else False
    if not np.isfinite(array):
        raise ValueError(f"{what} must be finite; got {float(array)}.")
    return float(array)


def fixed_values(
    fixed: Fixed,
    names: tuple[str, ...],
    starts: Mapping[str, float],
    low: Vector,
    high: Vector,
) -> dict[str, float]:
    """Return the value of each fixed parameter, also of those with equal bounds.

    Parameters
    ----------
    fixed : dict of str to value
        Result of ``parse_fixed``.
    names : tuple of str
        Names of all parameters.
    starts : mapping of str to float
        Initial values from p0 and from the signature of the model.
    low, high : ndarray, shape (p,)
        Bounds.
    """
    values = {}
    for name, a, b in zip(names, low, high, strict=True):
        value = fixed.get(name, False)
        if value is False:
            if a == b:
                if name in fixed:
                    raise ValueError(
                        f"fixed[{name!r}] is False, but the bounds of {name!r} are equal, {a:g}, "
                        f"which fixes it. Change the bounds, or leave it out of fixed."
                    )
                values[name] = float(a)
            continue
        if value is None and name not in starts:
            raise ValueError(
                f"fixed has {name!r} without a value, and neither p0 nor the signature of the "
                f"model has one. Write fixed={{{name!r}: 0.5}}, or give it in p0."
            )
        number = starts[name] if value is None else float(value)
        if not np.isfinite(number):
            raise ValueError(f"p0 of parameter {name!r} is {number}; expected a finite number.")
        if not a <= number <= b:
            raise ValueError(
                f"the fixed value {number:g} of parameter {name!r} is outside its bounds [{a:g}, "
                f"{b:g}]. Move it inside, or leave out the bounds."
            )
        values[name] = number
    return values


def parse_ties(
    ties: Any, fixed: Fixed, names: tuple[str, ...], low: Vector, high: Vector
) -> dict[str, Tie]:
    """Return the functions of the tied parameters by name.

    Parameters
    ----------
    ties : dict of str to callable, or None
    fixed : dict of str to value
        Result of ``parse_fixed``.
    names : tuple of str
        Names of all parameters.
    low, high : ndarray, shape (p,)
        Bounds, infinite where there are none.
    """
    if ties is None:
        return {}
    form = _TIE.format(name=names[-1], other=names[0])
    if not isinstance(ties, Mapping):
        raise ValueError(
            f"ties must be a dict of functions by name; got {reprlib.repr(ties)}. Write {form}."
        )
    reject_unknown(ties, names, "ties")
    for name, tie in ties.items():
        if not callable(tie):
            raise ValueError(
                f"ties[{name!r}] must be a function of the other parameters; got {tie!r}. Write "
                f"{form}, or fixed={{...}} for a constant."
            )
        if fixed.get(name, False) is not False:
            raise ValueError(f"{name!r} is both in fixed and in ties. Leave it out of one of them.")
        a, b = low[names.index(name)], high[names.index(name)]
        if np.isfinite(a) or np.isfinite(b):
            raise ValueError(
                f"parameter {name!r} is tied and cannot have bounds; got [{a:g}, {b:g}]. Give "
                f"bounds of the other parameters by name, bounds={{...}}, or (-inf, inf) for "
                f"{name!r}."
            )
    return dict(ties)


def check_any_free(names: Sequence[str], is_free: NDArray[np.bool_]) -> None:
    """Raise a ValueError if all parameters are fixed or tied."""
    if not is_free.any():
        raise ValueError(
            f"no parameter is left to fit: {join_first(names)} are all fixed or tied. Leave at "
            f"least one of them out of fixed and ties, and without equal bounds."
        )
