"""Messages for unknown keyword arguments, which name the call that accepts them."""

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

_CALL_OF: dict[str, str] = {}  # public call that accepts a keyword

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


def explain_keywords(call: str, others: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes unknown keywords a TypeError with a suggestion.

    Parameters
    ----------
    call : str
        Public name of the decorated function.
    others : bool
        Whether messages of other calls suggest this one for its keywords.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        known = set(signature.parameters)
        if others:
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
    """Give a method the signature of a function, with ``self`` in the place of its first argument.

    Parameters
    ----------
    source : callable
        Names, kinds, defaults and annotations of the arguments are written there alone.
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
    """Return a sentence on what to write instead of a keyword; empty if unknown."""
    if keyword in _UNSUPPORTED:
        return _UNSUPPORTED[keyword]
    keyword = _SYNONYMS.get(keyword, keyword)
    matches = get_close_matches(keyword, _CALL_OF, n=1, cutoff=0.75)
    return f"Did you mean {_CALL_OF[matches[0]]}(..., {matches[0]}=...)?" if matches else ""
