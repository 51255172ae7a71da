"""``curve_fit`` is a drop-in for SciPy's: calls as people write them, with both functions.

A call gets a namespace with ``curve_fit`` and the models, written with ``np``: in one run it is
SciPy's function and numpy, in the other run this package's and jax.numpy. All data have 60 rows, so
that few programs are compiled.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import optimize

import nlsq_dask as nd
from tests.problems import NO_WARMUP

RNG = np.random.default_rng(42)
M = 60
X = np.linspace(0, 4, M)
Y = 2.5 * np.exp(-1.3 * X) + 0.5 + 0.05 * RNG.standard_normal(M)
ERRORS = 0.05 * RNG.uniform(0.5, 2.0, M)
OUTLIERS = np.where(np.arange(M) % 13 == 5, Y + 1.5, Y)
GAPS = np.where(np.arange(M) % 17 == 3, np.nan, Y)
XX, YY = np.meshgrid(np.linspace(-2, 2, 10), np.linspace(-2, 2, 6))
IMAGE = 3 * np.exp(-(XX**2) - YY**2) + 0.5 + 0.02 * RNG.standard_normal(XX.shape)
POINTS = np.column_stack([XX.ravel(), YY.ravel()])


class Calls:
    """``curve_fit`` of SciPy or of this package, with models written for it."""

    def __init__(self, np: Any, curve_fit: Callable[..., Any]) -> None:
        self.curve_fit = curve_fit

        def decay(x: Any, a: Any, b: Any, c: Any) -> Any:
            return a * np.exp(-b * x) + c

        def decay_jac(x: Any, a: Any, b: Any, c: Any) -> Any:
            e = np.exp(-b * x)
            return np.array([e, -a * x * e, np.ones_like(x)]).T

        def spot(xy: Any, height: Any, width: Any, offset: Any) -> Any:
            x, y = xy
            return (height * np.exp(-(x**2 + y**2) / width) + offset).ravel()

        def spot_of_points(points: Any, height: Any, width: Any, offset: Any) -> Any:
            return height * np.exp(-(points**2).sum(axis=1) / width) + offset

        def constant(x: Any, level: Any) -> Any:
            return level

        self.decay, self.decay_jac = decay, decay_jac
        self.spot, self.spot_of_points, self.constant = spot, spot_of_points, constant


CALLS: dict[str, Callable[[Calls], Any]] = {
    "data only": lambda c: c.curve_fit(c.decay, X, Y),
    "p0 list": lambda c: c.curve_fit(c.decay, X, Y, [2, 1, 0]),
    "p0 tuple by keyword": lambda c: c.curve_fit(c.decay, X, Y, p0=(2, 1, 0)),
    "all by keyword": lambda c: c.curve_fit(f=c.decay, xdata=X, ydata=Y, p0=np.ones(3)),
    "maxfev": lambda c: c.curve_fit(c.decay, X, Y, maxfev=10000),
    "max_nfev": lambda c: c.curve_fit(c.decay, X, Y, method="trf", max_nfev=5000),
    "lm": lambda c: c.curve_fit(c.decay, X, Y, method="lm", maxfev=2000),
    "trf": lambda c: c.curve_fit(c.decay, X, Y, p0=[2, 1, 0.1], method="trf"),
    "dogbox": lambda c: c.curve_fit(c.decay, X, Y, method="dogbox"),
    "positive": lambda c: c.curve_fit(c.decay, X, Y, bounds=(0, np.inf)),
    "bounds of lists": lambda c: c.curve_fit(c.decay, X, Y, bounds=([0, 0, 0], [5, 5, 1])),
    "active bound": lambda c: c.curve_fit(c.decay, X, Y, bounds=(0, [3.0, 2.0, 0.45])),
    "bounds of an array": lambda c: c.curve_fit(c.decay, X, Y, bounds=np.array([[0] * 3, [9] * 3])),
    "Bounds object": lambda c: c.curve_fit(
        c.decay, X, Y, p0=[1, 1, 1], bounds=optimize.Bounds([0, 0, 0], [10, 10, 10])
    ),
    "bounds and method": lambda c: c.curve_fit(
        c.decay, X, Y, [2, 1, 0.1], bounds=(0, [3, 2, 1]), method="dogbox", max_nfev=1000
    ),
    "positional to the end": lambda c: c.curve_fit(
        c.decay, X, Y, [2, 1, 0], ERRORS, True, True, (-np.inf, np.inf), "lm", None
    ),
    "2-point": lambda c: c.curve_fit(c.decay, X, Y, jac="2-point", method="trf"),
    "3-point": lambda c: c.curve_fit(c.decay, X, Y, method="trf", jac="3-point"),
    "cs": lambda c: c.curve_fit(c.decay, X, Y, bounds=(0, 10), jac="cs"),
    "jac": lambda c: c.curve_fit(c.decay, X, Y, jac=c.decay_jac),
    "jac and bounds": lambda c: c.curve_fit(c.decay, X, Y, jac=c.decay_jac, bounds=(0, np.inf)),
    "tolerances": lambda c: c.curve_fit(c.decay, X, Y, ftol=1e-12, xtol=1e-12, gtol=1e-12),
    "no ftol": lambda c: c.curve_fit(c.decay, X, Y, bounds=(0, 9), ftol=None, xtol=1e-13),
    "gtol of zero": lambda c: c.curve_fit(c.decay, X, Y, xtol=1e-14, gtol=0.0),
    "x_scale jac": lambda c: c.curve_fit(c.decay, X, Y, method="trf", x_scale="jac"),
    "x_scale": lambda c: c.curve_fit(c.decay, X, Y, method="trf", x_scale=[1.0, 1.0, 0.1]),
    "no check": lambda c: c.curve_fit(c.decay, X, Y, check_finite=False),
    "check": lambda c: c.curve_fit(c.decay, X, Y, check_finite=True, nan_policy=None),
    "nan_policy None": lambda c: c.curve_fit(c.decay, X, Y, nan_policy=None),
    "nan_policy raise": lambda c: c.curve_fit(c.decay, X, Y, nan_policy="raise"),
    "nan_policy omit": lambda c: c.curve_fit(c.decay, X, GAPS, nan_policy="omit"),
    "omit with sigma": lambda c: c.curve_fit(
        c.decay, X, GAPS, sigma=ERRORS, nan_policy="omit", check_finite=False, full_output=True
    ),
    "tuples of numbers": lambda c: c.curve_fit(c.decay, tuple(X), tuple(Y)),
    "lists of numbers": lambda c: c.curve_fit(c.decay, X.tolist(), Y.tolist(), p0=[1, 1, 1]),
    "range": lambda c: c.curve_fit(c.decay, np.array(range(M)), Y, p0=[2, 0.1, 0]),
    "pandas": lambda c: c.curve_fit(c.decay, pd.Series(X).to_numpy(), pd.Series(Y), maxfev=800),
    "sigma list": lambda c: c.curve_fit(c.decay, X, Y, sigma=ERRORS.tolist()),
    "absolute sigma": lambda c: c.curve_fit(c.decay, X, Y, sigma=ERRORS, absolute_sigma=True),
    "scalar sigma": lambda c: c.curve_fit(c.decay, X, Y, sigma=0.05, absolute_sigma=True),
    "full output": lambda c: c.curve_fit(c.decay, X, Y, sigma=ERRORS, full_output=True),
    "full output, trf": lambda c: c.curve_fit(
        c.decay, X, Y, bounds=(0, np.inf), full_output=True, maxfev=10000
    ),
    "soft_l1": lambda c: c.curve_fit(
        c.decay, X, OUTLIERS, method="trf", loss="soft_l1", f_scale=0.1
    ),
    "huber": lambda c: c.curve_fit(
        c.decay, X, OUTLIERS, bounds=(0, 10), loss="huber", f_scale=0.1, xtol=1e-13, ftol=1e-13
    ),
    "meshgrid raveled": lambda c: c.curve_fit(c.spot, (XX.ravel(), YY.ravel()), IMAGE.ravel()),
    "meshgrid": lambda c: c.curve_fit(c.spot, (XX, YY), IMAGE.ravel(), p0=[1, 1, 0]),
    "list of meshgrids": lambda c: c.curve_fit(c.spot, [XX, YY], IMAGE.ravel(), maxfev=10000),
    "stacked": lambda c: c.curve_fit(c.spot, np.stack([XX, YY]), IMAGE.ravel()),
    "vstack": lambda c: c.curve_fit(c.spot, np.vstack([XX.ravel(), YY.ravel()]), IMAGE.ravel()),
    "points": lambda c: c.curve_fit(c.spot_of_points, POINTS, IMAGE.ravel(), full_output=True),
    "list of points": lambda c: c.curve_fit(c.spot_of_points, POINTS.tolist(), IMAGE.ravel()),
    "constant model": lambda c: c.curve_fit(c.constant, X, Y, sigma=ERRORS),
}


def precise(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """SciPy's ``curve_fit`` with the exact Jacobian, and tolerances at the limit of float64.

    SciPy's own pcov is that of the point before the last step, and so has fewer digits than popt.
    """
    arguments = inspect.signature(optimize.curve_fit).bind(f, *args, **kwargs).arguments
    options = {**arguments.pop("kwargs", {}), "ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    model = getattr(OURS, f.__name__)

    def jacobian(x: Any, *params: float) -> Any:
        with jax.enable_x64(True):
            n_rows = len(x) if np.ndim(x) == 1 else M  # fewer where rows are omitted
            columns = jax.jacfwd(lambda p: jnp.zeros(n_rows) + model(x, *p))(jnp.array(params))
            return np.asarray(columns)

    options["max_nfev"] = options.pop("maxfev", None) or options.get("max_nfev")
    method = "dogbox" if arguments.get("method") == "dogbox" else "trf"
    if np.ndim(arguments.get("sigma", [])) == 0:  # with jac, SciPy expects an array
        arguments["sigma"] = np.full(M, arguments["sigma"])
    arguments |= {"method": method, "jac": jacobian}
    return optimize.curve_fit(**arguments, **options)


# The warm-up takes longer to compile than all else; DEFAULTS has it.
CONFIG = nd.HybridStreamingConfig(verbose=0, **NO_WARMUP)
our_curve_fit = functools.partial(nd.curve_fit, config=CONFIG)

SCIPY, OURS = Calls(np, optimize.curve_fit), Calls(jnp, our_curve_fit)
DEFAULTS = Calls(jnp, nd.curve_fit)
PRECISE = Calls(np, precise)


@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_scipys(name: str) -> None:
    call = CALLS[name]
    popt, pcov, *rest = call(OURS)
    expected, covariance, *scipys = call(PRECISE)
    errors = np.sqrt(np.diag(covariance))
    scale = np.outer(errors, errors)
    np.testing.assert_allclose(popt, expected, rtol=1e-6, atol=1e-6 * errors.max())
    np.testing.assert_allclose(pcov / scale, covariance / scale, atol=1e-6)
    plain, _, *_ = call(SCIPY)
    np.testing.assert_array_less(np.abs(popt - plain), 1e-3 * errors)
    assert len(rest) == len(scipys)
    if rest:
        info, message, ier = rest
        np.testing.assert_allclose(info["fvec"], scipys[0]["fvec"], atol=1e-6)
        assert info["nfev"] > 0
        assert isinstance(message, str)
        assert ier in (1, 2, 3, 4)


@pytest.mark.parametrize("name", ["data only", "meshgrid raveled"])
def test_the_warm_up_changes_nothing(name: str) -> None:
    popt, pcov = CALLS[name](DEFAULTS)
    expected, covariance = CALLS[name](OURS)
    np.testing.assert_allclose(popt, expected, rtol=1e-6)
    np.testing.assert_allclose(pcov, covariance, rtol=1e-5)


# --- limits, Jacobians, rank deficiency


@pytest.mark.parametrize("name", ["maxfev", "max_nfev"])
@pytest.mark.parametrize("limit", [1, 3, 5])
def test_a_limit_of_evaluations_ends_the_fit_as_in_scipy(name: str, limit: int) -> None:
    for calls, message in ((SCIPY, "Optimal parameters"), (OURS, f"reached the limit of {limit}")):
        with pytest.raises(RuntimeError, match=message):
            calls.curve_fit(calls.decay, X, Y, [1, 1, 1], method="trf", **{name: limit})


def test_a_sufficient_limit_of_evaluations_changes_nothing() -> None:
    expected, _ = OURS.curve_fit(OURS.decay, X, Y)
    for limit in (20, 10_000):
        popt, _, info, *_ = OURS.curve_fit(OURS.decay, X, Y, maxfev=limit, full_output=True)
        np.testing.assert_allclose(popt, expected, rtol=1e-6)
        assert info["nfev"] <= limit


@pytest.mark.parametrize(
    "layout", [pytest.param("one variable", marks=pytest.mark.slow), "two variables"]
)
def test_the_jacobian_of_the_caller_is_used(layout: str) -> None:
    """The covariance is its inverse square: a Jacobian that is twice as large gives a quarter."""
    if layout == "one variable":
        model, xdata, y = OURS.decay, X, Y
    else:
        model, xdata, y = OURS.spot, (XX, YY), IMAGE.ravel()

    def double(x: Any, *params: Any) -> Any:
        return 2 * jax.jacfwd(lambda p: model(x, *p))(jnp.stack(params))

    options = {"p0": [2, 1, 0.5], "sigma": ERRORS, "absolute_sigma": True}
    _, pcov = our_curve_fit(model, xdata, y, **options)
    _, smaller = our_curve_fit(model, xdata, y, jac=double, **options)
    np.testing.assert_allclose(4 * smaller, pcov, rtol=1e-5)


def test_a_wrong_jacobian_does_not_affect_later_fits() -> None:
    """Programs are compiled once per model, which its values alone do not identify."""

    def model(x: Any, a: Any, b: Any) -> Any:
        return a * jnp.exp(-b * x) + 0.25

    def descent(**options: Any) -> Any:
        # The warm-up alone, which stops after 3 iterations.
        config = nd.HybridStreamingConfig(
            verbose=0, max_warmup_iterations=3, warmup_iterations=3, callback_frequency=3
        )
        options |= {"config": config, "callback": stop, "p0": [1.0, 1.0]}
        return nd.curve_fit(model, X, Y, **options)[0]

    def stop(params: Any, loss: float, iteration: int) -> None:
        raise StopIteration

    def uphill(x: Any, a: Any, b: Any) -> Any:
        return jnp.stack([-jnp.exp(-b * x), a * x * jnp.exp(-b * x)], axis=1)

    wrong = descent(jac=uphill)
    right = descent()
    assert not np.allclose(wrong, right)
    cost = [np.sum((np.asarray(model(X, *p)) - Y) ** 2) for p in ([1.0, 1.0], right)]
    assert cost[1] < cost[0]


@pytest.mark.parametrize(
    "jac",
    [
        lambda x, *p: np.exp(np.asarray(x)),  # not jax.numpy
        lambda x, *p: jnp.stack([x, x, x]),  # (p, M)
        lambda x, a: x[:, None],  # too few parameters
    ],
)
def test_an_unusable_jacobian(jac: Any) -> None:
    with pytest.raises(nd.ModelError, match=r"^jac .*Write it with jax\.numpy, or omit it"):
        nd.curve_fit(OURS.decay, X, Y, jac=jac)


@pytest.mark.parametrize(
    ("model", "fitted"),
    [
        (lambda x, a, b, c: (a + b) * jnp.exp(-c * x), lambda p: (p[0] + p[1], p[2])),
        (lambda x, a, b, c: a * jnp.exp(-b * x) + 0 * c, lambda p: (p[0], p[1])),
        pytest.param(
            lambda x, a, b, c: a * b * jnp.exp(-c * x),
            lambda p: (p[0] * p[1], p[2]),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sum", "unused", "product"],
)
@pytest.mark.parametrize(
    "bounds",
    [(-np.inf, np.inf), pytest.param((0, 10), marks=pytest.mark.slow)],
    ids=["free", "bounded"],
)
def test_rank_deficiency_warns_and_gives_infinity(model: Any, fitted: Any, bounds: Any) -> None:
    y = 2 * np.exp(-0.7 * X) + 0.01 * np.cos(9 * X)
    with pytest.warns(optimize.OptimizeWarning, match="^Covariance of the parameters could not"):
        popt, pcov = our_curve_fit(model, X, y, bounds=bounds)
    assert np.isinf(pcov).all()
    expected, _ = optimize.curve_fit(lambda x, a, c: a * np.exp(-c * x), X, y)
    np.testing.assert_allclose(fitted(popt), expected, rtol=1e-6)


def test_fewer_rows_than_parameters() -> None:
    for calls in (SCIPY, OURS):
        with pytest.raises(TypeError, match="must not exceed"):
            calls.curve_fit(calls.decay, X[:2], Y[:2])
        with pytest.warns(optimize.OptimizeWarning, match="could not be estimated"):
            popt, pcov = calls.curve_fit(calls.decay, X[:2], Y[:2], method="trf")
        np.testing.assert_allclose(calls.decay(X[:2], *popt), Y[:2], rtol=1e-6)
        assert np.isinf(pcov).all()


# --- other kinds of data


def test_lazy_variables_of_several_dimensions() -> None:
    lazy = [da.from_array(array, chunks=(4, 5)) for array in (XX, YY, IMAGE)]
    expected, _ = OURS.curve_fit(OURS.spot, (XX, YY), IMAGE.ravel())
    for xdata in (tuple(lazy[:2]), da.stack(lazy[:2])):
        popt, _, info, *_ = our_curve_fit(OURS.spot, xdata, lazy[2].ravel(), full_output=True)
        np.testing.assert_allclose(popt, expected, rtol=1e-6)
        assert info["fvec"] is None  # the data are not in memory


def test_labeled_data_and_masks() -> None:
    expected, _ = OURS.curve_fit(OURS.decay, X, Y)
    y = xr.DataArray(Y, dims="t", coords={"t": X})
    for xdata in ("t", y.t):
        popt, _, info, *_ = our_curve_fit(OURS.decay, xdata, y, full_output=True)
        np.testing.assert_allclose(popt, expected, rtol=1e-6)
        np.testing.assert_allclose(info["fvec"], OURS.decay(X, *popt) - Y, atol=1e-5)
    masked = np.ma.masked_where(np.isnan(GAPS), Y)
    popt, _, info, *_ = our_curve_fit(OURS.decay, X, masked, full_output=True)
    expected, _ = SCIPY.curve_fit(SCIPY.decay, X, GAPS, nan_policy="omit")
    np.testing.assert_allclose(popt, expected, rtol=1e-6)
    assert len(info["fvec"]) == masked.count()


def test_columns_of_a_frame() -> None:
    frame = pd.DataFrame({"t": X, "unused": Y})
    popt, _ = our_curve_fit(lambda d, a, b, c: OURS.decay(d["t"], a, b, c), dict(frame), Y)
    np.testing.assert_allclose(popt, OURS.curve_fit(OURS.decay, X, Y)[0], rtol=1e-6)


# --- what is refused, and how


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lm", "bounds": (0, 9)}, "Use method='trf', or omit it"),
        ({"method": "newton"}, "method must be None or one of 'lm', 'trf', 'dogbox'; got 'newton'"),
        ({"jac": "4-point"}, r"written with jax\.numpy, that returns .* \(M, p\); got '4-point'"),
        ({"nan_policy": "propagate"}, "nan_policy must be None, 'raise' or 'omit'; got 'prop"),
        ({"check_finite": "no"}, "check_finite must be True, False or None; got 'no'"),
        ({"loss": lambda z: z}, "loss must be the name of a loss function; functions are not"),
        ({"x_scale": [1, 1]}, r"x_scale must be 'jac', a positive number, or 3 .* got \[1, 1\]"),
        ({"x_scale": -1.0}, "x_scale must be 'jac', .*; got -1.0. It can be omitted"),
        ({"ftol": -1}, "ftol must be a number >= 0 and < 1, or None; got -1"),
        ({"maxfev": 2.5}, "maxfev must be a positive integer or None; got 2.5"),
        ({"max_nfev": 0}, "max_nfev must be a positive integer or None; got 0"),
    ],
)
def test_values_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nd.curve_fit(OURS.decay, X, Y, **options)


@pytest.mark.parametrize(
    ("xdata", "message"),
    [
        (np.ones((3, M, 2)), r"xdata has shape \(3, 60, 2\) and ydata has shape \(60,\)"),
        (np.ones((2, M - 1)), r"pass xdata of shape \(M,\), \(k, M\) or \(M, k\)"),
        (None, "must get the independent variables from xdata"),
    ],
)
def test_layouts_that_are_refused(xdata: Any, message: str) -> None:
    with pytest.raises(nd.DataError, match=message):
        nd.curve_fit(OURS.decay, xdata, Y)


def test_nan_is_an_error_unless_it_is_omitted() -> None:
    for options in ({}, {"check_finite": False}, {"check_finite": True, "nan_policy": "omit"}):
        with pytest.raises(ValueError, match="NaN"):
            nd.curve_fit(OURS.decay, X, GAPS, **options)


@pytest.mark.parametrize(
    ("keyword", "sentence"),
    [
        ("sigmas", "Did you mean curve_fit(..., sigma=...)?"),
        ("x_data", "Did you mean curve_fit(..., xdata=...)?"),
        ("epsfcn", "Omit it: derivatives of the model are computed by JAX."),
        ("diag", "Omit it: parameters are scaled automatically"),
        ("args", "Set further arguments of the model with functools.partial"),
        ("weights", "Use sigma=1 / weights if the weights multiply residuals"),
    ],
)
def test_keywords_that_do_not_exist(keyword: str, sentence: str) -> None:
    with pytest.raises(TypeError) as caught:
        nd.curve_fit(OURS.decay, X, Y, **{keyword: 1})
    assert sentence in str(caught.value)


def test_a_callback_of_scipys_form_is_refused() -> None:
    with pytest.raises(TypeError, match=r"callback must be callable\(params, loss, iteration\)"):
        nd.curve_fit(OURS.decay, X, Y, callback=lambda intermediate_result: None)
