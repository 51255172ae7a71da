"""The examples of the public contract, in its own spelling; and the shapes of its calls."""

from __future__ import annotations

import functools
import inspect
import signal
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nlsq_dask import (
    AdaptiveHybridStreamingOptimizer,
    HybridStreamingConfig,
    NormalizedModelWrapper,
    ParameterNormalizer,
    curve_fit,
    get_defense_telemetry,
    reset_defense_telemetry,
)
from tests.problems import NO_WARMUP, decay_data, exponential, line

rng = np.random.default_rng(0)
x, y = decay_data()
lower, upper = [0.0, 0.0, 0.0], [10.0, 5.0, 5.0]


def test_bounds_normalization() -> None:
    config = HybridStreamingConfig(normalize=True, normalization_strategy="bounds")
    optimizer = AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(
        model=exponential, x_data=x, y_data=y, p0=[2.0, 0.5, 0.3], bounds=(lower, upper)
    )
    assert result.success
    assert optimizer.current_phase == 3
    first = optimizer.phase_history[0]
    assert first["phase"] == 0
    assert {"start_time", "duration"} <= set(first)


def test_criteria() -> None:
    config = HybridStreamingConfig(
        warmup_iterations=300,
        max_warmup_iterations=800,
        loss_plateau_threshold=1e-5,
        gradient_norm_threshold=1e-4,
        active_switching_criteria=["plateau", "gradient"],
    )
    assert AdaptiveHybridStreamingOptimizer(config).fit(exponential, x, y, [2.0, 0.5, 0.3]).success


def test_fault_tolerance(tmp_path: Any) -> None:
    config = HybridStreamingConfig(
        enable_checkpoints=True,
        checkpoint_frequency=50,
        checkpoint_dir=tmp_path,
        validate_numerics=True,
        enable_fault_tolerance=True,
        max_retries_per_batch=3,
    )
    result = AdaptiveHybridStreamingOptimizer(config).fit(exponential, x, y, [2.0, 0.5, 0.3])
    for path in (tmp_path, next(tmp_path.iterdir())):  # a folder, and a file
        config = HybridStreamingConfig(resume_from_checkpoint=path)
        resumed = AdaptiveHybridStreamingOptimizer(config).fit(exponential, x, y, [2.0, 0.5, 0.3])
        np.testing.assert_array_equal(resumed.popt, result.popt)


def test_telemetry() -> None:
    reset_defense_telemetry()
    optimizer = AdaptiveHybridStreamingOptimizer()
    for start in ([2.0, 0.5, 0.3], [4.0, 2.0, 1.0]):
        optimizer.fit(exponential, x, y, start, verbose=0)
    telemetry = get_defense_telemetry()
    assert telemetry.get_summary()["total_warmup_calls"] == 2
    assert telemetry.get_trigger_rates()["layer1_warm_start_rate"] == 0.0
    assert telemetry.export_metrics()["nlsq_defense_warmup_calls_total"] == 2


def test_normalizer() -> None:
    normalizer = ParameterNormalizer([2.0, 0.0, -4.0])
    assert normalizer.strategy == "p0"
    np.testing.assert_array_equal(normalizer.scales, [2, 1, 4])
    np.testing.assert_array_equal(normalizer.normalize([2.0, 3.0, -4.0]), [1, 3, -1])
    np.testing.assert_array_equal(normalizer.denormalize([1, 3, -1]), [2, 3, -4])
    np.testing.assert_array_equal(normalizer.normalization_jacobian, np.diag([2, 1, 4]))
    bounded = ParameterNormalizer([1.0, 1.0], bounds=([0, -1], [4, 3]), strategy="auto")
    assert bounded.strategy == "bounds"
    np.testing.assert_array_equal(bounded.offsets, [0, -1])
    np.testing.assert_array_equal(bounded.transform_bounds(), [[0, 0], [1, 1]])
    half_open = ParameterNormalizer([2.0], bounds=([0], [np.inf]))
    assert half_open.strategy == "p0"
    with pytest.raises(ValueError, match="finite"):
        ParameterNormalizer([2.0], bounds=([0], [np.inf]), strategy="bounds")
    with pytest.raises(ValueError, match="'auto', 'bounds'"):
        ParameterNormalizer([2.0], strategy="log")
    wrapped = NormalizedModelWrapper(line, bounded)
    assert wrapped(2.0, 0.5, 0.5) == 2.0 * 2.0 + 1.0
    with pytest.raises(TypeError, match="expected 2"):
        wrapped(2.0, 0.5)


def test_signatures() -> None:
    fit = inspect.signature(AdaptiveHybridStreamingOptimizer.fit)
    assert list(fit.parameters)[1:] == [
        "model",
        "x_data",
        "y_data",
        "p0",
        "bounds",
        "sigma",
        "absolute_sigma",
        "loss",
        "f_scale",
        "nan_policy",
        "fixed",
        "ties",
        "param_names",
        "callback",
        "verbose",
    ]
    scipy_like = list(inspect.signature(curve_fit).parameters)
    assert scipy_like == [
        "f",
        "xdata",
        "ydata",
        "p0",
        "sigma",
        "absolute_sigma",
        "check_finite",
        "bounds",
        "method",
        "jac",
        "full_output",
        "nan_policy",
        "config",
        "kwargs",
    ]


# --- curve_fit as SciPy's


def test_curve_fit() -> None:
    from scipy import optimize

    popt, pcov = curve_fit(exponential, x, y)
    expected, covariance = optimize.curve_fit(
        lambda x, a, b, c: a * np.exp(-b * x) + c, x, y, xtol=1e-14, ftol=1e-14
    )
    np.testing.assert_allclose(popt, expected, rtol=1e-6)
    np.testing.assert_allclose(pcov, covariance, rtol=1e-4)
    popt, _, info, message, ier = curve_fit(
        exponential, x, y, [1, 1, 1], np.full(len(x), 0.1), True, None, (0, 9), full_output=True
    )
    assert info["result"].success
    assert info["nfev"] >= 1
    assert "Converged" in message
    assert ier in (1, 2, 3, 4)


@pytest.mark.parametrize("form", ["array", "tuple", "list"])
def test_curve_fit_with_scipys_layout_of_several_variables(form: str) -> None:
    import dask.array as da

    u = rng.uniform(0, 1, (2, 3_000))
    z = 2 * u[0] + 3 * u[1] + 1

    def plane(x: Any, a: Any, b: Any, c: Any) -> Any:
        first, second = x
        return a * first + b * second + c * jnp.ones(x.shape[1])

    xdata = {"array": u, "tuple": (u[0], u[1]), "list": [u[0], u[1]]}[form]
    config = HybridStreamingConfig(**NO_WARMUP)
    popt, _ = curve_fit(plane, xdata, z, config=config)
    np.testing.assert_allclose(popt, [2, 3, 1], rtol=1e-9)
    if form == "array":
        lazy = da.from_array(u, chunks=(1, 700)), da.from_array(z, chunks=900)
        popt, _ = curve_fit(plane, *lazy, config=config)
        np.testing.assert_allclose(popt, [2, 3, 1], rtol=1e-9)


def test_curve_fit_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    curve_fit(exponential, x, y)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("sentence", "options", "callback"),
    [
        ("Stopped by the callback", {"callback_frequency": 1}, True),
        ("Stopped: `max_walltime`", {"max_walltime": 1e-6}, False),
        ("Stopped by SIGTERM", {"callback_frequency": 1, "stop_on_sigterm": True}, True),
    ],
)
def test_curve_fit_returns_what_there_is_when_it_has_to_end(
    sentence: str, options: dict[str, Any], callback: bool
) -> None:
    def end(params: Any, loss: float, iteration: int) -> None:
        if "SIGTERM" not in sentence:
            raise StopIteration
        signal.raise_signal(signal.SIGTERM)

    popt, pcov, info, message, ier = curve_fit(
        exponential,
        x,
        y,
        [2.0, 0.5, 0.3],
        config=HybridStreamingConfig(verbose=0, **options),
        callback=end if callback else None,
        full_output=True,
    )
    assert message.startswith(sentence)
    assert ier == info["result"].status < 0
    assert np.isfinite(popt).all()
    assert pcov.shape == (3, 3)


def test_curve_fit_keeps_names_and_defaults_of_stacked_models() -> None:
    class Plane:
        def __call__(self, x: Any, slope: Any, other: Any = 2.5) -> Any:
            return slope * x[0] + other * x[1]

    u = rng.uniform(0, 1, (2, 3_000))
    bound = functools.partial(lambda offset, x, a, b: a * x[0] + b * x[1] + offset, 1.0)
    for model, names in ((Plane(), ("slope", "other")), (bound, ("a", "b"))):
        config = HybridStreamingConfig(**NO_WARMUP)
        found = curve_fit(model, u, 2 * u[0] + 3 * u[1], full_output=True, config=config)
        assert found[2]["result"].param_names == names
    with pytest.raises(TypeError, match="model must be a callable"):
        curve_fit(3, u, u[0])  # type: ignore[arg-type]


def test_a_call_with_wrong_arguments_names_itself() -> None:
    optimizer = AdaptiveHybridStreamingOptimizer()
    for call, name in ((optimizer.fit, "fit"), (optimizer.plan, "plan")):
        with pytest.raises(TypeError, match=rf"^{name}\(\): missing a required argument: 'x_data'"):
            call(lambda x, a: a * x)
        with pytest.raises(TypeError, match=rf"^{name}\(\): too many positional arguments"):
            call(lambda x, a: a * x, 1, 2, 3, 4, 5)
