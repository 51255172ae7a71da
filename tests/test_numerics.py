"""Models that are not finite everywhere: back to the best point, a smaller step, and a report."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nlsq_dask.status import Status
from tests import problems

X = np.linspace(0, 1, 3_000)
Y = 2.0 * X + np.sqrt(0.02) + 0.01 * np.random.default_rng(0).standard_normal(len(X))
START = (1.0, 3.0)


def root(x: Any, a: Any, b: Any) -> Any:
    """NaN for b < 1."""
    return a * x + jnp.sqrt(b - 1)


def trap(x: Any, a: Any, b: Any) -> Any:
    """Finite everywhere, but jnp.where makes its reverse-mode derivative NaN for b < 1."""
    return a * x + jnp.where(b > 1, jnp.sqrt(b - 1), 0.0)


fit = functools.partial(problems.fit, x=X, y=Y, p0=START)


def expected() -> np.ndarray:
    slope, intercept = np.polyfit(X, Y, 1)
    return np.array([slope, 1.0 + intercept**2])


@pytest.mark.parametrize("threshold", [2000, 2], ids=["matrices", "conjugate gradients"])
def test_validate_numerics_goes_back(threshold: int) -> None:
    result = fit(root, max_warmup_iterations=0, cg_param_threshold=threshold)
    assert result.success
    assert result.diagnostics["non_finite"]["sample"] > 0
    np.testing.assert_allclose(result.x, expected(), rtol=1e-7)


@pytest.mark.parametrize("threshold", [2000, 2], ids=["matrices", "conjugate gradients"])
def test_without_it_the_fit_ends_there(threshold: int) -> None:
    result = fit(
        root, max_warmup_iterations=0, cg_param_threshold=threshold, validate_numerics=False
    )
    assert not result.success
    assert result.status == Status.NON_FINITE_STEP.code
    np.testing.assert_array_equal(result.x, START)
    assert result.diagnostics["non_finite"]["all rows"] == 1


def test_the_warm_up_goes_on_with_smaller_steps() -> None:
    options = dict(
        enable_step_clipping=False,
        lbfgs_line_search="backtracking",
        lbfgs_exploration_step_size=5.0,
    )
    with_it = fit(trap, **options)
    warm_up = with_it.diagnostics["warm_up"]
    without = fit(trap, **options, validate_numerics=False).diagnostics["warm_up"]
    assert without["reason"] == "non_finite"
    assert without["restarts"] == 0
    assert warm_up["restarts"] > 0
    assert warm_up["loss"] < without["loss"]
    assert with_it.diagnostics["non_finite"]["warm-up"] == warm_up["restarts"]
    np.testing.assert_allclose(with_it.x, expected(), rtol=1e-7)


def test_it_goes_on_as_long_as_its_limit_allows() -> None:
    """Without "max_iter" that is ten times max_warmup_iterations, of which the first run took 6."""
    options = dict(
        max_warmup_iterations=3,
        active_switching_criteria=["plateau"],
        max_warmup_step_size=0.5,
        lbfgs_line_search="backtracking",
        lbfgs_exploration_step_size=5.0,
    )
    warm_up = fit(trap, **options).diagnostics["warm_up"]
    assert warm_up["restarts"] == 1
    assert 6 < warm_up["iterations"] <= 30


def test_what_a_warm_up_did_is_counted_over_all_its_runs() -> None:
    options = dict(
        max_warmup_step_size=0.5,
        lbfgs_line_search="backtracking",
        lbfgs_exploration_step_size=5.0,
    )
    first = fit(trap, **options, validate_numerics=False).diagnostics["warm_up"]
    all_runs = fit(trap, **options).diagnostics["warm_up"]
    assert all_runs["restarts"] == 1
    assert 0 < first["clipped"] < all_runs["clipped"]
    assert first["iterations"] < all_runs["iterations"]


@pytest.mark.parametrize("verbose", [1, 2])
def test_it_is_said(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    fit(root, max_warmup_iterations=0, verbose=verbose)
    assert ("not finite at a trial point" in capsys.readouterr().out) == (verbose == 2)
