"""The four defence layers of the warm-up, each a function that a warm-up includes or not.

1. warm start: a p0 that fits already skips the warm-up;
2. adaptive step: the relative loss chooses the first step size;
3. cost guard: a loss that grows aborts, back to the best point;
4. step clipping: no update is longer than a limit.
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
    """Return ``mean((r / sigma)^2)`` and the penalty over the weighted variance of ``y / sigma``.

    The penalty counts as in the loss of the warm-up: a start that fits the rows may be far from
    what the fit minimizes. Infinite where the data do not vary or the model is not finite.
    """
    if sums.total_variation <= 0.0 or not np.isfinite(sums.cost):
        return float("inf")
    return (sums.chi2 + 2.0 * sums.penalty) / sums.total_variation


@dataclass(frozen=True)
class StartSettings:
    """How layers 1 and 2 judge a start."""

    warm_start_threshold: float  # relative loss below which the warm-up is skipped; 0 for never
    is_adaptive: bool  # whether the relative loss chooses the first step size
    refinement_step: float
    careful_step: float
    exploration_step: float


def is_warm_start(loss: float, settings: StartSettings) -> bool:
    """Layer 1: whether the start is so good that the warm-up can be skipped."""
    return loss < settings.warm_start_threshold


def first_step_size(loss: float, settings: StartSettings) -> tuple[str, float]:
    """Layer 2: the name of the mode and the size of the first step."""
    if not settings.is_adaptive:
        return "fixed", settings.careful_step
    if loss < _REFINEMENT_BELOW:
        return "refinement", settings.refinement_step
    if loss < _CAREFUL_BELOW:
        return "careful", settings.careful_step
    return "exploration", settings.exploration_step


def cost_increased(loss: Any, initial_loss: Any, tolerance: Any) -> Any:
    """Layer 3: whether the loss has grown by more than is tolerated (traced)."""
    return loss > initial_loss * (1.0 + tolerance)


class ClipState(NamedTuple):
    """How many updates layer 4 has shortened."""

    count: Any


def clip_step(max_norm: Any) -> optax.GradientTransformationExtraArgs:
    """Layer 4: shorten an update to ``max_norm``, and count how often that was necessary.

    It stands before the line search, which then may not lengthen the step again, so the search's
    conditions hold for the step that is taken.
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
