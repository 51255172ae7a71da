"""The programs of a ``LaneSolver``, in JAX: blocks of lanes, processed one after the other.

A block is so small that the state of its lanes and a strip of their points fit a core's cache. The
arguments that vary over the lanes have the blocks first, then rows, then the lanes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nlsq_dask.kernels.lane_sums import LaneData, LaneFactors, LaneSummation
from nlsq_dask.model.model import Model
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.solvers.lanes.steps import ACTIVE, Problem, State, StepSettings, propose, update


@dataclass(frozen=True)
class Shapes:
    """Shapes of the arrays that a program takes."""

    n_points: int  # with padding
    block: int  # lanes that are iterated together
    n_blocks: int  # per call
    n_params: int
    x_varies: tuple[bool, ...]
    sigma: str  # "none", "shared" or "varies"
    dtype: str

    @property
    def n_lanes(self) -> int:
        """Lanes per call."""
        return self.block * self.n_blocks

    @property
    def n_sums(self) -> int:
        """Number of elements of the triangle in ``LaneSums``."""
        return (self.n_params + 1) * (self.n_params + 2) // 2

    @property
    def row_counts(self) -> list[int]:
        """Number of rows of each field of a ``State``, then of the bounds, in a packed array."""
        p = self.n_params
        return [p, p, p, self.n_sums, *[1] * (len(State._fields) - 4), p, p]


def pack(library: Any, state: State, low: Any, high: Any) -> Any:
    """Return the state of c lanes and their bounds as one array, shape (rows, c).

    ``library`` is ``numpy`` or ``jax.numpy``.
    """
    rows = [field if field.ndim == 2 else field[None] for field in (*state, low, high)]
    return library.concatenate(rows)


def unpack(packed: Any, shapes: Shapes) -> tuple[State, Any, Any]:
    """Return the state and the bounds in the result of ``pack``."""
    counts = shapes.row_counts
    ends = np.cumsum(counts)
    fields = [packed[end - count : end] for end, count in zip(ends, counts, strict=True)]
    *state, low, high = fields
    return State(*state[:4], *(field[0] for field in state[4:])), low, high


def solve_blocks(
    summation: LaneSummation,
    shapes: Shapes,
    settings: StepSettings,
    max_active: Any,
    n_blocks: Any,
    data: tuple[Any, Any, Any],
    packed: Any,
) -> tuple[Any, Any]:
    """Iterate each of the first blocks until at most ``max_active`` of its lanes are active.

    Returns the packed state, and per block the tied parameters with their derivatives.
    """

    def solve(b: Any, packed_blocks: Any) -> Any:
        block = _block(data, b, shapes)
        state, low, high = unpack(packed_blocks[b], shapes)
        weighted = block.y.astype(jnp.float64)
        weighted = weighted if block.sigma is None else weighted / block.sigma
        signal = jnp.where(jnp.isfinite(block.y), weighted**2, 0.0).sum(axis=0)
        problem = Problem(low, high, jnp.isfinite(block.y).sum(axis=0), signal)

        def iterate(state: State) -> State:
            state = update(state, summation(block, state.trial), problem, settings)
            return propose(state, problem, settings)

        def repeats(state: State) -> Any:
            return (state.status == ACTIVE).sum() > max_active

        state = lax.while_loop(repeats, iterate, state)
        return packed_blocks.at[b].set(pack(jnp, state, low, high))

    packed = lax.fori_loop(0, n_blocks, solve, packed)
    return packed, _tied(summation.model.transform, packed[:, : shapes.n_params])


def factor_blocks(
    summation: LaneSummation, shapes: Shapes, n_blocks: Any, data: tuple[Any, Any, Any], points: Any
) -> tuple[Any, Any]:
    """Compute the ``LaneFactors`` of the first blocks.

    The rows of ``points`` are the parameters, then 1 for free and 0 for fixed ones. Returns the
    rows of the factors one below the other, and the tied parameters as ``solve_blocks``.
    """
    p = shapes.n_params

    def factor(b: Any, results: Any) -> Any:
        params, free = points[b, :p], points[b, p:]
        factors = summation.factors(_block(data, b, shapes), params, free)
        rows = [field.reshape(-1, shapes.block) for field in factors]
        return results.at[b].set(jnp.concatenate(rows))

    n_rows = (p + 1) ** 2 + p**2 + 2
    results = jnp.zeros((shapes.n_blocks, n_rows, shapes.block))
    results = lax.fori_loop(0, n_blocks, factor, results)
    return results, _tied(summation.model.transform, points[:, :p])


def unpack_factors(packed: Any, n_params: int) -> LaneFactors:
    """Return the factors in the result of ``factor_blocks``, shape (rows, c)."""
    p, n_lanes = n_params, packed.shape[-1]
    triangle, scores, rest = np.split(packed, np.cumsum([(p + 1) ** 2, p**2]))
    return LaneFactors(
        triangle.reshape(p + 1, p + 1, n_lanes), scores.reshape(p, p, n_lanes), *rest
    )


def _block(data: tuple[Any, Any, Any], b: Any, shapes: Shapes) -> LaneData:
    y, x, sigma = data
    pairs = zip(x, shapes.x_varies, strict=True)
    x = tuple(leaf[b] if varies else leaf for leaf, varies in pairs)
    return LaneData(y[b], x, sigma[b] if shapes.sigma == "varies" else sigma)


def _tied(transform: ParameterTransform | None, params: Any) -> tuple[Any, Any] | None:
    """Return tied parameters, shape (blocks, t, c), and their derivatives, (blocks, t, p, c)."""
    if transform is None or not transform.ties:
        return None
    return jax.vmap(partial(_tied_of_block, transform))(params)


def _tied_of_block(transform: ParameterTransform, params: Any) -> tuple[Any, Any]:

    def values(params: Any) -> Any:
        every = transform([params[i] for i in range(transform.n_free)], params.dtype)
        return jnp.stack([every[i] for i in np.flatnonzero(transform.is_tied)])

    def jacobian(params: Any) -> Any:
        try:
            return jax.jacfwd(values)(params)
        except TypeError:  # a function with derivatives in reverse mode only
            return jax.jacrev(values)(params)

    return jax.vmap(values, 1, 1)(params), jax.vmap(jacobian, 1, 2)(params)


def data_specs(model: Model, shapes: Shapes) -> tuple[Any, Any, Any]:
    """Return the shapes of y, x and sigma."""
    spec = partial(jax.ShapeDtypeStruct, dtype=np.dtype(shapes.dtype))
    block = shapes.n_blocks, shapes.n_points, shapes.block
    x = tuple(
        spec(block) if varies else spec((shapes.n_points, *features))
        for features, varies in zip(model.layout.x_features, shapes.x_varies, strict=True)
    )
    sigma = {"none": None, "shared": spec((shapes.n_points, 1)), "varies": spec(block)}
    return spec(block), x, sigma[shapes.sigma]


def rows_spec(shapes: Shapes, n_rows: int) -> Any:
    """Return the shape of an array of float64 rows."""
    return jax.ShapeDtypeStruct((shapes.n_blocks, n_rows, shapes.block), np.dtype(np.float64))


INTEGER = jax.ShapeDtypeStruct((), np.dtype(np.int64))
