"""Errors for unknown keyword arguments, with a suggestion of what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
First = TypeVar("First")
Owner = TypeVar("Owner")

_CALL_OF: dict[str, str] = {}  # by keyword: the public function that accepts it

# Names used by SciPy and other libraries.
_SYNONYMS = {
    **dict.fromkeys(("ftol", "xtol", "gtol", "tol"), "gauss_newton_tol"),
    **dict.fromkeys(
        ("maxfev", "max_nfev", "maxiter", "max_iter", "max_iterations"),
        "gauss_newton_max_iterations",
    ),
    "weights": "sigma",
    "seed": "random_seed",
}

# Arguments of SciPy without a counterpart here.
_UNSUPPORTED = {
    **dict.fromkeys(
        ("jac", "Dfun", "epsfcn", "diff_step"),
        "Omit it: derivatives of the model are computed by JAX.",
    ),
    "method": "Omit it: the only method is Gauss-Newton with a trust region.",
    "check_finite": "Use nan_policy='raise' (the default) or nan_policy='omit' instead.",
}


def explain_keywords(call: str, hinted: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator with which unknown keywords raise a TypeError with a suggestion.

    Parameters
    ----------
    call : str
        Public name of the decorated function.
    hinted : bool
        Whether this function is suggested if one of its keywords is passed to another function.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        known = set(signature.parameters)
        if hinted:
            _CALL_OF.update(dict.fromkeys(known - {"self"}, call))

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for keyword in kwargs:
                if keyword not in known:
                    message = f"{call}() has no argument {keyword!r}. {suggest_keyword(keyword)}"
                    raise TypeError(message.rstrip())
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{call}(): {error}.") from None
            return function(*args, **kwargs)

        return checked

    return decorate


def arguments_of(
    source: Callable[Concatenate[First, P], Any],
) -> Callable[[Callable[Concatenate[Owner, P], R]], Callable[Concatenate[Owner, P], R]]:
    """Return a decorator that gives a method the signature of another function.

    The arguments are thereby declared once; ``help`` and editors show them for the method.

    Parameters
    ----------
    source : callable
        Function with the signature; its first argument is replaced by ``self``.
    """

    def decorate(
        method: Callable[Concatenate[Owner, P], R],
    ) -> Callable[Concatenate[Owner, P], R]:
        own, given = inspect.signature(method), inspect.signature(source)
        this, *_ = own.parameters.values()
        _, *arguments = given.parameters.values()
        method.__signature__ = own.replace(parameters=[this, *arguments])  # type: ignore[attr-defined]
        return method

    return decorate


def suggest_keyword(keyword: str) -> str:
    """Return a sentence that says what to write instead of an unknown keyword, or ""."""
    if keyword in _UNSUPPORTED:
        return _UNSUPPORTED[keyword]
    keyword = _SYNONYMS.get(keyword, keyword)
    matches = get_close_matches(keyword, _CALL_OF, n=1, cutoff=0.75)
    return f"Did you mean {_CALL_OF[matches[0]]}(..., {matches[0]}=...)?" if matches else ""
