"""What is said of a model, a start or bounds that cannot be used, and what to write instead."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import xarray as xr
from jax import lax

import nlsq_dask as nd
from nlsq_dask.errors import ModelError
from nlsq_dask.fit.arguments.parameters import parse_parameters
from nlsq_dask.model.check import check_trace
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Layout

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
        "The model receives x as one argument, a tuple of 2 arrays: begin with `x0, x1 = x`."
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
    assert said.endswith("x as one argument, a dict with the arrays x['t'], x['lat'].")


@pytest.mark.parametrize(
    ("x", "parts"),
    [((T, LAT), "x"), (["t", "lat"], "x"), ({"t": T, "lat": LAT}, "x['t'], x['lat']")],
)
def test_x_as_separate_arguments(x: Any, parts: str) -> None:
    assert message(separate, x, NAMED) == (
        "p0 has 2 values, but the model takes 3 parameters (lat, a, b). Pass one value per "
        f"parameter. If lat is part of x: the model gets all arrays of x as its first argument, "
        f"so write `def model(x, a, b)`, and begin its body with `t, lat = {parts}`."
    )


def test_x_as_separate_arguments_without_p0() -> None:
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
        "x is a block of rows with shape (b, 2) and columns x[:, 0] and x[:, 1]; "
        "`x0, x1 = x.T` unpacks them."
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
    assert said.endswith("and 2 scalars.")


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


@pytest.mark.parametrize(
    ("n", "names"), [(2, "a, b"), (4, "a, b, c, d"), (5, "a, b, ..."), (9, "a, b, ...")]
)
def test_a_start_for_parameters_in_a_vector(n: int, names: str) -> None:
    assert message(lambda x, p: p[0] * x, T, p0=[1.0] * n) == (
        f"p0 has {n} values, but the model takes 1 parameter (p). The model needs an argument "
        f"for each parameter: write `def model(x, {names})`, or `def model(x, *p)`, where p is a "
        f"tuple of all parameters."
    )


def test_arguments_in_another_order() -> None:
    order = "The order of arguments is model, x, y, p0."
    said = message(lambda x, a, b: a * x + b, T, [1.0, 1.0], Y)
    assert said == f"p0 has 60 values, but the model takes 2 parameters (a, b). {order}"
    with pytest.raises(TypeError, match=rf"got an array of shape \(60,\)\. {order}$"):
        nd.AdaptiveHybridStreamingOptimizer().fit(T, Y, separate)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=rf"got '[^']{{,40}}'\. {order}$"):
        nd.AdaptiveHybridStreamingOptimizer().fit("a * x + b" * 99, T, Y)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pairs", [[(0, 1), (0, 5), (1, 2)], np.array([(0, 1), (0, 5), (1, 2)]), [[-1, np.inf]]]
)
def test_bounds_in_pairs_of_one_meaning(pairs: Any) -> None:
    parsed = parse_parameters(lambda x, *p: 0.0, [1.0] * len(pairs), pairs, None)
    low, high = np.asarray(pairs, float).T
    np.testing.assert_array_equal(parsed.low, low)
    np.testing.assert_array_equal(parsed.high, high)


def test_bounds_of_two_parameters_are_those_of_scipy() -> None:
    parsed = parse_parameters(lambda x, a, b: 0.0, None, [(0, 1), (5, 10)], None)
    assert parsed.low.tolist() == [0, 1]
    assert parsed.high.tolist() == [5, 10]


@pytest.mark.parametrize(
    ("pairs", "columns", "by_name"),
    [
        ([(0, 2), (0, 3)], "bounds=((0, 0), (2, 3))", "{'p0': (0, 2), 'p1': (0, 3)}"),
        (
            [(0, None), (None, 5)],
            "bounds=((0, -np.inf), (np.inf, 5))",
            "{'p0': (0, np.inf), 'p1': (-np.inf, 5)}",
        ),
    ],
)
def test_bounds_in_two_pairs(pairs: Any, columns: str, by_name: str) -> None:
    with pytest.raises(ValueError, match=r"lower bounds, then all upper bounds: write ") as caught:
        nd.AdaptiveHybridStreamingOptimizer().fit(lambda x, *p: p[0] * x, T, Y, [1.0] * 2, pairs)
    assert str(caught.value).endswith(f"write {columns}, or bounds={by_name}.")


@pytest.mark.parametrize("pairs", [[(0, 1)] * 4, [(0, 1), (0, None), (1, 2)], [(0, 1), (5, 0)]])
def test_bounds_in_invalid_pairs(pairs: Any) -> None:
    with pytest.raises(ValueError, match=r"a pair for each of the 3|for parameter 'p1'|have 2 val"):
        parse_parameters(lambda x, *p: 0.0, [1.0] * 3, pairs, None)


# --- indices outside of x

TABLE = np.linspace(0.0, 1.0, 60).reshape(30, 2)


@pytest.mark.parametrize(
    ("model", "index"),
    [
        (lambda x, a, b: a + b * x[:, 2], 2),
        (lambda x, a, b: a + b * x.T[5], 5),
        (lambda x, a, b: a + b * x[..., -3], -3),
        (lambda x, a, b: a + b * x[:, np.array([0, 2])].sum(axis=1), 2),
        (lambda x, a, b: a + b * jnp.take(x, 2, axis=1), 2),
        (jax.jit(lambda x, a, b: a + b * x[:, 2]), 2),
        (jax.vmap(lambda row, a, b: a + b * row[2], (0, None, None)), 2),
        (lambda x, a, b: jnp.array([a, b])[2] * x[:, 0], 2),
    ],
)
def test_an_index_outside_of_x(model: Any, index: int) -> None:
    with pytest.raises(ModelError, match=f"reads index {index} of an axis of length 2") as caught:
        nd.AdaptiveHybridStreamingOptimizer().fit(model, TABLE, Y[:30], [1.0, 1.0])
    assert "x[:, 0] and x[:, 1]" in str(caught.value)


@pytest.mark.parametrize(
    "model",
    [
        lambda x, a, b: a + b * x[:, -1] + x[:, 1] + x.T[-2],
        lambda x, a, b: a + b * jnp.take(x, np.arange(2) + 1, axis=1, mode="clip").sum(axis=1),
        lambda x, a, b: a + b * jnp.roll(x, 1, axis=1)[:, 1] + x[:, ::-1][:, 1],
        lambda x, a, b: a * jnp.interp(x[:, 0], np.arange(5.0), np.arange(5.0)) + b,
        lambda x, a, b: a + b * jnp.arange(3.0)[jnp.clip(x[:, 0].astype(int), 0, 2)],
        lambda x, a, b: a + lax.fori_loop(0, 2, lambda i, s: s + b * x[:, i], 0 * x[:, 0]),
        lambda x, *p: jnp.polyval(jnp.array(p), x[:, 0]) + jnp.vander(x[:, 1], 3)[:, 2],
    ],
)
def test_indices_inside_of_arrays(model: Any) -> None:
    check_trace(Model(model, 2, Layout(None, ((2,),), ("f8",), "f8", None, False), "float64"))


# Ends a fit before anything is compiled; the tests read what is printed before that.
AT_ONCE = nd.HybridStreamingConfig(max_walltime=1e-9)


def wave(x: Any, height: Any, width: Any, offset: Any, slope: Any = 0.1) -> Any:
    return height * jnp.sin(x / width) + offset + slope * x


@pytest.mark.parametrize(
    ("p0", "bounds", "remark"),
    [
        ({"height": 1}, None, "Parameters missing in p0 start at: width = 1, offset = 1"),
        (
            {"height": 1, "width": 2},
            {"offset": (2, 4)},
            "Parameters missing in p0 start at: offset = 3",
        ),
        ({"height": 1, "width": 2, "offset": 0}, None, ""),
        (None, None, ""),
        ([1, 1, 1], None, ""),
    ],
)
def test_a_start_that_leaves_parameters_out(
    p0: Any, bounds: Any, remark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(AT_ONCE)
    problems = optimizer.plan(wave, T, Y, p0, bounds).problems
    optimizer.fit(wave, T, Y, p0, bounds)
    lines = capsys.readouterr().out.splitlines()
    if remark:
        assert remark in problems
        assert lines[1] == f"  {remark}"
    else:
        assert not any("p0" in problem for problem in problems)
        assert lines[1] == "Phase 0: normalization"


def test_a_start_that_leaves_very_many_parameters_out(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"c{i}" for i in range(50)]
    nd.AdaptiveHybridStreamingOptimizer(AT_ONCE).fit(
        lambda x, *p: p[0] * x + sum(p), T, Y, {"c0": 1}, param_names=names
    )
    assert ", c20 = 1, and 29 more\n" in capsys.readouterr().out
