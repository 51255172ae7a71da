"""``NamedValues``: values of parameters by name, the argument of functions of users.

These are the functions in ``ties``, and those that ``FitResult.derive`` gets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from nlsq_dask._text import join_first
from nlsq_dask.model.advice import tracing_hint


def as_real_array(returned: Any) -> tuple[Any, str]:
    """Return what a function returned as a JAX array, and words for it in messages.

    The array is None if these are no real numbers.
    """
    try:
        array = jnp.asarray(returned)
    except (TypeError, ValueError):  # None or text, for instance
        return None, f"an object of type {type(returned).__name__}"
    words = f"{f'an array of shape {array.shape} and ' if array.ndim else ''}dtype {array.dtype}"
    return (array if array.dtype.kind in "iuf" else None), words


def call_traced(
    function: Callable[..., Any], arguments: tuple[Any, ...], what: str, called: str
) -> Any:
    """Return ``function(*arguments)``; raise a ValueError that says how it is called if it fails.

    ``what`` is the function in messages, and ``called`` says with which arguments.
    """
    try:
        return function(*arguments)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        text = str(error).partition("\n")[0].rstrip(".")  # JAX appends help texts
        raise ValueError(
            f"{what} raised {type(error).__name__}: {text}. It is called {called}. "
            f"{tracing_hint(error)}".rstrip()
        ) from error


class _UnknownNameError(Exception):
    """A function uses a name that it cannot use."""


class NamedValues(Mapping[str, Any]):
    """Values of parameters by name, for one function.

    Parameters
    ----------
    values : dict of str to scalar
    what : str
        Name of the function in messages, such as "ties['b']".
    tied : collection of str
        Names of parameters that the function cannot use because they are tied.
    """

    def __init__(
        self, values: Mapping[str, Any], what: str, tied: Collection[str] = frozenset()
    ) -> None:
        self._values = values
        self._what = what
        self._tied = tied

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        is_tied = name in self._tied
        reason = "which is tied itself" if is_tied else "which is not a parameter"
        instead = f" Write the function of {name!r} out in its place." if is_tied else ""
        allowed = join_first(list(self._values))
        raise _UnknownNameError(
            f"{self._what} uses {name!r}, {reason}. It can use {allowed}.{instead}"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def call(self, function: Callable[[Mapping[str, Any]], Any], example: str) -> Any:
        """Return ``function(self)``; raise a ValueError with an example if it fails."""
        called = f"with a mapping of parameters by name, such as {example}"
        try:
            return call_traced(function, (self,), self._what, called)
        except _UnknownNameError as error:
            raise ValueError(str(error)) from None
