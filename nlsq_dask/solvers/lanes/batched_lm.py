"""``LaneSolver``: many small fits at once, each a lane of arrays, by damped Gauss-Newton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.lane_sums import LaneSummation, padded_points, strip_points
from nlsq_dask.model.jacobian import choose_mode
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program, traced_once
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.solvers.lanes.batches import LaneBatches
from nlsq_dask.solvers.lanes.program import (
    INTEGER,
    Shapes,
    data_specs,
    factor_blocks,
    rows_spec,
    solve_blocks,
)
from nlsq_dask.solvers.lanes.records import LaneFits, Lanes, LaneSettings
from nlsq_dask.solvers.lanes.refinement import LaneRefinement
from nlsq_dask.solvers.lanes.results import LaneResults
from nlsq_dask.solvers.lanes.steps import StepSettings

Array = NDArray[Any]

_MIN_BLOCK = 8  # lanes that SIMD instructions process together
_BLOCK = 256  # lanes whose state and strips fit a core's cache
_MAX_BLOCKS = 8  # blocks per call of the program
_FACTORED_BLOCK, _MAX_FACTORED_BLOCKS = 64, 4  # in the factorization
_CALL_BYTES = 1 << 24  # of the arguments of a call


def choose_lanes(n_points: int, n_params: int, dtype: str, max_pixels: int) -> int:
    """Return how many lanes a call of the program gets, from shapes alone.

    Parameters
    ----------
    n_points, n_params : int
        Of each lane.
    dtype : str
        That of the model.
    max_pixels : int
        Largest number of lanes that a caller will pass.
    """
    lane_bytes = n_points * np.dtype(dtype).itemsize + 4 * (n_params + 4) ** 2
    if max_pixels < _BLOCK:
        return max(1 << (max_pixels - 1).bit_length(), _MIN_BLOCK)
    n_blocks = min(_MAX_BLOCKS, _CALL_BYTES // (lane_bytes * _BLOCK), -(-max_pixels // _BLOCK))
    return _BLOCK * max(n_blocks, 1)


@dataclass(frozen=True)
class LaneSolver:
    """Solves many small fits; traced once, then callable in any process and thread."""

    program: Program
    shapes: Shapes
    # Of the lanes in which J^T J loses digits, and for sandwich covariances.
    factorization: Program
    factorization_shapes: Shapes
    settings: LaneSettings
    transform: ParameterTransform | None  # that of the model, without the functions of ties

    @classmethod
    def trace(
        cls,
        model: Model,
        n_points: int,
        n_lanes: int,
        settings: LaneSettings,
        *,
        x_varies: tuple[bool, ...],
        sigma: Literal["none", "shared", "varies"],
        fast_compile: bool = False,
    ) -> Self:
        """Trace the program for fits of ``n_points`` points each, ``n_lanes`` lanes per call.

        Parameters
        ----------
        model : Model
        n_points, n_lanes : int
        settings : LaneSettings
        x_varies : tuple of bool
            Which x arrays vary over the lanes.
        sigma : {"none", "shared", "varies"}
            Whether there is a sigma, and whether it varies over the lanes.
        fast_compile : bool
            Whether to compile the programs in less time, for slower fits.
        """
        with x64():
            jaxpr = model.jaxpr()
            mode = choose_mode(model, jaxpr)
        block = min(_BLOCK, n_lanes)
        shapes = Shapes(
            padded_points(n_points),
            block,
            -(-n_lanes // block),
            model.n_params,
            x_varies,
            sigma,
            model.dtype,
        )
        strip = strip_points(n_points)
        summation = LaneSummation(model, mode, settings.loss, x_varies, strip)
        steps = StepSettings(settings.tolerance, settings.max_iterations, model.dtype)
        block = min(_FACTORED_BLOCK, block)
        few = replace(shapes, block=block, n_blocks=min(_MAX_FACTORED_BLOCKS, shapes.n_blocks))

        def trace() -> tuple[Program, Program]:
            data, rows = data_specs(model, shapes), rows_spec(shapes, sum(shapes.row_counts))
            solve = partial(solve_blocks, summation, shapes, steps)
            program = Program.trace(solve, INTEGER, INTEGER, data, rows, fast_compile=fast_compile)
            data, rows = data_specs(model, few), rows_spec(few, 2 * few.n_params)
            factorize = partial(factor_blocks, summation, few)
            return program, Program.trace(factorize, INTEGER, data, rows, fast_compile=fast_compile)

        has_ties = model.transform is not None and bool(model.transform.ties)
        signature = (
            cls,
            model.layout,
            mode,
            shapes,
            few,
            strip,
            steps,
            settings.loss,
            fast_compile,
        )
        # The values of the model, which the jaxpr has, do not identify the functions of ties.
        programs = trace() if has_ties else traced_once(signature, jaxpr, trace)
        transform = _without_functions(model.transform)
        return cls(programs[0], shapes, programs[1], few, settings, transform)

    def __call__(self, lanes: Lanes, start: Array, low: Array, high: Array) -> LaneFits:
        """Fit all lanes, any number m of them.

        Parameters
        ----------
        lanes : Lanes
        start, low, high : ndarray, each of shape (p, m) or (p, 1)
            For the free parameters of the model. Equal bounds fix a parameter of a lane.
        """
        shape = self.shapes.n_params, lanes.y.shape[1]
        start, low, high = (
            np.broadcast_to(np.asarray(array, np.float64), shape) for array in (start, low, high)
        )
        with np.errstate(all="ignore"):  # what is not finite shows in the status
            return self._fit(lanes, np.clip(start, low, high), low, high)

    def _fit(self, lanes: Lanes, start: Array, low: Array, high: Array) -> LaneFits:
        dtype = self.shapes.dtype
        results = LaneResults(lanes, start, low, high, self.settings, self.transform, dtype)
        batches = LaneBatches(self.program, self.shapes, start, low, high)
        batches.solve(lanes, results.missing, results.store)
        unsure = results.unsure
        if len(unsure):
            refinement = LaneRefinement(
                self.factorization, self.factorization_shapes, lanes, low, high
            )
            refined = refinement.solve(unsure, results.params(unsure), results.needs_steps(unsure))
            results.refine(unsure, refined)
        return results.fits()


def _without_functions(transform: ParameterTransform | None) -> ParameterTransform | None:
    """Return the transform with only the names of ties: the program has their functions."""
    if transform is None:
        return None
    ties: dict[str, Any] = dict.fromkeys(transform.ties)
    return ParameterTransform(transform.names, transform.is_free, transform.values, ties)
