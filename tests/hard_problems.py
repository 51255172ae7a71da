"""Problems on which fits stop short: each with data, a start that is not kind, perhaps bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from tests.problems import exponential

Vector = np.ndarray


@dataclass(frozen=True)
class Hard:
    name: str
    model: Callable[..., Any]
    truth: tuple[float, ...]
    start: tuple[float, ...]
    x_range: tuple[float, float]
    n_rows: int
    noise: float
    bounds: tuple[Any, Any] | None = None

    def data(self) -> tuple[Vector, Vector]:
        rng = np.random.default_rng(sum(map(ord, self.name)))
        low, high = self.x_range
        x = low + (high - low) / self.n_rows * (
            np.arange(self.n_rows) + rng.uniform(size=self.n_rows)
        )
        with jax.enable_x64(True):
            clean = np.asarray(self.model(jnp.asarray(x), *self.truth))
        return x, clean + self.noise * np.abs(clean).max() * rng.standard_normal(self.n_rows)


def two_exponentials(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * jnp.exp(-b * x) + c * jnp.exp(-d * x)


def three_exponentials(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    return a * jnp.exp(-b * x) + c * jnp.exp(-d * x) + e * jnp.exp(-f * x)


def rational(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return (a + b * x) / (1 + c * x + d * x**2)


def cubic_over_cubic(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
    return (a + b * x + c * x**2 + d * x**3) / (1 + e * x + f * x**2 + g * x**3)


def peak(x: Any, height: Any, centre: Any, width: Any, floor: Any) -> Any:
    return height * jnp.exp(-0.5 * ((x - centre) / width) ** 2) + floor


def logistic(x: Any, top: Any, rate: Any, middle: Any) -> Any:
    return top / (1 + jnp.exp(-rate * (x - middle)))


def power(x: Any, a: Any, k: Any, c: Any) -> Any:
    return a * x**k + c


def hahn(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * (1 - jnp.exp(-b * x)) ** c


def quadratic(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a + b * x + c * x**2


def arrhenius(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(b / (x + c))


def cases() -> Iterator[Hard]:
    """Yield them all, most of them small: there fits stop short."""
    for size in (1e-12, 1e-6, 1e6, 1e12):
        yield Hard(
            f"units {size:g}",
            lambda x, a, b, c, size=size: a * size * jnp.exp(-b / size * x) + c,
            (2.5 / size, 1.3 * size, 0.5),
            (1.0 / size, 0.5 * size, 1.0),
            (0, 4),
            60,
            0.02,
        )
    for n in (10, 40, 250):
        yield Hard(f"decay {n}", exponential, (2.5, 1.3, 0.5), (25, 0.13, 5), (0, 4), n, 0.02)
        yield Hard(
            f"two rates {n}", two_exponentials, (2, 1, 3, 1.7), (1, 0.5, 1, 3), (0, 5), n, 1e-4
        )
        yield Hard(
            f"close rates {n}", two_exponentials, (2, 1, 3, 1.3), (1, 0.7, 1, 2), (0, 5), n, 1e-6
        )
        yield Hard(f"rational {n}", rational, (1, 2, 0.5, 0.3), (1, 1, 1, 1), (0, 8), n, 1e-3)
        yield Hard(f"peak {n}", peak, (4, 3, 0.6, 1), (40, 3.5, 2, 0), (0, 6), n, 0.02)
        yield Hard(f"logistic {n}", logistic, (3, 1.7, 5), (30, 0.5, 8), (0, 10), n, 0.01)
        yield Hard(f"power {n}", power, (1.7, -0.8, 0.1), (10, -0.1, 1), (0.5, 30), n, 0.01)
        yield Hard(f"growth {n}", hahn, (5, 0.3, 2.5), (50, 0.1, 1), (0.5, 12), n, 0.005)
        yield Hard(
            f"at a bound {n}",
            exponential,
            (2.5, 1.3, 0.5),
            (2, 0.5, 1.0),
            (0, 4),
            n,
            0.02,
            ([0, 0, 0.7], [np.inf, np.inf, np.inf]),
        )
        yield Hard(
            f"at two bounds {n}",
            peak,
            (4, 3, 0.6, 1),
            (3, 2.5, 1.0, 1.5),
            (0, 6),
            n,
            0.02,
            ([0, 0, 0.8, 1.2], [10, 10, 5, 3]),
        )
        yield Hard(f"valley {n}", power, (0.3, 2.5, 1), (3, 1, 0), (0.9, 1.4), n, 1e-4)
    yield Hard(
        "three rates",
        three_exponentials,
        (1, 0.3, 2, 1.5, 3, 6),
        (1, 0.2, 1, 1, 1, 4),
        (0, 8),
        200,
        1e-6,
    )
    yield Hard(
        "cubics",
        cubic_over_cubic,
        (1, 0.5, 0.2, 0.05, 0.3, 0.1, 0.02),
        (1, 1, 0.1, 0.1, 0.1, 0.1, 0.1),
        (-2, 3),
        120,
        1e-5,
    )
    yield Hard("seconds", quadratic, (1e5, -1e-4, 3e-14), (0, 0, 0), (1.7e9, 1.8e9), 100, 1e-4)
    yield Hard("Arrhenius", arrhenius, (6e-3, 6e3, 345), (6e-3, 6.2e3, 350), (50, 125), 16, 1e-5)
    yield Hard("large", exponential, (2.5e8, 1.3e-4, 0.5e8), (1e8, 1e-5, 0), (0, 4e4), 30_000, 0.05)


def exact_functions(problem: Hard, x: Vector, y: Vector) -> tuple[Any, Any]:
    """Return residual and Jacobian as functions of the parameters, in float64."""

    def residual(p: Any) -> Any:
        return problem.model(jnp.asarray(x), *p) - y

    compiled = jax.jit(residual), jax.jit(jax.jacfwd(residual))

    def in_64_bits(function: Any) -> Any:
        def call(p: Any) -> Vector:
            with jax.enable_x64(True):
                return np.asarray(function(jnp.asarray(p, jnp.float64)))

        return call

    return in_64_bits(compiled[0]), in_64_bits(compiled[1])


def scipy_solution(problem: Hard, residual: Any, jacobian: Any) -> Any:
    """Return SciPy's best from the start, by several methods."""
    methods = ("trf", "dogbox") if problem.bounds else ("lm", "trf")
    found = []
    for method in methods:
        for scale in ("jac", 1.0):
            try:
                found.append(
                    optimize.least_squares(
                        residual,
                        problem.start,
                        jacobian,
                        problem.bounds or (-np.inf, np.inf),
                        method=method,
                        x_scale=scale,
                        ftol=1e-15,
                        xtol=1e-15,
                        gtol=1e-15,
                        max_nfev=5_000,
                    )
                )
            except ValueError:  # the model is not finite where SciPy went
                continue
    return min(found, key=lambda one: one.cost)
