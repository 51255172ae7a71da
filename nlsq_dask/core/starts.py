"""The candidates of a tournament: quasi-random points in a box, the caller's start among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from nlsq_dask.config import HybridStreamingConfig

Vector = NDArray[np.float64]


def check_box(low: Vector, high: Vector, config: HybridStreamingConfig) -> None:
    """Raise a ValueError if starts are wanted around the middle of bounds that are not there."""
    if not config.enable_multistart or config.center_on_p0:
        return
    if not (np.isfinite(low) & np.isfinite(high)).any():
        raise ValueError(
            f"center_on_p0=False draws starts around the middle of the bounds, but no parameter "
            f"has two finite bounds; got lower={low.tolist()}, upper={high.tolist()}. Give bounds, "
            f"or leave center_on_p0 at True."
        )


def draw_box(
    start: Vector, low: Vector, high: Vector, config: HybridStreamingConfig
) -> tuple[Vector, Vector]:
    """Return the box from which candidates are drawn, which lies inside the bounds.

    Parameters
    ----------
    start, low, high : ndarray, each of shape (p,)
        The caller's start and bounds, which may be infinite.
    config : HybridStreamingConfig
        Its ``scale_factor`` and ``center_on_p0`` say how; the rule stands there.
    """
    is_bounded = np.isfinite(low) & np.isfinite(high)
    below, above = np.where(is_bounded, 0.5 * low, 0.0), np.where(is_bounded, 0.5 * high, 0.0)
    around_middle = is_bounded & (not config.center_on_p0)
    centre = np.where(around_middle, below + above, start)
    size = np.where(is_bounded, above - below, np.where(start == 0.0, 1.0, np.abs(start)))
    half_width = config.scale_factor * size
    return np.maximum(centre - half_width, low), np.minimum(centre + half_width, high)


def draw_starts(
    start: Vector, low: Vector, high: Vector, config: HybridStreamingConfig
) -> NDArray[np.float64]:
    """Return all candidates, shape (n_starts, p), the first of which is ``start`` itself.

    Parameters
    ----------
    start, low, high : ndarray, each of shape (p,)
    config : HybridStreamingConfig
    """
    n_drawn, n_params = config.n_starts - 1, len(start)
    rng = np.random.default_rng(config.random_seed)
    match config.multistart_sampler:
        case "sobol":
            # Balanced for powers of two only; the first of so many are still well spread.
            unit = qmc.Sobol(n_params, rng=rng).random_base2(n_drawn.bit_length())[:n_drawn]
        case "halton":
            unit = qmc.Halton(n_params, rng=rng).random(n_drawn)
        case _:
            unit = qmc.LatinHypercube(n_params, rng=rng).random(n_drawn)
    lowest, highest = draw_box(start, low, high, config)
    return np.concatenate([start[None], lowest + unit * (highest - lowest)])
