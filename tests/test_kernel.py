"""The kernel against NumPy's extended precision: both modes, masks, both precisions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nlsq_dask as nd
from nlsq_dask.kernels.dense_kernel import dense_kernel
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.model.jacobian import choose_mode
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.rows.rows import Layout, Rows
from tests.problems import NO_WARMUP

N_ROWS = 20_000
RNG = np.random.default_rng(8)
X = RNG.uniform(0.1, 4.0, N_ROWS)
Y = RNG.normal(size=N_ROWS)
SIGMA = RNG.uniform(0.5, 2.0, N_ROWS)


def exponentials(n_params: int) -> Callable[..., Any]:
    def model(x: Any, *p: Any) -> Any:
        total = p[-1] if n_params % 2 else 0.0
        for i in range(n_params // 2):
            total = total + p[2 * i] * jnp.exp(-p[2 * i + 1] * x)
        return total

    return model


def model_of(function: Any, n_params: int, dtype: str = "float64", stored: str = "f8") -> Model:
    return Model(function, n_params, Layout(None, ((),), (stored,), stored, "f8", True), dtype)


def exact(n_params: int, params: Any, rows: np.ndarray) -> tuple[Any, Any, Any]:
    """Return J^T J, J^T r and cost of ``exponentials``, in extended precision."""
    x, y, sigma = (a[rows].astype(np.longdouble) for a in (X, Y, SIGMA))
    p = params.astype(np.longdouble)
    value, columns = np.zeros(len(x), np.longdouble), []
    for i in range(n_params // 2):
        decay = np.exp(-p[2 * i + 1] * x)
        value += p[2 * i] * decay
        columns += [decay, -x * p[2 * i] * decay]
    if n_params % 2:
        value += p[-1]
        columns.append(np.ones(len(x), np.longdouble))
    residual = (value - y) / sigma
    jacobian = np.array(columns) / sigma
    return jacobian @ jacobian.T, jacobian @ residual, residual @ residual / 2


def agree(sums: NormalEquations, expected: tuple[Any, Any, Any], rtol: float) -> None:
    jtj, jtr, cost = expected
    norms = np.sqrt(np.diag(jtj)).astype(float)
    assert abs(sums.cost / float(cost) - 1) < rtol
    assert np.abs((sums.jtj - jtj) / np.outer(norms, norms)).max() < rtol
    assert np.abs((sums.jtr - jtr) / norms).max() < rtol * np.sqrt(2 * float(cost))


# Five and six parameters have a test of their own below.
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    "n_params",
    [3, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6, 7, 21))],
)
def test_both_modes_against_extended_precision(n_params: int, mode: Mode) -> None:
    params = RNG.uniform(0.5, 1.5, n_params)
    model = model_of(exponentials(n_params), n_params)
    kernel = dense_kernel(model, 4096, mode)
    rows = Rows(Y, (X,), SIGMA, np.zeros(N_ROWS, bool))
    sums = kernel(rows, Request(params))
    agree(sums, exact(n_params, params, np.arange(N_ROWS)), 1e-13)
    assert (sums.n_used, sums.n_bad, sums.n_masked) == (N_ROWS, 0, 0)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("first", [0, 5_000, 16_400, 19_999])
def test_rows_left_out_from_some_row_on(first: int, mode: Mode) -> None:
    """The unmasked loop must stop before the first row that is masked, NaN or infinite."""
    y, x, sigma, mask = Y.copy(), X.copy(), SIGMA.copy(), np.zeros(N_ROWS, bool)
    y[first::7], x[first::11], sigma[first::13], mask[first::5] = np.nan, np.inf, np.nan, True
    rows = Rows(y, (x,), sigma, mask)
    params = np.array([1.2, 0.7, 0.3])
    kernel = dense_kernel(model_of(exponentials(3), 3), 32_768, mode)
    sums = kernel(rows, Request(params, np.array([params, 2 * params])))
    bad = ~np.isfinite(y) | ~np.isfinite(x) | ~np.isfinite(sigma)
    used = np.flatnonzero(~bad & ~mask)
    agree(sums, exact(3, params, used), 1e-13)
    assert (sums.n_used, sums.n_masked) == (len(used), mask.sum())
    assert sums.n_bad == (bad & ~mask).sum()
    np.testing.assert_allclose(sums.weight, (1 / sigma[used] ** 2).sum(), rtol=1e-12)
    np.testing.assert_allclose(sums.signal, ((y / sigma)[used] ** 2).sum(), rtol=1e-12)
    costs = [float(exact(3, q, used)[2]) for q in (params, 2 * params)]
    np.testing.assert_allclose(sums.candidate_costs, costs, rtol=1e-12)


def test_a_model_that_swallows_nan_in_x_does_not_hide_the_row() -> None:
    x = X.copy()
    x[77] = np.nan
    model = model_of(lambda x, a, b: jnp.where(x > 1, a * x, b), 2)
    rows = Rows(Y, (x,), SIGMA, np.zeros(N_ROWS, bool))
    sums = dense_kernel(model, 4096)(rows, Request(np.ones(2)))
    assert (sums.n_bad, sums.n_nonfinite) == (1, 0)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_sigma_that_is_not_positive_is_counted(bad: float) -> None:
    sigma = SIGMA.copy()
    sigma[[5, 12_000]] = bad
    rows = Rows(Y, (X,), sigma, np.zeros(N_ROWS, bool))
    model = model_of(exponentials(3), 3)
    sums = dense_kernel(model, 4096)(rows, Request(np.ones(3)))
    assert sums.n_bad_sigma == 2


def test_where_a_block_is_cut_changes_no_bit() -> None:
    rows = Rows(Y, (X,), SIGMA, np.zeros(N_ROWS, bool))
    params = np.array([1.2, 0.7, 0.3])
    sums = []
    for batch_rows in (1024, 4096, 32_768):
        kernel = dense_kernel(model_of(exponentials(3), 3), batch_rows)
        sums.append(kernel(rows, Request(params)))
    for other in sums[1:]:
        np.testing.assert_array_equal(other.jtj, sums[0].jtj)
        assert other.cost == sums[0].cost


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_float32_arithmetic_with_float64_sums(scale: float) -> None:
    """Factors keep products of very small and very large numbers inside float32."""
    y = (2.5 * np.exp(-1.3 * X) + 0.5 + 0.05 * Y) * scale

    def fit(precision: str) -> nd.FitResult:
        config = nd.HybridStreamingConfig(
            precision=precision, sample_rows=2_000, verbose=0, **NO_WARMUP
        )
        start = [2 * scale, 1.0, 0.4 * scale]
        return nd.AdaptiveHybridStreamingOptimizer(config).fit(exponentials(3), X, y, start)

    single, double = fit("float32"), fit("float64")
    assert single.success
    assert np.abs((single.x - double.x) / double.perr).max() < 1e-2
    np.testing.assert_allclose(single.perr, double.perr, rtol=1e-4)
    assert not np.array_equal(single.x, double.x)


def test_memory_optimized_is_a_fit_in_float32() -> None:
    y = 2.5 * np.exp(-1.3 * X) + 0.5 + 0.05 * Y
    config = nd.HybridStreamingConfig.memory_optimized(verbose=0)
    result = nd.AdaptiveHybridStreamingOptimizer(config).fit(exponentials(3), X, y, [2, 1, 0.4])
    assert result.success
    assert result.rows_cached == 0


# --- the rule


def mode_of(function: Any, n_params: int) -> Mode:
    model = model_of(function, n_params)
    with x64():
        return choose_mode(model, model.jaxpr())


def wide(x: Any, *p: Any) -> Any:
    centres = jnp.stack(p)
    return jnp.exp(-((x[:, None] - centres) ** 2)).sum(axis=1)


def with_while(x: Any, *p: Any) -> Any:
    """Kepler's equation, for instance, has no closed form."""

    def step(state: Any) -> Any:
        i, e = state
        return i + 1, e - (e - p[1] * e**2 - x) / (1 - 2 * p[1] * e)

    return p[0] * lax.while_loop(lambda s: s[0] < 5, step, (0, x))[1] + sum(p[2:])


@jax.custom_vjp
def squared(v: Any) -> Any:
    return v * v


squared.defvjp(lambda v: (v * v, v), lambda v, g: (2 * v * g,))


@jax.custom_vjp
def root(a: Any) -> Any:
    """Newton's iteration, with the derivative of what it converges to."""
    return lax.while_loop(
        lambda s: jnp.max(jnp.abs(s * s - a)) > 1e-12, lambda s: (s + a / s) / 2, jnp.ones_like(a)
    )


root.defvjp(lambda a: (root(a), root(a)), lambda r, g: (g / (2 * r),))


@pytest.mark.parametrize(
    ("function", "n_params", "mode"),
    [
        (lambda x, a, b: root(a) * x + b, 2, Mode.REVERSE),
        (lambda x, *p: jnp.squeeze(jnp.cos(x[:, None] * p[0])) + sum(p), 7, Mode.FORWARD),
        (exponentials(5), 5, Mode.FORWARD),
        (exponentials(6), 6, Mode.REVERSE),
        (lambda x, a, b: a * jnp.cos(b * x), 2, Mode.REVERSE),
        (lambda x, a, b: a * b + jnp.cos(x), 2, Mode.FORWARD),
        (wide, 3, Mode.REVERSE),
        (wide, 1, Mode.FORWARD),
        (with_while, 8, Mode.FORWARD),
        (lambda x, a, b: squared(a * x) + b, 2, Mode.REVERSE),
    ],
)
def test_the_rule(function: Any, n_params: int, mode: Mode) -> None:
    assert mode_of(function, n_params) is mode


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, a, b: squared(a) * x + b, 3.0**0.5),
        (lambda x, a, b: root(a) * x + b, 9.0),
        (lambda x, a, b: jnp.squeeze(a * x[:, None]) + b * jnp.cos(x), 3.0),
    ],
)
def test_models_that_have_one_mode_only(function: Any, expected: float) -> None:
    y = 3.0 * X + 0.1 * Y
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
    result = optimizer.fit(function, X, y, [1.0, 0.1])
    assert result.success
    assert result.x[0] == pytest.approx(expected, rel=1e-2)


def test_models_that_use_other_columns_are_two_models() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 2, 500), rng.uniform(0, 2, 500)
    y = 2 * x[0] + 3 * x[1] + 0.1 * rng.standard_normal(500)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
    for column in (0, 1):
        result = optimizer.fit(lambda x, a, column=column: a * x[column] ** 2, x, y, [1.0])
        np.testing.assert_allclose(result.predict(x), result.x[0] * x[column] ** 2, rtol=1e-6)
    alone = optimizer.fit(lambda x, a: a * x**2, x[1], y, [1.0])  # as many arrays as are used
    np.testing.assert_allclose(alone.x, result.x, rtol=1e-9)


@pytest.mark.slow
def test_models_that_differ_in_hidden_constants_are_two_models() -> None:
    """What an inner ``jax.jit`` closes over is not part of a jaxpr's text."""
    grid = np.linspace(0.0, 5.0, 6)

    def instrument(table: np.ndarray) -> Callable[..., Any]:
        @jax.jit
        def response(x: Any) -> Any:
            return jnp.interp(x, grid, table)

        return lambda x, a, b: a * response(x) + b

    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
    for table in (grid**2, np.sqrt(grid), 7.0 - grid):
        y = 2.0 * np.interp(X, grid, table) + 0.3
        result = optimizer.fit(instrument(table), X, y, [1.0, 0.0])
        np.testing.assert_allclose(result.x, [2.0, 0.3], rtol=1e-7)


# --- memory of the rows


@pytest.mark.parametrize(
    ("x_shape", "sigma_shape"), [((40, 1, 1), (1, 30, 25)), ((40, 30, 25), (1, 1, 25))]
)
def test_broadcast_rows_in_memory_that_is_used_again(
    x_shape: tuple[int, ...], sigma_shape: tuple[int, ...]
) -> None:
    """Batches are copied into memory of earlier ones, by two threads at once."""
    shape = (40, 30, 25)
    rng = np.random.default_rng(4)
    x, sigma = rng.uniform(0, 5, x_shape), rng.uniform(0.5, 2, sigma_shape)
    blocks = [Rows(rng.normal(size=shape), (x,), sigma) for _ in range(8)]
    layout = Layout(None, ((),), ("float64",), "float64", "float64", False)
    model = Model(exponentials(3), 3, layout, "float64")
    params = np.array([1.2, 0.7, 0.3])
    kernel = dense_kernel(model, 2048)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda block: kernel(block, Request(params)), blocks))
    for block, sums in zip(blocks, found, strict=True):
        flat = Rows(
            block.y.ravel(),
            (np.broadcast_to(x, shape).ravel(),),
            np.broadcast_to(sigma, shape).ravel(),
        )
        alone = dense_kernel(model, 32_768)(flat, Request(params))
        np.testing.assert_array_equal(sums.jtj, alone.jtj)
        np.testing.assert_array_equal(sums.jtr, alone.jtr)
        assert (sums.cost, sums.weight, sums.y_square) == (alone.cost, alone.weight, alone.y_square)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("n_params", [5, 6])
def test_sums_in_lanes_and_as_matrix_product(n_params: int, mode: Mode) -> None:
    """Both sides of the number of parameters from which a matrix product is used."""
    params = np.linspace(0.5, 1.5, n_params)
    kernel = dense_kernel(model_of(exponentials(n_params), n_params), 4096, mode)
    sums = kernel(Rows(Y, (X,), SIGMA, np.zeros(N_ROWS, bool)), Request(params))
    agree(sums, exact(n_params, params, np.arange(N_ROWS)), 1e-13)
    np.testing.assert_array_equal(sums.jtj, sums.jtj.T)


@pytest.mark.parametrize("first", [None, 0, 9_000])
def test_sums_of_the_data_alone(first: int | None) -> None:
    """With and without rows left out, about a reference value that is far away."""
    y = Y + 1e3
    if first is not None:
        y[first::101] = np.nan
    kernel = dense_kernel(model_of(exponentials(3), 3), 4096)
    kernel = replace(kernel, y_reference=1e3)
    sums = kernel(Rows(y, (X,), SIGMA, np.zeros(N_ROWS, bool)), Request(np.ones(3)))
    used = np.isfinite(y)
    offset, weight = y[used].astype(np.longdouble) - 1e3, 1 / SIGMA[used].astype(np.longdouble) ** 2
    assert sums.n_used == used.sum()
    assert sums.weight == pytest.approx(float(weight.sum()), rel=1e-13)
    assert sums.y_sum == pytest.approx(float(weight @ offset), rel=1e-11)
    assert sums.y_square == pytest.approx(float(weight @ offset**2), rel=1e-13)
