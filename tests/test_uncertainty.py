"""Intervals, bands and the sandwich: against statsmodels' formulas in NumPy, and by simulation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from scipy import stats

import nlsq_dask as nd
from tests import problems
from tests.problems import NO_WARMUP, exponential, plane

TRUTH = np.array([2.5, 1.3, 0.5])

fit = functools.partial(
    problems.fit, exponential, p0=[2.0, 1.0, 0.3], sample_rows=1_000, **NO_WARMUP
)


def jacobian(x: np.ndarray, p: Any) -> np.ndarray:
    decay = np.exp(-p[1] * x)
    return np.stack([decay, -p[0] * x * decay, np.ones_like(x)], axis=-1)


def data(n: int = 6_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, y and the standard deviation of y, which grows with x."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 4, n)
    deviation = 0.02 + 0.05 * x
    return (
        x,
        TRUTH[0] * np.exp(-TRUTH[1] * x) + TRUTH[2] + deviation * rng.normal(size=n),
        deviation,
    )


@pytest.mark.parametrize("cov_type", [pytest.param("HC0", marks=pytest.mark.slow), "HC1"])
@pytest.mark.parametrize("with_sigma", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("loss", ["linear", "huber"])
def test_sandwich_against_numpy(cov_type: str, with_sigma: bool, loss: str) -> None:
    x, y, deviation = data()
    sigma = np.sqrt(deviation) if with_sigma else None
    lazy = [da.from_array(a, chunks=1_700) for a in (x, y)]
    f_scale = 0.1
    options = {"sigma": sigma, "loss": loss, "f_scale": f_scale}
    result = fit(*lazy, cov_type=cov_type, gauss_newton_tol=1e-10, **options)
    plain = fit(*lazy, gauss_newton_tol=1e-10, **options)
    assert result.n_passes == plain.n_passes + 1
    weight = 1.0 if sigma is None else sigma
    r = (exponential(x, *result.x) - y) / weight
    j = jacobian(x, result.x) / np.reshape(weight, (-1, 1))
    is_inlier = np.abs(r) <= f_scale if loss == "huber" else np.full(len(r), True)
    score = np.where(is_inlier, r, f_scale * np.sign(r))
    # Beyond f_scale huber's rho' + 2 rho'' z is 0: these rows have no curvature.
    bread = np.linalg.inv((j * is_inlier[:, None]).T @ j)
    expected = bread @ (j * score[:, None] ** 2).T @ j @ bread
    if cov_type == "HC1":
        expected *= len(x) / (len(x) - 3)
    errors = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(result.perr, errors, rtol=1e-4)
    scale = np.outer(errors, errors)
    np.testing.assert_allclose(result.pcov / scale, expected / scale, atol=1e-4)
    np.testing.assert_array_equal(result.x, plain.x)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_sandwich_does_not_depend_on_the_size_of_y(precision: str) -> None:
    x, y, _ = data()
    sizes = 1.0, 1e20
    small, large = (
        fit(x, y * size, p0=[2 * size, 1.0, 0.3 * size], cov_type="HC1", precision=precision)
        for size in sizes
    )
    unit = np.array([sizes[1], 1.0, sizes[1]])
    np.testing.assert_allclose(large.perr / unit, small.perr, rtol=1e-4)


def test_confidence_intervals() -> None:
    x, y, deviation = data(12)
    relative = fit(x, y)
    quantile = stats.t.ppf(0.95, 9)
    expected = np.stack(
        [relative.x - quantile * relative.perr, relative.x + quantile * relative.perr]
    )
    np.testing.assert_allclose(relative.conf_interval(0.9), expected.T)
    absolute = fit(x, y, sigma=deviation, absolute_sigma=True)
    half = np.diff(absolute.conf_interval()).ravel() / 2
    np.testing.assert_allclose(half, 1.959963984540054 * absolute.perr)
    for level in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="level"):
            relative.conf_interval(level)


def test_band_of_the_curve() -> None:
    x, y, _ = data()
    result = fit(x, y)
    grid = np.linspace(0, 5, 40_000)
    value, error = result.predict(grid, return_std=True)
    j = jacobian(grid, result.x)
    np.testing.assert_allclose(value, result.predict(grid))
    np.testing.assert_allclose(error, np.sqrt(np.einsum("ij,jk,ik->i", j, result.pcov, j)))
    lazy = da.from_array(grid, chunks=7_000)
    values, errors = result.predict(lazy, return_std=True)
    assert isinstance(errors, da.Array)
    np.testing.assert_allclose(errors, error)
    np.testing.assert_allclose(values, value)
    named = xr.DataArray(grid[:100], dims="time", coords={"time": grid[:100]})
    _, labelled = result.predict(named, return_std=True)
    xr.testing.assert_allclose(labelled, named.copy(data=error[:100]))


def test_band_in_float32_with_a_jacobian_in_reverse_mode() -> None:
    def wave(x: Any, a: Any, b: Any, c: Any) -> Any:
        return a * jnp.sin(b * x + c)

    x, _, _ = data(2_000)
    y = wave(x, 2.0, 1.5, 0.3) + 0.01 * np.random.default_rng(1).normal(size=len(x))
    bands = [
        problems.fit(wave, x, y, [1.8, 1.4, 0.2], precision=precision).predict(x, return_std=True)
        for precision in ("float32", "float64")
    ]
    for single, double in zip(*bands, strict=True):
        np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_no_band_where_the_data_do_not_determine_the_parameters() -> None:
    x = np.linspace(0, 1, 200)
    y = 2 * x + 0.1 * np.cos(40 * x)
    result = problems.fit(lambda x, a, b: (a + b) * x, x, y, [1.0, 0.5], **NO_WARMUP)
    _, error = result.predict(x, return_std=True)
    assert np.isnan(error).all()
    assert np.isinf(result.conf_interval()).all()


def simulate(n: int, count: int, interval: Callable[[Any, Any, Any], Any], **noise: Any) -> Any:
    """Return how often, a parameter, the interval covers the truth."""
    hits = np.zeros(3)
    for seed in range(count):
        x, y, deviation = data(n, seed)
        if noise.get("is_even"):
            y = exponential(x, *TRUTH) + 0.1 * np.random.default_rng([seed, 1]).normal(size=n)
            deviation = np.full(n, 0.1)
        low, high = np.asarray(interval(x, np.asarray(y), deviation)).T
        hits += (low <= TRUTH) & (high >= TRUTH)
    return hits / count


@pytest.mark.slow
def test_band_of_parameters_that_can_hardly_be_told_apart() -> None:
    """The curve is known far better than its parameters, whose covariance has squared all that."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 1, 400))
    y = 1.0 + x + 1e-3 * rng.normal(size=400)

    def polynomial(x: Any, *p: Any) -> Any:
        return sum((q * x**k for k, q in enumerate(p)), jnp.zeros_like(x))

    result = problems.fit(polynomial, x, y, np.zeros(11))
    assert result.condition_number > 1e6
    _, found = result.predict(x, return_std=True)
    q = np.linalg.qr(np.vander(x, 11))[0]
    expected = np.sqrt(result.sigma_sq * (q**2).sum(axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("degree", "low"), [(5, 0.0), (7, 2.0)])
def test_sandwich_of_parameters_that_can_hardly_be_told_apart(degree: int, low: float) -> None:
    """Against a basis of Chebyshev polynomials, where nothing is lost, exactly transformed."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(low, low + 1, 400))
    y = np.sin(3 * x) + (0.01 + 0.05 * (x - low)) * rng.normal(size=400)

    def polynomial(x: Any, *p: Any) -> Any:
        total = jnp.zeros_like(x)
        for coefficient in p[::-1]:
            total = total * x + coefficient
        return total

    result = problems.fit(polynomial, x, y, [0.0] * (degree + 1), cov_type="HC0")
    assert result.success
    domain = [low, low + 1]
    basis = np.polynomial.chebyshev.chebvander(2 * (x - low) - 1, degree)
    bread = np.linalg.inv(basis.T @ basis)
    residual = basis @ (bread @ (basis.T @ y)) - y
    covariance = bread @ ((basis * residual[:, None] ** 2).T @ basis) @ bread
    to_powers = np.stack(
        [
            np.pad(
                np.polynomial.Chebyshev.basis(k, domain)
                .convert(kind=np.polynomial.Polynomial)
                .coef,
                (0, degree - k),
            )
            for k in range(degree + 1)
        ],
        axis=1,
    )
    expected = np.sqrt(np.diag(to_powers @ covariance @ to_powers.T))
    np.testing.assert_allclose(result.perr, expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize("cov_type", ["HC0", "HC1"])
def test_sandwich_without_degrees_of_freedom(cov_type: str) -> None:
    result = fit(np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.6, 1.1]), cov_type=cov_type)
    assert np.isposinf(result.pcov).all()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", ["sigma known", "sigma unknown", "heteroscedastic"])
def test_coverage(case: str) -> None:
    """2,000 data sets each; the standard error of a coverage of 95 % is 0.5 %."""
    n = 300

    def interval(x: Any, y: Any, deviation: Any) -> Any:
        lazy = [da.from_array(a, chunks=128) for a in (x, y)]
        if case == "sigma known":
            return fit(*lazy, sigma=deviation, absolute_sigma=True).conf_interval()
        if case == "sigma unknown":
            return fit(*lazy).conf_interval()
        return fit(*lazy, cov_type="HC1").conf_interval()

    covered = simulate(n, 2_000, interval, is_even=case == "sigma unknown")
    assert ((covered >= 0.93) & (covered <= 0.97)).all(), covered
    if case == "heteroscedastic":  # where the usual covariance is wrong
        wrong = simulate(n, 200, lambda x, y, _: fit(x, y).conf_interval())
        assert (wrong < 0.93).any() or (wrong > 0.97).any(), wrong


@pytest.mark.parametrize("solver", ["normal", "qr"])
def test_errors_of_the_curve_with_a_sandwich(solver: str) -> None:
    x, y, _ = data()
    result = fit(x, y, cov_type="HC1", gauss_newton_solver=solver)
    j = jacobian(x, result.x)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", j, result.pcov, j))
    _, std = result.predict(x, return_std=True)
    np.testing.assert_allclose(std, expected, rtol=1e-10)
    assert "covariance           = HC1" in result.fit_report()


def test_one_x_of_several_dimensions_is_no_table() -> None:
    """Fitted against a y of as many, it is predicted so, from any kind of array."""
    x = np.random.default_rng(0).uniform(0, 4, (30, 40))
    y = 2.0 * np.exp(-0.7 * x)
    result = fit(x, y)
    named = xr.DataArray(x, dims=("time", "place"))
    for given in (x, da.from_array(x, chunks=(10, 20)), named):
        predicted = result.predict(given)
        assert type(predicted) is type(given)
        np.testing.assert_allclose(np.asarray(predicted), y, rtol=1e-7)
    with pytest.raises(nd.DataError, match=r"x has no rows: x has shape \(0, 3\)"):
        result.predict(np.zeros((0, 3)))


def test_x_in_memory_is_predicted_here() -> None:
    """Whatever scheduler is active: it may have no workers, or lack the package."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("no scheduler is needed")

    x = np.linspace(0, 4, 100)
    result = problems.fit(plane, (x, x**2), 2 * x + x**2, [1, 1], **NO_WARMUP)
    with dask.config.set(scheduler=refuse):
        np.testing.assert_allclose(result.predict((x, x**2)), 2 * x + x**2, rtol=1e-7)
    with pytest.raises(
        nd.DataError, match=r"x must be a tuple of 2 arrays, .*; got a tuple of length 3"
    ):
        result.predict((x, x, x))
    with pytest.raises(nd.DataError, match="do not broadcast"):
        result.predict((x, x[:3]))
