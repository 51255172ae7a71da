"""Every way to hand over data and parameters, right and wrong, with the sentence it gets."""

from __future__ import annotations

import functools
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

import nlsq_dask as nd
from tests.problems import NO_WARMUP, decay_data, exponential, fit, line

N = 4_000
RNG = np.random.default_rng(5)
X, Y = decay_data(N, seed=3)
usual = functools.partial(fit, exponential, X, Y, gauss_newton_tol=1e-12)


@pytest.fixture(scope="module")
def expected() -> nd.FitResult:
    """The fit of NumPy arrays."""
    return usual()


# --- data that work


@pytest.mark.parametrize(("zarr_format", "sharded"), [(2, False), (3, False), (3, True)])
def test_zarr_formats_and_shards(
    tmp_path: Any, zarr_format: int, sharded: bool, expected: nd.FitResult
) -> None:
    shards = (1500,) if sharded else None
    stores = []
    for name, values in (("x", X), ("y", Y.astype(">f8"))):
        store = zarr.create_array(
            str(tmp_path / name),
            shape=(N,),
            chunks=(500,),
            shards=shards,
            dtype=values.dtype,
            zarr_format=zarr_format,
        )
        store[:] = values
        stores.append(store)
    result = fit(exponential, *stores)
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)


def test_lists_integers_and_float32() -> None:
    x = np.arange(1, 40)
    y = 3 * x + 1
    result = fit(line, list(map(int, x)), y.astype(np.float32), [1, 1], **NO_WARMUP)
    np.testing.assert_allclose(result.popt, [3, 1], rtol=1e-10)


def test_x_of_features_tuple_and_dict_agree() -> None:
    x2 = RNG.uniform(0, 1, N)
    y = Y + 0.5 * x2

    def two(t: Any, u: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return exponential(t, a, b, c) + d * u

    features = fit(lambda x, a, b, c, d: two(*x.T, a, b, c, d), np.c_[X, x2], y, **NO_WARMUP)
    pair = fit(lambda x, a, b, c, d: two(*x, a, b, c, d), (X, x2), y, **NO_WARMUP)
    x_named = {"t": X, "u": x2}
    named = fit(lambda x, a, b, c, d: two(x["t"], x["u"], a, b, c, d), x_named, y, **NO_WARMUP)
    np.testing.assert_allclose(pair.popt, features.popt, rtol=1e-10)
    np.testing.assert_allclose(named.popt, features.popt, rtol=1e-10)
    predicted = features.predict(np.c_[X, x2])
    np.testing.assert_allclose(pair.predict([X, x2]), predicted, rtol=1e-9)
    np.testing.assert_allclose(named.predict({"u": x2, "t": X}), predicted, rtol=1e-9)


def test_features_in_several_chunks(expected: nd.FitResult) -> None:
    x = da.from_array(np.c_[X, X**2], chunks=(900, 1))
    result = fit(lambda x, a, b, c: a * jnp.exp(-b * x[:, 0]) + c + 0 * x[:, 1], x, Y, **NO_WARMUP)
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-8)


@pytest.mark.parametrize("sigma", [0.02, np.full(N, 0.02), da.full(N, 0.02, chunks=777)])
def test_constant_sigma_changes_nothing_but_the_scale(sigma: Any, expected: nd.FitResult) -> None:
    result = usual(sigma=sigma)
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-10)
    np.testing.assert_allclose(result.perr, expected.perr, rtol=1e-6)
    np.testing.assert_allclose(result.chi2, expected.chi2 / 0.02**2, rtol=1e-10)


def test_masked_entries_are_left_out() -> None:
    y = np.ma.masked_array(Y.copy(), mask=np.arange(N) % 7 == 0)
    y.data[y.mask] = np.nan
    kept = ~y.mask
    expected = fit(exponential, X[kept], Y[kept])
    for masked, options in ((y, {}), (da.from_array(y, chunks=999), NO_WARMUP)):
        result = fit(exponential, X, masked, **options)
        np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-8)
        assert result.n_omitted == y.mask.sum()
        assert result.n_points == kept.sum()


@pytest.mark.parametrize("where", ["y", "x", "sigma"])
def test_nan_is_omitted_on_request(where: str) -> None:
    bad = np.array([0, 17, 3999])
    arrays = {"y": Y.copy(), "x": X.copy(), "sigma": np.full(N, 0.1)}
    arrays[where][bad] = [np.nan, np.inf, np.nan]
    kept = np.delete(np.arange(N), bad)
    expected = fit(exponential, X[kept], Y[kept])
    result = fit(exponential, arrays["x"], arrays["y"], sigma=arrays["sigma"], nan_policy="omit")
    assert result.success
    assert (result.n_omitted, result.n_points) == (3, N - 3)
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)


def test_nan_where_the_model_has_no_value() -> None:
    x = X.copy()
    x[5] = np.nan
    result = fit(
        lambda x, a, k: a * jnp.log(x + k),
        x,
        np.log(X + 1),
        [2.0, 0.5],
        nan_policy="omit",
        **NO_WARMUP,
    )
    np.testing.assert_allclose(result.popt, [1, 1], rtol=1e-8)


def test_xarray_dimensions_in_any_order_and_lazy_store(tmp_path: Any) -> None:
    time, height = np.linspace(0, 3, 40), np.linspace(0, 1, 25)
    y = 2.0 * np.exp(-0.7 * time[:, None]) + 0.3 * height + 0.01 * RNG.standard_normal((40, 25))
    dataset = xr.Dataset(
        {"y": (("time", "height"), y), "s": (("height",), 0.01 + 0.01 * height)},
        coords={"time": time, "height": height, "tilt": (("height", "time"), np.ones((25, 40)))},
    )
    dataset.chunk(time=7, height=25).to_zarr(tmp_path / "s.zarr", consolidated=False)

    def tilted(x: Any, a: Any, b: Any, c: Any) -> Any:
        return a * jnp.exp(-b * x[0]) + c * x[1] * x[2]

    names = ("time", "height", "tilt")
    options = NO_WARMUP
    expected = fit(tilted, names, dataset.y, sigma=dataset.s, **options)
    np.testing.assert_allclose(expected.popt, [2.0, 0.7, 0.3], rtol=0.02)
    for chunks in (None, {}, {"time": 14, "height": 25}):
        store = xr.open_zarr(tmp_path / "s.zarr", chunks=chunks, consolidated=False)
        assert fit(tilted, names, store.y, sigma=store.s, **options).popt == pytest.approx(
            expected.popt
        )
        turned = store.y.transpose("height", "time")
        arrays = tuple(store[name] for name in names)
        assert fit(tilted, arrays, turned, sigma=store.s, **options).popt == pytest.approx(
            expected.popt
        )
        mixed = ("time", store.height, "tilt")  # names beside arrays
        assert fit(tilted, mixed, turned, sigma=store.s, **options).popt == pytest.approx(
            expected.popt
        )


# --- starts and bounds that work


def test_starts_by_name_by_signature_and_as_integers(expected: nd.FitResult) -> None:
    def with_default(x: Any, a: Any, b: float = 0.5, c: Any = 0) -> Any:
        return exponential(x, a, b, c)

    for p0 in (None, [1, 1, 1], {"b": 2}, np.array([2.0, 1.0, 0.0]), (1, 2, 3)):
        result = fit(with_default, X, Y, p0)
        np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-8)
    np.testing.assert_array_equal(fit(with_default, X, Y, {"c": 0.1}).p0, [1.0, 0.5, 0.1])
    held = fit(with_default, X, Y, [1.0, 1.0])  # c is not fitted, as in SciPy
    assert held.param_names == ("a", "b")


def test_options_of_the_model_are_not_fitted(expected: nd.FitResult) -> None:
    def with_options(
        x: Any, a: Any, b: Any, c: Any = 0.1, kind: str = "exp", *, k: Any = 1.0
    ) -> Any:
        return exponential(x, a, b, c) if kind == "exp" and k == 1.0 else x

    for p0, bounds in (
        (None, None),
        ([1, 1, 1], {"b": (0, 3)}),
        ({"a": 1}, {"c": (-1.0, 1.0), "a": (0, np.inf)}),
    ):
        result = fit(with_options, X, Y, p0, bounds)
        assert result.param_names == ("a", "b", "c")
        np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-8)
    assert fit(with_options, X, Y).p0[2] == 0.1
    for p0 in ([1, 1, 1, 1], {"kind": 1}, {"k": 1}):
        with pytest.raises(ValueError, match="a, b, c"):
            fit(with_options, X, Y, p0)

    def flagged(x: Any, a: Any, b: Any, c: Any, flag: bool = True) -> Any:
        return exponential(x, a, b, c if flag is True else jnp.nan)

    held = fit(flagged, X, Y)
    np.testing.assert_allclose(held.popt, expected.popt, rtol=1e-8)


def test_open_signature_and_names() -> None:
    result = fit(lambda x, *p: exponential(x, *p), X, Y, [1, 1, 1], param_names=["A", "B", "C"])
    assert result.param_names == ("A", "B", "C")
    assert fit(lambda x, *p: exponential(x, *p), X, Y, [1, 1, 1]).param_names == ("p0", "p1", "p2")


@pytest.mark.parametrize(
    "bounds",
    [
        (0, 5),
        ([0, 0, -np.inf], [np.inf, 9, 9]),
        {"b": (0.0, 3.0)},
        ({"a": 0.0}, {"c": 4.0}),
    ],
)
def test_bounds_in_every_form(bounds: Any, expected: nd.FitResult) -> None:
    np.testing.assert_allclose(usual(bounds=bounds).popt, expected.popt, rtol=1e-8)


def test_a_default_start_is_moved_inside_the_bounds(expected: nd.FitResult) -> None:
    result = usual(bounds=([2.0, 0, 0], [3.0, np.inf, 1.0]))
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-8)
    assert result.p0[0] == 2.5


# --- what is refused; the sentences are in ``test_bad_input``


def test_nan_is_counted_and_found() -> None:
    y = Y.copy()
    y[[1234, 1235, 3999]] = np.nan
    with pytest.raises(nd.NonFiniteDataError, match=r"3 of 4,000 rows .* y_data\[1234\]") as caught:
        fit(exponential, X, da.from_array(y, chunks=500))
    assert (caught.value.n_rows, caught.value.first_block) == (3, (2,))


def test_nan_that_the_sample_misses_is_found() -> None:
    n = 400_000
    x = np.linspace(0, 1, n)
    y = 2 * x + 1
    y[123_456] = np.inf
    lazy = da.from_array(y, chunks=50_000)
    with pytest.raises(nd.NonFiniteDataError, match="1 of 400,000 rows"):
        fit(line, da.from_array(x, chunks=50_000), lazy, **NO_WARMUP)


def test_all_nan() -> None:
    with pytest.raises(nd.DataError, match="none of the 4,000 rows"):
        fit(exponential, X, np.full(N, np.nan), nan_policy="omit")


def test_labels_must_match(expected: nd.FitResult) -> None:
    y = xr.DataArray(Y, coords={"t": X}, dims="t")
    shifted = xr.DataArray(X, coords={"t": X + 1}, dims="t")
    with pytest.raises(nd.DataError, match="labels of x_data along 't'"):
        fit(exponential, shifted, y)
    with pytest.raises(nd.DataError, match=r"names the coordinate 'u', but .* are \['t'\]"):
        fit(exponential, "u", y)
    np.testing.assert_allclose(fit(exponential, "t", y).popt, expected.popt, rtol=1e-9)


@pytest.mark.parametrize("value", ["group", "dataset"])
def test_containers_are_refused_by_name(value: str, tmp_path: Any) -> None:
    group = zarr.create_group(str(tmp_path / "g"))
    group.create_array("t", shape=(3,), dtype="f8")
    container = group if value == "group" else xr.Dataset({"t": ("row", X)})
    with pytest.raises(nd.DataError, match="'t'"):
        fit(exponential, container, Y)
