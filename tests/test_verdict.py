"""What the result says, and that it is true: success only for solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import OptimizeWarning

import nlsq_dask as nd
from tests.problems import NO_WARMUP, decay_data, exponential, fit, gaussian, line, plane

RNG = np.random.default_rng(11)


def test_iteration_limit() -> None:
    x, y = decay_data()
    # The warm-up and the sample would solve this one alone.
    config = dict(gauss_newton_max_iterations=1, max_warmup_iterations=0, warmup_iterations=0)
    config["sample_rows"] = 1
    result = fit(exponential, x, y, [20.0, 0.1, 5.0], **config)
    assert not result.success
    assert result.status == 0
    assert "gauss_newton_max_iterations" in result.message
    with pytest.raises(RuntimeError, match="gauss_newton_max_iterations"):
        nd.curve_fit(
            exponential,
            x,
            y,
            [20.0, 0.1, 5.0],
            config=nd.HybridStreamingConfig(verbose=0, **config),
        )


def test_model_that_is_not_finite_at_the_start() -> None:
    x, y = decay_data()
    result = fit(lambda x, a, b: a * jnp.log(x - b), x, y, [1.0, 1.0])
    assert not result.success
    assert "not finite at the start" in result.message
    assert np.isinf(result.pcov).all()


def test_model_that_is_not_finite_nearby_is_a_bad_trial_point_only() -> None:
    x = np.linspace(0.1, 4, 500)
    y = np.sqrt(x + 0.5) * 2
    result = fit(lambda x, a, b: a * jnp.sqrt(x + b), x, y, [1.0, 3.0])
    assert result.success
    np.testing.assert_allclose(result.popt, [2, 0.5], rtol=1e-7)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize(
    ("start", "is_solved"),
    [
        ([1e-8, 50.0, 0.0], True),
        ([0, 0, 0], True),
        ([1e6, 1e-6, -1e6], True),  # a straight line, as is the flat valley of the next
        ([-3, -2, 40], False),
    ],
)
def test_wrong_start_ends_in_the_solution_or_says_so(start: list[float], is_solved: bool) -> None:
    x, y = decay_data()
    best = fit(exponential, x, y, [2, 1, 0])
    result = fit(exponential, x, y, start)
    assert result.success == is_solved
    if is_solved:
        np.testing.assert_allclose(result.popt, best.popt, rtol=1e-8)
    else:
        assert result.cost > 2 * best.cost
        assert any(word in result.message for word in ("try", "raise", "fix"))


def test_exact_data() -> None:
    x = np.linspace(0, 4, 1_000)
    y = 2.5 * np.exp(-1.3 * x) + 0.5
    result = fit(exponential, x, y, [2, 1, 0])
    assert result.success
    np.testing.assert_allclose(result.popt, [2.5, 1.3, 0.5], rtol=1e-11)


def test_data_of_zeros() -> None:
    result = fit(line, np.arange(1e3), np.zeros(1_000), [1, 1])
    assert result.success
    np.testing.assert_allclose(result.popt, 0, atol=1e-12)


def test_parameters_that_the_data_do_not_determine() -> None:
    x, y = decay_data()
    with pytest.warns(OptimizeWarning, match="do not constrain 'a', 'd'"):
        result = fit(
            lambda x, a, b, c, d: (a + d) * jnp.exp(-b * x) + c,
            x,
            y,
            [1, 1, 0, 1],
            **NO_WARMUP,
        )
    assert np.isinf(result.pcov).all()
    assert result.diagnostics["undetermined"] == ["a", "d"]
    np.testing.assert_allclose(result.popt[0] + result.popt[3], 2.5, rtol=0.02)


def test_no_degrees_of_freedom() -> None:
    x, y = np.array([0.0, 1.0]), np.array([1.0, 3.0])
    with pytest.warns(OptimizeWarning, match="no degrees of freedom"):
        result = fit(line, x, y, [1, 1])
    np.testing.assert_allclose(result.popt, [2, 1])
    assert np.isinf(result.pcov).all()
    options = {"sigma": 1.0, "absolute_sigma": True, **NO_WARMUP}
    known = fit(line, x, y, [1, 1], **options)
    np.testing.assert_allclose(known.pcov, [[2, -1], [-1, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [40, 1_000])
def test_a_feature_that_the_sample_misses(chunks: int) -> None:
    """One block of many holds the peak; the fit must not stop at the sample's solution."""
    n = 100_000
    x = np.linspace(0, 100, n)
    y = 3 * np.exp(-0.5 * ((x - 42.5) / 0.2) ** 2) + 1 + 0.01 * RNG.standard_normal(n)
    lazy = [da.from_array(v, chunks=n // chunks) for v in (x, y)]

    def peak(x: Any, h: Any, m: Any, w: Any, c: Any) -> Any:
        return h * jnp.exp(-0.5 * ((x - m) / w) ** 2) + c

    start = [2.0, 42.4, 0.25, 0.5]
    result = fit(peak, *lazy, start, sample_rows=1000)
    expected = fit(peak, x, y, start, sample_rows=n)
    assert result.success
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-8)


def test_result_is_read_by_attribute_and_item_but_not_unpacked() -> None:
    x, y = decay_data()
    result = fit(exponential, x, y)
    for name in result.keys():  # noqa: SIM118  a result is not iterable
        assert result[name] is getattr(result, name) or name in (
            "popt",
            "perr",
            "free",
            "chi2",
            "reduced_chi2",
        )
    assert "pcov" in result
    with pytest.raises(TypeError, match="curve_fit"):
        _, _ = result  # type: ignore[misc]
    with pytest.raises(TypeError, match="curve_fit"):
        result[0]
    with pytest.raises(KeyError, match="has x, success"):
        result["nothing"]


def test_statistics_against_their_definitions() -> None:
    x, y = decay_data()
    sigma = RNG.uniform(0.5, 2, len(x))
    result = fit(exponential, x, y + 1e6, [2, 1, 1e6], sigma=sigma, **NO_WARMUP)
    residual = (y + 1e6 - np.asarray(result.predict(x))) / sigma
    weight = 1 / sigma**2
    mean = np.average(y, weights=weight)
    assert result.chi2 == pytest.approx(residual @ residual, rel=1e-6)
    assert result.reduced_chi2 == pytest.approx(result.chi2 / (len(x) - 3))
    variation = weight @ (y - mean) ** 2
    assert result.r_squared == pytest.approx(1 - result.chi2 / variation, rel=1e-6)
    assert result.rows_read == len(x) * (1 + result.n_passes)


def test_reports() -> None:
    x, y = decay_data()
    result = fit(exponential, x, y)
    report = result.fit_report()
    for part in ("[[Fit Statistics]]", "[[Variables]]", "[[Correlations]]", "C(", "init = 1"):
        assert part in report
    assert f"passes over the data = {result.n_passes}\n" in report
    assert "function evals" not in report  # each of them is a pass
    assert "<table>" in result._repr_html_()
    dataset = result.to_xarray()
    assert float(dataset.curvefit_errors.sel(param="b")) == result.perr[1]
    assert dataset.curvefit_covariance.shape == (3, 3)


def test_predict_is_lazy_for_lazy_x() -> None:
    import xarray as xr

    x, y = decay_data()
    result = fit(exponential, x, y)
    new = np.linspace(0, 1, 50_001)
    with np.errstate(all="ignore"):
        expected = result.x[0] * np.exp(-result.x[1] * new) + result.x[2]
    np.testing.assert_allclose(result.predict(new), expected, rtol=1e-12)
    lazy = result.predict(da.from_array(new, chunks=12_345))
    assert isinstance(lazy, da.Array)
    np.testing.assert_allclose(lazy.compute(), expected, rtol=1e-12)
    named = result.predict(xr.DataArray(new, dims="t", coords={"t": new}))
    assert named.dims == ("t",)
    np.testing.assert_allclose(named, expected, rtol=1e-12)


def test_predict_on_a_grid() -> None:
    import xarray as xr

    t, h = np.linspace(0, 1, 30), np.linspace(0, 1, 20)
    y = 2 * t[:, None] + 3 * h
    result = fit(plane, (t[:, None], h), y, **NO_WARMUP)
    np.testing.assert_allclose(result.predict((t[:, None], h)), y, rtol=1e-10)
    named = result.predict((xr.DataArray(t, dims="t"), xr.DataArray(h, dims="h").chunk(h=7)))
    assert named.dims == ("t", "h")
    assert named.chunks is not None
    np.testing.assert_allclose(named.compute(), y, rtol=1e-10)


def test_predict_at_one_array_of_two_dimensions() -> None:
    """The columns of an x of shape (n, k) are one row; of an image each entry is."""
    import xarray as xr

    x = np.linspace(0, 1, 600).reshape(20, 30)
    y = 2 * x + 1
    image = fit(line, x, y, [1, 1], **NO_WARMUP)
    np.testing.assert_allclose(image.predict(x), y, rtol=1e-10)
    lazy = image.predict(da.from_array(x, chunks=(5, 30)))
    assert lazy.chunks == ((5,) * 4, (30,))
    np.testing.assert_allclose(lazy, y, rtol=1e-10)
    named = image.predict(xr.DataArray(x, dims=("t", "h")))
    assert named.dims == ("t", "h")
    np.testing.assert_allclose(named, y, rtol=1e-10)
    value, error = image.predict(x, return_std=True)
    assert value.shape == error.shape == x.shape


def test_predict_at_a_table_beside_a_column() -> None:
    import xarray as xr

    table, column = RNG.uniform(0, 1, (500, 2)), RNG.uniform(0, 1, 500)
    y = table @ [1, 2] + 3 * column
    result = fit(
        lambda x, a, b, c: a * x[0][:, 0] + b * x[0][:, 1] + c * x[1],
        (table, column),
        y,
        **NO_WARMUP,
    )
    np.testing.assert_allclose(result.predict((table, column)), y, rtol=1e-9)
    lazy = result.predict((da.from_array(table, chunks=(100, 1)), column))
    np.testing.assert_allclose(lazy, y, rtol=1e-9)
    named = result.predict(
        (xr.DataArray(table, dims=("t", "column")), xr.DataArray(column, dims="t"))
    )
    assert named.dims == ("t",)
    np.testing.assert_allclose(named, y, rtol=1e-9)


def test_predict_in_memory_needs_no_cluster() -> None:
    import dask
    import xarray as xr

    def busy(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("x is in memory")

    x, y = decay_data()
    result = fit(exponential, x, y)
    lazy = result.predict(da.from_array(x, chunks=1000))
    with dask.config.set(scheduler=busy):
        values = result.predict(x)
        named = result.predict(xr.DataArray(x, dims="t"))
        with pytest.raises(AssertionError, match="in memory"):
            lazy.compute()
    np.testing.assert_array_equal(values, lazy)
    np.testing.assert_array_equal(values, named)


T, H = np.linspace(0, 1, 600).reshape(300, 2), np.linspace(0, 1, 300)


def of_columns(x: Any, a: Any, b: Any) -> Any:
    return a * x[:, 0] + b


def of_a_pair(x: Any, a: Any, b: Any) -> Any:
    return a * x[0][:, 0] + b * x[1] ** 2


def of_a_dict(x: Any, a: Any, b: Any) -> Any:
    return a * x[0] + b * x["h"] ** 2


@pytest.mark.parametrize(
    ("model", "fitted", "x", "sentence"),
    [
        (line, H, (H, H), "x must be one array, as in the fit; got a tuple of length 2."),
        (line, H, {"h": H}, "x must be one array, as in the fit; got a dict with the keys 'h'."),
        (line, H, [], "x has no rows: x has shape (0,)."),
        (line, H, ["h"], "x must be arrays as in the fit, not names; got [['h']]."),
        (line, H, np.array(["h"]), "x has dtype <U1; expected real numbers."),
        (
            of_columns,
            T,
            H,
            "x must have shape (n, 2), as in the fit; got (300,).",
        ),
        (of_columns, T, T[:, :1], "x must have shape (n, 2), as in the fit; got (300, 1)."),
        (
            of_a_pair,
            (T, H),
            T,
            "a tuple of 2 arrays, as in the fit; got type ndarray with shape (300, 2).",
        ),
        (of_a_pair, (T, H), (T, H[:9]), "arrays of x have the shapes (300,), (9,), which do not"),
        (of_a_pair, (T, H), (T, H[:1]), "x[0] has shape (300, 2), x[1] has shape (1,)."),
        (of_a_pair, (T, H), (T, H[:, None]), "x[0] has shape (300, 2), x[1] has shape (300, 1)."),
        (
            of_a_dict,
            {0: H, "h": H},
            {},
            "x must be a dict with the keys 0, 'h', as in the fit; got an empty dict.",
        ),
        (
            of_a_dict,
            {0: H, "h": H},
            H,
            "x must be a dict with the keys 0, 'h', as in the fit; got type ndarray",
        ),
        (of_a_dict, {0: H, "h": H}, {0: H, "h": H[:9]}, "the shapes (300,), (9,), which do not"),
    ],
)
def test_predict_at_something_else(model: Any, fitted: Any, x: Any, sentence: str) -> None:
    result = fit(model, fitted, np.cos(9 * H), [1, 1], **NO_WARMUP)
    with pytest.raises(nd.DataError) as caught:
        result.predict(x)
    assert sentence in str(caught.value)
    assert "_data" not in str(caught.value)


def test_predict_at_names_that_do_not_match() -> None:
    import xarray as xr

    result = fit(of_a_dict, {0: H, "h": H}, np.cos(9 * H), [1, 1], **NO_WARMUP)
    along = xr.DataArray(H, {"t": H}, "t")
    with pytest.raises(nd.DataError, match=r"x\['h'\] has size 9 along 't', .*has 300"):
        result.predict({0: along, "h": along[:9]})
    with pytest.raises(nd.DataError, match=r"labels of x\['h'\] along 't' differ from the labels"):
        result.predict({0: along, "h": along.assign_coords(t=H + 1)})
    with pytest.raises(nd.DataError, match=r"same number of rows: .*x\['h'\] has shape \(\)"):
        result.predict({0: along, "h": along[0].drop_vars("t")})


# --- cases that a careful reader tried


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize(
    ("model", "start"),
    [
        (gaussian, [1.0, 500.0, 0.1]),
        (lambda x, a, b: a * b * x, [0.0, 0.0]),
        (exponential, [1.0, 1e9, 1.0]),
    ],
)
def test_a_start_at_which_nothing_can_be_learned(model: Any, start: list[float]) -> None:
    x, y = decay_data()
    result = fit(model, x, y, start)
    assert not result.success
    assert "insensitive" in result.message


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_a_polynomial_far_from_the_origin_is_solved_or_refused() -> None:
    t = 1.7e9 + np.linspace(0, 86400, 2000)
    rng = np.random.default_rng(0)
    for curvature in (0.0, 1e-9):
        y = 3 + 1e-5 * (t - t[0]) + curvature * (t - t[0]) ** 2 + 0.1 * rng.standard_normal(2000)
        result = fit(lambda x, a, b, c: a + b * x + c * x**2, t, y, [1, 1, 1])
        best = np.polyfit((t - t.mean()) / t.std(), y, 2, full=True)[1][0] / 2
        assert not result.success or result.cost <= best * (1 + 1e-6)


def test_warnings_are_of_the_line_that_called() -> None:
    """Also if that is in a module beside the package, whose path begins like the package's."""
    path = f"{Path(nd.__file__).parent}_demo.py"
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(**NO_WARMUP))
    names = {"fit": optimizer.fit, "x": H, "y": 2 * H}
    code = "fit(lambda x, a, b: (a + b) * x, x, y, [1, 1], verbose=0)"
    with pytest.warns(OptimizeWarning, match="not constrain 'a', 'b'") as caught:
        exec(compile(code, path, "exec"), names)
    assert [warning.filename for warning in caught] == [path]


def test_numpy_warnings_do_not_reach_the_caller() -> None:
    x, y = decay_data()
    for start in ([1, -50, 1], [1, -500, 1]):
        fit(exponential, x, y, start)  # warnings are errors here


@pytest.mark.parametrize(
    "model",
    [
        lambda x, a, b: a * x / jnp.max(x) + b,
        lambda x, a, b: a * x + b * jnp.max(x),
        lambda x, a, b: a * x + b * x.sum(),
        lambda x, a, b: a * jnp.sort(x) + b,
        lambda x, a, b: a * x + b * jnp.arange(len(x)),
    ],
)
@pytest.mark.parametrize("n", [60, 3000])
def test_models_that_look_at_other_rows(model: Any, n: int) -> None:
    x, y = decay_data(n)
    with pytest.raises(nd.ModelError, match="not row-wise"):
        fit(model, x, y, [1.0, 0.0])


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda x, a: (a * x).astype(int), "int"),
        (lambda x, a: a * x * 1j, "complex"),
        (lambda x, a: None, "NoneType"),
    ],
)
def test_models_that_return_something_else(model: Any, sentence: str) -> None:
    x, y = decay_data()
    with pytest.raises(nd.ModelError, match=sentence):
        fit(model, x, y, [1.0])


def test_blocks_that_are_not_what_dask_was_told() -> None:
    from dask import delayed

    x, y = decay_data()
    lazy = da.from_array(y, chunks=500)
    with pytest.raises(
        nd.DataError, match=r"dtype float64 .* but its Dask array declares .* int64"
    ):
        fit(exponential, x, lazy.map_blocks(lambda block: block, dtype="i8"))
    short = da.from_delayed(delayed(y[:100]), shape=(1000,), dtype="f8")
    with pytest.raises(nd.DataError, match=r"shape \(100,\).*\(1000,\)"):
        fit(exponential, x, short)


def test_predict_of_a_large_grid_is_lazy() -> None:
    import xarray as xr

    t, h = np.linspace(0, 1, 30), np.linspace(0, 1, 20)
    y = xr.DataArray(2 * t[:, None] + 3 * h, {"t": t, "h": h}, ("t", "h"))
    result = fit(plane, ("t", "h"), y, **NO_WARMUP)
    long = xr.DataArray(np.linspace(0, 1, 10**6), dims="t")
    wide = xr.DataArray(np.linspace(0, 1, 10**5), dims="h")
    lazy = result.predict((long, wide))  # 800 GB
    assert lazy.shape == (10**6, 10**5)
    np.testing.assert_allclose(lazy[-1, -1].compute(), 5, rtol=1e-9)
    small = result.predict((y.t, y.h))
    assert small.chunks is None
    assert small.name is None
    np.testing.assert_allclose(small, y, rtol=1e-9, atol=1e-9)
    with pytest.raises(nd.DataError, match="single number"):
        result.predict((0.5, 0.5))


# --- problems that fits were seen to refuse, or to end before the solution


TIMES = np.linspace(0, 4, 1_000)


@pytest.mark.parametrize(
    ("model", "x", "y", "start"),
    [
        pytest.param(line, TIMES, 0 * TIMES + 3, [1, 1], id="slope"),
        pytest.param(
            gaussian,
            TIMES - 2,
            3 * np.exp(-0.5 * ((TIMES - 2) / 1.2) ** 2),
            [2, 0.3, 1],
            id="centre",
        ),
        pytest.param(
            lambda x, a, w, p: a * jnp.sin(w * x + p),
            TIMES,
            2 * np.sin(1.7 * TIMES),
            [1, 1.6, 0.2],
            id="phase",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_parameters_whose_value_is_zero(
    model: Any, x: np.ndarray, y: np.ndarray, start: list[float]
) -> None:
    """A slope, a centre or a phase of 1e-17 is found, not hidden."""
    result = fit(model, x, y, start)
    assert result.success, result.message
    assert result.cost < 1e-25


@pytest.mark.parametrize("bound", [1e-300, 1e-16, 0.0])
def test_a_solution_on_a_bound_near_zero(bound: float) -> None:
    x, y = decay_data()
    result = fit(exponential, x, y - 0.6, [1, 1, 1e-3], ([0, 0, bound], [9, 9, 9]))
    assert result.success, result.message
    assert result.x[2] == bound
    assert result.active_mask.tolist() == [0, 0, -1]


@pytest.mark.parametrize("unit", [1e-200, 1e-150, 1e150, 1e200])
def test_units_whose_squares_leave_float64(unit: float) -> None:
    x, y = decay_data(100)
    with pytest.raises(nd.DataError, match="other units"):
        fit(exponential, x, unit * y, [unit, 1, unit])


def test_a_strong_regularization_shortens_steps() -> None:
    x, y = decay_data()
    config = {"max_warmup_iterations": 0, "warmup_iterations": 0}
    plain = fit(exponential, x, y, [5, 3, 2], **config)
    strong = fit(exponential, x, y, [5, 3, 2], regularization_factor=0.9, **config)
    assert plain.success
    assert not strong.success or strong.nit > plain.nit
