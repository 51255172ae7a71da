"""Hard problems with the default configuration: SciPy's minimum, digits, and an honest verdict."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from tests.hard_problems import Hard, cases, exact_functions, scipy_solution
from tests.problems import fit

CASES = list(cases())
# The fast run has every seventh of them.
SHORT = {case.name for case in CASES[::7]}


def test_there_are_enough() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in SHORT else [pytest.mark.slow])
        for case in CASES
    ],
)
def test_as_good_as_scipy(problem: Hard) -> None:
    x, y = problem.data()
    chunks = max(len(x) // 4, 3)
    result = fit(
        problem.model,
        da.from_array(x, chunks=chunks),
        da.from_array(y, chunks=chunks),
        problem.start,
        problem.bounds,
    )
    residual, jacobian = exact_functions(problem, x, y)
    best = scipy_solution(problem, residual, jacobian)
    r, j = residual(result.x), jacobian(result.x)
    cost = 0.5 * r @ r
    free = result.active_mask == 0
    norms = np.linalg.norm(j[:, free], axis=0)
    q, triangle = np.linalg.qr(j[:, free] / norms)
    left = np.linalg.norm(q.T @ r)
    deviation = np.sqrt(2 * cost / max(len(x) - len(result.x), 1))
    if result.success:
        assert left <= 1e-3 * deviation
    assert cost <= best.cost * (1 + 1e-10), (result.message, cost / best.cost - 1)
    assert result.success, result.message
    if cost >= best.cost * (1 - 1e-10):
        digits = min(6.0, 14.0 - np.log10(np.linalg.cond(triangle)))
        # From here, because minima with pairs of parameters exchanged are the same minimum.
        exact = result.x.copy()
        for _ in range(20):
            step = np.linalg.lstsq(jacobian(exact)[:, free] / norms, -residual(exact))[0] / norms
            exact[free] += step
        away = np.abs(result.x - exact) / np.abs(exact)
        assert (away <= 10.0**-digits).all(), away
