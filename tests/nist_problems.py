"""NIST's 27 nonlinear regression problems, with certified values; ``nist.json`` has the data.

Source: NIST, Statistical Reference Datasets, https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.hard_problems import (
    arrhenius,
    cubic_over_cubic,
    three_exponentials,
)


@dataclass(frozen=True)
class Certified:
    name: str
    model: Callable[..., Any]
    starts: tuple[list[float], list[float]]
    params: list[float]
    errors: list[float]
    x: Any  # one array, or a tuple of two
    y: np.ndarray


def _rise(x: Any, a: Any, b: Any) -> Any:
    return a * (1 - jnp.exp(-b * x))


def _decay_over_line(x: Any, a: Any, b: Any, c: Any) -> Any:
    return jnp.exp(-a * x) / (b + c * x)


def _magnetism(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * (b + x) ** (-1 / c)


def _cycles(
    x: Any, level: Any, a: Any, b: Any, period: Any, c: Any, d: Any, other: Any, e: Any, f: Any
) -> Any:
    year, one, two = (2 * jnp.pi * x / length for length in (12.0, period, other))
    return (
        level
        + a * jnp.cos(year)
        + b * jnp.sin(year)
        + c * jnp.cos(one)
        + d * jnp.sin(one)
        + e * jnp.cos(two)
        + f * jnp.sin(two)
    )


def _normal(x: Any, area: Any, width: Any, center: Any) -> Any:
    return area / width * jnp.exp(-0.5 * ((x - center) / width) ** 2)


def _two_peaks(x: Any, a: Any, b: Any, h1: Any, m1: Any, w1: Any, h2: Any, m2: Any, w2: Any) -> Any:
    first, second = (jnp.exp(-(((x - m) / w) ** 2)) for m, w in ((m1, w1), (m2, w2)))
    return a * jnp.exp(-b * x) + h1 * first + h2 * second


def _quadratics(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    return (a + b * x + c * x**2) / (1 + d * x + e * x**2)


def _enzyme(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * (x**2 + x * b) / (x**2 + x * c + d)


def _two_decays(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    return a + b * jnp.exp(-d * x) + c * jnp.exp(-e * x)


def _breakdown(x: Any, a: Any, b: Any, c: Any) -> Any:
    time, temperature = x
    return a - b * time * jnp.exp(-c * temperature)


def _defect(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return a - b * x - jnp.arctan(c / (x - d)) / jnp.pi


_MODELS: dict[str, Callable[..., Any]] = {
    "Bennett5": _magnetism,
    "BoxBOD": _rise,
    "Chwirut1": _decay_over_line,
    "Chwirut2": _decay_over_line,
    "DanWood": lambda x, a, b: a * x**b,
    "ENSO": _cycles,
    "Eckerle4": _normal,
    "Gauss1": _two_peaks,
    "Gauss2": _two_peaks,
    "Gauss3": _two_peaks,
    "Hahn1": cubic_over_cubic,
    "Kirby2": _quadratics,
    "Lanczos1": three_exponentials,
    "Lanczos2": three_exponentials,
    "Lanczos3": three_exponentials,
    "MGH09": _enzyme,
    "MGH10": arrhenius,
    "MGH17": _two_decays,
    "Misra1a": _rise,
    "Misra1b": lambda x, a, b: a * (1 - (1 + b * x / 2) ** -2),
    "Misra1c": lambda x, a, b: a * (1 - (1 + 2 * b * x) ** -0.5),
    "Misra1d": lambda x, a, b: a * b * x / (1 + b * x),
    "Nelson": _breakdown,
    "Rat42": lambda x, a, b, c: a / (1 + jnp.exp(b - c * x)),
    "Rat43": lambda x, a, b, c, d: a / (1 + jnp.exp(b - c * x)) ** (1 / d),
    "Roszman1": _defect,
    "Thurber": cubic_over_cubic,
}


def nist_problems() -> list[Certified]:
    """Return the problems in alphabetical order."""
    records = json.loads(Path(__file__).with_name("nist.json").read_text())
    problems = []
    for name, record in records.items():
        x = tuple(np.array(column, float) for column in record["x"])
        y = np.array(record["y"], float)
        problems.append(
            Certified(
                name,
                _MODELS[name],
                tuple(record["starts"]),
                record["certified"],
                record["errors"],
                x[0] if len(x) == 1 else x,
                np.log(y) if name == "Nelson" else y,
            )
        )
    return problems
