"""Sentences about parameters that the data leave uncertain, for messages and reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nlsq_dask._text import join_first

MIN_CORRELATION = 0.9999  # of a pair that is named; polynomials of x near 0 remain below 0.9997
_MIN_ERROR = 1e3  # standard error, relative to the parameter and to its typical size
_MAX_PAIRS = 3  # in a sentence

Vector = NDArray[np.float64]


def are_uncertain(params: Vector, errors: Vector, sizes: Vector) -> NDArray[np.bool_]:
    """Return which standard errors are finite, but so large that they say nothing of the value.

    ``sizes`` are the typical sizes of the parameters, for values near 0.
    """
    is_large = errors > _MIN_ERROR * np.maximum(np.abs(params), sizes)
    return np.asarray(is_large & np.isfinite(errors))


def correlated_pairs(
    names: Sequence[str], pcov: NDArray[np.float64] | None, least: float
) -> list[tuple[str, str, float]]:
    """Return pairs of parameters with their correlation, largest first, down to ``least``.

    There are none if not all variances are finite and positive.
    """
    if pcov is None:
        return []
    variances = np.diag(pcov)
    if not (np.isfinite(variances).all() and (variances > 0.0).all()):
        return []
    errors = np.sqrt(variances)
    matrix = pcov / errors[:, None] / errors
    first, second = np.nonzero(np.triu(np.abs(matrix) >= least, 1))
    values = matrix[first, second]
    order = np.argsort(-np.abs(values), kind="stable")
    return [(names[first[i]], names[second[i]], float(values[i])) for i in order]


def confounded_sentence(names: Sequence[str]) -> str:
    """Return a sentence on parameters that the data cannot tell apart, and what to do."""
    return (
        f"The data cannot tell {join_first([*map(repr, names)])} apart: a change of one is made up "
        f"for by changes of the others. Fix one of them (and another, if this is still reported), "
        f"merge parameters that the model only combines, such as the factors of a product, or add "
        f"data at which their effects differ."
    )


def uncertain_sentence(names: Sequence[str]) -> str:
    """Return a sentence on parameters of which ``are_uncertain`` is True."""
    is_one = len(names) == 1
    error, has, value = (
        ("standard error", "is", "its value and its initial value")
        if is_one
        else ("standard errors", "are", "their values and their initial values")
    )
    return (
        f"The {error} of {join_first([*map(repr, names)])} {has} more than {_MIN_ERROR:,.0f} times "
        f"{value}: the data barely constrain {'it' if is_one else 'them'}."
    )


def correlated_sentence(pairs: Sequence[tuple[str, str, float]]) -> str:
    """Return a sentence on pairs of strongly correlated parameters, and what to do."""
    texts = [f"{a!r} and {b!r} ({_correlation(value)})" for a, b, value in pairs]
    listed = join_first(texts, _MAX_PAIRS, "; ", "pairs")
    return (
        f"Strongly correlated: {listed}. The data determine a combination of both far better than "
        f"each of them; centering x or rewriting the model in less correlated parameters helps."
    )


def _correlation(value: float) -> str:
    """Return a correlation near 1 or -1 with two digits of its distance from it."""
    distance = max(1.0 - abs(value), 1e-15)
    return f"{value:+.{1 - int(np.floor(np.log10(distance)))}f}"
