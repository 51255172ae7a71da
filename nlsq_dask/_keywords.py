"""Errors for unknown keyword arguments, with a suggestion of what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from difflib import SequenceMatcher, get_close_matches
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
First = TypeVar("First")
Owner = TypeVar("Owner")

_MIN_SIMILARITY = 0.75  # of a misspelled word to the right one, as measured by difflib
_MIN_STEM = 3  # letters of a word that may stand for a longer one, such as "tol"

_CALL_OF: dict[str, str] = {}  # by keyword: the public function that accepts it

# Names used by SciPy and other libraries for arguments of the same meaning.
_SYNONYMS = {
    **dict.fromkeys(("ftol", "xtol", "gtol", "tol"), "gauss_newton_tol"),
    **dict.fromkeys(
        ("maxfev", "max_nfev", "maxiter", "max_iter", "max_iterations"),
        "gauss_newton_max_iterations",
    ),
    **dict.fromkeys(
        ("yerr", "y_err", "sigma_y", "y_sigma", "stddev", "uncertainty", "uncertainties"),
        "sigma",
    ),
    **dict.fromkeys(("fix", "frozen", "fixed_params", "fixed_parameters"), "fixed"),
    **dict.fromkeys(("tie", "tied"), "ties"),
    **dict.fromkeys(("x0", "beta0", "guess", "initial_guess", "initial_values"), "p0"),
    "limits": "bounds",
    "seed": "random_seed",
}

_DERIVATIVES = "Omit it: derivatives of the model are computed by JAX."
_SCALING = "Omit it: parameters are scaled automatically, by the column norms of the Jacobian."
_LINEAR_ALGEBRA = "Omit it: the normal equations are solved exactly, with p by p matrices."
_EXTRA_ARGUMENTS = (
    "Set further arguments of the model with functools.partial, and pass the result as the model."
)
_CONSTRAINTS = (
    "Use ties={'b': lambda p: 2 * p['a']} for a parameter that is a function of others, and bounds "
    "for limits of single parameters; other constraints are not supported."
)
_BOUNDS = (
    "Use bounds={'a': (0, np.inf), ...} with lower and upper bounds by name, or "
    "bounds=(lower, upper) for all parameters."
)
_PARAMETERS = (
    "Use p0={'a': 1.0, ...} for initial values, bounds={'a': (0, np.inf), ...} for limits, fixed "
    "for parameters that do not vary, and ties for those that are functions of others."
)
_WEIGHTS = (
    "Use sigma=1 / weights if the weights multiply residuals (as in lmfit, astropy and "
    "numpy.polyfit), or sigma=1 / np.sqrt(weights) if they multiply squared residuals (as in "
    "statsmodels and scikit-learn)."
)
_ERRORS_OF_X = (
    "Errors of x are not supported: sigma holds standard deviations of y. The package odrpack "
    "fits with errors of x."
)

# Arguments of SciPy and other libraries that no argument here replaces by itself.
_UNSUPPORTED = {
    **dict.fromkeys(("jac", "Dfun", "col_deriv", "epsfcn", "diff_step"), _DERIVATIVES),
    **dict.fromkeys(("x_scale", "diag", "factor"), _SCALING),
    **dict.fromkeys(("tr_solver", "tr_options", "jac_sparsity"), _LINEAR_ALGEBRA),
    **dict.fromkeys(("args", "kwargs", "fcn_args", "fcn_kws"), _EXTRA_ARGUMENTS),
    **dict.fromkeys(("weights", "weight", "w", "sample_weight", "sample_weights"), _WEIGHTS),
    **dict.fromkeys(("xerr", "x_err", "sigma_x", "x_sigma"), _ERRORS_OF_X),
    "method": "Omit it: the only method is Gauss-Newton with a trust region.",
    "check_finite": "Use nan_policy='raise' (the default) or nan_policy='omit' instead.",
    "workers": "Omit it: a fit runs on the active Dask client, or on the threads of this machine.",
    "vary": "Use fixed=['b', ...] with the names of the parameters that do not vary.",
    **dict.fromkeys(("min", "max", "lower", "upper", "lb", "ub", "min_val", "max_val"), _BOUNDS),
    **dict.fromkeys(("params", "parameters", "parinfo"), _PARAMETERS),
    **dict.fromkeys(("constraints", "expr"), _CONSTRAINTS),
    "dims": "For an independent fit at every position of the other dimensions, use "
    "fit_each(..., dims=...); in curvefit, reduce_dims has further dimensions along which to fit.",
    "reduce_dims": "Use dims=(...) with all dimensions along which to fit.",
    "scale_covar": "Use absolute_sigma=True for scale_covar=False, and False for True.",
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
                    hint = suggest_keyword(keyword, call, known)
                    raise TypeError(f"{call}() has no argument {keyword!r}. {hint}".rstrip())
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{call}(): {error}.") from None
            return function(*args, **kwargs)

        return checked

    return decorate


def arguments_of(
    source: Callable[Concatenate[First, P], Any], also: Callable[..., Any] | None = None
) -> Callable[[Callable[Concatenate[Owner, P], R]], Callable[Concatenate[Owner, P], R]]:
    """Return a decorator that gives a method the signature of another function.

    The arguments are thereby declared once; ``help`` and editors show them for the method.

    Parameters
    ----------
    source : callable
        Function with the signature; its first argument is replaced by ``self``.
    also : callable, optional
        Function whose further keywords the method accepts, with the default None.
    """

    def decorate(
        method: Callable[Concatenate[Owner, P], R],
    ) -> Callable[Concatenate[Owner, P], R]:
        own, given = inspect.signature(method), inspect.signature(source)
        this, *_ = own.parameters.values()
        _, *arguments = given.parameters.values()
        if also is not None:
            others = inspect.signature(also).parameters.items()
            arguments += [
                argument.replace(default=None)
                for name, argument in others
                if name not in given.parameters
            ]
        method.__signature__ = own.replace(parameters=[this, *arguments])  # type: ignore[attr-defined]
        return method

    return decorate


def suggest_keyword(keyword: str, call: str = "", known: Collection[str] = ()) -> str:
    """Return a sentence that says what to write instead of an unknown keyword, or "".

    Parameters
    ----------
    keyword : str
    call : str
        Public name of the function that was called.
    known : collection of str
        Names of its arguments, which are suggested before those of other functions.
    """
    if keyword in _UNSUPPORTED:
        return _UNSUPPORTED[keyword]
    keyword = _SYNONYMS.get(keyword, keyword)
    call_of = _CALL_OF | dict.fromkeys(set(known) - {"self"}, call)
    matches = get_close_matches(keyword, call_of, n=len(call_of), cutoff=_MIN_SIMILARITY)
    meant = [name for name in matches if _is_misspelling(keyword, name)]
    match = next((name for name in meant if name in known), meant[0] if meant else None)
    return "" if match is None else f"Did you mean {call_of[match]}(..., {match}=...)?"


def _is_misspelling(keyword: str, name: str) -> bool:
    """Return whether two similar keywords have the same words, and so presumably one meaning.

    Another word means something else, even a single letter: ``sigma_x`` is not ``sigma``, and
    ``x_scale`` is not ``f_scale``. So does another number: ``sigma2`` may be a variance. A word of
    several may be missing.
    """
    if [*filter(str.isdigit, keyword)] != [*filter(str.isdigit, name)]:
        return False
    if keyword.replace("_", "") == name.replace("_", ""):
        return True
    given, expected = keyword.split("_"), name.split("_")
    if len(given) == len(expected):
        return all(map(_is_same_word, given, expected))
    return 1 < len(given) == len(expected) - 1 and set(given) < set(expected)


def _is_same_word(given: str, expected: str) -> bool:
    if given.startswith(expected) or expected.startswith(given):
        return min(len(given), len(expected)) >= _MIN_STEM or given == expected
    return SequenceMatcher(None, given, expected).ratio() >= _MIN_SIMILARITY
