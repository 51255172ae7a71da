"""``GuessKernel``: computes the start of each pixel with a function of the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.named_values import as_real_array, call_traced
from nlsq_dask.model.program import Program

Array = NDArray[Any]

_CALLED = "as guess(x, y) with the points of one pixel"
_EXAMPLE = "guess=lambda x, y: {{{name!r}: jnp.nanmax(y)}}"


@dataclass(frozen=True)
class GuessKernel:
    """Program that evaluates ``guess(x, y)`` for many pixels."""

    program: Program
    dtype: str
    n_lanes: int  # pixels per call
    x_varies: tuple[bool, ...]  # which x arrays vary over the map

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

        x_axes = tuple(1 if varies else None for varies in x_varies)
        of_pixels = jax.vmap(of_pixel, in_axes=(x_axes, 1, 1), out_axes=1)
        x = tuple(
            jax.ShapeDtypeStruct((n_points, n_lanes) if varies else (n_points, *features), dtype)
            for features, varies in zip(layout.x_features, x_varies, strict=True)
        )
        y = jax.ShapeDtypeStruct((n_points, n_lanes), dtype)
        start = jax.ShapeDtypeStruct((model.n_params, n_lanes), dtype)
        with x64():
            program = Program.trace(of_pixels, x, y, start)
        return cls(program, model.dtype, n_lanes, tuple(x_varies))

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
        m = y.shape[1]
        whole = np.broadcast_to(start, (len(start), m))
        parts = [np.empty((len(start), 0))]
        for first in range(0, m, self.n_lanes):
            index = np.minimum(np.arange(first, first + self.n_lanes), m - 1)
            some = tuple(
                np.asarray(leaf[:, index] if varies else leaf, self.dtype)
                for leaf, varies in zip(x, self.x_varies, strict=True)
            )
            values = self.program(
                some,
                np.asarray(y[:, index], self.dtype),
                np.asarray(whole[:, index], self.dtype),
            )
            parts.append(np.asarray(values, np.float64)[:, : m - first])
        return np.concatenate(parts, axis=1)


def _by_name(values: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of a guess by name of the parameter, each a scalar."""
    example = _EXAMPLE.format(name=names[0])
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(
                f"guess returned values of {unknown}, which are no parameters of the model; they "
                f"are {', '.join(names)}."
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
