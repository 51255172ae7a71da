"""Problems with many minima, each with a start from which a fit ends in a wrong one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nlsq_dask as nd
from tests.problems import fit

N_ROWS = 20_000


@dataclass(frozen=True)
class ManyMinima:
    name: str
    model: Callable[..., Any]
    truth: tuple[float, ...]
    start: tuple[float, ...]
    bounds: tuple[Any, Any]
    x_range: tuple[float, float]
    n_starts: int
    noise: float = 0.1

    @functools.cached_property
    def x(self) -> np.ndarray:
        return np.random.default_rng(len(self.name)).uniform(*self.x_range, N_ROWS)

    @functools.cached_property
    def y(self) -> np.ndarray:
        rng = np.random.default_rng(1 + len(self.name))
        with jax.enable_x64(True):
            clean = np.asarray(self.model(jnp.asarray(self.x), *self.truth))
        return clean + self.noise * rng.standard_normal(N_ROWS)

    def fit(self, start: Any = None, **options: Any) -> nd.FitResult:
        start = self.start if start is None else start
        return fit(self.model, self.x, self.y, start, self.bounds, **options)

    @functools.cached_property
    def best(self) -> nd.FitResult:
        """The fit from the truth."""
        return self.fit(self.truth)


def wave(x: Any, a: Any, b: Any, omega: Any, c: Any) -> Any:
    return a * jnp.sin(omega * x) + b * jnp.cos(omega * x) + c


def two_waves(x: Any, a: Any, b: Any, omega: Any, c: Any, d: Any, more: Any) -> Any:
    faster = omega + more  # so that the two cannot change places
    return (
        a * jnp.sin(omega * x)
        + b * jnp.cos(omega * x)
        + c * jnp.sin(faster * x)
        + d * jnp.cos(faster * x)
    )


def peak(x: Any, height: Any, centre: Any, width: Any, floor: Any, slope: Any) -> Any:
    return height * jnp.exp(-0.5 * ((x - centre) / width) ** 2) + floor + slope * x


def doublet(x: Any, h1: Any, centre: Any, h2: Any, distance: Any, width: Any) -> Any:
    first = h1 * width**2 / ((x - centre) ** 2 + width**2)
    return first + h2 * width**2 / ((x - centre - distance) ** 2 + width**2)


def chirp(x: Any, a: Any, b: Any, omega: Any, rate: Any) -> Any:
    phase = omega * x + rate * x**2
    return a * jnp.sin(phase) + b * jnp.cos(phase)


PROBLEMS = [
    ManyMinima(
        "frequency of a wave",
        wave,
        (1.0, 0.5, 6.3, 0.3),
        (1.0, 0.0, 2.0, 0.0),
        ([-3, -3, 0.5, -3], [3, 3, 10, 3]),
        (0, 10),
        20,
        0.5,
    ),
    ManyMinima(
        "two waves",
        two_waves,
        (1.0, 0.5, 2.1, 0.6, -0.4, 1.5),
        (1.0, 0.0, 4.5, 1.0, 0.0, 1.0),
        ([-3, -3, 0.5, -3, -3, 0.3], [3, 3, 6, 3, 3, 3]),
        (0, 10),
        40,
        0.5,
    ),
    ManyMinima(
        "peak on a slope",
        peak,
        (3.0, 7.4, 0.15, 1.0, 0.2),
        (1.0, 2.0, 0.2, 0.0, 0.0),
        ([0, 0, 0.05, -5, -2], [10, 10, 1, 5, 2]),
        (0, 10),
        30,
        0.2,
    ),
    ManyMinima(
        "doublet",
        doublet,
        (2.0, 2.5, 1.0, 4.7, 0.2),
        (1.0, 7.0, 1.0, 1.0, 0.3),
        ([0, 0, 0, 0.2, 0.05], [5, 10, 5, 8, 1]),
        (0, 10),
        20,
    ),
    ManyMinima(
        "chirp",
        chirp,
        (1.0, 0.5, 3.0, 0.4),
        (1.0, 0.0, 1.0, 0.1),
        ([-3, -3, 0, 0], [3, 3, 6, 1]),
        (0, 6),
        20,
    ),
]
