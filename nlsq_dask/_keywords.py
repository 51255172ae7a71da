"""Keyword arguments that a call does not have: the message names the call that has them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_CALL_OF: dict[str, str] = {}  # by the keyword that they have

# What SciPy and others call it.
_SYNONYMS = {
    "ftol": "gauss_newton_tol",
    "xtol": "gauss_newton_tol",
    "gtol": "gauss_newton_tol",
    "tol": "gauss_newton_tol",
    "maxfev": "gauss_newton_max_iterations",
    "max_nfev": "gauss_newton_max_iterations",
    "maxiter": "gauss_newton_max_iterations",
    "max_iter": "gauss_newton_max_iterations",
    "max_iterations": "gauss_newton_max_iterations",
    "weights": "sigma",
    "seed": "random_seed",
}

# What SciPy asks for and this package has no other name for.
_FROM_JAX = "Leave it out: the derivatives come from JAX, which takes them of the model."
_UNSUPPORTED = {
    "method": "Leave it out: there is one method, Gauss-Newton in a trust region over all rows.",
    "jac": _FROM_JAX,
    "Dfun": _FROM_JAX,
    "epsfcn": _FROM_JAX,
    "diff_step": _FROM_JAX,
    "check_finite": "nan_policy takes its place: 'raise', as by default, or 'omit'.",
}


def explain_keywords(call: str, others: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function, so that it says of an unknown keyword where that belongs.

    Parameters
    ----------
    call : str
        The name by which users call it.
    others : bool
        Whether the messages of other calls name this one for its keywords.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = set(inspect.signature(function).parameters)
        if others:
            _CALL_OF.update(dict.fromkeys(known - {"self"}, call))

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for keyword in kwargs:
                if keyword not in known:
                    message = f"{call}() has no argument {keyword!r}. {suggest_keyword(keyword)}"
                    raise TypeError(message.rstrip())
            return function(*args, **kwargs)

        return checked

    return decorate


def suggest_keyword(keyword: str) -> str:
    """Return a message that says what to write instead of a keyword, if that is known."""
    if keyword in _UNSUPPORTED:
        return _UNSUPPORTED[keyword]
    keyword = _SYNONYMS.get(keyword, keyword)
    matches = get_close_matches(keyword, _CALL_OF, n=1, cutoff=0.75)
    return f"Do you mean {_CALL_OF[matches[0]]}(..., {matches[0]}=...)?" if matches else ""
