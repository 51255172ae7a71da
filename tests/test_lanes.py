"""Many small fits at once, each beside SciPy's fit of the same data."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.trigonometry import vectorized
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import compile_count
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.rows.rows import Layout
from nlsq_dask.solvers.lanes.batched_lm import LaneSolver, choose_lanes
from nlsq_dask.solvers.lanes.records import LaneFits, Lanes, LaneSettings, LaneStatus

INF = np.array([[np.inf]])


def exponential(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


def gaussian(x: Any, height: Any, middle: Any, width: Any, floor: Any, slope: Any) -> Any:
    return height * jnp.exp(-0.5 * ((x - middle) / width) ** 2) + floor + slope * x


def damped_sine(x: Any, a: Any, tau: Any, omega: Any, phi: Any) -> Any:
    return a * jnp.exp(-x / tau) * jnp.sin(omega * x + phi)


def logistic(x: Any, top: Any, rate: Any, middle: Any, bottom: Any) -> Any:
    return bottom + top / (1 + jnp.exp(-rate * (x - middle)))


def power_law(x: Any, a: Any, k: Any) -> Any:
    return a * x**k


def bi_exponential(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * jnp.exp(-b * x) + c * jnp.exp(-d * x)


# Model, truth, start, range of x, number of points, noise.
CUBES: dict[str, Any] = {
    "exponential": (exponential, (2.5, 1.3, 0.5), (2.0, 1.0, 0.3), (0, 5), 37, 0.05),
    "Gaussian": (gaussian, (4, 5, 0.8, 1, 0.2), (3, 4.7, 1.1, 0.5, 0.1), (0, 10), 60, 0.1),
    "damped sine": (damped_sine, (3, 6, 2, 0.4), (2, 5, 2.05, 0.2), (0, 12), 50, 0.1),
    "logistic": (logistic, (3, 1.7, 5, 0.4), (2, 1, 4, 0), (0, 10), 41, 0.05),
    "power law": (power_law, (1.7, -0.8), (1, -0.5), (0.5, 30), 30, 0.02),
    "bi-exponential": (bi_exponential, (3, 0.4, 2, 4), (2, 0.3, 1.5, 3), (0, 8), 80, 0.01),
}


class Cube:
    """Simulated lanes of one model."""

    def __init__(self, name: str, n_lanes: int = 120, seed: int = 0) -> None:
        self.function, truth, start, x_range, self.n_points, noise = CUBES[name]
        rng = np.random.default_rng(seed)
        self.rng, self.n_params = rng, len(truth)
        self.truth = np.array(truth)[:, None] * (1 + 0.1 * rng.standard_normal((len(truth), 1)))
        self.truth = self.truth * (1 + 0.05 * rng.standard_normal((len(truth), n_lanes)))
        self.start = np.array(start, float)[:, None]
        self.x = np.linspace(*x_range, self.n_points)
        self.sigma = noise * rng.uniform(0.5, 2.0, (self.n_points, n_lanes))
        with jax.enable_x64(True):
            columns = jax.vmap(self.function, (None, *[0] * self.n_params), 1)
            clean = np.asarray(columns(jnp.asarray(self.x), *map(jnp.asarray, self.truth)))
        self.y = clean + self.sigma * rng.standard_normal(clean.shape)

    def solver(self, dtype: str = "float64", sigma: Any = "none", **settings: Any) -> LaneSolver:
        return make_solver(self.function, self.n_params, self.n_points, dtype, sigma, **settings)


def make_solver(
    function: Callable[..., Any],
    n_params: int,
    n_points: int,
    dtype: str = "float64",
    sigma: Any = "none",
    transform: ParameterTransform | None = None,
    x_varies: bool = False,
    **settings: Any,
) -> LaneSolver:
    layout = Layout(None, ((),), (dtype,), dtype, None, False)
    model = Model(function, n_params, layout, dtype, transform=transform)
    return LaneSolver.trace(
        model, n_points, 64, LaneSettings(**settings), x_varies=(x_varies,), sigma=sigma
    )


class Scipy:
    """``least_squares`` with the exact Jacobian, lane by lane; the covariance of ``curve_fit``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        def residual(p: Any, x: Any, y: Any, weight: Any) -> Any:
            return (function(x, *p) - y) * weight

        self._residual, self._jacobian = jax.jit(residual), jax.jit(jax.jacfwd(residual))

    def __call__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        start: np.ndarray,
        low: Any = -np.inf,
        high: Any = np.inf,
        sigma: Any = 1.0,
        absolute_sigma: bool = False,
        **options: Any,
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Return parameters, covariance and SciPy's result; equal bounds fix a parameter."""
        use = np.isfinite(y)
        # A weight of zero in place of an omitted point: one shape, compiled once.
        data = x, np.where(use, y, 0.0), np.where(use, 1 / np.broadcast_to(sigma, y.shape), 0.0)
        low, high = np.broadcast_to(low, start.shape), np.broadcast_to(high, start.shape)
        free = low < high

        def in_64_bits(function: Any) -> Any:
            def call(q: Any) -> np.ndarray:
                p = low.copy()
                p[free] = q
                with jax.enable_x64(True):
                    return np.asarray(function(jnp.asarray(p), *map(jnp.asarray, data)))

            return call

        residual, jacobian = map(in_64_bits, (self._residual, self._jacobian))
        result = optimize.least_squares(
            residual,
            np.clip(start, low, high)[free],
            lambda q: jacobian(q)[:, free],
            (low[free], high[free]),
            **{"x_scale": "jac", "ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, **options},
        )
        params, covariance = low.copy(), np.zeros((len(start), len(start)))
        params[free] = result.x
        _, values, rows = np.linalg.svd(result.jac, full_matrices=False)
        dof = use.sum() - free.sum()
        scale = 1.0 if absolute_sigma else 2 * result.cost / dof
        covariance[np.ix_(free, free)] = scale * (rows.T / values**2) @ rows
        return params, covariance, result


def check(
    fits: LaneFits, i: int, expected: tuple[np.ndarray, np.ndarray, Any], rtol: float = 1e-5
) -> None:
    """Check lane i: the same minimum, or a lower one."""
    params, covariance, result = expected
    assert fits.status[i] > 0
    if fits.cost[i] < result.cost * (1 - 1e-9):
        return
    errors = np.sqrt(np.diag(covariance))
    assert fits.errors is not None
    assert np.abs(fits.params[:, i] - params).max(initial=0, where=errors == 0) == 0
    distance = np.abs(fits.params[:, i] - params) / np.where(errors > 0, errors, 1.0)
    assert distance.max() < rtol
    np.testing.assert_allclose(fits.errors[:, i], errors, rtol=rtol)
    np.testing.assert_allclose(fits.cost[i], result.cost, rtol=1e-8)


def some_slow(*names: str, slow: tuple[str, ...]) -> list[Any]:
    """Parameters of a test, of which some are slow: each compiles a program."""
    return [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in names]


# ``test_maps.py`` compares such models, too.
IN_MAPS = "Gaussian", "damped sine", "logistic", "power law", "bi-exponential"


@pytest.mark.parametrize("name", some_slow(*CUBES, slow=IN_MAPS))
def test_scipy_on_each_lane(name: str) -> None:
    cube = Cube(name)
    y = np.where(cube.rng.random(cube.y.shape) < 0.1, np.nan, cube.y)
    # Some bounds are active, and some lanes have a parameter fixed.
    middle, width = cube.truth.mean(axis=1, keepdims=True), np.abs(cube.truth)
    low = np.broadcast_to(middle, width.shape) - 0.1 * width
    high = np.broadcast_to(middle, width.shape) + 0.4 * width
    is_fixed = cube.rng.random(width.shape) < 0.05
    low, high = (np.where(is_fixed, cube.truth, bound) for bound in (low, high))
    solver = cube.solver(sigma="varies")
    fits = solver(Lanes(y, (cube.x,), cube.sigma), cube.start, low, high)
    free = solver(Lanes(y, (cube.x,), cube.sigma), cube.start, -INF, INF)
    assert {LaneStatus.CONVERGED, LaneStatus.AT_BOUND} == set(fits.status)
    scipy = Scipy(cube.function)
    for i in range(0, y.shape[1], 8):
        data = cube.x, y[:, i], cube.start[:, 0]
        check(fits, i, scipy(*data, low[:, i], high[:, i], cube.sigma[:, i]))
        check(free, i, scipy(*data, sigma=cube.sigma[:, i]))
        assert fits.n_points[i] == np.isfinite(y[:, i]).sum()


LOSSES = some_slow(
    "soft_l1", "huber", "cauchy", "arctan", slow=("soft_l1", "huber", "cauchy", "arctan")
)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str) -> None:
    cube = Cube("power law", 40)
    y = cube.y + (cube.rng.random(cube.y.shape) < 0.1) * cube.rng.uniform(0.2, 1, cube.y.shape)
    solver = cube.solver(loss=Loss(loss, 0.1), covariance="full", absolute_sigma=True)
    fits = solver(Lanes(y, (cube.x,)), cube.truth, -INF, INF)
    scipy = Scipy(cube.function)
    for i in range(0, 40, 5):
        start = cube.truth[:, i]
        expected = scipy(cube.x, y[:, i], start, absolute_sigma=True, loss=loss, f_scale=0.1)
        check(fits, i, expected)
        assert fits.covariance is not None
        scale = np.sqrt(np.diag(expected[1]))
        difference = (fits.covariance[..., i] - expected[1]) / np.outer(scale, scale)
        assert np.abs(difference).max() < 1e-5
        with jax.enable_x64(True):
            residual = np.asarray(cube.function(cube.x, *fits.params[:, i])) - y[:, i]
        np.testing.assert_allclose(fits.chi2[i], (residual**2).sum(), rtol=1e-6)


@pytest.mark.parametrize("cov_type", some_slow("HC0", "HC1", slow=("HC0",)))
def test_sandwich(cov_type: Any) -> None:
    cube = Cube("exponential", 20)
    solver = cube.solver(cov_type=cov_type, sigma="varies")
    fits = solver(Lanes(cube.y, (cube.x,), cube.sigma), cube.start, -INF, INF)
    scipy, n, p = Scipy(cube.function), cube.n_points, cube.n_params
    for i in range(0, 20, 4):
        _, _, result = scipy(cube.x, cube.y[:, i], cube.start[:, 0], sigma=cube.sigma[:, i])
        bread = np.linalg.inv(result.jac.T @ result.jac)
        scores = result.fun[:, None] * result.jac
        covariance = bread @ scores.T @ scores @ bread * (n / (n - p) if cov_type == "HC1" else 1)
        assert fits.errors is not None
        np.testing.assert_allclose(fits.errors[:, i], np.sqrt(np.diag(covariance)), rtol=1e-5)


def test_ties_and_fixed_parameters() -> None:
    cube = Cube("bi-exponential", 30)
    names = ("a", "b", "c", "d")
    transform = ParameterTransform(
        names,
        np.array([True, True, True, False]),
        np.zeros(4),
        {"d": lambda p: 8 * p["b"] + 0.1 * p["a"] ** 2},
    )

    def tied(x: Any, a: Any, b: Any, c: Any) -> Any:
        return cube.function(x, a, b, c, 8 * b + 0.1 * a**2)

    solver = make_solver(cube.function, 3, cube.n_points, transform=transform, covariance="full")
    solver = pickle.loads(pickle.dumps(solver))
    fits = solver(Lanes(cube.y, (cube.x,)), cube.start[:3], -INF, INF)
    assert fits.covariance is not None
    scipy = Scipy(tied)
    for i in range(0, 30, 6):
        params, covariance, _ = scipy(cube.x, cube.y[:, i], cube.start[:3, 0])
        slopes = np.vstack([np.eye(3), [0.2 * params[0], 8, 0]])
        expected = slopes @ covariance @ slopes.T
        errors = np.sqrt(np.diag(expected))
        every = np.append(params, 8 * params[1] + 0.1 * params[0] ** 2)
        assert (np.abs(fits.params[:, i] - every) / errors).max() < 1e-5
        difference = (fits.covariance[..., i] - expected) / np.outer(errors, errors)
        assert np.abs(difference).max() < 1e-5


def test_float32() -> None:
    cube = Cube("exponential", 400)
    lanes = Lanes(cube.y, (cube.x,))
    single, double = (cube.solver(dtype) for dtype in DTYPES)
    middle = cube.truth.mean(axis=1, keepdims=True)
    for low, high in ((-INF, INF), (0.95 * middle, 1.5 * middle)):
        ours, exact = (solver(lanes, cube.start, low, high) for solver in (single, double))
        assert (ours.status == exact.status).all()
        assert (LaneStatus.AT_BOUND in exact.status) == np.isfinite(low).all()
        assert exact.errors is not None
        assert ours.errors is not None
        assert (np.abs(ours.params - exact.params) / exact.errors).max() < 0.02
        np.testing.assert_allclose(ours.errors, exact.errors, rtol=1e-3)


DTYPES = "float32", "float64"


@pytest.mark.slow
def test_twenty_parameters() -> None:
    middles = np.linspace(1, 11, 6)

    def peaks(x: Any, *q: Any) -> Any:
        total = q[18] + q[19] * x
        for i in range(6):
            total += q[3 * i] * jnp.exp(-0.5 * ((x - q[3 * i + 1]) / q[3 * i + 2]) ** 2)
        return total

    rng = np.random.default_rng(3)
    truth = np.append(
        np.column_stack([np.full(6, 2.0), middles, np.full(6, 0.5)]).ravel(), [1, 0.1]
    )
    x = np.linspace(0, 12, 150)
    with jax.enable_x64(True):
        y = np.asarray(peaks(jnp.asarray(x), *truth))[:, None]
    y = y + 0.02 * rng.standard_normal((150, 8))
    start = truth * rng.uniform(0.95, 1.05, 20)
    fits = make_solver(peaks, 20, 150)(Lanes(y, (x,)), start[:, None], -INF, INF)
    scipy = Scipy(peaks)
    for i in range(2):
        check(fits, i, scipy(x, y[:, i], start))


def test_hostile_lanes() -> None:
    cube = Cube("exponential", 16)
    y, start = cube.y.copy(), np.repeat(cube.start, 16, axis=1)
    sigma, low, high = np.full(y.shape, 0.05), np.full(start.shape, -INF), np.full(start.shape, INF)
    y[:, 1] = np.nan
    y[:, 2] = 1.5
    y[1:, 3] = np.nan
    y[3, 4] = np.inf
    y[:, 5] *= 1e12
    y[:, 6] *= 1e-12
    for lane, factor in ((5, 1e12), (6, 1e-12)):
        start[::2, lane] *= factor
        sigma[:, lane] *= factor
    start[1, 7] = -1e4  # overflows
    sigma[4, 8] = 0.0
    sigma[4, 9], y[4, 9] = np.nan, np.nan
    start[2, 10] = np.nan
    high[0, 11] = np.nan
    low[1, 12], high[1, 12] = 2.0, 1.0
    start[1, 13] = -60.0  # a trial point far away, but finite
    y[:, 14] = 0.0
    solver = cube.solver(sigma="varies")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = solver(Lanes(y, (cube.x,), sigma), start, low, high)
        clean = solver(Lanes(cube.y, (cube.x,), np.full(y.shape, 0.05)), cube.start, -INF, INF)
    expected = {
        1: LaneStatus.NO_DATA,
        3: LaneStatus.TOO_FEW_POINTS,
        7: LaneStatus.NON_FINITE,
        8: LaneStatus.NON_FINITE,
        10: LaneStatus.BAD_START,
        11: LaneStatus.BAD_START,
        12: LaneStatus.BAD_START,
    }
    assert {i: LaneStatus(fits.status[i]) for i in expected} == expected
    assert fits.errors is not None
    assert clean.errors is not None
    for i in (1, 3, 10, 11, 12):
        assert np.isnan(fits.params[:, i]).all()
        assert np.isnan(fits.errors[:, i]).all()
    assert not np.isnan(fits.params[:, 7]).any()
    assert fits.status[[2, 14]].tolist() == [LaneStatus.SINGULAR] * 2
    assert np.isinf(fits.errors[:, [2, 14]]).all()
    np.testing.assert_allclose(fits.params[:2, 14].prod(), 0, atol=1e-8)
    for i in (0, 15):  # the others do not matter
        np.testing.assert_array_equal(fits.params[:, i], clean.params[:, i])
        np.testing.assert_array_equal(fits.errors[:, i], clean.errors[:, i])
    scipy = Scipy(cube.function)
    for i in (4, 9):
        check(
            fits, i, scipy(cube.x, np.where(np.isinf(y), np.nan, y)[:, i], start[:, i], sigma=0.05)
        )
    for i, factor in ((5, 1e12), (6, 1e-12)):
        ratio = fits.params[:, i] / clean.params[:, i]
        np.testing.assert_allclose(ratio, [factor, 1, factor], rtol=1e-6)
    if fits.status[13] > 0:
        assert fits.cost[13] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_data(dtype: str) -> None:
    cube = Cube("exponential", 12)
    with jax.enable_x64(True):
        y = np.asarray(cube.function(cube.x[:, None], *map(jnp.asarray, cube.truth)))
    # Of constants, only a + c or c is determined.
    constants = 3.0, 0.0, 1e5, -2.7, 1 / 3, 1e-8
    y = np.concatenate([y, np.broadcast_to(constants, (len(y), 6))], axis=1)
    lanes, names = Lanes(y, (cube.x,)), ("errors", None)
    for start in (cube.start, np.array([[-3.0], [0.2], [1.0]])):
        fits, without = (
            cube.solver(dtype, covariance=name)(lanes, start, -INF, INF) for name in names
        )
        assert (fits.status[12:] == LaneStatus.SINGULAR).all()
        assert fits.errors is not None
        assert np.isinf(fits.errors[:, 12:]).all()
        np.testing.assert_array_equal(without.status, fits.status)
    rtol = 1e-12 if dtype == "float64" else 1e-4
    zero = np.array([[0.0], [0.0], [1.0]])
    for offset, start in ((0, cube.start), (cube.truth[2], cube.start * (1 - zero))):
        fits = cube.solver(dtype)(Lanes(y[:, :12] - offset, (cube.x,)), start, -INF, INF)
        assert (fits.status == LaneStatus.CONVERGED).all()
        expected = cube.truth - zero * offset
        np.testing.assert_allclose(fits.params, expected, rtol=rtol, atol=rtol)


def test_points_as_many_as_parameters() -> None:
    cube = Cube("exponential", 4)
    y = cube.y.copy()
    y[[i for i in range(cube.n_points) if i not in (0, 9, 30)]] = np.nan
    fits = cube.solver()(Lanes(y, (cube.x,)), cube.start, -INF, INF)
    assert (fits.status == LaneStatus.CONVERGED).all()
    assert np.isinf(fits.errors).all()
    strict = cube.solver(min_points=4)(Lanes(y, (cube.x,)), cube.start, -INF, INF)
    assert (strict.status == LaneStatus.TOO_FEW_POINTS).all()


def test_order_of_lanes_and_repeated_calls() -> None:
    cube = Cube("exponential", 301)
    solver = cube.solver()
    lanes = Lanes(cube.y, (cube.x,))
    before = compile_count()
    fits = solver(lanes, cube.start, -INF, INF)
    assert compile_count() - before <= 1
    before = compile_count()
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda _: cube.solver()(lanes, cube.start, -INF, INF), range(2)))
    order = cube.rng.permutation(301)[:77]
    shuffled = solver(lanes.take(order), cube.start, -INF, INF)
    assert compile_count() == before
    for other in again:
        np.testing.assert_array_equal(other.params, fits.params)
        np.testing.assert_array_equal(other.errors, fits.errors)
    assert fits.errors is not None
    distance = np.abs(shuffled.params - fits.params[:, order]) / fits.errors[:, order]
    assert distance.max() < 1e-5


@pytest.mark.slow
def test_x_that_varies() -> None:
    cube = Cube("exponential", 20)
    shift = cube.rng.uniform(0.9, 1.1, 20)
    x = cube.x[:, None] * shift
    solver = make_solver(cube.function, 3, cube.n_points, sigma="shared", x_varies=True)
    sigma = cube.sigma[:, :1]
    fits = solver(Lanes(cube.y, (x,), sigma, (True,)), cube.start, -INF, INF)
    scipy = Scipy(cube.function)
    for i in range(0, 20, 5):
        check(fits, i, scipy(x[:, i], cube.y[:, i], cube.start[:, 0], sigma=sigma[:, 0]))


def test_ill_conditioned_lanes() -> None:
    def polynomial(x: Any, *q: Any) -> Any:
        return sum(q[i] * x**i for i in range(6))

    rng = np.random.default_rng(0)
    x = np.linspace(10, 12, 60)
    y = (x[:, None] - 11) ** np.arange(6) @ rng.standard_normal((6, 12))
    y += 0.05 * rng.standard_normal(y.shape)
    fits = make_solver(polynomial, 6, 60)(Lanes(y, (x,)), np.zeros((6, 1)), -INF, INF)
    assert (fits.status == LaneStatus.CONVERGED).all()
    assert fits.errors is not None
    # The same polynomial around 11, where it is well-conditioned.
    matrix = (x[:, None] - 11) ** np.arange(6)
    centered = np.linalg.lstsq(matrix, y)[0]
    cost = 0.5 * ((matrix @ centered - y) ** 2).sum(axis=0)
    np.testing.assert_allclose(fits.cost, cost, rtol=1e-7)
    vandermonde = x[:, None] ** np.arange(6)
    _, values, rows = np.linalg.svd(vandermonde / np.linalg.norm(vandermonde, axis=0))
    inverse = np.sqrt(np.diag((rows.T / values**2) @ rows))
    errors = inverse / np.linalg.norm(vandermonde, axis=0)
    expected = errors[:, None] * np.sqrt(2 * cost / 54)
    np.testing.assert_allclose(fits.errors, expected, rtol=1e-5)


def test_saddle_points_and_redundant_parameters() -> None:
    def square(x: Any, a: Any, b: Any, c: Any) -> Any:
        return a + b**2 * x + 0 * c

    x = np.linspace(0, 1, 20)
    y = 1 + 4 * x[:, None] + 0.05 * np.random.default_rng(0).standard_normal((20, 6))
    start = np.array([[0.0], [0.0], [1.0]])
    fixed = np.array([[-np.inf], [-np.inf], [1.0]]), np.array([[np.inf], [np.inf], [1.0]])
    solver = make_solver(square, 3, 20)
    fits = solver(Lanes(y, (x,)), start, *fixed)
    line = np.polynomial.polynomial.polyfit(x, y, 1)
    np.testing.assert_allclose(fits.params[0], line[0], rtol=1e-6)
    np.testing.assert_allclose(fits.params[1] ** 2, line[1], rtol=1e-6)
    assert (fits.status == LaneStatus.CONVERGED).all()
    assert (fits.errors[2] == 0).all()
    redundant = solver(Lanes(y, (x,)), start, -INF, INF)
    np.testing.assert_allclose(redundant.cost, fits.cost, rtol=1e-9)
    assert (redundant.status == LaneStatus.SINGULAR).all()
    assert np.isinf(redundant.errors).all()


def test_lanes_of_a_call() -> None:
    assert choose_lanes(100, 3, "float64", 10**6) == 2048
    assert choose_lanes(100, 3, "float64", 10) == 16
    assert choose_lanes(10**6, 3, "float64", 10**6) == 256


@pytest.mark.parametrize("dtype", DTYPES)
def test_sines(dtype: str) -> None:
    rng, rounding = np.random.default_rng(0), np.finfo(dtype).eps
    for scale in (1, 1e3, 9e4, 1e7):
        x = np.append(rng.uniform(-scale, scale, 1_000), np.pi / 2 * np.arange(100)).astype(dtype)
        with jax.enable_x64(True):
            results = vectorized(lambda x: (jnp.sin(x), jax.jit(jnp.cos)(x), -x))(x)
        wide = x.astype(np.float64)
        for result, expected in zip(results, (np.sin(wide), np.cos(wide), -wide), strict=True):
            assert result.dtype == dtype
            np.testing.assert_allclose(result, expected, rtol=2 * rounding, atol=rounding)
    with jax.enable_x64(True):
        undefined = vectorized(jnp.sin)(np.array([np.inf, np.nan, 1.0], dtype))[:2]
    assert np.isnan(undefined).all()


def test_equal_operations_are_computed_once() -> None:
    def both(x: Any, b: Any) -> Any:
        return jnp.exp(-b * x), jax.jit(lambda x: jnp.exp(-b * x))(x) + jnp.exp(b * x)

    args = np.linspace(0, 1, 5), 2.0
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(vectorized(both))(*args)
        results = vectorized(both)(*args)
    assert [equation.primitive.name for equation in jaxpr.eqns].count("exp") == 2
    expected = np.exp(-2 * args[0]), np.exp(-2 * args[0]) + np.exp(2 * args[0])
    for result, each in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, each, rtol=1e-15)
