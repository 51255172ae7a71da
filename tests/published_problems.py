"""Published least-squares problems with narrow curved valleys, or with minima at zero residual.

The functions are those of J. J. Moré, B. S. Garbow and K. E. Hillstrom, "Testing unconstrained
optimization software", ACM Transactions on Mathematical Software 7, 17-41 (1981), with their
starts. Residual i is the value of the model at row i, minus y.

Their minima are of three kinds: at zero residual, at the end of narrow curved valleys, and with
large residuals over a singular Jacobian. Problems 10, 15 and 17 are NIST's MGH10, MGH09 and MGH17.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

Vector = np.ndarray


@dataclass(frozen=True)
class Published:
    name: str
    model: Callable[..., Any]
    x: Vector
    y: Vector
    start: tuple[float, ...]


def _formulas(
    name: str, residuals: Callable[..., list[Any]], start: tuple[float, ...]
) -> Published:
    """Return a problem in which each row has a formula of its own, and x is its number."""
    n_rows = len(residuals(*start))

    def model(x: Any, *params: Any) -> Any:
        return jnp.stack([jnp.asarray(r) for r in residuals(*params)])[x.astype(int)]

    return Published(name, model, np.arange(float(n_rows)), np.zeros(n_rows), start)


def _curve(
    name: str, model: Callable[..., Any], x: Any, y: Any, start: tuple[float, ...]
) -> Published:
    x = np.asarray(x, float)
    return Published(name, model, x, np.broadcast_to(np.asarray(y, float), x.shape), start)


def _numbers(text: str) -> Vector:
    return np.array(text.split(), float)


def _rosenbrock(a: Any, b: Any) -> list[Any]:
    return [10 * (b - a**2), 1 - a]


def _extended_rosenbrock(*p: Any) -> list[Any]:
    return [r for a, b in zip(p[::2], p[1::2], strict=True) for r in _rosenbrock(a, b)]


def _freudenstein_roth(a: Any, b: Any) -> list[Any]:
    return [-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b]


def _badly_scaled_powell(a: Any, b: Any) -> list[Any]:
    return [1e4 * a * b - 1, jnp.exp(-a) + jnp.exp(-b) - 1.0001]


def _badly_scaled_brown(a: Any, b: Any) -> list[Any]:
    return [a - 1e6, b - 2e-6, a * b - 2]


def _helical_valley(a: Any, b: Any, c: Any) -> list[Any]:
    turns = jnp.arctan2(b, a) / (2 * jnp.pi)
    return [10 * (c - 10 * turns), 10 * (jnp.hypot(a, b) - 1), c]


def _singular_powell(a: Any, b: Any, c: Any, d: Any) -> list[Any]:
    return [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]


def _wood(a: Any, b: Any, c: Any, d: Any) -> list[Any]:
    return [
        10 * (b - a**2),
        1 - a,
        90**0.5 * (d - c**2),
        1 - c,
        10**0.5 * (b + d - 2),
        (b - d) / 10**0.5,
    ]


def _variably_dimensioned(*p: Any) -> list[Any]:
    total = sum((j + 1) * (q - 1) for j, q in enumerate(p))
    return [*(q - 1 for q in p), total, total**2]


def _trigonometric(*p: Any) -> list[Any]:
    n, total = len(p), sum(jnp.cos(q) for q in p)
    return [n - total + (i + 1) * (1 - jnp.cos(q)) - jnp.sin(q) for i, q in enumerate(p)]


def _almost_linear_brown(*p: Any) -> list[Any]:
    n, product = len(p), 1.0
    for q in p:
        product = product * q
    return [*(q + sum(p) - (n + 1) for q in p[:-1]), product - 1]


def _tridiagonal_broyden(*p: Any) -> list[Any]:
    padded = (0.0, *p, 0.0)
    return [(3 - 2 * q) * q - padded[i] - 2 * padded[i + 2] + 1 for i, q in enumerate(p)]


def _penalty(*p: Any) -> list[Any]:
    return [*(1e-5**0.5 * (q - 1) for q in p), sum(q**2 for q in p) - 0.25]


def _watson(x: Any, *p: Any) -> Any:
    """Residuals of a differential equation at 29 points, and its initial values (x = 2, 3)."""
    t = jnp.where(x <= 1, x, 0.5)
    slope = sum(j * q * t ** (j - 1) for j, q in enumerate(p) if j)
    value = sum(q * t**j for j, q in enumerate(p))
    equation = slope - value**2 - 1
    return jnp.where(x <= 1, equation, jnp.where(x == 2, p[0], p[1] - p[0] ** 2 - 1))


def _osborne(x: Any, *p: Any) -> Any:
    peaks = zip(p[1:4], p[5:8], p[8:], strict=True)
    total = p[0] * jnp.exp(-x * p[4])
    return total + sum(h * jnp.exp(-((x - m) ** 2) * w) for h, w, m in peaks)


def _bard(x: Any, a: Any, b: Any, c: Any) -> Any:
    other = 16 - x
    return a + x / (b * other + c * jnp.minimum(x, other))


def _box(x: Any, a: Any, b: Any, c: Any) -> Any:
    return jnp.exp(-x * a) - jnp.exp(-x * b) - c * (jnp.exp(-x) - jnp.exp(-10 * x))


def _gulf(x: Any, a: Any, b: Any, c: Any) -> Any:
    time = 25 + (-50 * jnp.log(x)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(time - b) ** c) / a)


def _brown_dennis(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return (a + x * b - jnp.exp(x)) ** 2 + (c + d * jnp.sin(x) - jnp.cos(x)) ** 2


def _biggs(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    return c * jnp.exp(-x * a) - d * jnp.exp(-x * b) + f * jnp.exp(-x * e)


_BARD_Y = _numbers("0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39")
_GAUSSIAN_Y = _numbers(
    "0.0009 0.0044 0.0175 0.0540 0.1295 0.2420 0.3521 0.3989 "
    "0.3521 0.2420 0.1295 0.0540 0.0175 0.0044 0.0009"
)
_OSBORNE_Y = _numbers(
    "1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655 0.616 "
    "0.606 0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558 0.533 0.495 "
    "0.500 0.423 0.395 0.375 0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672 "
    "0.708 0.633 0.668 0.645 0.632 0.591 0.559 0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581 "
    "0.428 0.292 0.162 0.098 0.054"
)


def published_problems() -> Iterator[Published]:
    """Yield the problems; those with formulas first."""
    yield _formulas("Rosenbrock", _rosenbrock, (-1.2, 1))
    yield _formulas("extended Rosenbrock", _extended_rosenbrock, (-1.2, 1) * 5)
    yield _formulas("Freudenstein and Roth", _freudenstein_roth, (0.5, -2))
    yield _formulas("Powell badly scaled", _badly_scaled_powell, (0, 1))
    yield _formulas("Brown badly scaled", _badly_scaled_brown, (1, 1))
    yield _formulas("helical valley", _helical_valley, (-1, 0, 0))
    yield _formulas("Powell singular", _singular_powell, (3, -1, 0, 1))
    yield _formulas("Wood", _wood, (-3, -1, -3, -1))
    yield _formulas(
        "variably dimensioned", _variably_dimensioned, tuple(1 - j / 10 for j in range(1, 11))
    )
    yield _formulas("trigonometric", _trigonometric, (0.1,) * 10)
    yield _formulas("Brown almost linear", _almost_linear_brown, (0.5,) * 10)
    yield _formulas("Broyden tridiagonal", _tridiagonal_broyden, (-1,) * 10)
    yield _formulas("penalty", _penalty, (1, 2, 3, 4))

    rows = np.arange(1.0, 17.0)
    yield _curve("Beale", lambda x, a, b: a * (1 - b**x), rows[:3], [1.5, 2.25, 2.625], (1, 1))
    yield _curve(
        "Jennrich and Sampson",
        lambda x, a, b: jnp.exp(x * a) + jnp.exp(x * b),
        rows[:10],
        2 + 2 * rows[:10],
        (0.3, 0.4),
    )
    yield _curve("Bard", _bard, rows[:15], _BARD_Y, (1, 1, 1))
    yield _curve(
        "Gaussian",
        lambda x, a, b, c: a * jnp.exp(-b * (x - c) ** 2 / 2),
        (8 - rows[:15]) / 2,
        _GAUSSIAN_Y,
        (0.4, 1, 0),
    )
    yield _curve("Box", _box, 0.1 * rows[:10], 0, (0, 10, 20))
    yield _curve("Gulf", _gulf, np.arange(1, 100) / 100, np.arange(1, 100) / 100, (5, 2.5, 0.15))
    yield _curve("Brown and Dennis", _brown_dennis, np.arange(1, 21) / 5, 0, (25, 5, -5, -1))
    z = 0.1 * rows[:13]
    biggs_y = np.exp(-z) - 5 * np.exp(-10 * z) + 3 * np.exp(-4 * z)
    yield _curve("Biggs", _biggs, z, biggs_y, (1, 2, 1, 1, 1, 1))
    starts = (1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5)
    yield _curve("Osborne 2", _osborne, np.arange(65) / 10, _OSBORNE_Y, starts)
    points = np.r_[np.arange(1, 30) / 29, 2, 3]
    for n in (6, 9):
        yield _curve(f"Watson {n}", _watson, points, 0, (0,) * n)
