"""Parameters that the data cannot tell apart are named, and others are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask.status import Status
from tests.problems import NO_WARMUP, decay_data, fit

X, Y = decay_data()
Y = Y - 0.5  # without the offset

NO_COVARIANCE = "ignore:Covariance of the parameters"


@pytest.mark.filterwarnings(NO_COVARIANCE)
@pytest.mark.parametrize(
    ("model", "groups"),
    [
        (lambda x, a, b, k: a * b * jnp.exp(-k * x), [["a", "b"]]),
        pytest.param(
            lambda x, a, k, x0: a * jnp.exp(-k * (x - x0)), [["a", "x0"]], marks=pytest.mark.slow
        ),
        pytest.param(
            lambda x, a, b, c, k: a * b / c * jnp.exp(-k * x),
            [["a", "b", "c"]],
            marks=pytest.mark.slow,
        ),
        (lambda x, a, b, c, d: (a + b) * jnp.exp(-c * d * x), [["a", "b"], ["c", "d"]]),
    ],
    ids=["product", "origin", "quotient", "two groups"],
)
def test_parameters_that_enter_in_combination(
    model: Callable[..., Any], groups: list[list[str]]
) -> None:
    result = fit(model, X, Y, **NO_WARMUP)
    assert result.diagnostics["confounded"] == groups
    assert result.diagnostics["undetermined"] == sorted(name for group in groups for name in group)
    for group in groups:
        listed = ", ".join(map(repr, group))
        assert f"The data cannot tell {listed} apart" in result.message
        assert f"The data cannot tell {listed} apart" in result.fit_report()
    assert np.isinf(result.pcov).all()


def binding(x: Any, top1: Any, top2: Any, kd: Any) -> Any:
    """Two data sets of one binding curve, with a common constant."""
    ligand, number = x
    return jnp.where(number < 0.5, top1, top2) * ligand / (kd + ligand)


def binding_data(low: float, high: float) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    ligand = np.tile(np.logspace(low, high, 20), 2)
    number = np.repeat([0.0, 1.0], 20)
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=40)
    return (ligand, number), np.where(number < 0.5, 2.0, 3.0) * ligand / (1.5 + ligand) * noise


def test_binding_curves_far_below_saturation(tmp_path: Path) -> None:
    """Only the ratios of the levels to the constant are known; no singular value is zero."""
    result = fit(binding, *binding_data(-5, -3), [1, 1, 1], **NO_WARMUP)
    assert result.diagnostics["confounded"] == [["top1", "top2", "kd"]]
    assert (result.perr > 10 * np.abs(result.x)).all()
    sentence = "The data cannot tell 'top1', 'top2', 'kd' apart"
    assert sentence in result.message
    result.save(tmp_path / "result.nlsq")
    assert sentence in nd.FitResult.load(tmp_path / "result.nlsq").fit_report()


def test_binding_curves_that_saturate() -> None:
    result = fit(binding, *binding_data(-2, 2), [1, 1, 1], **NO_WARMUP)
    assert result.success
    assert result.diagnostics["confounded"] == []
    assert "apart" not in result.message


def test_one_of_two_curves_is_far_below_saturation() -> None:
    (ligand, number), y = binding_data(-2, 2)
    ligand = np.where(number < 0.5, ligand, 1e-5 * ligand)
    y = np.where(number < 0.5, y, 2.0 * ligand)

    def separate(x: Any, top1: Any, kd1: Any, top2: Any, kd2: Any) -> Any:
        is_first = x[1] < 0.5
        return jnp.where(is_first, top1, top2) * x[0] / (jnp.where(is_first, kd1, kd2) + x[0])

    result = fit(separate, (ligand, number), y, [1, 1, 1, 1], **NO_WARMUP)
    assert result.diagnostics["confounded"] == [["top2", "kd2"]]
    assert result.diagnostics["undetermined"] == []
    np.testing.assert_allclose(result.x[:2], [2.0, 1.5], rtol=0.05)


@pytest.mark.filterwarnings(NO_COVARIANCE)
def test_a_parameter_without_effect_is_confused_with_none() -> None:
    result = fit(lambda x, a, b, k: a * jnp.exp(-k * x) + 0 * b, X, Y, **NO_WARMUP)
    assert result.diagnostics["undetermined"] == ["b"]
    assert result.diagnostics["confounded"] == []


def test_correlated_parameters_that_are_known_well() -> None:
    """Correlations of 0.999999 are no matter if the errors are small, or if a value is near 0."""
    t = np.linspace(1000, 1010, 200)
    for offset in (5.0, 0.0):
        y = offset + 2.0 * (t - 1000) + 0.01 * np.random.default_rng(0).normal(size=200)
        result = fit(lambda x, a, b: a + b * x, t, y, [1, 1], **NO_WARMUP)
        assert result.success
        assert result.diagnostics["confounded"] == []
        correlation = -t.mean() / np.sqrt((t**2).mean())
        assert f"Strongly correlated: 'a' and 'b' ({correlation:.7f})" in result.message


def test_a_polynomial_has_no_strongly_correlated_parameters() -> None:
    t = np.linspace(1, 2, 50)
    y = 1 + t + 0.01 * np.random.default_rng(0).normal(size=50)
    result = fit(
        lambda x, a, b, c, d: a + b * x + c * x**2 + d * x**3, t, y, np.ones(4), **NO_WARMUP
    )
    assert result.success
    assert "correlated" not in result.message


@pytest.mark.filterwarnings(NO_COVARIANCE)
def test_a_parameter_that_has_lost_its_effect_is_named() -> None:
    """The decay ends before the second point, so that its rate is any large number."""
    t = np.linspace(0, 1, 100)
    y = 1 + (t == 0) + 0.01 * np.random.default_rng(0).normal(size=100)
    result = fit(lambda x, a, b, k: a + b * jnp.exp(-k * x), t, y, [1, 1, 500], **NO_WARMUP)
    assert not result.success
    assert result.diagnostics["undetermined"] == ["k"]
    assert "The data do not constrain: 'k'. Start them closer" in result.message


def test_a_parameter_with_an_error_far_above_its_size_is_named() -> None:
    t = np.linspace(-1, 1, 101)
    y = 1 + 0.01 * np.cos(5 * t)  # even, so that the slope is 0
    result = fit(lambda x, a, b: a + 1e-9 * b * x, t, y, [1, 1], **NO_WARMUP)
    assert result.success
    assert result.perr[1] == pytest.approx(np.sqrt(np.polyfit(t, y, 1, cov=True)[1][0, 0]) * 1e9)
    assert "The standard error of 'b' is more than 1,000 times its value" in result.message


@pytest.mark.filterwarnings(NO_COVARIANCE)
def test_the_cause_comes_before_the_remedies() -> None:
    one_step = {"gauss_newton_max_iterations": 1, "sample_rows": 1, **NO_WARMUP}
    result = fit(lambda x, a, b, k: a * b * jnp.exp(-k * x), X, Y, [1, 1, 5], **one_step)
    assert result.status == Status.ITERATION_LIMIT.code
    parts = (Status.ITERATION_LIMIT.cause, "The data cannot tell", Status.ITERATION_LIMIT.remedy)
    positions = [result.message.index(part) for part in parts]
    assert positions == sorted(positions)


def test_without_matrices() -> None:
    def model(x: Any, a: Any, b: Any, k: Any) -> Any:
        return (a + b) * jnp.exp(-k * x)

    with pytest.warns(match="do not constrain 'a', 'b'"):
        result = fit(model, X, Y, [1, 1, 1], cg_param_threshold=1, **NO_WARMUP)
    assert result.diagnostics["confounded"] == [["a", "b"]]
    assert "The data cannot tell 'a', 'b' apart" in result.message
