"""``curvefit`` does what ``xarray.DataArray.curvefit`` does, with ``np`` changed to ``jnp``.

xarray itself is the reference. Both get the same call on the same data; nearly all of them share
one model of 20 points, and tolerances, so that one program is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cftime
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import nlsq_dask as nd

TIGHT = {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14}
T = np.arange(20) * 0.25
Function = Callable[..., Any]


def decay(np: Any) -> Function:
    """Return the model for numpy or jax.numpy."""

    def exp_decay(t: Any, n0: Any, tau: Any = 1.0) -> Any:
        return n0 * np.exp(-t / tau)

    return exp_decay


NUMPY, JAX = decay(np), decay(jnp)


def make_cube() -> xr.DataArray:
    """Return decays at four positions, with coordinates of several kinds."""
    noise = 0.02 * np.random.default_rng(0).normal(size=(4, 20))
    height, tau = np.array([[2.0], [3.0], [4.0], [5.0]]), np.array([[1.5], [2.0], [2.5], [3.5]])
    return xr.DataArray(
        height * np.exp(-T / tau) + noise,
        dims=("x", "t"),
        coords={
            "x": [0, 10, 20, 30],
            "t": T,
            "place": ("x", list("abcd")),
            "run": 7,
            "age": ("t", T**1.1),
            "shifted": (("x", "t"), T + 0.1 * np.arange(4)[:, None]),
        },
        name="signal",
        attrs={"units": "V"},
    )


CUBE = make_cube()
MAP = xr.DataArray([1.5, 2.5, 4.5, 5.5], coords={"x": CUBE.x})


def assert_same(ours: xr.Dataset, theirs: xr.Dataset) -> None:
    """Names, dimensions, coordinates, attributes and dtypes are equal, and numbers are close."""
    assert set(theirs.data_vars) <= set(ours.data_vars)
    assert ours.attrs == theirs.attrs
    xr.testing.assert_identical(ours.coords.to_dataset(), theirs.coords.to_dataset())
    for name in theirs.data_vars:
        mine, other = ours[name], theirs[name]
        assert (mine.dims, mine.dtype, mine.attrs) == (other.dims, other.dtype, other.attrs)
        xr.testing.assert_identical(mine.coords.to_dataset(), other.coords.to_dataset())
    for name in map(str, theirs.data_vars):
        if not name.endswith("covariance"):
            continue
        variance = np.einsum("...ii->...i", theirs[name].values)
        error = np.sqrt(variance)
        best = name.replace("covariance", "coefficients")
        scale = error[..., :, None] * error[..., None, :]
        np.testing.assert_allclose(
            (ours[best].values - theirs[best].values) / error, 0.0 * error, atol=1e-5
        )
        np.testing.assert_allclose(
            (ours[name].values - theirs[name].values) / scale, 0.0 * scale, atol=1e-5
        )
        mean = ours[name.replace("covariance", "stderr")].values
        np.testing.assert_allclose(mean, error, rtol=1e-5)


def fit_both(
    ours: Any,
    *args: Any,
    model: Callable[[Any], Function] = decay,
    theirs: Any = None,
    **given: Any,
) -> xr.Dataset:
    """Return our result, after a comparison with that of xarray for the same call."""
    theirs = ours if theirs is None else theirs
    given.setdefault("kwargs", TIGHT)
    result = ours.nlsq.curvefit(*args, func=model(jnp), **given).compute()
    assert_same(result, theirs.curvefit(*args, func=model(np), **given).compute())
    return result


def with_gaps() -> xr.DataArray:
    cube = CUBE.copy()
    cube[1], cube[0, 3] = np.nan, np.nan
    return cube


DURATIONS = (T * 86_400e9).astype("timedelta64[ns]")
EPOCH = np.datetime64("1970-01-01", "ns")
NAT = np.datetime64("NaT", "ns")
SLOW = {"tau": 1e14}  # ns

CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "name": (CUBE, "t", {}),
    "list": (CUBE, ["t"], {}),
    "array": (CUBE, CUBE.t, {}),
    "last dimension": (CUBE.T, "t", {}),
    "float32": (CUBE.astype("f4"), "t", {}),
    "integers": ((CUBE * 1000).astype(int), "t", {"p0": {"n0": 2000}}),
    "p0 and bounds": (CUBE, "t", {"p0": {"n0": 4}, "bounds": {"tau": (2, 6)}}),
    "one-sided bounds": (CUBE, "t", {"bounds": {"tau": (2, np.inf), "n0": (-np.inf, 4)}}),
    "map of p0": (CUBE, "t", {"p0": {"n0": MAP}}),
    "p0 of any kind": (CUBE, "t", {"p0": {"n0": CUBE.max(), "tau": np.float32(2)}}),
    "maps of bounds": (CUBE, "t", {"bounds": {"n0": (MAP, 10.0), "tau": (0.1, MAP)}}),
    "lazy map": (CUBE, "t", {"p0": {"n0": MAP.chunk(x=3)}}),
    "lazy number": (CUBE, "t", {"p0": {"n0": CUBE.chunk(x=3).max()}}),
    "gaps": (with_gaps(), "t", {}),
    "gaps, checked": (with_gaps(), "t", {"kwargs": {**TIGHT, "check_finite": True}}),
    "another coordinate": (CUBE, "age", {"reduce_dims": "t"}),
    "array without labels": (CUBE, xr.DataArray(T**1.1, dims="t"), {"reduce_dims": ["t"]}),
    "integer coordinate": (CUBE.assign_coords(t=np.arange(20)), "t", {}),
    "coordinate that varies": (CUBE, "shifted", {"reduce_dims": "t"}),
    "coordinate with more dimensions": (
        CUBE[0].drop_vars(["x", "place"]),
        CUBE.shifted.drop_vars("run"),
        {"reduce_dims": "t"},
    ),
    "one pixel": (CUBE[0], "t", {}),
    "durations": (CUBE.assign_coords(t=DURATIONS), "t", {"p0": SLOW}),
    "dates": (CUBE.assign_coords(t=EPOCH + DURATIONS), "t", {"p0": SLOW}),
    "dates with a gap": (
        CUBE.assign_coords(day=("t", np.where(T == 2, NAT, EPOCH + DURATIONS))),
        "day",
        {"reduce_dims": "t", "p0": SLOW},
    ),
    "names": (CUBE, "t", {"param_names": ["height", "lifetime"], "p0": {"height": 3}}),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str) -> None:
    obj, coords, given = CALLS[case]
    fit_both(obj, coords, **given)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sigma": 0.02, "absolute_sigma": True},
        {"sigma": 0.02 + 0.01 * T},
        {"sigma": list(0.02 + 0.01 * T), "method": "trf", "maxfev": 10_000},
        {"loss": "soft_l1", "f_scale": 0.01, "method": "trf"},
    ],
    ids=["number", "array", "list", "loss"],
)
def test_arguments_of_scipy(kwargs: dict[str, Any]) -> None:
    fit_both(CUBE, "t", kwargs={**TIGHT, **kwargs})


def test_options_may_be_keywords() -> None:
    expected = CUBE.nlsq.curvefit("t", JAX, kwargs={"sigma": 0.1, **TIGHT})
    xr.testing.assert_identical(CUBE.nlsq.curvefit("t", JAX, sigma=0.1, **TIGHT), expected)


def test_sigma_may_vary_over_the_map() -> None:
    sigma = 0.01 * (1.0 + CUBE.t) * MAP
    result = CUBE.nlsq.curvefit("t", JAX, sigma=sigma.T, **TIGHT)
    for x in CUBE.x.values:
        kwargs = {**TIGHT, "sigma": sigma.sel(x=x).values}
        expected = CUBE.sel(x=x).curvefit("t", NUMPY, kwargs=kwargs)
        for name in expected.data_vars:
            np.testing.assert_allclose(result.sel(x=x)[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("shape", [(20, 20), (4,), (4, 20), (19,)])
def test_sigma_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    # The shape (20, 20) is that of a covariance matrix in SciPy, and may be that of the data.
    square = xr.concat([CUBE] * 5, "x").drop_vars(["x", "place", "shifted"])
    with pytest.raises(ValueError, match=r"expected a number, an array with the shape \(20,\)"):
        square.nlsq.curvefit("t", JAX, kwargs={"sigma": np.ones(shape)})


@pytest.mark.parametrize("chunks", [{"x": 2}, {"t": 7}, {"x": 3, "t": 1}], ids=str)
def test_lazy_data_stay_lazy(chunks: dict[str, int]) -> None:
    lazy = CUBE.chunk(chunks)
    result = lazy.nlsq.curvefit("t", JAX, kwargs=TIGHT)
    assert all(variable.chunks is not None for variable in result.data_vars.values())
    assert_same(result.compute(), CUBE.curvefit("t", NUMPY, kwargs=TIGHT))
    single = lazy[0].nlsq.curvefit("t", JAX, kwargs=TIGHT)
    assert single.curvefit_coefficients.chunks is not None
    assert_same(single.compute(), CUBE[0].curvefit("t", NUMPY, kwargs=TIGHT))


def test_everything_reduced() -> None:
    result = fit_both(CUBE.drop_vars("place"), "t", reduce_dims="x")
    assert result.curvefit_n_points.item() == 80
    assert result.curvefit_status.dims == ()


def test_variables_of_a_dataset() -> None:
    ds = xr.Dataset(
        {
            "cube": CUBE,
            "line": 2 * CUBE[0].drop_vars(["x", "place", "shifted"]),
            "more": (CUBE * 3).expand_dims(y=[1, 2]).transpose("t", "y", "x"),
            5: CUBE,
        },
        attrs={"title": "Decays"},
    )
    result = fit_both(ds, "t", p0={"n0": 4})
    assert result.line_curvefit_coefficients.dims == ("param",)
    assert result.more_curvefit_chi2.dims == ("y", "x")
    fit_both(ds[["line"]].assign_coords(x=CUBE.x), "t", p0={"n0": MAP})


def test_stacked_dimensions() -> None:
    both = xr.concat([CUBE, 2 * CUBE], xr.DataArray([0, 1], dims="w", name="w"))
    both = both.drop_vars(["place", "shifted"])
    stacked = both.stack(z=("w", "x")).nlsq.curvefit("t", JAX)
    expected = both.nlsq.curvefit("t", JAX)
    actual = stacked.curvefit_coefficients.unstack("z").transpose("w", "x", "param")
    np.testing.assert_allclose(actual, expected.curvefit_coefficients, rtol=1e-9)


def test_several_coordinates() -> None:
    def model(np: Any) -> Function:
        def plane(coords: Any, a: Any, tau: Any, slope: Any) -> Any:
            x, t = coords
            return a * np.exp(-t / tau) + slope * x

        return plane

    cube = xr.concat([CUBE, 2 * CUBE], "y").drop_vars(["place", "shifted"]) + 0.1 * CUBE.x
    cube = cube.transpose("t", "y", "x")
    expected = fit_both(cube, ["x", "t"], model=model)
    lazy = cube.chunk(x=3, t=7)
    fit_both(lazy, ("x", cube.t), model=model, theirs=cube)
    assert expected.curvefit_n_points.values.tolist() == [80, 80]


def test_attributes_follow_the_option_of_xarray() -> None:
    with xr.set_options(keep_attrs=False):
        assert fit_both(CUBE, "t").curvefit_coefficients.attrs == {}
    with xr.set_options(keep_attrs=True):
        assert fit_both(CUBE, "t").curvefit_coefficients.attrs == {"units": "V"}


def test_constant_models_and_numbers_of_parameters() -> None:
    fit_both(CUBE, "t", model=lambda np: lambda t, a: a)
    fit_both(CUBE, "t", param_names=["n0"])  # tau stays at its default
    names = ["height", "lifetime"]
    open_model = lambda np: lambda t, *p: p[0] * np.exp(-t / p[1])  # noqa: E731
    fit_both(CUBE, "t", model=open_model, param_names=names)


def test_cftime_dates_are_days_since_a_stated_day() -> None:
    dates = [cftime.DatetimeNoLeap(2000, 1, 1 + i) for i in range(20)]
    cube = CUBE.assign_coords(t=("t", np.array(dates)))
    late = lambda t, a, b: a + b * (t - 730_000.0)  # noqa: E731
    result = cube.nlsq.curvefit("t", late)
    assert "days since" in result.attrs["dates"]
    expected = np.polynomial.polynomial.polyfit(np.arange(20), CUBE.values.T, 1)[1]
    np.testing.assert_allclose(result.curvefit_coefficients.sel(param="b"), expected, rtol=1e-6)


def test_infinity_is_omitted_and_counted() -> None:
    cube = CUBE.copy()
    cube[1, 2] = np.inf
    result = cube.nlsq.curvefit("t", JAX, kwargs=TIGHT)
    assert result.curvefit_n_points.values.tolist() == [20, 19, 20, 20]
    expected = cube.where(np.isfinite(cube)).curvefit("t", NUMPY, kwargs=TIGHT)
    np.testing.assert_allclose(
        result.curvefit_coefficients, expected.curvefit_coefficients, rtol=1e-6
    )


# Errors of fits


def stepped(np: Any) -> Function:
    """Return a line that cannot have a slope above 10."""
    return lambda x, a, b: np.where(a > 10, 0.0, a * x + b)


STEEP = xr.DataArray([[1, 3, 5], [0, 20, 40]], coords={"i": [1, 2], "x": [0.0, 1.0, 2.0]})
FEW = {"maxfev": 5}


@pytest.mark.parametrize("chunks", [None, {"i": 1}], ids=["eager", "lazy"])
def test_errors(chunks: Any) -> None:
    data = STEEP if chunks is None else STEEP.chunk(chunks)
    with pytest.raises(RuntimeError, match="1 of 2 fits failed"):
        data.nlsq.curvefit("x", stepped(jnp), kwargs=FEW).compute()
    ignored = data.nlsq.curvefit("x", stepped(jnp), errors="ignore", kwargs=FEW).compute()
    expected = data.curvefit("x", stepped(np), errors="ignore", kwargs=FEW).compute()
    for name in ("curvefit_coefficients", "curvefit_covariance"):
        np.testing.assert_allclose(ignored[name], expected[name], atol=1e-9)
    assert np.isnan(ignored.curvefit_stderr[1]).all()
    assert (ignored.curvefit_status.values > 0).tolist() == [True, False]


def test_an_error_of_lazy_data_is_raised_by_compute() -> None:
    lazy = CUBE.chunk(x=2).nlsq.curvefit("t", JAX, kwargs={"maxfev": 2})
    with pytest.raises(nd.PixelFitError, match="4 iteration_limit"):
        lazy.compute()


@pytest.mark.parametrize("errors", ["raise", "ignore"])
def test_skipna_false(errors: str) -> None:
    fit_both(CUBE, "t", skipna=False, errors=errors)
    for call, model in ((with_gaps().curvefit, NUMPY), (with_gaps().nlsq.curvefit, JAX)):
        with pytest.raises(ValueError, match="NaN"):
            call("t", model, skipna=False, errors=errors)


def test_pixels_with_too_few_points() -> None:
    cube = CUBE.copy()
    cube[2, 1:] = np.nan
    with pytest.raises(RuntimeError, match="1 too_few_points"):
        cube.nlsq.curvefit("t", JAX, kwargs=TIGHT)
    result = cube.nlsq.curvefit("t", JAX, errors="ignore", kwargs=TIGHT)
    assert np.isnan(result.curvefit_coefficients[2]).all()
    assert np.isfinite(result.curvefit_coefficients[3]).all()


# Models

ACROSS_POINTS: dict[str, Function] = {
    "first point": lambda t, a, tau: a * jnp.exp(-(t - t[0]) / tau),
    "largest": lambda t, a, b: a + b * t / t.max(),
    "sum so far": lambda t, a, b: a + b * jnp.cumsum(t),
    "position": lambda t, a, b: a + b * jnp.arange(len(t)),
}


@pytest.mark.parametrize("chunks", [None, {"t": 5}], ids=["in memory", "lazy"])
@pytest.mark.parametrize("name", ACROSS_POINTS)
def test_a_model_that_depends_on_other_points_is_refused(name: str, chunks: Any) -> None:
    # xarray passes all points of a fit at once. Here a model sees some of them at a time.
    late = CUBE.t.drop_vars("t") + 5.0
    late = late if chunks is None else late.chunk(chunks)
    with pytest.raises(nd.ModelError, match="is not row-wise"):
        CUBE.nlsq.curvefit(late, ACROSS_POINTS[name], reduce_dims="t")
    with pytest.raises(nd.ModelError, match="is not row-wise"):
        CUBE.nlsq.fit_each(ACROSS_POINTS[name], late, dims="t")


def test_a_model_written_with_numpy() -> None:
    with pytest.raises(nd.ModelError, match=r"jnp\.exp for np\.exp"):
        CUBE.nlsq.curvefit("t", NUMPY)


# Wrong arguments: (arguments, class of error, text)

Q = xr.DataArray([1.0, 2.0], dims="q")
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "coords": ({"coords": "time"}, KeyError, "coords has 'time', but the data have"),
    "no dimension": ({"coords": "age"}, ValueError, "reduce_dims"),
    "reduce_dims": ({"reduce_dims": "z"}, ValueError, "reduce_dims contains 'z'"),
    "func": ({"func": None}, TypeError, "func must be a function"),
    "errors": ({"errors": "warn"}, ValueError, "errors must be 'raise' or 'ignore'"),
    "open": ({"func": lambda t, *p: p[0] * t}, ValueError, "param_names"),
    "p0 outside": ({"p0": {"tau": 9}, "bounds": {"tau": (1, 6)}}, ValueError, "outside its bounds"),
    "bounds": ({"bounds": {"tau": (6, 1)}}, ValueError, "lower bound 6 of parameter 'tau'"),
    "p0 of another map": ({"p0": {"tau": Q}}, ValueError, r"p0\['tau'\] has the dimension 'q'"),
    "p0 along t": ({"p0": {"tau": CUBE.t}}, ValueError, r"p0\['tau'\] has the dimension 't'"),
    "bound of another map": (
        {"bounds": {"tau": (0, Q)}},
        ValueError,
        r"bounds\['tau'\]\[1\] has the dimension 'q'",
    ),
    "labels": ({"p0": {"tau": MAP.assign_coords(x=range(4))}}, ValueError, "labels"),
    "method": ({"kwargs": {"method": "newton"}}, ValueError, "method must be None or one of"),
    "lm": ({"bounds": {"tau": (1, 6)}, "kwargs": {"method": "lm"}}, ValueError, "'lm'"),
    "bounds in kwargs": ({"kwargs": {"bounds": (0, 1)}}, TypeError, r"curvefit\(\.\.\., bounds="),
    "p0 in kwargs": ({"kwargs": {"p0": [1, 1]}}, TypeError, r"curvefit\(\.\.\., p0="),
    "keyword": ({"kwargs": {"sigmas": 1}}, TypeError, r"Did you mean curvefit\(\.\.\., sigma="),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    given, error, text = WRONG[case]
    with pytest.raises(error):
        CUBE.curvefit(**{"coords": "t", "func": NUMPY, **given})
    with pytest.raises(error, match=text):
        CUBE.nlsq.curvefit(**{"coords": "t", "func": JAX, **given})


def test_wrong_arguments_that_xarray_ignores() -> None:
    with pytest.raises(ValueError, match="unknown parameter names in p0: 'taw'"):
        CUBE.nlsq.curvefit("t", JAX, p0={"taw": 1})
    with pytest.raises(TypeError, match="p0 must be a dict by name of parameter; got"):
        CUBE.nlsq.curvefit("t", JAX, p0=[1, 2])
    with pytest.raises(TypeError, match="coords must be a name"):
        CUBE.nlsq.curvefit(3, JAX)
    with pytest.raises(TypeError, match="'sigma' twice"):
        CUBE.nlsq.curvefit("t", JAX, kwargs={"sigma": 1}, sigma=2)
    with pytest.raises(ValueError, match="'mean' does not have the dimension 't'"):
        xr.Dataset({"mean": CUBE.mean("t"), "cube": CUBE}).nlsq.curvefit("t", JAX)
    with pytest.raises(ValueError, match="expected real numbers") as caught:
        xr.Dataset({"text": CUBE.astype(str)}).nlsq.curvefit("t", JAX)
    assert caught.value.__notes__ == ["The error is in the fit of the variable 'text'."]
    with pytest.raises(TypeError, match="obj must be a DataArray or Dataset"):
        nd.curvefit(CUBE.values, "t", JAX)  # type: ignore[arg-type]


# The examples of xarray's documentation and tests


def sine(np: Any) -> Function:
    return lambda t, a, f, p: a * np.sin(2 * np.pi * (f * t + p))


def test_starts_and_bounds_choose_the_minimum() -> None:
    t = np.arange(0, 2, 0.02)
    waves = np.sin(4 * np.pi * t)
    noise = 0.01 * np.random.default_rng(0).normal(size=(2, 100))
    data = xr.DataArray(waves + noise, coords={"x": [0, 1], "t": t})
    # Derivatives by one-sided differences would cost SciPy the digits that are compared.
    exact = {**TIGHT, "method": "trf", "jac": "3-point"}
    over_x = lambda *values: xr.DataArray(list(values), coords={"x": data.x})  # noqa: E731
    fit_both(data, "t", model=sine, p0={"f": over_x(2, 2), "p": 0.1}, kwargs=exact)
    bounds = {"a": (over_x(0, -2), over_x(2, 0))}
    p0 = {"f": over_x(2, 2), "p": 0.25}
    fits = fit_both(data, "t", model=sine, p0=p0, bounds=bounds, kwargs=exact)
    np.testing.assert_allclose(fits.curvefit_coefficients.sel(param="a"), [1, -1], atol=0.01)
    # The start, 1, is inside the bounds. From their middle, the fit ends elsewhere.
    p0, bounds = {"p": 0.1, "a": 1.0}, {"f": (0.0, 7.0), "a": (-9, 9)}
    fit_both(data.assign_coords(t=2 * t), "t", model=sine, p0=p0, bounds=bounds, kwargs=exact)


def test_example_of_the_reference() -> None:
    def model(np: Any) -> Function:
        return lambda t, time_constant, amplitude: np.exp(-t / time_constant) * amplitude

    t = np.arange(11)
    rng = np.random.default_rng(seed=0)
    curves = np.stack([model(np)(t, c, a) for c, a in ((1, 0.1), (2, 0.2), (3, 0.3))])
    curves += rng.normal(size=(3, t.size)) * 0.01
    data = xr.DataArray(curves, coords={"x": [0, 1, 2], "time": t})
    fit_both(data, "time", model=model)
    guess = xr.DataArray([1, 2, 3], coords=[data.x])
    fit_both(data, "time", model=model, p0={"amplitude": 0.2, "time_constant": guess})


def test_example_of_a_relation_between_variables() -> None:
    def model(np: Any) -> Function:
        return lambda x, a, xc: np.exp((x - xc) / a)

    x = t = np.arange(-5, 5, 0.1)
    z1 = np.random.default_rng(0).uniform(low=-5, high=5, size=(t.size, x.size))
    ds = xr.Dataset(
        {
            "var1": (("t", "x"), z1),
            "var2": (("t", "x"), model(np)(z1, 3, x)),
            "var3": (("t", "x"), model(np)(z1, 1, -x)),
        },
        coords={"t": t, "x": x},
    )
    result = ds[["var2", "var3"]].nlsq.curvefit(
        coords=ds.var1, func=model(jnp), reduce_dims="t", bounds={"a": (0.5, 5), "xc": (-5, 5)}
    )
    # The parameters of the data, which have no noise.
    for name, a, xc in (("var2", 3, x), ("var3", 1, -x)):
        best = result[f"{name}_curvefit_coefficients"]
        assert best.dims == ("x", "param")
        np.testing.assert_allclose(best.sel(param="a"), np.full(x.size, a), rtol=1e-6)
        np.testing.assert_allclose(best.sel(param="xc"), xc, atol=1e-6)


def test_example_of_two_peaks() -> None:
    def model(np: Any) -> Function:
        def gaussian_2d(coords: Any, a: Any, xc: Any, yc: Any, xalpha: Any, yalpha: Any) -> Any:
            x, y = coords
            return a * np.exp(
                -np.square(x - xc) / 2 / np.square(xalpha)
                - np.square(y - yc) / 2 / np.square(yalpha)
            )

        def multi_peak(coords: Any, *args: Any) -> Any:
            z = np.zeros(coords[0].shape)
            for i in range(len(args) // 5):
                z += gaussian_2d(coords, *args[i * 5 : i * 5 + 5])
            return z

        return multi_peak

    x = y = np.arange(-5, 5, 0.1)
    grid = np.meshgrid(x, y)
    peaks = model(np)(grid, 3, 1, 1, 2, 1, 2, -1, -2, 1, 1)
    peaks += np.random.default_rng(0).normal(scale=0.1, size=peaks.shape)
    data = xr.DataArray(peaks, dims=["y", "x"], coords={"y": y, "x": x})
    names = [f"{name}{i}" for i in range(2) for name in ("a", "xc", "yc", "xalpha", "yalpha")]
    result = data.nlsq.curvefit(
        coords=["x", "y"], func=model(jnp), param_names=names, kwargs={"maxfev": 10000}
    )
    best = result.curvefit_coefficients.values
    error = result.curvefit_stderr.values
    residuals = data.values - model(np)(grid, *best)
    assert (residuals**2).sum() < 1.001 * 0.1**2 * residuals.size
    assert ((error > 0.0) & (error < 0.1)).all()
