"""``Parameters``: names, initial values and bounds, and which parameters are free."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from nlsq_dask._text import join_first
from nlsq_dask.fit.arguments.bounds import parse_bounds
from nlsq_dask.fit.arguments.fixed import check_any_free, fixed_values, parse_fixed, parse_ties
from nlsq_dask.fit.arguments.numbers import ORDER, Vector, as_real, is_real, reject_unknown, vector
from nlsq_dask.model.call import is_option, positional_arguments
from nlsq_dask.model.transform import ParameterTransform

_SET_OPTIONS = "Set them with functools.partial, and pass the result as the model."
_MISPLACED_RATIO = 10  # values in p0 per parameter; no miscount is so large


@dataclass(frozen=True)
class Parameters:
    """Names, initial values and bounds of the p parameters of a model."""

    names: tuple[str, ...]
    start: Vector  # initial values, shape (p,)
    low: Vector  # lower bounds, shape (p,), -inf for none
    high: Vector  # upper bounds, shape (p,), inf for none
    transform: ParameterTransform  # which are free, and the values of the others
    not_given: tuple[str, ...] = ()  # names missing in a dict p0, without default in the model

    @property
    def has_bounds(self) -> bool:
        """Whether any bound is finite."""
        return bool(np.isfinite(self.low).any() or np.isfinite(self.high).any())

    @property
    def notice(self) -> str:
        """Message on the parameters missing in p0; empty if none is missing."""
        return self.missing_notice(self.not_given)

    def missing_notice(self, missing: Collection[str]) -> str:
        """Return a message on parameters that p0 does not have; empty if there are none."""
        starts = [
            f"{name} = {value:g}"
            for name, value in zip(self.names, self.start, strict=True)
            if name in missing
        ]
        return f"Parameters missing in p0 start at: {join_first(starts)}" if starts else ""

    @property
    def not_free(self) -> tuple[str, ...]:
        """Sentences on the parameters that are fixed or tied."""
        kinds = {"Fixed": self.transform.is_fixed, "Tied (at p0)": self.transform.is_tied}
        values = list(zip(self.names, self.start, strict=True))
        listed = {
            kind: [
                f"{name} = {value:g}"
                for (name, value), is_one in zip(values, flags, strict=True)
                if is_one
            ]
            for kind, flags in kinds.items()
        }
        return tuple(
            f"{kind}: {join_first(texts, noun='parameters')}."
            for kind, texts in listed.items()
            if texts
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that must be equal when a fit is resumed."""
        fixed = zip(self.names, self.start, self.transform.is_fixed, strict=True)
        return {
            "p0": self.start,
            "lower bounds": self.low,
            "upper bounds": self.high,
            "param_names": self.names,
            # None, as in checkpoints that are older than the arguments.
            "fixed": [(name, value) for name, value, is_one in fixed if is_one] or None,
            "ties": list(self.transform.ties) or None,
        }

    @property
    def free(self) -> Parameters:
        """The free parameters only."""
        if self.transform.is_identity:
            return self
        is_free = self.transform.is_free
        names = tuple(compress(self.names, is_free))
        return Parameters(
            names,
            self.start[is_free],
            self.low[is_free],
            self.high[is_free],
            ParameterTransform.of_fixed(names, np.zeros(len(names)), ()),
            self.not_given,
        )


@dataclass(frozen=True)
class _Signature:
    x_name: str  # name of the first argument
    names: tuple[str, ...]
    defaults: Mapping[str, float]
    is_open: bool  # has *params, so their number is unknown
    keyword_only: tuple[str, ...] = ()  # names of arguments that cannot be parameters


def parse_parameters(
    model: Callable[..., Any],
    p0: Any,
    bounds: Any,
    param_names: Sequence[str] | None,
    n_x: int = 1,
    x_parts: str = "x",
    *,
    fixed: Any = None,
    ties: Any = None,
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
    fixed : dict by name of numbers and booleans, collection of names, or None
        Parameters that are not fitted; without a number, they stay at their initial value.
    ties : dict by name of callable, or None
        Parameters that are functions of the others, ``tie(p)`` with a mapping p by name.

    Raises
    ------
    ValueError
        If an argument is invalid; the message names the parameter.
    TypeError
        If the model is not callable.
    """
    signature = _read_signature(model)
    separate_x = _separate_x(signature, p0, n_x, x_parts)
    names = _names(signature, p0, param_names, separate_x)
    low, high = parse_bounds(bounds, names)
    held = parse_fixed(fixed, names)
    tied = parse_ties(ties, held, names, low, high)
    # Defaults are matched by position, whatever the names in param_names.
    defaults = {
        name: signature.defaults[original]
        for name, original in zip(names, signature.names, strict=False)
        if original in signature.defaults
    }
    given: dict[str, float] = {}
    if isinstance(p0, Mapping):
        reject_unknown(p0, names, "p0")
        given = {name: as_real(value, f"p0[{name!r}]") for name, value in p0.items()}
    elif p0 is not None:
        given = dict(zip(names, vector(p0, "p0"), strict=True))
    given = {name: value for name, value in given.items() if name not in tied}
    start = np.array([given.get(name, defaults.get(name, 1.0)) for name in names])
    values = fixed_values(held, names, defaults | given, low, high)
    unused = {*values, *tied}  # initial values that are not used
    _check_p0(start, given.keys() - unused, unused, names, low, high)
    start = np.where([name in given for name in names], start, _inside(start, low, high))
    start = np.array([values.get(name, value) for name, value in zip(names, start, strict=True)])
    is_free = np.array([name not in values and name not in tied for name in names], bool)
    check_any_free(names, is_free)
    transform = ParameterTransform(names, is_free, start, tied)
    known = {*given, *defaults, *values, *tied}
    not_given = () if p0 is None else tuple(name for name in names if name not in known)
    return Parameters(names, _with_ties(start, transform), low, high, transform, not_given)


def order_names(
    model: Callable[..., Any], names: Sequence[str], param_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the names of parameters of an earlier fit in the order of the model's arguments.

    Parameters
    ----------
    model : callable
        ``model(x, *params)``.
    names : sequence of str
        Names of all parameters of the fit, in any order.
    param_names : sequence of str, optional
        As in ``parse_parameters``.

    Raises
    ------
    ValueError
        If the model takes other parameters.
    """
    signature = _read_signature(model)
    known, n = signature.names, len(names)
    n_required = sum(name not in signature.defaults for name in known)
    own = known[:n]
    if signature.is_open:
        own += tuple(name for name in names if name not in own)
    if param_names is not None:
        own = tuple(map(str, param_names))
    is_callable = n >= n_required and (signature.is_open or n <= len(known))
    if not is_callable or sorted(own) != sorted(names):
        listed = ", ".join(map(repr, known if param_names is None else own))
        source = "the model takes" if param_names is None else "param_names has"
        raise ValueError(
            f"{source} the parameters {listed or 'none'}, but those of the fit are "
            f"{', '.join(map(repr, names)) or 'none'}. Pass the model of the fit and all of its "
            f"parameters. If it was fitted with param_names, pass these as well, in the order of "
            f"the model's arguments."
        )
    return own


def _check_p0(
    start: Vector,
    given: Collection[str],
    unused: Collection[str],
    names: tuple[str, ...],
    low: Vector,
    high: Vector,
) -> None:
    """Raise a ValueError if an initial value is not finite, or a given one outside its bounds."""
    for name, value, a, b in zip(names, start, low, high, strict=True):
        if name not in unused and not np.isfinite(value):
            raise ValueError(f"p0 of parameter {name!r} is {value}; expected a finite number.")
        if name in given and not a <= value <= b:
            raise ValueError(
                f"p0 of parameter {name!r} is {value:g}, outside its bounds [{a:g}, {b:g}]. Move "
                f"p0 inside or widen the bounds."
            )


def _with_ties(start: Vector, transform: ParameterTransform) -> Vector:
    """Return initial values with those of the tied parameters, which must be finite."""
    if not transform.ties:
        return start
    full = transform.expand(start[transform.is_free])
    for name, value in zip(transform.names, full, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"ties[{name!r}] is {value} at the initial values of the other parameters. Choose "
                f"another p0, or a function that is finite there."
            )
    return full


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
        raise TypeError(f"model must be a callable model(x, *params); got {got}. {ORDER}")
    try:
        positional = positional_arguments(model)
    except ValueError:  # builtins have no signature
        return _Signature("x", (), {}, True)
    parameters = inspect.signature(model).parameters.values()
    is_open = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    fitted = [p for p in positional[1:] if not is_option(p)]
    defaults = {p.name: float(p.default) for p in fitted if p.default is not p.empty}
    keyword_only = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    required = [p.name for p in keyword_only if p.default is p.empty]
    if required:
        raise ValueError(
            f"the model has keyword-only arguments without default ({', '.join(required)}). "
            f"{_of_partial(model) or _SET_OPTIONS}"
        )
    x_name, names = positional[0].name if positional else "x", tuple(p.name for p in fitted)
    return _Signature(x_name, names, defaults, is_open, tuple(p.name for p in keyword_only))


def _of_partial(model: Callable[..., Any]) -> str:
    """Return a hint if functools.partial has set a parameter by keyword; else empty."""
    keywords = model.keywords if isinstance(model, functools.partial) else {}
    numbers = {name: value for name, value in keywords.items() if is_real(value)}
    if not numbers:
        return ""
    fixed = ", ".join(f"{name!r}: {value!r}" for name, value in numbers.items())
    return (
        f"functools.partial makes all arguments after those that it sets by keyword keyword-only. "
        f"To fix a parameter, pass the function itself, and fixed={{{fixed}}}."
    )


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
        n = len(vector(p0, "p0"))
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
        by_keyword = ", ".join(signature.keyword_only)
        hint = f"Parameters are passed by position, but {by_keyword} can be passed by keyword only."
        raise ValueError(
            "the model has no parameters to fit: expected model(x, a, b, ...). "
            f"{hint if by_keyword else ''}".rstrip()
        )
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
        return ORDER
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
