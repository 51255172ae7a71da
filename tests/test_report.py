"""What a result says to a person: its report, and what its message advises."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import OptimizeWarning

from tests import problems
from tests.problems import NO_WARMUP, decay_data, exponential, gaussian

X, Y = decay_data()

MULTISTART = "HybridStreamingConfig.with_multistart(n_starts=30, center_on_p0=False)"


fit = functools.partial(problems.fit, x=X, y=Y)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_a_start_far_off_is_told_of_multistart() -> None:
    start = [1.0, 500.0, 20.0]
    assert MULTISTART in fit(gaussian, p0=start).message
    box = ([0.5, 400.0, 10.0], [2.0, 600.0, 30.0])
    after_it = fit(gaussian, p0=start, enable_multistart=True, n_starts=2, bounds=box)
    assert not after_it.success
    assert "with_multistart" not in after_it.message
    assert "with_multistart" not in fit(exponential, p0=[2.0, 1.0, 0.0]).message


def test_a_flat_valley_says_how_to_fix_a_parameter() -> None:
    result = fit(exponential, p0=[-3.0, -2.0, 40.0])
    assert not result.success
    assert "fix one of the parameters (such as fixed=['" in result.message
    assert MULTISTART in result.message


def test_nothing_is_known_of_parameters_that_the_model_does_not_react_to() -> None:
    """Also where rounding leaves a little more than nothing of the derivatives."""
    with pytest.warns(OptimizeWarning, match="insensitive to 'height', 'centre', 'width' at"):
        result = fit(gaussian, p0=[1.0, 500.0, 20.0])
    assert "insensitive" in result.message
    assert np.isinf(result.pcov).all()
    assert np.isinf(result.perr).all()
    assert "height: 1 +/- inf (??) (init = 1)\n" in result.fit_report().replace("  ", " ")


def test_relative_errors_are_short() -> None:
    """Of a parameter whose value is zero but for rounding they have very many digits."""
    result = fit(exponential, p0=[2.0, 1.0, 0.0])
    report = replace(result, x=result.x * 1e-90).fit_report()
    assert "e+89%)" in report
    assert max(map(len, report.splitlines())) < 100


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, None),
        ({"sigma": 0.05}, "scaled by the variance of residuals (absolute_sigma=False)"),
        (
            {"sigma": 0.05, "absolute_sigma": True},
            "from sigma (absolute_sigma=True)",
        ),
        ({"absolute_sigma": True}, "from sigma = 1 (default) (absolute_sigma=True)"),
        ({"sigma": 0.05, "cov_type": "HC1"}, None),
    ],
)
def test_what_standard_errors_are_measured_by(options: dict[str, Any], line: str | None) -> None:
    report = fit(exponential, p0=[2.0, 1.0, 0.0], **options, **NO_WARMUP).fit_report()
    if line is None:
        assert "standard errors" not in report
    else:
        assert f"    # standard errors      = {line}\n" in report


@pytest.mark.parametrize(
    ("sigma", "doubt"),
    [(0.05, ""), (0.02, "residuals are larger than sigma"), (0.2, "residuals are smaller than")],
)
def test_a_sigma_that_does_not_fit_the_residuals(sigma: float, doubt: str) -> None:
    for absolute_sigma in (True, False):
        options = {"sigma": sigma, "absolute_sigma": absolute_sigma, **NO_WARMUP}
        report = fit(exponential, p0=[2, 1, 0], **options).fit_report()
        (line,) = (line for line in report.splitlines() if "reduced chi-square" in line)
        assert doubt in line if absolute_sigma else "residuals" not in line
        assert doubt or "residuals" not in line
