"""``call_model``: calls a model ``f(x, *params)`` whose signature may also have options.

An argument whose default is not a number (None, a string, a flag) is an option, not a parameter. It
keeps its default, also between parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional_arguments(model: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the arguments of a model that can be passed by position; the first one is x.

    Raises
    ------
    ValueError
        If the model is a builtin without signature.
    """
    arguments = inspect.signature(model).parameters.values()
    return [argument for argument in arguments if argument.kind in _POSITIONAL]


def is_option(argument: inspect.Parameter) -> bool:
    """Whether an argument has a default that is not a number, so that it is not fitted."""
    default = argument.default
    if default is argument.empty:
        return False
    return not (np.ndim(default) == 0 and np.asarray(default).dtype.kind in "iuf")


def call_model(model: Callable[..., Any], x: Any, params: Iterable[Any]) -> Any:
    """Return ``model(x, *params)``, with the default of each option that precedes a parameter."""
    arguments = list(params)
    try:
        positional = positional_arguments(model)
    except ValueError:  # a builtin
        positional = []
    for position, argument in enumerate(positional[1:]):
        if is_option(argument) and position < len(arguments):
            arguments.insert(position, argument.default)
    return model(x, *arguments)
