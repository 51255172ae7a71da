"""The sums by QR factorizations: against NumPy, exact arithmetic and what J^T J gives."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import partial, wraps
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask.kernels import tsqr
from nlsq_dask.kernels.dense_kernel import dense_kernel, with_accumulation
from nlsq_dask.kernels.dense_terms import Accumulation
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.request import Request
from nlsq_dask.model.check import float32_constants
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.rows.rows import Layout, Rows
from tests.problems import NO_WARMUP


def fit(model: Any, x: Any, y: Any, p0: Any, solver: str = "auto", **options: Any) -> nd.FitResult:
    config = nd.HybridStreamingConfig(verbose=0, gauss_newton_solver=solver, **options)
    return nd.AdaptiveHybridStreamingOptimizer(config).fit(model, x, y, p0)


def solver_of(result: nd.FitResult) -> str:
    """Return what summed over all rows in the end."""
    return str(result.phase_history[2]["solver"])


def polynomial(x: Any, *p: Any) -> Any:
    total = p[-1] * jnp.ones_like(x)
    for coefficient in p[-2::-1]:
        total = total * x + coefficient
    return total


# --- the kernel


def harmonics(x: Any, *p: Any) -> Any:
    return sum((q * jnp.cos(k * x) for k, q in enumerate(p)), jnp.zeros_like(x))


def positive(matrix: np.ndarray) -> np.ndarray:
    """Return R with a diagonal that is positive, which makes it unique."""
    signs = np.where(np.diag(matrix) < 0, -1.0, 1.0)
    return signs[:, None] * np.triu(matrix)


# In the fast run each mode with each loss, and each loss with few parameters and with many.
FAST = {
    (3, Mode.FORWARD, "cauchy"),
    (3, Mode.REVERSE, "linear"),
    (12, Mode.FORWARD, "linear"),
    (12, Mode.REVERSE, "cauchy"),
}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product([1, 3, 12, 40], Mode, ["linear", "cauchy"])
]


@pytest.mark.parametrize(("n_params", "mode", "loss"), CASES)
def test_r_is_that_of_all_rows(n_params: int, mode: Mode, loss: str) -> None:
    rng = np.random.default_rng(n_params)
    x, y, sigma = rng.uniform(0, 3, 5_000), rng.normal(size=5_000), rng.uniform(0.5, 2, 5_000)
    y[::7] = np.nan
    params = rng.normal(size=n_params)
    layout = Layout(None, ((),), ("float64",), "float64", "float64", False)
    model = Model(harmonics, n_params, layout, "float64")
    plain_kernel = dense_kernel(model, 2048, mode, loss=Loss(loss, 0.7))
    kernel = with_accumulation(plain_kernel, Accumulation.TRIANGLE, model)
    sums = kernel(Rows(y, (x,), sigma), Request(params))
    parts = [
        kernel(Rows(y[rows], (x[rows],), sigma[rows]), Request(params))
        for rows in np.array_split(np.arange(5_000), 3)
    ]
    joined = parts[0].combine(parts[1].combine(parts[2]))
    plain = plain_kernel(Rows(y, (x,), sigma), Request(params))
    used = np.isfinite(y)
    jacobian = np.cos(np.outer(x, np.arange(n_params)))
    residual = (jacobian @ params - y) / sigma
    jacobian, residual = (jacobian / sigma[:, None])[used], residual[used]
    if loss == "linear":
        expected = np.linalg.qr(np.column_stack([jacobian, residual]), mode="r")
        size = np.linalg.norm(expected, axis=0)
        for found in (sums, joined):
            assert found.triangle is not None
            np.testing.assert_allclose(
                positive(found.triangle) / size, positive(expected) / size, atol=1e-13
            )
    for found in (sums, joined):
        np.testing.assert_allclose(found.jtj, plain.jtj, rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(found.jtr, plain.jtr, rtol=1e-9, atol=1e-9)
        assert found.cost == pytest.approx(plain.cost, rel=1e-13)
        assert found.chi2 == pytest.approx(plain.chi2, rel=1e-13)
        assert found.n_used == plain.n_used == used.sum()


def test_the_largest_residual_is_kept() -> None:
    x = np.linspace(0, 1, 5_000)
    y = np.zeros(5_000)
    y[4_321] = 9.0
    layout = Layout(None, ((),), ("float64",), "float64", None, False)
    kernel = dense_kernel(
        Model(polynomial, 3, layout, "float64"), 2048, accumulation=Accumulation.TRIANGLE
    )
    assert kernel(Rows(y, (x,)), Request(np.zeros(3))).largest == 9.0


def test_rows_added_to_a_triangle() -> None:
    rng = np.random.default_rng(0)
    rows, further = rng.normal(size=(50, 4)), rng.normal(size=(3, 4))
    expected = np.linalg.qr(np.vstack([rows, further]), mode="r")
    found = tsqr.with_rows(np.linalg.qr(rows, mode="r"), further)
    np.testing.assert_allclose(positive(found), positive(expected), rtol=1e-12)


# --- what it is good for


def exact_least_squares(x: np.ndarray, y: np.ndarray, n_params: int) -> np.ndarray:
    """Fit a polynomial in rational arithmetic to the numbers that float64 holds."""
    rows = [[Fraction(float(v)) ** k for k in range(n_params)] for v in x]
    right = [Fraction(float(v)) for v in y]
    matrix = [
        [sum((row[i] * row[j] for row in rows), Fraction(0)) for j in range(n_params)]
        + [sum((row[i] * v for row, v in zip(rows, right, strict=True)), Fraction(0))]
        for i in range(n_params)
    ]
    for i in range(n_params):
        matrix[i] = [entry / matrix[i][i] for entry in matrix[i]]
        for k in range(n_params):
            if k != i:
                factor = matrix[k][i]
                matrix[k] = [a - factor * b for a, b in zip(matrix[k], matrix[i], strict=True)]
    return np.array([float(row[-1]) for row in matrix])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_a_polynomial_of_degree_eleven_on_the_unit_interval() -> None:
    """Its J^T J is like Hilbert's matrix: Gauss-Newton by it stops at the first digit."""
    n_params = 12
    rng = np.random.default_rng(5)
    x = np.sort(rng.uniform(0, 1, 300))
    y = np.polynomial.polynomial.polyval(x, np.ones(n_params)) + 1e-3 * rng.normal(size=300)
    exact = exact_least_squares(x, y, n_params)
    root = np.linalg.qr(np.vander(x, n_params, increasing=True), mode="r")
    inverse = np.linalg.solve(root, np.eye(n_params))
    lazy = [da.from_array(v, chunks=70) for v in (x, y)]

    def digits(result: nd.FitResult) -> float:
        return float(-np.log10(np.linalg.norm(result.x - exact) / np.linalg.norm(exact)))

    for solver in ("qr", "auto"):
        result = fit(polynomial, *lazy, np.zeros(n_params), solver)
        assert result.success
        assert solver_of(result) == "qr"
        assert digits(result) >= 7
        expected = np.sqrt(np.diag(inverse @ inverse.T) * result.sigma_sq)
        np.testing.assert_allclose(result.perr, expected, rtol=1e-6)
    plain = fit(polynomial, *lazy, np.zeros(n_params), "normal")
    assert not plain.success
    assert digits(plain) < 2


def close_rates(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * jnp.exp(-b * x) + c * jnp.exp(-d * x)


def decay(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


@pytest.mark.slow
def test_auto_goes_over_only_where_it_must() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.uniform(0, 5, 20_000), 1e-5 * rng.normal(size=20_000)
    easy = da.from_array(2 * np.exp(-x) + 0.5 + noise, chunks=3_000)
    hard = da.from_array(2 * np.exp(-x) + 3 * np.exp(-1.1 * x) + noise, chunks=3_000)
    easy_result = fit(decay, x, easy, [1, 2, 0])
    assert easy_result.success
    assert solver_of(easy_result) == "normal"
    hard_result = fit(close_rates, x, hard, [1, 0.9, 1, 1.2])
    assert hard_result.success
    assert solver_of(hard_result) == "qr"
    assert hard_result.condition_number > 1e4
    asked = fit(decay, x, easy, [1, 2, 0], solver="qr")
    assert solver_of(asked) == "qr"
    np.testing.assert_allclose(asked.x, easy_result.x, rtol=1e-9)
    np.testing.assert_allclose(asked.pcov, easy_result.pcov, rtol=1e-7)


def test_all_rows_are_worse_conditioned_than_the_sample() -> None:
    """Only the pass over all rows can say that J^T J is not enough, and it does."""
    n = 100_000
    rng = np.random.default_rng(3)
    columns = rng.normal(size=(n, 2))
    columns[7::20_000] = 1e8  # five rows that know the sum of the parameters alone
    y = columns @ [2.0, 1.0] + 0.1 * rng.normal(size=n)
    x = tuple(da.from_array(column, chunks=10_000) for column in columns.T)
    y = da.from_array(y, chunks=10_000)
    config = {"sample_rows": 1_000, **NO_WARMUP}
    result = fit(lambda x, a, b: a * x[0] + b * x[1], x, y, [1, 1], **config)
    assert result.success
    assert solver_of(result) == "qr"
    root = np.linalg.qr(columns, mode="r")
    inverse = np.linalg.inv(root)
    expected = np.linalg.lstsq(columns, y.compute())[0]
    error = np.sqrt(result.sigma_sq * np.diag(inverse @ inverse.T))
    np.testing.assert_allclose(result.perr, error, rtol=1e-8)
    np.testing.assert_allclose(result.x, expected, atol=1e-3 * error.min())


def test_float32_constants_are_found_inside_of_what_wraps_the_model() -> None:
    outside = jnp.ones(1)

    def model(x: Any, a: Any, b: Any = 0.0) -> Any:
        return a * outside[0] * x + b

    @wraps(model)
    def wrapped(*args: Any) -> Any:
        return model(*args)

    for function in (model, wrapped, partial(model, b=1.0), partial(wrapped)):
        layout = Layout(None, ((),), ("float64",), "float64", None, False)
        assert float32_constants(Model(function, 1, layout, "float64")) == ["outside"]


def test_float32_by_request() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 5, 5_000).astype("f4")
    y = (2 * np.exp(-x) + 0.5 + 0.01 * rng.normal(size=5_000)).astype("f4")
    result = fit(decay, x, y, [1, 2, 0], solver="qr", precision="float32", **NO_WARMUP)
    expected = fit(decay, x, y, [1, 2, 0], **NO_WARMUP)
    assert result.success
    assert solver_of(result) == "qr"
    assert (np.abs(result.x - expected.x) <= 1e-2 * expected.perr).all()


def test_unknown_solver() -> None:
    with pytest.raises(ValueError, match="gauss_newton_solver"):
        nd.HybridStreamingConfig(gauss_newton_solver="cholesky")
