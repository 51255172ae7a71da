"""Every way in which a fit can end is reached, and says so."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from nlsq_dask import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig
from nlsq_dask.events import Event, SampleSolved
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.iterate import Settings
from nlsq_dask.solvers.newton import find_minimum
from nlsq_dask.status import Status
from tests.problems import exponential, fit

N = 1_000
LONG = 200_000
X = np.random.default_rng(0).uniform(0, 5, N)
NOISE = np.random.default_rng(1).standard_normal(N)
Y = 2.5 * np.exp(-1.3 * X) + 0.5 + 0.05 * NOISE


@jax.custom_jvp
def wrong(a: Any) -> Any:
    return a


@wrong.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], -tangents[0]


def finite_at_one_only(x: Any, a: Any) -> Any:
    return a * x + jnp.log(1.0 - 1e40 * (a - 1.0) ** 2)


def stopping_callback(params: Any, loss: float, iteration: int) -> None:
    raise StopIteration


LONG_X = np.random.default_rng(3).uniform(0, 5, LONG)
LONG_Y = 2.5 * np.exp(-1.3 * LONG_X) + 0.5
LONG_Y += 0.05 * np.random.default_rng(4).standard_normal(LONG)
SECONDS = 1.7e9 + 3.0 * np.arange(2_000)

NO_WARMUP = {"warmup_iterations": 0, "max_warmup_iterations": 0}
NO_SAMPLE = {**NO_WARMUP, "sample_rows": 1}
# NIST's MGH10 with the first of its starts: a valley that bends over forty orders of magnitude.
MGH10_X = 50.0 + 5.0 * np.arange(16)
MGH10_Y = np.array(
    [
        [34780.0, 28610, 23650, 19630, 16370, 13720, 11540, 9744],
        [8261.0, 7030, 6005, 5147, 4427, 3820, 3307, 2872],
    ]
).ravel()
ROWS = np.arange(float(N))
BOX_BOD_X = np.array([1.0, 2, 3, 5, 7, 10])
BOX_BOD_Y = np.array([109.0, 149, 149, 191, 213, 224])


def growth(x: Any, a: Any, b: Any) -> Any:
    return a * (1 - jnp.exp(-b * x))


def arrhenius(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(b / (x + c))


def freudenstein_roth(x: Any, a: Any, b: Any) -> Any:
    """A function whose residuals are large at a local minimum; x is 0 or 1."""
    first = -13 + a + ((5 - b) * b - 2) * b
    return jnp.where(x == 0, first, -29 + a + ((b + 1) * b - 14) * b)


Case = tuple[Status, Callable[..., Any], Any, Any, list[float], dict[str, Any]]
CASES: list[Case] = [
    (Status.REDUCTION, exponential, X, Y, [2, 1, 0], {}),
    (Status.STEP, growth, BOX_BOD_X, BOX_BOD_Y, [1, 1], {}),
    (Status.LAST_STEP, exponential, LONG_X, LONG_Y, [2, 1, 0], {"sample_rows": 1_000}),
    (Status.FLOOR, exponential, X, 2.5 * np.exp(-1.3 * X) + 0.5, [2, 1, 0], {}),
    (
        Status.ITERATION_LIMIT,
        exponential,
        X,
        Y,
        [20, 0.1, 5],
        {**NO_SAMPLE, "gauss_newton_max_iterations": 1},
    ),
    (
        Status.SLOW_PROGRESS,
        arrhenius,
        np.tile(MGH10_X, 10),
        np.tile(MGH10_Y, 10),
        [2, 400_000, 25_000],
        NO_SAMPLE,
    ),
    (Status.STUCK, freudenstein_roth, ROWS % 2, np.zeros(N), [0.5, -2.0], NO_SAMPLE),
    (Status.STALLED, lambda x, a: wrong(a) * x, X, 3 * X + NOISE, [1], NO_WARMUP),
    (Status.NO_SENSITIVITY, exponential, X, Y, [1, 1e9, 1], {}),
    (
        Status.ILL_CONDITIONED,
        lambda x, a, b, c: a + b * x + c * x**2,
        SECONDS,
        1e-5 * (SECONDS - SECONDS[0]) + np.random.default_rng(1).standard_normal(len(SECONDS)),
        [1, 1, 1],
        {"gauss_newton_solver": "normal"},
    ),
    (Status.NON_FINITE_START, lambda x, a: a * jnp.log(x - a), X, Y, [1], {}),
    (Status.NON_FINITE_STEP, finite_at_one_only, X, 3 * X, [1], NO_WARMUP),
    (Status.USER_STOP, exponential, X, Y, [2, 1, 0], {"callback_frequency": 1}),
]


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].name.lower())
def test_reason(case: Case) -> None:
    reason, model, x, y, start, options = case
    lazy = [da.from_array(v, chunks=max(len(x) // 10, 4)) for v in (x, y)]
    callback = stopping_callback if reason is Status.USER_STOP else None
    result = fit(model, *lazy, start, callback=callback, **options)
    message = reason.cause
    if reason is Status.NON_FINITE_START:  # names the rows
        message = "Not converged: the model is not finite at the start at 193 of 1,000 rows"
    elif reason is Status.NON_FINITE_STEP:
        message = "Not converged: the model is not finite at any trial point: at the last one, at"
    else:
        remedy = reason.remedy.partition(" (such as fixed")[0]  # with the name of a parameter
        assert remedy in result.message
    assert result.message.startswith(message), result.message
    assert result.status == reason.code
    assert result.success == (reason.code > 0)
    assert result.n_passes <= 30  # none goes on for long without progress


def test_all_reasons_are_here() -> None:
    interruptions = {status for status in Status if status.is_interruption}  # tested with those
    assert {case[0] for case in CASES} | interruptions == set(Status)
    assert len({status.code for status in Status}) == len(Status)


def test_a_start_with_a_cost_but_without_a_derivative() -> None:
    x = np.linspace(0.01, 4.0, 30_000)

    def model(x: Any, a: Any, tau: Any) -> Any:
        return a * jnp.exp(-x / tau)

    result = fit(model, x, np.exp(-x), [1.0, 0.0])
    assert not result.success
    assert "at the start the model is finite, but its derivative is not" in result.message


@pytest.mark.parametrize("start", [[1.0, 1.0], [100.0, 0.75]])
def test_box_bod(start: list[float]) -> None:
    """NIST's BoxBOD of six points, from both of its starts, with its certified values."""
    lazy = [da.from_array(v, chunks=2) for v in (BOX_BOD_X, BOX_BOD_Y)]
    result = fit(growth, *lazy, start)
    assert result.success, result.message
    np.testing.assert_allclose(result.x, [2.1380940889e2, 5.4723748542e-1], rtol=1e-8)
    np.testing.assert_allclose(result.perr, [1.2354515176e1, 1.0455993237e-1], rtol=1e-7)


@pytest.mark.parametrize(
    "start", [pytest.param([2, 400_000, 25_000], marks=pytest.mark.slow), [0.02, 4000, 250]]
)
def test_mgh10(start: list[float]) -> None:
    """NIST's MGH10, whose parameters span eight orders of magnitude."""
    lazy = [da.from_array(v, chunks=5) for v in (MGH10_X, MGH10_Y)]
    result = fit(arrhenius, *lazy, start)
    assert result.success, result.message
    expected = [5.6096364710e-3, 6.1813463463e3, 3.4522363462e2]
    np.testing.assert_allclose(result.x, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("start", [[50, 150, -100, 1, 2], [0.5, 1.5, -1, 0.01, 0.02]])
def test_mgh17(start: list[float]) -> None:
    """NIST's MGH17, two exponentials, from both of its starts."""
    x = 10.0 * np.arange(33)
    values = (
        "844 908 932 936 925 908 881 850 818 784 751 718 685 658 628 603 580 558 538 522 506 490 "
        "478 467 457 448 438 431 424 420 414 411 406"
    )
    y = 1e-3 * np.array(values.split(), float)

    def model(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        return a + b * jnp.exp(-d * x) + c * jnp.exp(-e * x)

    result = fit(model, x, y, start)
    assert result.success, result.message
    expected = [3.7541005211e-1, 1.9358469127, -1.4646871366, 1.2867534640e-2, 2.2122699662e-2]
    np.testing.assert_allclose(result.x, expected, rtol=1e-6)


# --- right values at the floating-point resolution


def pulse(t: Any, height: Any, center: Any, width: Any, offset: Any) -> Any:
    return offset + height * jnp.exp(-0.5 * ((t - center) / width) ** 2)


@pytest.mark.parametrize(
    "origin", [1.7e9, pytest.param(2.46e6, marks=pytest.mark.slow)], ids=["unix", "julian"]
)
def test_a_parameter_whose_spacing_is_close_to_its_error(origin: float) -> None:
    width = 4e4 * np.spacing(origin)
    t = origin + np.linspace(-10, 10, 200) * width
    truth = [3.0, origin + 0.3 * width, width, 0.2]
    noise = 1e-3 * np.random.default_rng(0).normal(size=len(t))
    result = fit(pulse, t, pulse(t, *truth) + noise, [2.0, origin, 1.5 * width, 0.0])
    assert result.success, result.message
    assert np.all(np.abs(result.x - truth) < 4 * result.perr + np.spacing(truth))


def test_a_phase_far_from_zero() -> None:
    x = np.linspace(0, 10, 101)
    phase = 1 + 40 * np.pi

    def wave(x: Any, a: Any, phase: Any, c: Any) -> Any:
        return a * jnp.sin(2 * x + phase) + c

    y = 2.0 * np.sin(2 * x + phase) + 0.1
    result = fit(wave, x, y, [1.5, phase + 0.1, 0.0])
    assert result.success, result.message
    np.testing.assert_allclose(result.x, [2.0, phase, 0.1], rtol=1e-13)


def line(x: Any, a: Any, b: Any) -> Any:
    return a + b * x


def parabola(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a + b * x + c * x**2


@pytest.mark.parametrize("scale", [1e19, 1e-25, 1e60])
def test_an_affine_model_needs_no_start(scale: float) -> None:
    x = np.linspace(0, 1, 50)
    y = scale * (3 + 2 * x + 0.01 * np.random.default_rng(0).normal(size=50))
    result = fit(line, x, y)
    assert result.success, result.message
    np.testing.assert_allclose(result.x, np.polyfit(x, y, 1)[::-1], rtol=1e-10)
    bounds = {"a": (0.0, 2.9 * scale)}
    bounded = fit(line, x, y, bounds=bounds)
    assert bounded.success, bounded.message
    slope = x @ (y - 2.9 * scale) / (x @ x)
    np.testing.assert_allclose(bounded.x, [2.9 * scale, slope], rtol=1e-10)


def test_an_affine_model_far_from_zero() -> None:
    x = np.linspace(0, 1, 50)
    y = 1e19 * (3 + 2 * x - x**2 + 0.01 * np.random.default_rng(0).normal(size=50))
    result = fit(parabola, da.from_array(x, chunks=20), da.from_array(y, chunks=20), [0, 0, 0])
    assert result.success, result.message
    np.testing.assert_allclose(result.x, np.polyfit(x, y, 2)[::-1], rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize(("scale", "start"), [(1e19, [1, 3, 1]), (1.0, [1, 500, 10])])
def test_a_start_without_effect_is_not_led_away(scale: float, start: list[float]) -> None:
    """A peak is not affine in its parameters: its start must be close."""
    x = np.linspace(0, 10, 50)
    y = scale * 3 * np.exp(-0.5 * ((x - 5) / 0.7) ** 2)
    result = fit(lambda x, h, m, w: pulse(x, h, m, w, 0.0), x, y, start)
    assert result.status == Status.NO_SENSITIVITY.code
    assert "p0 may be too small by orders of magnitude" in result.message


def test_zero_data_are_fitted_exactly() -> None:
    result = fit(line, np.linspace(0, 1, 50), np.zeros(50), [1.0, 1.0])
    assert result.success, result.message
    np.testing.assert_allclose(result.x, 0.0, atol=1e-100)


def test_a_start_of_enormous_cost_over_noisy_data() -> None:
    """Nothing is compared with the cost of the start."""
    x = np.linspace(0, 1, 50)
    y = np.random.default_rng(0).normal(size=50)
    result = fit(line, x, y, [1e20, -1e20])
    assert result.success, result.message
    slope, offset = np.polyfit(x, y, 1)
    np.testing.assert_allclose(result.x, [offset, slope], rtol=1e-9)


@pytest.mark.parametrize("power", [0, 1])
def test_a_kink_is_no_matter_of_resolution(power: int) -> None:
    x = np.linspace(0, 1, 50)
    y = np.sin(9 * x) + np.random.default_rng(0).normal(size=50)
    result = fit(lambda x, a, b: b * jnp.abs(x - a) * x**power, x, y, [0.3, 1.0])
    assert result.status == Status.STALLED.code


# --- minima that Gauss-Newton does not resolve


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_a_minimum_of_large_residuals_and_a_singular_jacobian(loss: str) -> None:
    """The second derivatives show that it is one."""
    x = ROWS[:2]
    result = fit(freudenstein_roth, x, np.zeros(2), [0.5, -2.0], loss=loss, f_scale=2.0)
    assert result.success, result.message
    factor = 2.0
    losses = {"linear": lambda z: z, "soft_l1": lambda z: 2 * (jnp.sqrt(1 + z) - 1)}

    def cost(p: Any) -> Any:
        residual = freudenstein_roth(jnp.asarray(x), *p)
        return 0.5 * factor**2 * losses[loss]((residual / factor) ** 2).sum()

    with jax.enable_x64(True):
        at = jnp.asarray(result.x)
        gradient, hessian = np.asarray(jax.grad(cost)(at)), np.asarray(jax.hessian(cost)(at))
    assert np.linalg.eigvalsh(hessian).min() > 0
    step = np.linalg.solve(hessian, gradient)
    assert np.abs(step).max() < 1e-7


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_a_minimum_at_which_two_parameters_are_equal() -> None:
    """Jennrich and Sampson's: both columns of the Jacobian are equal there."""
    x = np.arange(1.0, 11.0)

    def model(x: Any, a: Any, b: Any) -> Any:
        return jnp.exp(a * x) + jnp.exp(b * x)

    result = fit(model, x, 2 + 2 * x, [0.3, 0.4])
    assert result.success, result.message
    np.testing.assert_allclose(result.x, 0.25782521, rtol=1e-7)
    assert result.cost == pytest.approx(0.5 * 124.36218236)
    assert result.diagnostics["confounded"] == [["a", "b"]]


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_a_saddle_is_no_minimum() -> None:
    """Gauss-Newton does not leave it: the derivative by a vanishes at a = 0."""
    x = np.linspace(0.1, 1, 50)
    y = 1.0 + x + 0.01 * np.random.default_rng(0).normal(size=50)
    result = fit(lambda x, a, b: b + (a**2) * x, x, y, [0.0, 1.0])
    assert not result.success or result.x[0] != 0.0


def squares(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a + b**2 * x + c**2 * x * x


T = np.linspace(0.0, 1.0, 101)
HALF_LINE = ([-np.inf, 0.0, 0.0], np.inf)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters", "ignore:The model is")
@pytest.mark.parametrize(
    ("y", "start", "arguments", "named"),
    [
        (T, [0.0, 0.0, 1.0], {"bounds": HALF_LINE}, "'b'"),
        (T + T * T, [0.0, 0.0, 0.0], {"bounds": HALF_LINE}, "'b', 'c'"),
        (T - T * T, [0.0, 0.0, 1.0], {"bounds": HALF_LINE, "fixed": {"a": 0.0}}, "'b'"),
        (T, [0.0, 0.0, 0.0], {"bounds": ([-np.inf, -2.0, -2.0], [np.inf, 0.0, 0.0])}, "'b', 'c'"),
        (T, [0.0, 0.0, 0.0], {"cg_param_threshold": 1}, "'b', 'c'"),
    ],
    ids=["one", "two", "beside a fixed one", "upper", "without matrices"],
)
def test_a_maximum_at_a_bound(
    y: Any, start: list[float], arguments: dict[str, Any], named: str
) -> None:
    """The derivative by b or c vanishes at zero, although the cost decreases beside it."""
    result = fit(squares, T, y, start, **NO_WARMUP, **arguments)
    assert result.status == Status.NO_SENSITIVITY.code
    assert f"The data do not constrain: {named}." in result.message
    assert result.diagnostics["confounded"] == []


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize("y", [-T, 1.0 - T - T * T, 1.0 - T + 3 * T * T])
def test_a_minimum_at_a_bound_without_a_slope(y: Any) -> None:
    """The cost increases with b, by its second derivative only."""
    result = fit(squares, T, y, [0.0, 1.0, 1.0], HALF_LINE, **NO_WARMUP)
    assert result.success, result.message
    # In place of squares, the model is linear, and its minimum with bounds is unique.
    matrix = np.column_stack([np.ones_like(T), T, T * T])
    expected = optimize.lsq_linear(matrix, y, HALF_LINE, method="bvls").x
    np.testing.assert_allclose(result.x**2 * [0, 1, 1], expected * [0, 1, 1], atol=1e-6)


def test_a_bound_that_the_gradient_holds() -> None:
    result = fit(lambda x, a, b: a + b * x, T, 1.0 - T, [0.0, 1.0], ([-np.inf, 0.0], np.inf))
    assert result.success, result.message
    assert result.x[1] == 0.0
    assert "The cost would decrease beyond the bound of 'b'." in result.message


def test_a_phase_is_not_affine_although_its_normal_matrix_is_constant() -> None:
    x = 2 * np.pi * np.arange(64) / 64
    result = fit(lambda x, phase: 1e7 * jnp.sin(x + phase), x, 1e7 * np.sin(x + 2.5), [1.0])
    assert abs(np.sin(result.x[0] - 2.5)) < 1e-6


def test_an_inflection_is_not_a_minimum() -> None:
    def residuals(p: np.ndarray) -> NormalEquations:
        """u + d^3 x - x, whose cost falls through d = 0 down to the minimum at d = 1."""
        x = np.linspace(0.5, 1.5, 50)
        jacobian = np.stack([np.ones_like(x), 3 * p[1] ** 2 * x], axis=1)
        residual = p[0] + p[1] ** 3 * x - x
        return NormalEquations(
            jtj=jacobian.T @ jacobian,
            jtr=jacobian.T @ residual,
            cost=0.5 * residual @ residual,
            chi2=residual @ residual,
            n_used=len(x),
        )

    settings = Settings(
        low=np.full(2, -np.inf),
        high=np.full(2, np.inf),
        tol=1e-8,
        max_iterations=100,
        patience=15,
        sizes=np.array([0.5, 0.3]),
        regularization=0.0,
        initial_radius=1.0,
        epsilon=2.0**-52,
        recovers=False,
    )
    for d in (-0.3, -0.1, -0.01, -0.001):
        assert find_minimum(residuals, np.array([0.5, d]), settings) is None


def test_a_fit_that_is_cut_in_its_first_pass_has_the_solution_of_the_sample() -> None:
    """Also where no iteration of the sample led to it, because a start is the solution."""
    x = da.linspace(0.0, 4.0, LONG, chunks=LONG // 20)
    reads: list[int] = []

    def read(block: Any) -> Any:
        reads.append(len(block))
        if knows_sample:
            knows_sample.clear()  # a second signal might come after the fit
            os.kill(os.getpid(), signal.SIGTERM)
        return np.asarray(2 * np.exp(-0.7 * block))

    def watch(event: Event) -> None:
        if isinstance(event, SampleSolved):
            knows_sample.append(True)

    knows_sample: list[bool] = []
    config = HybridStreamingConfig(verbose=0, stop_on_sigterm=True)
    y = x.map_blocks(read, dtype=float, meta=np.empty(0))
    optimizer = AdaptiveHybridStreamingOptimizer(config, observers=[watch])
    result = optimizer.fit(lambda x, a, b: a * jnp.exp(-b * x), x, y, [1.0, 1.0])
    assert result.status == Status.TERMINATED.code
    assert len(reads) < 40
    np.testing.assert_allclose(result.popt, [2.0, 0.7], rtol=1e-9)
