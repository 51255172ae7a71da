"""What is said of a model that cannot be used: what is wrong with it, and what to write instead."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import xarray as xr

import nlsq_dask as nd

T = np.linspace(0.0, 4.0, 60)
LAT = np.cos(3.0 * T)
Y = 2.0 * T + LAT
NAMED = xr.DataArray(Y, {"t": T, "lat": ("t", LAT)}, "t")


def message(model: Any, x: Any, y: Any = Y, p0: Any = (1.0, 1.0)) -> str:
    with pytest.raises(ValueError) as caught:
        nd.AdaptiveHybridStreamingOptimizer().fit(model, x, y, p0, verbose=0)
    return str(caught.value)


def separate(t: Any, lat: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-t) + b * lat


def unpacking(x: Any, a: Any, b: Any) -> Any:
    t, lat = x
    return a * t + b * lat


def branching(t: Any, a: Any, b: Any) -> Any:
    if t > 3:
        return a * t
    return b * t


@pytest.mark.parametrize(
    "model",
    [
        lambda x, a, b: a * x + b,
        lambda x, a, b: x * a + b,
        lambda x, a, b: a * jnp.exp(x) + b,
        lambda x, a, b: a * jnp.exp(-b * (2 * x)),
        lambda x, a, b: x**a + b,
        lambda x, a, b: a * x[:, 0] + b,
        lambda x, a, b: a * x["t"] + b,
        lambda x, a, b: a * x.t + b,
    ],
)
def test_a_tuple_that_is_not_unpacked(model: Any) -> None:
    said = message(model, (T, LAT))
    assert said.endswith(
        "The model gets x as one argument, a tuple of 2 arrays: begin with `x0, x1 = x`."
    )
    said = message(model, ("t", "lat"), NAMED)
    assert said.endswith("a tuple of 2 arrays: begin with `t, lat = x`.")


@pytest.mark.parametrize(
    "model",
    [
        lambda x, a, b: a * x + b,
        lambda x, a, b: a * x[0] + b,
        lambda x, a, b: a * x["T"] + b,
        lambda x, a, b: a * next(iter(x)) + b,  # the key, as of t, lat = x
    ],
)
def test_a_dict_that_is_taken_for_something_else(model: Any) -> None:
    said = message(model, {"t": T, "lat": LAT})
    assert said.endswith("x as one argument, a dict: its arrays are x['t'], x['lat'].")


def test_x_as_separate_arguments() -> None:
    assert "begin with `x0, x1 = x`" in message(separate, (T, LAT), p0=None)


@pytest.mark.parametrize("p0", [None, [1.0]])
@pytest.mark.parametrize(
    "model", [lambda x, p: p[0] * x + p[1], lambda x, p: sum(v * x**i for i, v in enumerate(p))]
)
def test_parameters_in_a_vector(model: Any, p0: Any) -> None:
    said = message(model, T, p0=p0)
    assert "write `def model(x, a, b)`, or `def model(x, *p)` for a tuple p of them" in said


@pytest.mark.parametrize(
    "model",
    [
        lambda x, a, b: a * x[0] + b * x[1],
        lambda x, a, b: a * x + b,
        unpacking,
    ],
)
def test_columns_of_x_are_not_its_rows(model: Any) -> None:
    said = message(model, np.stack([T, LAT], axis=1))
    assert said.endswith(
        "x is a block of rows, of shape (b, 2): its columns are x[:, 0] and x[:, 1], and "
        "`x0, x1 = x.T` gives them names."
    )


@pytest.mark.parametrize(
    "model",
    [
        lambda x, a, b: a * np.exp(-b * x),
        lambda x, a, b: math.exp(a) * x + b,
        lambda x, a, b: a * math.exp(b * x),
        lambda x, a, b: a * scipy.special.erf(x) + b,
        lambda x, a, b: float(a) * x + b,
        lambda x, a, b: x[0].item() * a + b,
    ],
)
def test_functions_of_other_libraries(model: Any) -> None:
    said = message(model, T)
    assert "jnp.exp for np.exp and math.exp" in said
    assert "jax.scipy.special for scipy.special" in said


def test_a_name_that_jax_does_not_have() -> None:
    said = message(lambda x, a, b: a * jnp.expp(b * x), T)
    assert "module 'jax.numpy' has no attribute 'expp'" in said
    assert said.endswith("and 2 single numbers.")


@pytest.mark.parametrize(
    "model",
    [
        branching,
        lambda x, a, b: a * x if b > 0 else x,
        lambda x, a, b: jnp.where((x > 0) and (x < 2), a, b),
        lambda x, a, b: a * max(x, b),
    ],
)
def test_conditions_on_values(model: Any) -> None:
    said = message(model, T)
    assert "Write jnp.where(x > 3, this, that) instead of 'if'" in said
    assert ".any()" not in said


def test_rows_picked_by_a_condition() -> None:
    said = message(lambda x, a, b: a * x[x > 1] + b, T)
    assert said.endswith("jnp.where(x > 3, this, that) gives a value for each row.")
    assert "\n" not in said
