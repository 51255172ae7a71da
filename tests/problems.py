"""Models, data and the ``fit`` helper of all tests, with SciPy's answers for comparison.

Compiling dominates the run time, and each distinct program is compiled once. A test that does not
depend on its model, row count or chunks therefore uses those of its neighbors. It also passes
``NO_WARMUP`` unless the warm-up is its subject: the program of the warm-up takes twice as long to
compile as the kernel.

The reference is ``scipy.optimize.curve_fit`` on the same rows, with the exact Jacobian (JAX's,
over all rows at once, outside of the library) and tolerances at the edge of float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

import nlsq_dask as nd
from nlsq_dask.events import Event

N_ROWS = 50_000
NO_WARMUP: dict[str, Any] = {"max_warmup_iterations": 0}
_OPTIONS = {field.name for field in fields(nd.HybridStreamingConfig)}


def fit(
    model: Callable[..., Any],
    x: Any,
    y: Any,
    p0: Any = None,
    bounds: Any = None,
    *,
    config: nd.HybridStreamingConfig | None = None,
    observers: Iterable[Callable[[Event], None]] = (),
    **arguments: Any,
) -> nd.FitResult:
    """Fit without printing; options go to the configuration, other arguments to ``fit``."""
    if config is None:
        options = {name: arguments.pop(name) for name in _OPTIONS & arguments.keys()}
        config = nd.HybridStreamingConfig(**{"verbose": 0, **options})
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config, observers=observers)
    return optimizer.fit(model, x, y, p0, bounds, **arguments)


def line(x: Any, a: Any, b: Any) -> Any:
    return a * x + b


def exponential(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


def plane(x: Any, a: Any, b: Any) -> Any:
    """Model of two arrays."""
    return a * x[0] + b * x[1]


def fading(x: Any, a: Any, b: Any, c: Any) -> Any:
    """Model of two coordinates, such as time and position."""
    t, position = x
    return a * jnp.exp(-b * t) + c * position


def gaussian(x: Any, height: Any, centre: Any, width: Any) -> Any:
    return height * jnp.exp(-0.5 * ((x - centre) / width) ** 2)


@functools.cache
def decay_data(n_rows: int = 1_000, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return x and noisy y of ``exponential`` with a = 2.5, b = 1.3 and c = 0.5."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 5, n_rows)
    y = 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * rng.standard_normal(n_rows)
    return x, y


@dataclass(frozen=True)
class Problem:
    name: str
    model: Callable[..., Any]  # model(x, *params)
    truth: tuple[float, ...]
    start: tuple[float, ...]
    x_range: tuple[float, float]
    noise: float = 0.05
    n_variables: int = 1

    @functools.cached_property
    def x(self) -> Any:
        rng = np.random.default_rng(len(self.name))
        shape = (N_ROWS,) if self.n_variables == 1 else (N_ROWS, self.n_variables)
        return rng.uniform(*self.x_range, shape)

    @functools.cached_property
    def sigma(self) -> np.ndarray:
        rng = np.random.default_rng(1 + len(self.name))
        return self.noise * rng.uniform(0.5, 2.0, N_ROWS)

    @functools.cached_property
    def y(self) -> np.ndarray:
        rng = np.random.default_rng(2 + len(self.name))
        with jax.enable_x64(True):
            clean = np.asarray(self.model(jnp.asarray(self.x), *self.truth))
        return clean + self.sigma * rng.standard_normal(N_ROWS)


def scipy_fit(
    model: Callable[..., Any], x: Any, y: np.ndarray, p0: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Fit with SciPy, the exact Jacobian and tolerances of 1e-15."""
    n = len(p0)

    def stacked(p: Any) -> Any:
        return model(jax.tree.map(jnp.asarray, x), *p)

    values, jacobian = jax.jit(stacked), jax.jit(jax.jacfwd(stacked))
    with jax.enable_x64(True):
        return optimize.curve_fit(
            lambda _, *p: np.asarray(values(jnp.array(p))),
            np.zeros(len(y)),
            y,
            p0,
            jac=lambda _, *p: np.asarray(jacobian(jnp.array(p))).reshape(-1, n),
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
            **options,
        )


def _gaussian_2d(x: Any, height: Any, x0: Any, y0: Any, width: Any, floor: Any) -> Any:
    distance = (x[:, 0] - x0) ** 2 + (x[:, 1] - y0) ** 2
    return height * jnp.exp(-0.5 * distance / width**2) + floor


PROBLEMS = [
    Problem(
        "exponential",
        exponential,
        (2.5, 1.3, 0.5),
        (2.0, 0.5, 0.3),
        (0.0, 5.0),
    ),
    Problem(
        "bi-exponential",
        lambda x, a, b, c, d: a * jnp.exp(-b * x) + c * jnp.exp(-d * x),
        (3.0, 0.4, 2.0, 4.0),
        (2.0, 0.2, 1.0, 3.0),
        (0.0, 8.0),
        0.01,
    ),
    Problem(
        "Gaussian peak on a slope",
        lambda x, h, m, w, a, b: h * jnp.exp(-0.5 * ((x - m) / w) ** 2) + a + b * x,
        (4.0, 3.0, 0.6, 1.0, 0.2),
        (3.0, 2.6, 0.9, 0.5, 0.1),
        (0.0, 10.0),
    ),
    Problem(
        "Lorentzian",
        lambda x, h, m, w, a: h * w**2 / ((x - m) ** 2 + w**2) + a,
        (5.0, 4.0, 0.8, 0.3),
        (4.0, 3.6, 1.2, 0.1),
        (0.0, 10.0),
    ),
    Problem(
        "logistic",
        lambda x, top, rate, middle, bottom: bottom + top / (1 + jnp.exp(-rate * (x - middle))),
        (3.0, 1.7, 5.0, 0.4),
        (2.0, 1.0, 4.0, 0.0),
        (0.0, 10.0),
    ),
    Problem(
        "Michaelis-Menten",
        lambda x, vmax, km: vmax * x / (km + x),
        (12.0, 3.5),
        (8.0, 2.0),
        (0.1, 20.0),
    ),
    Problem(
        "damped sine",
        lambda x, a, tau, omega, phi: a * jnp.exp(-x / tau) * jnp.sin(omega * x + phi),
        (3.0, 6.0, 2.0, 0.4),
        (2.0, 5.0, 2.05, 0.2),
        (0.0, 12.0),
    ),
    Problem("power law", lambda x, a, k: a * x**k, (1.7, -0.8), (1.0, -0.5), (0.5, 30.0), 0.02),
    Problem(
        "2-d Gaussian",
        _gaussian_2d,
        (4.0, 1.0, -1.0, 1.5, 0.2),
        (3.0, 0.6, -0.7, 2.0, 0.0),
        (-5.0, 5.0),
        0.05,
        2,
    ),
]


def separable(x: Any, level: Any, warming: Any, middle: Any, rate: Any, slope: Any, k: Any) -> Any:
    """A model of (time, latitude, longitude) for broadcast coordinates."""
    time, latitude, longitude = x
    rise = warming / (1 + jnp.exp(-rate * (time - middle)))
    return level + rise + slope * latitude**2 + k * jnp.cos(longitude)


SEPARABLE_TRUTH = (1.0, 2.0, 6.0, 0.9, -0.3, 0.5)
SEPARABLE_START = (0.5, 1.5, 5.0, 0.6, -0.2, 0.3)


@functools.cache
def separable_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return time, latitude, longitude (1-d) and y of shape (time, latitude, longitude)."""
    time, latitude = np.linspace(0, 12, 60), np.linspace(-1, 1, 31)
    longitude = np.linspace(0, 6, 29)
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        x = (time[:, None, None], latitude[None, :, None], longitude[None, None, :])
        clean = np.asarray(separable(tuple(map(jnp.asarray, x)), *SEPARABLE_TRUTH))
    return time, latitude, longitude, clean + 0.1 * rng.standard_normal(clean.shape)
