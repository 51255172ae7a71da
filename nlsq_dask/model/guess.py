"""``GuessKernel``: computes the start of each pixel with a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.lane_function import LaneFunction
from nlsq_dask.model.model import Model
from nlsq_dask.model.named_values import as_real_array, call_traced

Array = NDArray[Any]

_CALLED = "as guess(x, y) with the points of one pixel"
_EXAMPLE = "guess=lambda x, y: {{{name!r}: jnp.nanmax(y)}}"


@dataclass(frozen=True)
class GuessKernel:
    """Program that evaluates ``guess(x, y)`` for many pixels."""

    function: LaneFunction

    @classmethod
    def trace(
        cls,
        guess: Callable[..., Any],
        model: Model,
        names: Sequence[str],
        n_points: int,
        n_lanes: int,
        x_varies: Sequence[bool],
    ) -> GuessKernel:
        """Trace a function that returns values of all parameters, or a dict of some by name.

        ``names`` are those of all parameters. Parameters without a value keep their start.

        Raises
        ------
        ValueError
            If the function raises an error or returns something else.
        """
        layout, dtype = model.layout, np.dtype(model.dtype)
        transform = model.transform
        is_free = [True] * len(names) if transform is None else transform.is_free.tolist()

        def of_pixel(x: Any, y: Any, start: Any) -> Any:
            returned = call_traced(guess, (layout.assemble(x), y), "guess", _CALLED)
            values = _by_name(returned, names)
            free = (name for name, is_one in zip(names, is_free, strict=True) if is_one)
            return jnp.stack([values.get(n, start[i]).astype(dtype) for i, n in enumerate(free)])

        sizes = n_points, model.n_params
        return cls(LaneFunction.trace(of_pixel, model, n_points, n_lanes, x_varies, sizes))

    def __call__(self, x: Sequence[Array], y: Array, start: Array) -> Array:
        """Return the starts of m pixels, shape (p, m).

        Parameters
        ----------
        x : sequence of ndarray
            Each of shape (n, m), or (n,) or (n, k) if it does not vary over the map.
        y : ndarray, shape (n, m)
        start : ndarray, shape (p, m) or (p, 1)
            Values of parameters for which the function returns none.
        """
        whole = np.broadcast_to(start, (len(start), y.shape[1]))
        return self.function(x, y, whole).astype(np.float64) if whole.size else whole


def _by_name(values: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of a guess by name of the parameter, each a scalar."""
    example = _EXAMPLE.format(name=names[0])
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(
                f"unknown parameter names in what guess returned: "
                f"{', '.join(map(repr, unknown))}. The parameters are {', '.join(names)}."
            )
        pairs = dict(values)
    else:
        is_list = isinstance(values, Sequence) or jnp.ndim(values) == 1
        if not is_list or len(values) != len(names):
            raise ValueError(
                f"guess must return a dict by name, or {len(names)} values, one per parameter "
                f"({', '.join(names)}); it returned {values!r}. Write {example}."
            )
        pairs = dict(zip(names, values, strict=True))
    scalars = {}
    for name, given in pairs.items():
        value, what = as_real_array(given)
        if value is None or value.ndim:
            raise ValueError(
                f"guess must return one real number for {name!r}; it returned {what}. It is called "
                f"with x and y of one pixel. Write {example}."
            )
        scalars[name] = value
    return scalars
