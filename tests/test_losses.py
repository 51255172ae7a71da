"""Robust losses: SciPy's answers on data with outliers, streamed."""

from __future__ import annotations

from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import nlsq_dask as nd
from tests import problems
from tests.problems import NO_WARMUP, PROBLEMS, Problem

N_ROWS = 12_000
ROBUST = ["soft_l1", "huber", "cauchy", "arctan"]
FIVE = [PROBLEMS[i] for i in (0, 2, 3, 4, 5)]


def with_outliers(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, y and sigma of some rows, a tenth of which are far above the rest."""
    rng = np.random.default_rng(7)
    x, y, sigma = (array[:N_ROWS].copy() for array in (problem.x, problem.y, problem.sigma))
    bad = rng.random(N_ROWS) < 0.1
    y[bad] += sigma[bad] * rng.uniform(5, 60, bad.sum())
    return x, y, sigma


class Reference:
    """SciPy's ``least_squares`` and ``curve_fit``, with the exact Jacobian."""

    def __init__(self, problem: Problem, x: Any, y: Any, sigma: Any, f_scale: float) -> None:
        self._start = problem.start
        self._f_scale = f_scale

        def residual(p: Any) -> Any:
            return (problem.model(jnp.asarray(x), *p) - y) / sigma

        functions = jax.jit(residual), jax.jit(jax.jacfwd(residual))

        def in_64_bits(function: Any) -> Any:
            def call(p: Any) -> np.ndarray:
                with jax.enable_x64(True):
                    return np.asarray(function(jnp.asarray(p, jnp.float64)))

            return call

        self.residual, self.jacobian = map(in_64_bits, functions)

    def solve(self, loss: str, x0: Any = None) -> optimize.OptimizeResult:
        return optimize.least_squares(
            self.residual,
            self._start if x0 is None else x0,
            self.jacobian,
            loss=loss,
            f_scale=self._f_scale,
            method="trf",
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
            x_scale="jac",
        )


def fit(problem: Problem, x: Any, y: Any, sigma: Any, **options: Any) -> nd.FitResult:
    chunks = (1, 4_000, 2_999, 5_000)
    arrays = [da.from_array(array, chunks=chunks) for array in (x, y)]
    options = {"sample_rows": 3_000, "sigma": sigma, **options}
    return problems.fit(problem.model, *arrays, problem.start, **options)


# Each loss once, with another problem; the other pairs take minutes.
PAIRS = [
    pytest.param(problem, loss, marks=() if i == j else pytest.mark.slow)
    for i, problem in enumerate(FIVE)
    for j, loss in enumerate(ROBUST)
]


@pytest.mark.parametrize(("problem", "loss"), PAIRS)
def test_agrees_with_scipy(problem: Problem, loss: str) -> None:
    x, y, sigma = with_outliers(problem)
    f_scale = 1.5
    reference = Reference(problem, x, y, sigma, f_scale)
    expected = reference.solve(loss, problem.truth)
    result = fit(problem, x, y, sigma, loss=loss, f_scale=f_scale)
    assert result.success, result.message
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-6)
    assert result.cost == pytest.approx(expected.cost, rel=1e-9)
    residual = reference.residual(expected.x)
    assert result.chi2 == pytest.approx(residual @ residual, rel=1e-6)
    # SciPy's covariance: of its own scaled Jacobian, times 2 cost / dof.
    covariance = np.linalg.inv(expected.jac.T @ expected.jac)
    covariance *= 2 * expected.cost / (N_ROWS - len(expected.x))
    errors = np.sqrt(np.diag(covariance))
    scale = np.outer(errors, errors)
    np.testing.assert_allclose(result.pcov / scale, covariance / scale, atol=1e-5)
    # The outliers have not moved it far, as they do with the linear loss.
    plain = reference.solve("linear", problem.truth)
    assert np.abs(result.x - plain.x).max() > 10 * np.abs(result.x - expected.x).max()


# A worker gets all losses in the same way.
@pytest.mark.parametrize(
    "loss", [*(pytest.param(loss, marks=pytest.mark.slow) for loss in ROBUST[:-1]), ROBUST[-1]]
)
def test_on_a_cluster_with_sigma_bounds_and_rows_left_out(loss: str, process_client: Any) -> None:
    problem = PROBLEMS[0]
    x, y, sigma = with_outliers(problem)
    y[::50] = np.nan
    bounds = ([0, 0, 0.6], [10, 10, 10])  # the background's truth is 0.5
    used = np.isfinite(y)
    reference = Reference(problem, x[used], y[used], sigma[used], 2.0)
    start = [2.0, 0.5, 0.7]
    expected = optimize.least_squares(
        lambda q: reference.residual([*q, 0.6]),
        start[:2],
        lambda q: reference.jacobian([*q, 0.6])[:, :2],
        loss=loss,
        f_scale=2.0,
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
    )
    with process_client.as_current():
        result = problems.fit(
            problem.model,
            da.from_array(x, chunks=4_000),
            da.from_array(y, chunks=4_000),
            start,
            bounds,
            sigma=sigma,
            loss=loss,
            f_scale=2.0,
            nan_policy="omit",
            **NO_WARMUP,
        )
    assert result.success, result.message
    np.testing.assert_allclose(result.x, [*expected.x, 0.6], rtol=1e-6)
    assert result.n_omitted == 240


def test_curve_fit_as_scipy_does() -> None:
    problem = PROBLEMS[0]
    x, y, sigma = with_outliers(problem)

    def numpy_model(x: Any, a: Any, b: Any, c: Any) -> Any:
        return a * np.exp(-b * x) + c

    options = {"sigma": sigma, "loss": "soft_l1", "f_scale": 1.5}
    config = nd.HybridStreamingConfig(**NO_WARMUP)
    popt, pcov = nd.curve_fit(problem.model, x, y, problem.start, config=config, **options)
    expected, covariance = optimize.curve_fit(
        numpy_model,
        x,
        y,
        problem.start,
        method="trf",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        **options,
    )
    np.testing.assert_allclose(popt, expected, rtol=1e-6)
    np.testing.assert_allclose(pcov, covariance, rtol=1e-4)


def test_in_float32() -> None:
    """Far from one, where squares would leave float32 if the kernel did not scale."""
    problem = PROBLEMS[0]
    x, y, _ = with_outliers(problem)
    size = 1e25
    start = [2 * size, 0.5, 0.3 * size]
    options = {"loss": "huber", "f_scale": 0.05 * size, "sample_rows": 3_000, **NO_WARMUP}
    single, double = (
        problems.fit(problem.model, x, y * size, start, precision=precision, **options)
        for precision in ("float32", "float64")
    )
    assert single.success, single.message
    assert np.abs((single.x - double.x) / double.perr).max() < 1e-2


@pytest.mark.parametrize(
    ("loss", "f_scale", "named"),
    [
        ("l2", 1.0, "'l2'"),
        (len, 1.0, "soft_l1"),
        ("huber", 0.0, "f_scale"),
        ("huber", np.inf, "f_scale"),
        ("huber", "wide", "'wide'"),
    ],
)
def test_what_is_refused(loss: Any, f_scale: Any, named: str) -> None:
    x = np.arange(5.0)
    with pytest.raises(ValueError, match=named):
        fit(PROBLEMS[0], np.tile(x, 2400), np.tile(x, 2400), None, loss=loss, f_scale=f_scale)
