"""Names, initial values and bounds of the parameters, from the arguments of ``fit``."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._text import join_first
from nlsq_dask.model.call import is_option, positional_arguments

Vector = NDArray[np.float64]

_MISPLACED_RATIO = 10  # values in p0 per parameter; no miscount is so large
_OF_PAIRS = (
    "For two parameters, bounds are all lower bounds, then all upper bounds: write "
    "bounds=(({lows}), ({highs})), or bounds={{{by_name}}}."
)
_ORDER = "The order of arguments is model, x, y, p0."


@dataclass(frozen=True)
class Parameters:
    """Names, initial values and bounds of the p parameters of a fit."""

    names: tuple[str, ...]
    start: Vector  # initial values, shape (p,)
    low: Vector  # lower bounds, shape (p,), -inf for none
    high: Vector  # upper bounds, shape (p,), inf for none
    not_given: tuple[str, ...] = ()  # names missing in a dict p0, without default in the model

    @property
    def has_bounds(self) -> bool:
        """Whether any bound is finite."""
        return bool(np.isfinite(self.low).any() or np.isfinite(self.high).any())

    @property
    def notice(self) -> str:
        """Message on the parameters missing in p0; empty if none is missing."""
        starts = [
            f"{name} = {value:g}"
            for name, value in zip(self.names, self.start, strict=True)
            if name in self.not_given
        ]
        return f"Parameters missing in p0 start at: {join_first(starts)}" if starts else ""


@dataclass(frozen=True)
class _Signature:
    x_name: str  # name of the first argument
    names: tuple[str, ...]
    defaults: Mapping[str, float]
    is_open: bool  # has *params, so their number is unknown


def parse_parameters(
    model: Callable[..., Any],
    p0: Any,
    bounds: Any,
    param_names: Sequence[str] | None,
    n_x: int = 1,
    x_parts: str = "x",
) -> Parameters:
    """Return the parameters from the arguments of ``fit``.

    Parameters
    ----------
    model : callable
        ``model(x, *params)``.
    p0 : sequence, dict by name, or None
        A parameter without a value starts at its default in the signature of the model, or at 1.0,
        moved inside the bounds.
    bounds : (low, high), dict by name of (low, high), sequence of (low, high), or None
        Each of low and high a scalar, a sequence or a dict by name. A sequence has one pair for
        each parameter; two pairs for two parameters are ``(low, high)``.
    param_names : sequence of str, optional
        Names to use instead of those in the signature of the model.
    n_x : int
        Number of arrays in x.
    x_parts : str
        Code for the arrays of x inside a model, such as ``x['t'], x['u']``, for messages.

    Raises
    ------
    ValueError
        If p0, bounds or names are invalid; the message names the parameter.
    TypeError
        If the model is not callable.
    """
    signature = _read_signature(model)
    separate_x = _separate_x(signature, p0, n_x, x_parts)
    names = _names(signature, p0, param_names, separate_x)
    low, high = _bounds(bounds, names)
    # Defaults are matched by position, whatever the names in param_names.
    defaults = {
        name: signature.defaults[original]
        for name, original in zip(names, signature.names, strict=False)
        if original in signature.defaults
    }
    given: dict[str, float] = {}
    if isinstance(p0, Mapping):
        _reject_unknown(p0, names, "p0")
        given = {name: _real(value, f"p0[{name!r}]") for name, value in p0.items()}
    elif p0 is not None:
        given = dict(zip(names, _vector(p0, "p0"), strict=True))
    start = np.array([given.get(name, defaults.get(name, 1.0)) for name in names])
    for name, value, a, b in zip(names, start, low, high, strict=True):
        if not np.isfinite(value):
            raise ValueError(f"p0 of parameter {name!r} is {value}; expected a finite number.")
        if name in given and not a <= value <= b:
            raise ValueError(
                f"p0 of parameter {name!r} is {value:g}, outside its bounds [{a:g}, {b:g}]. Move "
                f"p0 inside or widen the bounds."
            )
    start = np.where([name in given for name in names], start, _inside(start, low, high))
    not_given = [name for name in names if name not in given and name not in defaults]
    return Parameters(names, start, low, high, () if p0 is None else tuple(not_given))


def _inside(start: Vector, low: Vector, high: Vector) -> Vector:
    """Return ``start``, with values on or outside the bounds moved to the middle of the bounds.

    With a single finite bound, they are moved to a distance of 1 inside it.
    """
    finite_low, finite_high = np.isfinite(low), np.isfinite(high)
    below, above = np.where(finite_low, low, 0.0), np.where(finite_high, high, 0.0)
    middle = np.select(
        [finite_low & finite_high, finite_low, finite_high],
        [0.5 * (below + above), below + 1.0, above - 1.0],
        start,
    )
    return np.where((low < start) & (start < high), start, middle)


def _read_signature(model: Callable[..., Any]) -> _Signature:
    if not callable(model):
        is_array = hasattr(model, "shape") and hasattr(model, "dtype")
        got = f"an array of shape {model.shape}" if is_array else reprlib.repr(model)
        raise TypeError(f"model must be a callable model(x, *params); got {got}. {_ORDER}")
    try:
        positional = positional_arguments(model)
    except ValueError:  # builtins have no signature
        return _Signature("x", (), {}, True)
    parameters = inspect.signature(model).parameters.values()
    is_open = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    fitted = [p for p in positional[1:] if not is_option(p)]
    defaults = {p.name: float(p.default) for p in fitted if p.default is not p.empty}
    required = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is p.empty]
    if required:
        raise ValueError(
            f"the model has keyword-only arguments without default ({', '.join(required)}). "
            f"Set them with functools.partial, and pass the result as the model."
        )
    x_name = positional[0].name if positional else "x"
    return _Signature(x_name, tuple(p.name for p in fitted), defaults, is_open)


def _names(
    signature: _Signature, p0: Any, param_names: Sequence[str] | None, separate_x: str
) -> tuple[str, ...]:
    known = signature.names
    if p0 is None or isinstance(p0, Mapping):
        if signature.is_open and param_names is None:
            raise ValueError(
                "the model takes *params, so the number of parameters is unknown. Pass p0 as a "
                "sequence, or param_names."
            )
        n = len(known) if not signature.is_open else len(param_names or ())
    else:
        n = len(_vector(p0, "p0"))
        # Trailing arguments with a default may be omitted and are then not fitted, as in SciPy.
        optional = [name in signature.defaults for name in known]
        least = max((i + 1 for i, is_optional in enumerate(optional) if not is_optional), default=0)
        if not signature.is_open and not least <= n <= len(known):
            takes = f"{len(known)} parameter{'' if len(known) == 1 else 's'}"
            raise ValueError(
                f"p0 has {n} value{'' if n == 1 else 's'}, but the model takes {takes} "
                f"({', '.join(known)}). {_of_number(n, len(known)) or separate_x}".rstrip()
            )
    if n == 0:
        raise ValueError("the model has no parameters to fit: expected model(x, a, b, ...).")
    if param_names is not None:
        names = tuple(map(str, param_names))
        if len(names) != n:
            raise ValueError(
                f"param_names must have {n} names, one per parameter; got {len(names)}."
            )
    else:
        names = (*known[:n], *(f"p{i}" for i in range(len(known), n)))
    if len(set(names)) != n:
        raise ValueError(f"the parameter names {names} are not all different.")
    return names


def _of_number(n: int, n_known: int) -> str:
    """Return a hint on why p0 has too many values; empty if no reason is likely."""
    if n > _MISPLACED_RATIO * max(n_known, 1):
        return _ORDER
    if n_known == 1 < n:
        names = ", ".join("abcd"[:n]) if n <= 4 else "a, b, ..."
        return (
            f"The model needs an argument for each parameter: write `def model(x, {names})`, or "
            f"`def model(x, *p)`, where p is a tuple of all parameters."
        )
    return ""


def _separate_x(signature: _Signature, p0: Any, n_x: int, x_parts: str) -> str:
    """Return a hint if the model seems to take each array of x as an argument; else empty."""
    known, n_more = signature.names, n_x - 1
    if n_x < 2 or p0 is None or isinstance(p0, Mapping) or len(known) != np.size(p0) + n_more:
        return ""
    separate = ", ".join(known[:n_more])
    return (
        f"Pass one value per parameter. If {separate} is part of x: the model gets all arrays of x "
        f"as its first argument, so write `def model({', '.join(('x', *known[n_more:]))})`, and "
        f"begin its body with `{signature.x_name}, {separate} = {x_parts}`."
    )


def _bounds(bounds: Any, names: tuple[str, ...]) -> tuple[Vector, Vector]:
    n = len(names)
    if bounds is None:
        return np.full(n, -np.inf), np.full(n, np.inf)
    if isinstance(bounds, Mapping):
        _reject_unknown(bounds, names, "bounds")
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
    for name, a, b in zip(names, low, high, strict=True):
        if not a < b:
            raise ValueError(
                f"the lower bound {a:g} of parameter {name!r} must be less than its upper bound "
                f"{b:g}. {_both_spellings(bounds, names)}".rstrip()
            )
    return low, high


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
    if not all(_is_real(low) and _is_real(high) and low < high for low, high in pairs):
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
        _reject_unknown(value, names, what)
        value = [value.get(name, missing) for name in names]
    no_bound = "-np.inf" if missing < 0 else "np.inf"
    values = _vector(value, what, f"Write {no_bound} where there is no bound.", names)
    if values.shape not in ((1,), (len(names),)):
        raise ValueError(
            f"the {what} have {len(values)} values for {len(names)} parameters. Pass one value for "
            f"all parameters, or one per parameter."
        )
    return np.broadcast_to(values, (len(names),)).copy()


def _vector(values: Any, what: str, instead_of_none: str = "", names: Sequence[str] = ()) -> Vector:
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
            f"{array.dtype}. {_ORDER if what == 'p0' and array.ndim > 1 else ''}".rstrip()
        )
    return array.astype(np.float64)


def _reject_first_not_real(
    array: NDArray[Any], what: str, instead_of_none: str, names: Sequence[str]
) -> None:
    for i, entry in enumerate(array.reshape(-1)):
        if not _is_real(entry):
            where = f" as entry {i}" if array.ndim else ""
            where = f" for parameter {names[i]!r}" if array.size == len(names) else where
            advice = f" {instead_of_none}" if entry is None else ""
            sentence = f"{what} must be real numbers; got {reprlib.repr(entry)}{where}.{advice}"
            raise ValueError(sentence.rstrip())


def _real(value: Any, what: str) -> float:
    if not _is_real(value):
        raise ValueError(f"{what} must be a real number; got {value!r}.")
    return float(value)


def _is_real(value: Any) -> bool:
    try:
        array = np.asarray(value)
    except ValueError:  # of lists in a list
        return False
    return array.ndim == 0 and array.dtype.kind in "biuf"


def _reject_unknown(given: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"unknown parameter names in {what}: {', '.join(map(repr, unknown))}. The parameters "
            f"are {', '.join(names)}."
        )
