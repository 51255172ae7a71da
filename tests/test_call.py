"""Options in the signature of a model: they keep their defaults, and end no list of parameters."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask.fit.arguments.parameters import parse_parameters
from nlsq_dask.model.call import call_model
from tests.problems import NO_WARMUP, fit

X = np.linspace(0.0, 3.0, 500)
Y = 2 * np.exp(-0.5 * X)


def between(x: Any, a: Any, kind: Any = None, b: Any = 1.0) -> Any:
    assert kind is None
    return a * jnp.exp(-b * x)


def first(x: Any, kind: str = "decay", /, a: Any = 1.0, is_log: bool = False, b: Any = 0.7) -> Any:
    assert (kind, is_log) == ("decay", False)
    return a * jnp.exp(-b * x)


def before_star(x: Any, a: Any, kind: Any = None, *more: Any) -> Any:
    assert kind is None
    return a * jnp.exp(-more[0] * x)


def last(x: Any, a: Any, b: Any, table: Any = (1, 2)) -> Any:
    assert table == (1, 2)
    return a * jnp.exp(-b * x)


@pytest.mark.parametrize("model", [between, first, last])
def test_parameters_and_their_starts(model: Any) -> None:
    parameters = parse_parameters(model, None, None, None)
    assert parameters.names == ("a", "b")
    np.testing.assert_array_equal(parameters.start, [1.0, 0.7 if model is first else 1.0])
    np.testing.assert_array_equal(parse_parameters(model, {"b": 3}, None, None).start, [1.0, 3.0])
    assert parse_parameters(model, None, {"b": (0, 2)}, None).high.tolist() == [np.inf, 2.0]


@pytest.mark.parametrize("model", [between, first, before_star, last])
def test_calls_keep_the_defaults(model: Any) -> None:
    np.testing.assert_allclose(call_model(model, X, [2.0, 0.5]), Y, rtol=1e-6)


def test_trailing_parameters_may_be_omitted() -> None:
    parameters = parse_parameters(between, [2.0], None, None)
    assert parameters.names == ("a",)
    np.testing.assert_allclose(call_model(between, X, [2.0]), 2 * np.exp(-X), rtol=1e-6)


def test_fit_predict_normalized_model_and_curve_fit(tmp_path: Any) -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(**NO_WARMUP))
    result = optimizer.fit(between, X, Y, verbose=0)
    np.testing.assert_allclose(result.x, [2.0, 0.5], rtol=1e-8)
    assert result.param_names == ("a", "b")
    np.testing.assert_allclose(result.predict(X), Y, rtol=1e-8)
    wrapped, normalizer = optimizer.normalized_model, optimizer.normalizer
    assert wrapped is not None
    assert normalizer is not None
    np.testing.assert_allclose(wrapped(X, *normalizer.normalize([2.0, 0.5])), Y, rtol=1e-6)
    path = tmp_path / "result"
    result.save(path)
    np.testing.assert_allclose(nd.FitResult.load(path, model=between).predict(X), Y, rtol=1e-8)
    popt, _ = nd.curve_fit(between, X, Y, config=optimizer.config)
    np.testing.assert_allclose(popt, [2.0, 0.5], rtol=1e-8)


def test_star_after_an_option() -> None:
    result = fit(before_star, X, Y, [1.0, 1.0], **NO_WARMUP)
    np.testing.assert_allclose(result.x, [2.0, 0.5], rtol=1e-8)
