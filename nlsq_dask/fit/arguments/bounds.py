"""Lower and upper bounds of the parameters, from the argument ``bounds`` of ``fit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.fit.arguments.numbers import Vector, is_real, reject_unknown, vector

_OF_PAIRS = (
    "For two parameters, bounds are all lower bounds, then all upper bounds: write "
    "bounds=(({lows}), ({highs})), or bounds={{{by_name}}}."
)


def parse_bounds(bounds: Any, names: tuple[str, ...]) -> tuple[Vector, Vector]:
    """Return lower and upper bounds, infinite where there are none; equal ones fix a parameter."""
    n, given = len(names), bounds
    if bounds is None:
        return np.full(n, -np.inf), np.full(n, np.inf)
    if isinstance(bounds, Mapping):
        reject_unknown(bounds, names, "bounds")
        for name, pair in bounds.items():
            if not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
                raise ValueError(f"bounds[{name!r}] must be (low, high); got {pair!r}.")
        pairs = [bounds.get(name, (-np.inf, np.inf)) for name in names]
        bounds = ([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    elif hasattr(bounds, "lb") and hasattr(bounds, "ub"):  # scipy.optimize.Bounds
        bounds = (bounds.lb, bounds.ub)
    if not isinstance(bounds, Sequence | np.ndarray):
        raise ValueError(f"bounds must be (low, high) or a dict by name; got {bounds!r}.")
    if n != 2 and len(bounds) == n and _are_pairs(bounds):  # a pair for each parameter
        bounds = ([pair[0] for pair in bounds], [pair[1] for pair in bounds])
    if len(bounds) != 2:
        which = "" if _are_pairs(bounds) else ", not all of them pairs"
        raise ValueError(
            f"bounds must be (low, high), a pair for each of the {n} parameters, or a dict of "
            f"pairs by name; got {len(bounds)} entries{which}."
        )
    if n == 2 and _are_pairs(bounds) and any(each is None for pair in bounds for each in pair):
        raise ValueError(
            f"bounds must be real numbers; got None. Write -np.inf or np.inf where there is no "
            f"bound. {_both_spellings(bounds, names)}".rstrip()
        )
    low = _side(bounds[0], names, -np.inf, "lower bounds")
    high = _side(bounds[1], names, np.inf, "upper bounds")
    _check_order(names, low, high, _both_spellings(bounds, names) if bounds is given else "")
    return low, high


def _check_order(names: tuple[str, ...], low: Vector, high: Vector, spellings: str) -> None:
    """Raise a ValueError unless lower bounds are less than upper bounds, or equal and finite.

    ``spellings`` says how to write bounds that may be meant as two pairs; they must not be equal,
    because that would fix a parameter by mistake.
    """
    for name, a, b in zip(names, low, high, strict=True):
        is_equal = bool(a == b and np.isfinite(a))
        if a < b or (is_equal and not spellings):
            continue
        sentences = [
            f"the lower bound {a:g} of parameter {name!r} must be less than its upper bound {b:g}.",
            f"To fix {name!r}, write fixed={{{name!r}: {a:g}}}." if is_equal else "",
            spellings,
        ]
        raise ValueError(" ".join(filter(None, sentences)))


def _are_pairs(bounds: Sequence[Any] | NDArray[Any]) -> bool:
    """Whether each entry is a pair, as in the bounds of scipy.optimize.minimize."""
    return all(isinstance(pair, Sequence | np.ndarray) and len(pair) == 2 for pair in bounds)


def _both_spellings(bounds: Any, names: tuple[str, ...]) -> str:
    """Return how to write the bounds of two parameters if they seem to be two pairs, else ""."""
    if len(names) != 2 or not _are_pairs(bounds):
        return ""
    pairs = [
        (-np.inf if low is None else low, np.inf if high is None else high) for low, high in bounds
    ]
    if not all(is_real(low) and is_real(high) and low <= high for low, high in pairs):
        return ""
    if pairs[0][1] == pairs[1][0]:  # both readings are the same
        return ""
    lows, highs = (", ".join(map(_code, side)) for side in zip(*pairs, strict=True))
    by_name = ", ".join(
        f"{name!r}: ({_code(low)}, {_code(high)})"
        for name, (low, high) in zip(names, pairs, strict=True)
    )
    return _OF_PAIRS.format(lows=lows, highs=highs, by_name=by_name)


def _code(number: float) -> str:
    return f"{number:g}".replace("inf", "np.inf")


def _side(value: Any, names: tuple[str, ...], missing: float, what: str) -> Vector:
    if isinstance(value, Mapping):
        reject_unknown(value, names, what)
        value = [value.get(name, missing) for name in names]
    no_bound = "-np.inf" if missing < 0 else "np.inf"
    values = vector(value, what, f"Write {no_bound} where there is no bound.", names)
    if values.shape not in ((1,), (len(names),)):
        raise ValueError(
            f"the {what} have {len(values)} values for {len(names)} parameters. Pass one value for "
            f"all parameters, or one per parameter."
        )
    return np.broadcast_to(values, (len(names),)).copy()
