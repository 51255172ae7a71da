"""Models that are not finite at some rows, or have no finite derivative, or no derivative."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax import lax
from jax.scipy.special import betainc

import nlsq_dask as nd
from nlsq_dask.errors import ModelError
from tests.problems import NO_WARMUP

RNG = np.random.default_rng(0)
X = np.r_[0.0, np.linspace(0.1, 5, 60)]
NOISE = RNG.normal(0, 0.01, len(X))
undefined = pytest.mark.filterwarnings("ignore:Covariance of the parameters")


def sinc(x: Any, a: Any, b: Any) -> Any:
    return jnp.where(x > 0, a * jnp.sin(b * x) / x, a * b)


def sinc_of_numpy(x: Any, a: Any, b: Any) -> Any:
    safe = np.where(x > 0, x, 1.0)
    return np.where(x > 0, a * np.sin(b * safe) / safe, a * b)


def uptake(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any, k: Any) -> Any:
    rise = jnp.where(x > 0, a * (1 - jnp.exp(-b * x)) / x, a * b)
    return rise + c * x + d * x**2 + e + k * x**3


def onset(x: Any, a: Any, b: Any, t: Any) -> Any:
    """Power law after an onset, with a cosine, by which reverse mode is preferred."""
    return jnp.where(x > t, a * (x - t) ** b, 0.0) + 0.1 * jnp.cos(t)


def fit(model: Any, x: Any, y: Any, p0: Any, config: Any = None, **options: Any) -> nd.FitResult:
    config = config or nd.HybridStreamingConfig(verbose=0, **NO_WARMUP)
    return nd.AdaptiveHybridStreamingOptimizer(config).fit(model, x, y, p0, verbose=0, **options)


def test_a_guarded_quotient_is_fitted_as_scipy_does() -> None:
    y = sinc_of_numpy(X, 2, 1.3) + NOISE
    expected, covariance = scipy.optimize.curve_fit(sinc_of_numpy, X, y, [1.0, 1.0])
    result = fit(sinc, X, y, [1.0, 1.0], nd.HybridStreamingConfig(verbose=0))  # with warm-up
    assert result.success
    np.testing.assert_allclose(result.popt, expected, rtol=1e-6)
    np.testing.assert_allclose(result.pcov, covariance, rtol=1e-4)


def test_the_mode_stays_with_the_result(tmp_path: Path) -> None:
    y = sinc_of_numpy(X, 2, 1.3) + NOISE
    result = fit(sinc, X, y, [1.0, 1.0])
    _, errors = result.predict(X[:3], return_std=True)
    assert np.isfinite(errors).all()
    result.save(tmp_path / "result.nlsq")
    loaded = nd.FitResult.load(tmp_path / "result.nlsq", model=sinc)
    np.testing.assert_array_equal(loaded.predict(X[:3], return_std=True)[1], errors)


@pytest.mark.parametrize(
    ("model", "truth", "start"),
    [
        (uptake, [2.0, 1.3, 0.1, 0.1, 0.0, 0.0], np.ones(6)),
        pytest.param(onset, [1.0, 1.5, 0.7], [0.8, 1.2, 0.6], marks=pytest.mark.slow),
        (onset, [1.0, 1.5, 0.7], [0.8, 1.2, -0.5]),  # the guard acts at later trials only
    ],
)
def test_other_guarded_models(model: Any, truth: Any, start: Any) -> None:
    with jax.enable_x64(True):
        safe = jnp.where(X > 0, X, 1e-9)
        y = np.asarray(model(safe, *truth)) + 0.1 * NOISE
    result = fit(model, X, y, start)
    assert result.success
    assert result.reduced_chi2 < 1e-5


@pytest.mark.parametrize("loss", [pytest.param("linear", marks=pytest.mark.slow), "soft_l1"])
def test_a_guarded_row_outside_of_the_sample(loss: str) -> None:
    x = np.linspace(0.1, 5, 40_000)
    x[12_345] = 0.0
    y = sinc_of_numpy(x, 2, 1.3) + 0.01 * np.cos(np.arange(len(x)))
    config = nd.HybridStreamingConfig(verbose=0, sample_rows=500, **NO_WARMUP)
    result = fit(sinc, da.from_array(x, chunks=5000), y, [1.0, 1.0], config, loss=loss)
    assert result.success
    np.testing.assert_allclose(result.popt, [2, 1.3], rtol=1e-3)
    assert np.isfinite(result.pcov).all()


@undefined
def test_no_mode_gives_a_finite_derivative() -> None:
    result = fit(lambda x, a, b: a * jnp.sqrt(b * x), X, 2 * np.sqrt(X), [1.0, 1.0])
    assert not result.success
    assert "derivative is not finite at 1 of 61 rows" in result.message
    assert "the first is y_data[0], with x=0. If jnp.where selects" in result.message
    assert "p0" not in result.message


@undefined
def test_a_derivative_that_is_infinite_at_this_start_only() -> None:
    result = fit(lambda x, a, b: a * jnp.sqrt(x - b), X, X, [1.0, 0.0], bounds=([0, -5], [9, 0]))
    assert "derivative is not finite at 1 of 61 rows" in result.message
    assert "Otherwise, choose another p0" in result.message


@undefined
@pytest.mark.parametrize(
    ("model", "x", "count", "first"),
    [
        (lambda x, a, b: a + b * jnp.log(x), X, "1 of 61 rows", "y_data[0], with x=0."),
        (
            lambda x, a, b: a * x**b,
            np.linspace(-1, 5, 61),
            "10 of 61 rows",
            "y_data[0], with x=-1.",
        ),
        (
            lambda x, a, b: a * jnp.arccos(x["u"]) + b * x["t"],
            {"t": X, "u": X / 4.9},
            "2 of 61 rows",
            "y_data[59], with t=4.91695, u=1.00346.",
        ),
        (
            lambda x, a, b: a / x[:, 1] + b * x[:, 0],
            np.c_[X, X - X[7]],
            "1 of 61 rows",
            f"y_data[7], with x=[{X[7]:.6g}, 0].",
        ),
    ],
)
def test_rows_at_which_no_p0_helps(model: Any, x: Any, count: str, first: str) -> None:
    result = fit(model, x, 1 + X, [1.0, 1.2])
    assert result.status == -2
    assert f"the model is not finite at the start at {count}; the first is {first}" in (
        result.message
    )
    assert "Choose another p0" not in result.message
    assert "nan_policy='omit'" in result.message


@undefined
def test_rows_at_which_another_p0_helps() -> None:
    result = fit(lambda x, a, b: a * jnp.exp(b * x), X, X, [1.0, 1e3])
    assert "not finite at the start at 52 of 61 rows" in result.message
    assert "Choose another p0" in result.message


@undefined
def test_an_undefined_row_of_many_blocks_and_dimensions() -> None:
    t = np.linspace(-3, 5, 801)[:, None] ** 2  # 0 at row 300
    y = da.ones((801, 8), chunks=(100, 4))
    y = da.where(da.arange(8)[None] == 0, np.nan, y).rechunk((100, 4))
    config = nd.HybridStreamingConfig(verbose=0, sample_rows=64, **NO_WARMUP)
    result = fit(lambda x, a, b: a + b * jnp.log(x), t, y, [1.0, 1.0], config, nan_policy="omit")
    assert "at 7 of 5,607 rows; the first is y_data[300, 1], with x=0." in result.message


MATRIX_FREE = nd.HybridStreamingConfig(verbose=0, cg_param_threshold=1, **NO_WARMUP)


@pytest.mark.parametrize(
    ("model", "x", "first"),
    [
        (
            lambda x, a, b: a * jnp.sqrt(b * x),
            X,
            "1 of 31 rows of block (0,); the first is y_data[0",
        ),
        (sinc, X, "1 of 31 rows of block (0,); the first is y_data[0], with x=0."),
        (sinc, X[::-1], "1 of 30 rows of block (1,); the first is y_data[60], with x=0."),
    ],
    ids=["root", "guard", "second block"],
)
def test_no_finite_derivative_without_matrices(model: Any, x: Any, first: str) -> None:
    """Conjugate gradients use reverse mode only."""
    lazy = [da.from_array(v, chunks=31) for v in (x, x)]
    result = fit(model, *lazy, [1.0, 1.0], MATRIX_FREE)
    assert result.status == -2
    assert f"the model is finite, but its derivative is not finite at {first}" in result.message
    assert "If jnp.where selects another expression" in result.message


@jax.custom_jvp
def smooth_at_one(a: Any, x: Any) -> Any:
    return a * x


@smooth_at_one.defjvp
def _(primals: Any, tangents: Any) -> Any:
    a, x = primals
    slope = jnp.where((a != 1.0) & (x > 4.5), jnp.nan, x)
    return a * x, slope * tangents[0] + a * tangents[1]


AT_TRIALS: list[tuple[Any, str]] = [
    (
        lambda x, a: smooth_at_one(a, x),
        "the derivative of the model is not finite at 7 of 30 rows of block (1,); the first is "
        "y_data[54], with x=4.50169.",
    ),
    (
        lambda x, a: a * x + jnp.log(1 - 1e40 * (a - 1) ** 2 * (x > 2)),
        "the model is not finite at any trial point: at the last one, at 37 of 61 rows; the first "
        "is y_data[24], with x=2.01017. Set bounds",
    ),
]


@undefined
@pytest.mark.parametrize(
    ("model", "sentence", "config"),
    [
        pytest.param(*AT_TRIALS[0], None, id="derivative"),
        pytest.param(*AT_TRIALS[0], MATRIX_FREE, id="derivative without matrices"),
        pytest.param(*AT_TRIALS[1], None, id="model"),
        pytest.param(
            *AT_TRIALS[1], MATRIX_FREE, id="model without matrices", marks=pytest.mark.slow
        ),
    ],
)
def test_the_rows_that_forbid_all_trials_are_named(
    model: Any, sentence: str, config: nd.HybridStreamingConfig | None
) -> None:
    lazy = [da.from_array(v, chunks=31) for v in (X, 3 * X)]
    result = fit(model, *lazy, [1.0], config)
    assert result.status == -3
    assert sentence in result.message


# --- models without derivative


def by_callback(x: Any, a: Any, b: Any) -> Any:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return a + jax.pure_callback(lambda v: np.exp(v), shape, -b * x)


@jax.custom_jvp
def exponential_by_callback(x: Any) -> Any:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda v: np.exp(v), shape, x)


exponential_by_callback.defjvps(lambda t, y, x: t * y)


@jax.custom_vjp
def only_reverse(x: Any) -> Any:
    return jnp.exp(x)


only_reverse.defvjp(lambda x: (jnp.exp(x), jnp.exp(x)), lambda y, g: (g * y,))


def loop(x: Any, a: Any, b: Any) -> Any:
    """Neither mode: a custom_vjp inside a while_loop."""
    step = lambda s: (s[0] + 1, only_reverse(-b * s[1]))  # noqa: E731
    return a + lax.while_loop(lambda s: s[0] < 2, step, (0, x))[1]


WITHOUT_DERIVATIVE: list[tuple[Any, str]] = [
    (lambda x, a, s: s * betainc(a, 2.0, x), "'<lambda>' with respect to 'a'. JAX reports: Beta"),
    (
        lambda x, s, a, b: s * betainc(a, b, x),
        "'<lambda>' with respect to 'a', 'b'. JAX reports: Beta",
    ),
    (by_callback, "'by_callback' with respect to 'b'. It calls a Python function by a callback"),
    (loop, "'loop' with respect to 'b'. JAX reports: "),
]


@pytest.mark.parametrize(("model", "sentence"), WITHOUT_DERIVATIVE)
def test_models_that_jax_cannot_differentiate(model: Any, sentence: str) -> None:
    x = np.linspace(0, 1, 50)
    p0 = np.full(model.__code__.co_argcount - 1, 1.5)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
    messages = []
    for call in (optimizer.fit, optimizer.plan):
        with pytest.raises(ModelError) as caught:
            call(model, x, x, p0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"JAX cannot differentiate the model {sentence}")


def test_a_callback_with_a_derivative_cannot_be_sent() -> None:
    with pytest.raises(ModelError, match="cannot be sent to workers"):
        fit(lambda x, a, b: a * exponential_by_callback(-b * x), X, X, [1.0, 1.0])


# --- options of JAX

OPTIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "jax_debug_nans": lambda: jax.debug_nans(True),
    "jax_debug_infs": lambda: jax.debug_infs(True),
    "jax_disable_jit": lambda: jax.disable_jit(),
    "jax_transfer_guard": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_jax_that_fits_do_not_support(option: str) -> None:
    y = sinc_of_numpy(X, 2, 1.3) + NOISE
    config = nd.HybridStreamingConfig(verbose=0)
    with OPTIONS[option](), pytest.raises(RuntimeError, match=rf"^The option {option} of JAX is"):
        fit(sinc, X, y, [1.0, 1.0], config)
    assert fit(sinc, X, y, [1.0, 1.0], config).success
