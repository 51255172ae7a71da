"""``FitResult.derive``: functions of the parameters with errors by the delta method.

Those of fixed and tied parameters, and with an infinite covariance: ``test_fixed.py``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from tests import problems
from tests.problems import NO_WARMUP, decay_data, exponential

X, Y = decay_data(4_000)
fit = functools.partial(problems.fit, exponential, x=X, y=Y, p0=[1.0, 1.0, 0.0], **NO_WARMUP)


@pytest.fixture(scope="module")
def result() -> nd.FitResult:
    return fit()


def test_a_number(result: nd.FitResult) -> None:
    rate, error = result.popt[1], result.perr[1]
    value, std = result.derive(lambda p: jnp.log(2) / p["b"])
    assert value == pytest.approx(np.log(2) / rate, rel=1e-14)
    assert std == pytest.approx(np.log(2) / rate**2 * error, rel=1e-12)
    assert np.ndim(value) == np.ndim(std) == 0
    assert result.derive(lambda p: p["b"]) == (rate, pytest.approx(error, rel=1e-15))
    assert result.derive(lambda p: 3) == (3.0, 0.0)


def test_arrays_dicts_and_covariances(result: nd.FitResult, tmp_path: Path) -> None:
    at = np.array([[0.0, 0.5, 1.0]])
    curve = functools.partial(lambda p: exponential(at, **p))
    values, stds = result.derive(curve)
    expected = result.predict(at.ravel(), return_std=True)
    np.testing.assert_allclose([values.ravel(), stds.ravel()], expected, rtol=1e-12)
    assert values.shape == stds.shape == (1, 3)

    def several(p: Any) -> dict[str, Any]:
        return {"z": p["b"] * p["a"], "a": [p["a"], 2 * p["c"]]}

    by_name, errors = result.derive(several)
    assert list(by_name) == list(errors) == ["z", "a"]
    jacobian = np.array([[*result.popt[1::-1], 0], [1, 0, 0], [0, 0, 2]])
    assert result.pcov is not None
    matrix = jacobian @ result.pcov @ jacobian.T
    np.testing.assert_allclose(result.derive(several, covariance=True)[1], matrix, rtol=1e-12)
    np.testing.assert_allclose([errors["z"], *errors["a"]], np.sqrt(np.diag(matrix)), rtol=1e-12)
    result.save(tmp_path / "result")
    loaded = nd.FitResult.load(tmp_path / "result")  # without its model
    np.testing.assert_array_equal(loaded.derive(curve), result.derive(curve))


def test_what_is_refused(result: nd.FitResult) -> None:
    for function, said in (
        (lambda p: p["rate"], "uses 'rate', which is not a parameter. It can use a, b, c."),
        (lambda p: np.exp(p["a"]), "Write it with jax.numpy instead of numpy or math"),
        (lambda p: p.a, "raised AttributeError"),
        (lambda p: p["a"] > 0, "must return real numbers; it returned dtype bool"),
        (lambda p: {}, "returned an empty dict"),
        (3.0, "derive needs a function of the parameters"),
    ):
        with pytest.raises(ValueError, match="derive") as caught:
            result.derive(function)
        assert said in str(caught.value)
    many = fit(cg_param_threshold=2)
    with pytest.raises(ValueError, match="derive requires a covariance"):
        many.derive(lambda p: p["a"])


def test_digits_of_strongly_correlated_parameters() -> None:
    """The matrix pcov has lost them; its square root has not."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1.5, 2_000)
    y = x + x * (1 + 1e-9 * x) + 0.1 * rng.normal(size=len(x))
    result = problems.fit(
        lambda x, a, b: a * x + b * x * (1 + 1e-9 * x), x, y, [1.0, 1.0], **NO_WARMUP
    )
    _, expected = result.predict(np.array([1.0]), return_std=True)
    _, error = result.derive(lambda p: p["a"] + p["b"] * (1 + 1e-9))
    assert error == pytest.approx(expected[0], rel=1e-3)


def test_a_derivative_by_a_fixed_parameter_has_no_effect() -> None:
    result = fit(y=Y - 0.5, fixed=["c"])
    values, matrix = result.derive(
        lambda p: {"root": jnp.sqrt(p["c"]), "a": p["a"]}, covariance=True
    )
    assert values["root"] == 0.0
    np.testing.assert_array_equal(matrix[0], [0.0, 0.0])
    assert np.sqrt(matrix[1, 1]) == pytest.approx(result.perr[0], rel=1e-12)
