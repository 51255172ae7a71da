"""Blocks that are not what their Dask array declares: heeded, or an error that names the block."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask.rows.declared import as_declared
from tests.problems import NO_WARMUP, fit

N = 60
X = np.arange(float(N))
GAP = X % 6 == 0
Y = 1 + 2 * X


def line(x: Any, a: Any, b: Any) -> Any:
    return a + b * x


def of_columns(x: Any, a: Any, b: Any) -> Any:
    return a + b * x[:, 1]


def lazy(values: Any, dtype: Any = float, **options: Any) -> da.Array:
    """Return an array of 6 delayed chunks, of which Dask knows what it is told."""
    parts = [dask.delayed(values[i : i + 10]) for i in range(0, N, 10)]
    shape = (10, *values.shape[1:])
    return da.concatenate([da.from_delayed(p, shape, dtype, **options) for p in parts])


def masked(values: Any, fill: float = -999.0) -> Any:
    return np.ma.masked_array(np.where(GAP, fill, values), GAP)


MASKED = {
    "y_data": {"y": lazy(masked(Y, 9999.0))},
    "x_data": {"x": lazy(masked(X))},
    "sigma": {"sigma": lazy(masked(np.ones(N)))},
    "sigma of groups": {"x": X // 40, "sigma": lazy(masked(np.ones(N))), "weights": [1.0, 2.0]},
    "x_data of groups": {"x": lazy(masked(X // 40)), "weights": [1.0, 2.0]},
    "y_data of groups": {"x": X // 40, "y": lazy(masked(Y)), "weights": [1.0, 2.0]},
    "x_data as dates": {
        "x": lazy(np.ma.masked_array(X.astype("M8[s]"), GAP), "M8[s]"),
    },
    "x_data in columns": {
        "x": da.stack([lazy(masked(X)), lazy(X)], axis=1),
        "model": of_columns,
    },
}  # fmt: skip


def fit_of(given: dict[str, Any], **options: Any) -> nd.FitResult:
    weights = given.get("weights")
    groups = {} if weights is None else {"enable_residual_weighting": True}
    return fit(
        given.get("model", line),
        given.get("x", X),
        given.get("y", Y),
        [1, 1],
        sigma=given.get("sigma"),
        residual_weights=weights,
        **groups,
        **options,
        **NO_WARMUP,
    )


@pytest.mark.parametrize("policy", ["raise", "omit"])
@pytest.mark.parametrize("case", MASKED)
def test_a_mask_that_dask_does_not_know_of(case: str, policy: str) -> None:
    name = case.split()[0]
    words = rf"{name} masks [12] of [12]0 elements in block \(\d,\) of the grid \(6,\)"
    with pytest.raises(nd.DataError, match=words + r".*meta=np.ma.empty\(0\)"):
        fit_of(MASKED[case], nan_policy=policy)


def test_the_two_remedies_for_masks_and_masks_of_nothing() -> None:
    values = masked(Y, 9999.0)
    declared = lazy(values, meta=np.ma.empty(0))
    later = lazy(values).map_blocks(np.ma.asarray, meta=np.ma.empty(0))
    for y in (declared, later):
        result = fit(line, X, y, [1, 1], **NO_WARMUP)
        np.testing.assert_allclose(result.x, [1, 2], rtol=1e-9)
        assert result.n_omitted == GAP.sum()
    nothing = np.ma.masked_array(Y, np.zeros(N, bool))
    assert fit(line, X, lazy(nothing), [1, 1], **NO_WARMUP).n_omitted == 0


WIDER = {
    "y_data": ({"y": lazy((1000 * Y).astype("i8"), "i2")}, "int16"),
    "x_data": ({"x": lazy((10 * X).astype("u2"), "u1")}, "uint8"),
    "sigma": ({"sigma": lazy(X + 0.1, "f4")}, "float32"),
    "x_data of groups": (
        {"x": lazy((300 * X).astype("i4"), "i1"), "weights": [1.0] * 20_000},
        "int8",
    ),
    "x_data in columns": (
        {"x": da.stack([lazy(X.astype("i2"), "i2"), lazy((1e5 * X).astype("i8"), "i2")], axis=1),
         "model": of_columns},
        "int16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDER)
def test_values_that_the_declared_dtype_cannot_hold(case: str) -> None:
    given, declared = WIDER[case]
    name = case.split()[0]
    words = (
        f"{name} has dtype .* in .*block.* declares {declared}, which changes values: .* becomes"
    )
    with pytest.raises(nd.DataError, match=words):
        fit_of(given)


def test_values_that_the_declared_dtype_holds() -> None:
    for values, dtype in (
        (np.array([1, -3, 2**15 - 1], "i8"), "int16"),
        (np.array([0.5, np.nan, np.inf]), "float32"),
        (np.array([2**24], "i8"), "float32"),
        (np.array([2**60 + 1, 3], "i8"), "float64"),
        (np.array([0.1], np.longdouble), "float64"),
        (np.array([True, False]), "int8"),
        (np.ma.masked_array([1.0, 2.0], [False, False]), "float64"),
    ):
        block = as_declared("x", values, dtype, values.shape)
        assert type(block) is np.ndarray
        assert block.dtype == dtype
        np.testing.assert_array_equal(block, np.asarray(values).astype(dtype))
    for wrong, dtype in (
        (np.array([2**24 + 1], "i8"), "float32"),
        (np.array([1e300]), "float32"),
        (np.array([2**63], "u8"), "int64"),
        (np.array([1j]), "float64"),
        (np.array(["a"]), "float64"),
        (np.array([1.5]), "int64"),
    ):
        with pytest.raises(nd.DataError, match=r"^x has .* a block, but its Dask array declares"):
            as_declared("x", wrong, dtype, wrong.shape)


def test_a_wider_dtype_whose_values_fit_is_no_error() -> None:
    result = fit(line, X, lazy(Y.astype("i8"), "i2"), [1, 1], **NO_WARMUP)
    np.testing.assert_allclose(result.x, [1, 2], rtol=1e-9)
    fixed = lazy((1000 * Y).astype("i8"), "i2").map_blocks(np.asarray, dtype="int64")
    np.testing.assert_allclose(
        fit(line, X, fixed, [1, 1], **NO_WARMUP).x, np.polyfit(X, 1000 * Y, 1)[::-1], rtol=1e-9
    )


def test_other_blocks_that_broadcasting_or_conversion_would_hide() -> None:
    groups = {"x": X // 40, "weights": [1.0, 2.0]}
    one = [da.from_delayed(dask.delayed(np.ones(1)), (10,), float) for _ in range(6)]
    with pytest.raises(nd.DataError, match=r"sigma has shape \(1,\) in a block.* declares \(10,\)"):
        fit_of(groups | {"sigma": da.concatenate(one)})
    for values in (X, X.astype("m8[s]")):
        with pytest.raises(nd.DataError, match=r"x_data has dtype .* declares datetime64\[s\]"):
            fit_of({"x": lazy(values, "M8[s]")})


def test_predict() -> None:
    good = fit(line, X, Y, [1, 1], **NO_WARMUP)
    expected = np.where(GAP, np.nan, Y)
    value, std = good.predict(lazy(masked(X)), return_std=True)
    np.testing.assert_allclose(value.compute(), expected, rtol=1e-9)
    np.testing.assert_array_equal(np.isnan(std.compute()), GAP)
    np.testing.assert_allclose(good.predict(lazy(X.astype("i8"), "i2")).compute(), Y, rtol=1e-9)
    with pytest.raises(nd.DataError, match=r"x has dtype int64 in a block.* 40000 becomes -25536"):
        good.predict(lazy(np.full(N, 40_000), "i2")).compute()
    with pytest.raises(nd.DataError, match=r"x has shape \(1,\) and .* in a block.*\(60,\)"):
        good.predict(da.from_delayed(dask.delayed(np.ones(1)), (N,), float)).compute()


def test_predict_of_columns_and_of_broadcast_arrays() -> None:
    columns = da.stack([lazy(masked(X)), lazy(X)], axis=1)
    good = fit(of_columns, np.c_[X, X], Y, [1, 1], **NO_WARMUP)
    np.testing.assert_array_equal(np.isnan(good.predict(columns).compute()), GAP)

    def plane(x: Any, a: Any, b: Any) -> Any:
        u, v = x
        return a * u + b * jnp.sin(v)

    u, v = X[:, None], X[None, :3]
    grid = fit(plane, (u, v), 2 * u + np.sin(v), [1, 1], **NO_WARMUP)
    masked_u = da.from_delayed(dask.delayed(masked(X)[:, None]), (N, 1), float)
    value = grid.predict((masked_u, v)).compute()
    np.testing.assert_array_equal(np.isnan(value), np.broadcast_to(GAP[:, None], (N, 3)))
