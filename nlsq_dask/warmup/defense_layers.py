"""The four defense layers of the L-BFGS warm-up, each of which can be switched off.

1. warm start: skip the warm-up if p0 already fits;
2. adaptive step: choose the first step size by the relative loss;
3. cost guard: abort if the loss increases, and return to the best point;
4. step clipping: limit the length of updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from nlsq_dask.kernels.sums import Sums

_REFINEMENT_BELOW, _CAREFUL_BELOW = 0.1, 1.0


def relative_loss(sums: Sums) -> float:
    """Return the mean squared weighted residual plus penalty, over the weighted variance of y.

    It is about 1 for a model that explains nothing. It is infinite for constant y or a model with
    non-finite values.
    """
    if sums.total_variation <= 0.0 or not np.isfinite(sums.cost):
        return float("inf")
    return (sums.chi2 + 2.0 * sums.penalty) / sums.total_variation


@dataclass(frozen=True)
class StartSettings:
    """Settings of layers 1 (warm start) and 2 (adaptive step)."""

    warm_start_threshold: float  # relative loss below which the warm-up is skipped; 0 for never
    is_adaptive: bool  # choose the first step size by the relative loss
    refinement_step: float  # size of the first step if the relative loss is below 0.1,
    careful_step: float  # from 0.1 to 1, or if it is not adaptive,
    exploration_step: float  # and above 1


def is_warm_start(loss: float, settings: StartSettings) -> bool:
    """Return whether the relative loss at p0 is so small that the warm-up is skipped (layer 1)."""
    return loss < settings.warm_start_threshold


def first_step_size(loss: float, settings: StartSettings) -> tuple[str, float]:
    """Return a name and the size of the first step, which depend on the relative loss (layer 2).

    The name is "refinement", "careful" or "exploration"; "fixed" if ``settings.is_adaptive`` is
    False.
    """
    if not settings.is_adaptive:
        return "fixed", settings.careful_step
    if loss < _REFINEMENT_BELOW:
        return "refinement", settings.refinement_step
    if loss < _CAREFUL_BELOW:
        return "careful", settings.careful_step
    return "exploration", settings.exploration_step


def cost_increased(loss: Any, initial_loss: Any, tolerance: Any) -> Any:
    """Layer 3: return, as a JAX boolean, whether the loss exceeds the tolerated one.

    That is ``initial_loss * (1 + tolerance)``.
    """
    return loss > initial_loss * (1.0 + tolerance)


class ClipState(NamedTuple):
    """State of ``clip_step``: the number of updates that it has shortened."""

    count: Any


def clip_step(max_norm: Any) -> optax.GradientTransformationExtraArgs:
    """Layer 4: return an optax transformation that limits the norm of updates.

    It comes before the line search, which then evaluates steps that are short enough, and counts
    how many updates it has shortened.
    """

    def init(params: Any) -> ClipState:
        return ClipState(jnp.zeros((), jnp.int64))

    def update(
        updates: Any, state: ClipState, params: Any = None, **extra: Any
    ) -> tuple[Any, ClipState]:
        norm = jnp.linalg.norm(updates)
        is_too_long = norm > max_norm
        shortened = updates * jnp.where(
            is_too_long, max_norm / jnp.where(is_too_long, norm, 1.0), 1.0
        )
        return shortened, ClipState(state.count + is_too_long)

    return optax.GradientTransformationExtraArgs(init, update)
