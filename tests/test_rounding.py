"""Warnings that x or y loses digits: spacing of the dtype in use against the span of the values."""

from __future__ import annotations

import warnings
from typing import Any

import dask.array as da
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask.data.rounding import rounding_notices
from nlsq_dask.fit.problem import validate_arguments
from nlsq_dask.rows.rows import Rows
from tests.problems import NO_WARMUP, fit

N = 4000
T = np.linspace(0.0, 59.0, N)
Y = 1 + 2 * T
NS = np.datetime64("2023-01-01T00:00", "ns") + np.arange(N)
IN_FLOAT32 = "Use HybridStreamingConfig(precision='float64'), or "


def line(x: Any, a: Any, b: Any) -> Any:
    first = x[0] if isinstance(x, tuple) else x[:, 0] if x.ndim == 2 else x
    return a + b * first


def notices(x: Any, y: Any = Y, precision: str = "float32") -> list[str]:
    """Return the notices for rows that are read, without a fit."""
    config = nd.HybridStreamingConfig(precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nd.DataWarning)
        problem = validate_arguments(config, line, x, y, [1, 1])
    blocks = problem.blocks
    rows = Rows(blocks.y.compute(), tuple(array.compute() for array in blocks.x))
    return list(rounding_notices(problem.blocks, problem.model.dtype, rows))


@pytest.mark.parametrize(
    ("x", "step", "advice"),
    [
        (2460310.5 + T, "multiples of 0.25, 0.424 % of the span", "x_data - 2460310."),
        ((1.7e9 + 100 * T, T), "multiples of 128, 2.17 % of the span", "x_data[0] - 1700000000."),
        (np.c_[T, 2e9 + T], "multiples of 128, 217 % of the span", "x_data[:, 1] - 2000000000."),
        (0.001 + 1e-9 * T, "multiples of 1.16e-10, 0.197 % of the span", "x_data - 0.001."),
        (
            2_000_000_001 + np.arange(N),
            "multiples of 128, 3.2 % of the span",
            "x_data - 2000000001.",
        ),
        (
            np.datetime64("2024-01-01", "s") + np.arange(N),
            "(in days since 1970-01-01), but in float32 such values are rounded to multiples of "
            "0.00195, 4.22 % of the span",
            "(t - t[0]) / np.timedelta64(1, 's').",
        ),
    ],
)
def test_x_in_float32(x: Any, step: str, advice: str) -> None:
    (notice,) = notices(x)
    assert step in notice
    assert IN_FLOAT32 in notice
    assert notice.endswith(advice)


def test_y_in_float32_and_integers_in_float64() -> None:
    (notice,) = notices(T, 101325 + np.sin(T))
    assert notice.startswith("y_data spans 2 at values up to 101326, but in float32")
    stamps = 1_700_000_000_000_000_001 + np.arange(N)
    (notice,) = notices(stamps, precision="float64")
    assert "in float64 such values are rounded to multiples of 256, 6.4 % of the span" in notice
    assert notice.endswith(
        "Subtract an origin near the data, such as x_data - 1700000000000000001."
    )


@pytest.mark.parametrize(
    ("x", "y", "precision"),
    [
        (T, Y, "float32"),
        (20 * 59 + T, Y, "float32"),
        ((2460310.5 + T).astype("f4"), Y, "float32"),  # as precise as the data are
        (2460310 + np.arange(N), Y, "float32"),  # whole days
        (np.full(N, 2460310.3), Y, "float32"),  # no span
        (2460310.5 + T, 1e12 + Y, "float64"),
        (2**50 + np.arange(N), np.arange(N), "float64"),
        (NS.astype("M8[s]") + np.arange(N), Y, "float64"),
    ],
)
def test_nothing_is_said_where_little_is_lost(x: Any, y: Any, precision: str) -> None:
    assert notices(x, y, precision) == []


def test_dates_in_memory_are_compared_once() -> None:
    assert notices(NS, precision="float64") == []  # ``align`` has said it
    (lazy,) = notices(da.from_array(NS, chunks=1000), precision="float64")
    with pytest.warns(nd.DataWarning) as caught:
        validate_arguments(nd.HybridStreamingConfig(), line, NS, Y, [1, 1])
    (notice,) = [str(w.message) for w in caught]
    words = "but days since 1970-01-01 in float64 are rounded to 3.1e-07 s. Measure time from"
    assert notice.startswith("x_data spans 4e-06 s")
    assert words in notice
    assert words in lazy  # of dates that are rounded already


def test_a_fit_warns_at_the_line_of_the_caller_and_reads_nothing_more() -> None:
    days, y = da.from_array(2460310.5 + T, chunks=500), da.from_array(Y, chunks=500)

    def from_origin(x: Any, a: Any, b: Any) -> Any:
        return a + b * (x - 2460310.5)

    def memory_optimized(**options: Any) -> nd.FitResult:
        config = nd.HybridStreamingConfig.memory_optimized(verbose=0, **NO_WARMUP, **options)
        return fit(from_origin, days, y, [1, 1], config=config)

    with pytest.warns(nd.DataWarning, match=r"x_data spans 59 at values up to 2.46037e") as caught:
        coarse = memory_optimized()
    (warning,) = [w for w in caught if w.category is nd.DataWarning]
    assert warning.filename.endswith("problems.py")
    exact = memory_optimized(precision="float64")
    np.testing.assert_allclose(exact.x, [1, 2], rtol=1e-9)
    assert coarse.rows_read - N * coarse.n_passes == exact.rows_read - N * exact.n_passes


def test_lazy_dates_in_a_fit() -> None:
    seconds = da.from_array(Y, chunks=1000)
    with pytest.warns(nd.DataWarning, match=r"rounded to 3.1e-07 s.*\(t - t\[0\]\)"):
        fit(lambda t, a: a + 0 * t, da.from_array(NS, chunks=1000), seconds, [1], **NO_WARMUP)
