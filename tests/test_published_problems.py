"""Published problems with the default configuration: NIST's digits, and SciPy's costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from tests.nist_problems import Certified, nist_problems
from tests.problems import fit
from tests.published_problems import Published, published_problems

NIST = nist_problems()
PUBLISHED = list(published_problems())
# The fast run has these.
SHORT = {"Misra1a", "BoxBOD", "Rat42", "Rosenbrock", "Powell singular"}


def marked(problems: list[Any]) -> list[Any]:
    return [
        pytest.param(one, id=one.name, marks=[] if one.name in SHORT else [pytest.mark.slow])
        for one in problems
    ]


def test_there_are_all() -> None:
    assert len(NIST) == 27
    assert len({problem.name for problem in PUBLISHED}) == len(PUBLISHED) >= 20


@pytest.mark.parametrize("start", [0, 1], ids=["start 1", "start 2"])
@pytest.mark.parametrize("problem", marked(NIST))
def test_certified_values(problem: Certified, start: int) -> None:
    result = fit(problem.model, problem.x, problem.y, problem.starts[start])
    assert result.success, result.message
    np.testing.assert_allclose(result.x, problem.params, rtol=1e-6)
    # The residuals of Lanczos1 are rounding errors of its data.
    np.testing.assert_allclose(result.perr, problem.errors, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize("problem", marked(PUBLISHED))
def test_as_good_as_scipy(problem: Published) -> None:
    def residuals(p: Any) -> Any:
        return problem.model(jnp.asarray(problem.x), *p) - problem.y

    compiled = jax.jit(residuals), jax.jit(jax.jacfwd(residuals))

    def evaluate(function: Any, p: Any) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(function(jnp.asarray(p, jnp.float64)))

    start = np.array(problem.start, float)
    best = optimize.least_squares(
        lambda p: evaluate(compiled[0], p),
        start,
        lambda p: evaluate(compiled[1], p),
        x_scale="jac",
        max_nfev=2_000,
        ftol=1e-12,
        xtol=1e-12,
        gtol=1e-12,
    )
    result = fit(problem.model, problem.x, problem.y, problem.start)
    first, last = (0.5 * np.sum(evaluate(compiled[0], p) ** 2) for p in (start, result.x))
    assert result.success, result.message
    # At a residual of zero, rounding errors remain.
    assert last <= best.cost * (1 + 1e-8) + 1e-20 * first
