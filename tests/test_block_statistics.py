"""One bad file in a terabyte shows."""

from __future__ import annotations

import itertools
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import nlsq_dask as nd
from tests.problems import NO_WARMUP, fading, fit

TRUTH, START = (2.5, 1.3, 0.5), [2.0, 1.0, 0.3]


def records(bad: bool) -> xr.DataArray:
    """200 blocks on a grid of 20 x 10, one of which is a little off."""
    rng = np.random.default_rng(3)
    t, position = np.linspace(0, 4, 400), np.linspace(-1, 1, 300)
    y = TRUTH[0] * np.exp(-TRUTH[1] * t[:, None]) + TRUTH[2] * position
    y = y + 0.1 * rng.standard_normal(y.shape)
    if bad:
        y[140:160, 90:120] += 0.15
        y[5, 200] += 1.0
    coords = {"time": t, "position": position}
    return xr.DataArray(y, coords, name="record").chunk(time=20, position=30)


def fit_records(y: xr.DataArray) -> nd.FitResult:
    dims = ("time", "position")
    return fit(fading, dims, y, START, sigma=0.1, sample_rows=5_000, **NO_WARMUP)


def test_a_bad_block_among_200_is_the_extreme() -> None:
    result = fit_records(records(bad=True))
    found = result.block_statistics
    assert dict(found.sizes) == {"time": 20, "position": 10}
    np.testing.assert_allclose(found.reduced_chi2, found.chi2 / found.n_points)
    worst = found.reduced_chi2.argmax(...)
    where = {dim: int(index) for dim, index in worst.items()}
    assert where == {"time": 7, "position": 3}
    at = found.isel(where)
    assert (int(at.time), int(at.position)) == (140, 90)
    assert at.reduced_chi2 > 2 * found.reduced_chi2.quantile(0.9)
    largest = {dim: int(i) for dim, i in found.largest_residual.argmax(...).items()}
    assert largest == {"time": 0, "position": 6}
    good = fit_records(records(bad=False)).block_statistics
    assert float(good.reduced_chi2.max()) < 1.3


@pytest.mark.parametrize(
    ("n_params", "loss"),
    [
        (3, "linear"),
        pytest.param(3, "soft_l1", marks=pytest.mark.slow),
        pytest.param(7, "linear", marks=pytest.mark.slow),
        (7, "soft_l1"),
    ],
)
def test_agrees_with_numpy(n_params: int, loss: str) -> None:
    """In lanes and as matrix product, with ragged chunks, rows left out and a robust loss."""
    rng = np.random.default_rng(8)
    x = rng.uniform(0, 3, 5_000)
    sigma = rng.uniform(0.1, 0.3, len(x))

    def polynomial(x: Any, *p: Any) -> Any:
        return sum(p[i] * jnp.cos(i * x) for i in range(n_params))

    y = np.cos(x) + sigma * rng.standard_normal(len(x))
    y[::77] = np.nan
    chunks = (1, 999, 1_000, 3_000)
    result = fit(
        polynomial,
        da.from_array(x, chunks=chunks),
        da.from_array(y, chunks=(2_000, 3_000)),
        np.zeros(n_params),
        sigma=sigma,
        loss=loss,
        nan_policy="omit",
        sample_rows=1_000,
        **NO_WARMUP,
    )
    assert result.success, result.message
    at = result.diagnostics["sums_at"]
    residual = (sum(at[i] * np.cos(i * x) for i in range(n_params)) - y) / sigma
    found = result.block_statistics
    edges = np.cumsum((0, *chunks))
    np.testing.assert_array_equal(found.dim_0, edges[:-1])
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        block = residual[start:stop]
        used = block[np.isfinite(block)]
        assert found.n_points[i] == len(used)
        assert float(found.chi2[i]) == pytest.approx(used @ used, rel=1e-10)
        if len(used):
            largest = float(found.largest_residual[i])
            assert largest == pytest.approx(np.abs(used).max(), rel=1e-10)
    # Its only row is left out.
    assert np.isnan(found.reduced_chi2[0])
    assert np.isnan(found.largest_residual[0])
    assert int(found.n_points.sum()) == result.n_points
    # A last step without a pass changes chi2 by a few units, but not that of the blocks.
    n_errors = np.abs((at - result.x) / result.perr).max()
    rounding = 1e-9 * result.chi2
    difference = float(found.chi2.sum()) - result.chi2
    assert -rounding <= difference <= 10 * n_params * n_errors**2 * result.sigma_sq + rounding


def test_costs_no_reading_and_no_pass(process_client: Any) -> None:
    y = records(bad=True)
    with process_client.as_current():
        result = fit_records(y)
    local = fit_records(y)
    assert result.n_passes == local.n_passes
    assert result.rows_read <= (result.n_passes + 1) * y.size
    xr.testing.assert_identical(result.block_statistics, local.block_statistics)
