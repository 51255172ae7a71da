"""Weights by group of rows, and the penalty on the variance of groups of parameters.

Both are compared with SciPy on the problem that they stand for, written out row by row.
"""

from __future__ import annotations

import functools
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from scipy.optimize import least_squares, lsq_linear

import nlsq_dask as nd
from tests import problems
from tests.problems import NO_WARMUP

RNG = np.random.default_rng(3)
N, GROUPS = 8_000, 4
WEIGHTS = [1.0, 2.0, 0.5, 3.0]
G = RNG.integers(0, GROUPS, N)
T = RNG.uniform(0, 4, N)
TRUTH = np.array([2.0, 2.3, 1.8, 2.1, 0.1, 0.3, 0.2, 0.5, 0.7])
X = np.column_stack([G, T])
Y = TRUTH[G] * np.exp(-0.7 * T) + TRUTH[4 + G] + 0.05 * (1 + G) * RNG.standard_normal(N)
START = [1.0] * 9
INDICES = [(0, 4), (4, 8)]


def model(x: Any, *p: Any) -> Any:
    q, group = jnp.stack(p), x[:, 0].astype(int)
    return q[group] * jnp.exp(-q[8] * x[:, 1]) + q[4 + group]


fit = functools.partial(problems.fit, model=model, x=X, y=Y, p0=START, gauss_newton_tol=1e-12)


def penalized(strength: float, **options: Any) -> dict[str, Any]:
    return {
        "enable_group_variance_regularization": True,
        "group_variance_lambda": strength,
        "group_variance_indices": INDICES,
        **options,
    }


def weighted(**options: Any) -> dict[str, Any]:
    return {"enable_residual_weighting": True, "residual_weights": WEIGHTS, **options}


def residuals(p: np.ndarray, sigma: Any) -> np.ndarray:
    return (p[G] * np.exp(-p[8] * T) + p[4 + G] - Y) / sigma


def jacobian(p: np.ndarray, sigma: Any) -> np.ndarray:
    found, decay = np.zeros((N, 9)), np.exp(-p[8] * T)
    found[np.arange(N), G] = decay
    found[np.arange(N), 4 + G] = 1.0
    found[:, 8] = -p[G] * T * decay
    return found / np.broadcast_to(sigma, N)[:, None]


def scipy_solution(strength: float = 0.0, sigma: Any = 1.0, loss: str = "linear") -> Any:
    """Solve by SciPy with the penalty as eight rows more.

    SciPy stops some 1e-8 before the end, where the cost does not change any more, so one more step
    is taken from there.
    """
    assert loss == "linear" or not strength
    root = np.sqrt(strength * N / 4)
    further = np.zeros((8, 9))
    further[:4, :4] = further[4:, 4:8] = root * (np.eye(4) - 0.25)

    def values(p: np.ndarray) -> np.ndarray:
        return np.r_[residuals(p, sigma), further @ p]

    def derivatives(p: np.ndarray) -> np.ndarray:
        return np.vstack([jacobian(p, sigma), further])

    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    found = least_squares(values, START, derivatives, loss=loss, **tight)
    if loss == "linear":
        found.x = found.x - lsq_linear(derivatives(found.x), values(found.x)).x
        found.jac, found.cost = derivatives(found.x), 0.5 * (values(found.x) ** 2).sum()
    return found


# --- the penalty


@pytest.mark.parametrize("solver", ["normal", "qr"])
@pytest.mark.parametrize("strength", [1e-3, 0.1, 100.0])
def test_the_penalty_is_eight_rows_more(strength: float, solver: str) -> None:
    result = fit(**penalized(strength, gauss_newton_solver=solver))
    expected = scipy_solution(strength)
    assert result.success
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-8)
    np.testing.assert_allclose(result.cost, expected.cost, rtol=1e-12)
    variance = (residuals(expected.x, 1.0) ** 2).sum() / (N - 9)
    np.testing.assert_allclose(result.sigma_sq, variance, rtol=1e-8)
    curvature = expected.jac.T @ expected.jac
    np.testing.assert_allclose(result.pcov, np.linalg.inv(curvature) * variance, rtol=1e-7)
    np.testing.assert_allclose(result.chi2, variance * (N - 9), rtol=1e-8)


def test_the_groups_come_together() -> None:
    spread = [np.ptp(fit(**penalized(strength)).x[:4]) for strength in (0.0, 0.1, 10.0, 1e4)]
    assert np.all(np.diff(spread) < 0)
    assert spread[-1] < 1e-4


def test_every_phase_has_the_same_objective() -> None:
    seen: list[tuple[np.ndarray, float]] = []
    fit(
        callback=lambda p, loss, iteration: seen.append((p, loss)),
        **penalized(0.3, callback_frequency=1, enable_warm_start_detection=False),
    )
    assert len(seen) > 10  # of the warm-up, the sample (which is all rows) and the passes
    for p, loss in seen:
        penalty = 0.3 * (np.var(p[:4]) + np.var(p[4:8]))
        assert loss == pytest.approx((residuals(p, 1.0) ** 2).mean() + penalty, rel=1e-10)


def test_a_start_that_fits_is_not_warm_with_a_large_penalty() -> None:
    clean = np.asarray(model(X, *TRUTH))
    spread = np.var(TRUTH[:4]) + np.var(TRUTH[4:8])
    for strength, is_warm in ((1e-6, True), (10.0, False)):
        found = fit(y=clean, p0=TRUTH, **penalized(strength)).diagnostics["warm_up"]
        assert found["relative_loss"] == pytest.approx(strength * spread / clean.var(), rel=1e-4)
        assert found["is_warm_start"] is is_warm
        assert ("iterations" in found) is not is_warm


@pytest.mark.slow
def test_blocks_forecasts_and_candidates_have_it_too() -> None:
    n = 300_000
    repeat = -(n // -N)
    x = np.tile(X, (repeat, 1))[:n]
    noise = 0.05 * np.random.default_rng(1).standard_normal(n)
    y = TRUTH[x[:, 0].astype(int)] * np.exp(-0.7 * x[:, 1]) + noise
    options = penalized(1.0, gauss_newton_tol=1e-8)
    chunked = fit(x=da.from_array(x, (50_000, 2)), y=da.from_array(y, 50_000), **options)
    assert chunked.success
    assert chunked.n_passes <= 3
    whole = fit(x=x, y=y, **options, sample_rows=n)
    np.testing.assert_allclose(chunked.x, whole.x, rtol=1e-7, atol=1e-9)


def test_a_sandwich_has_the_penalty_in_its_bread_alone() -> None:
    result = fit(**penalized(0.1, cov_type="HC0"))
    expected = scipy_solution(0.1)
    bread = np.linalg.inv(expected.jac.T @ expected.jac)
    rows = jacobian(expected.x, 1.0) * residuals(expected.x, 1.0)[:, None]
    np.testing.assert_allclose(result.pcov, bread @ (rows.T @ rows) @ bread, rtol=1e-7)


def test_a_group_beyond_the_parameters() -> None:
    with pytest.raises(ValueError, match=r"\(4, 12\), but the model has 9 parameters"):
        fit(**penalized(1.0) | {"group_variance_indices": [(0, 4), (4, 12)]})


@pytest.mark.parametrize(
    ("switch", "needed"),
    [
        ("enable_group_variance_regularization", "group_variance_indices"),
        ("enable_residual_weighting", "residual_weights"),
    ],
)
def test_switches_that_need_more(switch: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"{switch}=True requires {needed}"):
        nd.HybridStreamingConfig(**{switch: True})
    with pytest.raises(ValueError, match=f"{needed}=.* requires {switch}=True"):
        nd.HybridStreamingConfig(**{needed: [(0, 1)] if "indices" in needed else [1.0]})


# --- the weights

SIGMA = 0.05 * (1.0 + T)
ROOTS = np.sqrt(WEIGHTS)[G]


@pytest.mark.parametrize("loss", [pytest.param("linear", marks=pytest.mark.slow), "huber"])
@pytest.mark.parametrize(
    "sigma",
    [pytest.param(None, marks=pytest.mark.slow, id="unweighted"), pytest.param(SIGMA, id="sigma")],
)
def test_weights_are_a_smaller_sigma(sigma: Any, loss: str) -> None:
    options = {"loss": loss, **NO_WARMUP}
    result = fit(sigma=sigma, **weighted(), **options)
    written_out = (1.0 if sigma is None else sigma) / ROOTS
    expected = scipy_solution(sigma=written_out, loss=loss)
    assert result.success
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-8)
    np.testing.assert_allclose(result.cost, expected.cost, rtol=1e-12)
    same = fit(sigma=written_out, **options)
    np.testing.assert_allclose(result.pcov, same.pcov, rtol=1e-10)
    np.testing.assert_allclose(result.chi2, same.chi2, rtol=1e-12)
    if loss == "linear":
        variance = 2 * expected.cost / (N - 9)
        curvature = expected.jac.T @ expected.jac
        np.testing.assert_allclose(result.pcov, np.linalg.inv(curvature) * variance, rtol=1e-7)


def test_weights_and_penalty_together() -> None:
    result = fit(**penalized(0.2, **weighted()))
    expected = scipy_solution(0.2, 1 / ROOTS)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-8)
    np.testing.assert_allclose(result.cost, expected.cost, rtol=1e-12)


def test_the_warm_up_has_the_weights() -> None:
    seen: list[tuple[np.ndarray, float]] = []
    fit(callback=lambda p, loss, i: seen.append((p, loss)), **weighted(callback_frequency=1))
    for p, loss in seen:
        assert loss == pytest.approx((residuals(p, 1 / ROOTS) ** 2).mean(), rel=1e-10)


def test_chunks_and_several_arrays() -> None:
    expected = fit(**weighted())

    def of_two(x: Any, *p: Any) -> Any:
        return model(jnp.stack(x, axis=1), *p)

    lazy = tuple(da.from_array(a, chunks) for a, chunks in ((G, 1_700), (T, 900)))
    y, sigma = da.from_array(Y, 3_000), da.ones(N, chunks=777)
    result = fit(model=of_two, x=lazy, y=y, sigma=sigma, **weighted(), **NO_WARMUP)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-9)
    np.testing.assert_allclose(result.pcov, expected.pcov, rtol=1e-8)


@pytest.mark.slow
def test_a_group_along_one_dimension_stays_small() -> None:
    station = np.arange(GROUPS)
    hours = np.linspace(0, 4, 500)
    values = TRUTH[:4, None] * np.exp(-0.7 * hours) + TRUTH[4:8, None]
    values = values + 0.1 * np.random.default_rng(0).standard_normal(values.shape)
    y = xr.DataArray(values, {"station": station, "hour": hours}, ("station", "hour"))

    def of_two(x: Any, *p: Any) -> Any:
        return model(jnp.stack(x, axis=1), *p)

    result = fit(model=of_two, x=("station", "hour"), y=y.chunk(hour=120), **weighted())
    flat = np.column_stack([np.repeat(station, 500), np.tile(hours, 4)])
    expected = fit(x=flat, y=values.ravel(), **weighted())
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-9)


def test_blocks_are_read_once_for_x_and_weights() -> None:
    reads = []

    def counted(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        reads.append(block_info[0]["chunk-location"])
        return block

    x = da.from_array(X, (1_000, 2)).map_blocks(counted, dtype=float, meta=np.empty((0, 0)))
    options = weighted(cache=0, sample_rows=1_000, **NO_WARMUP)
    result = fit(x=x, y=da.from_array(Y, 1_000), **options)
    n_blocks = 8
    assert len(reads) <= n_blocks * (result.n_passes + 1)


@pytest.mark.parametrize(
    ("group", "shown"), [(4, "4"), (-1, "-1"), (1.5, "1.5")], ids=["beyond", "negative", "between"]
)
def test_what_is_no_group(group: float, shown: str) -> None:
    x = X.copy()
    x[-1, 0] = group
    with pytest.raises(nd.DataError, match=f"from 0 to 3 for the 4 .*got {shown}\\."):
        fit(x=x, **weighted())


def test_a_group_that_is_missing() -> None:
    x = X.copy()
    x[:5, 0] = np.nan
    with pytest.raises(nd.NonFiniteDataError, match="5 of 8,000 rows"):
        fit(x=x, **weighted())
    result = fit(x=x, nan_policy="omit", **weighted())
    np.testing.assert_allclose(result.x, fit(x=X[5:], y=Y[5:], **weighted()).x, rtol=1e-8)
    assert result.n_omitted == 5


def test_masked_rows_need_no_group() -> None:
    x = X.copy()
    x[:5, 0] = -1
    expected = fit(x=X[5:], y=Y[5:], **weighted())
    result = fit(x=x, y=np.ma.masked_array(Y, np.arange(N) < 5), **weighted())
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-8)
    result = fit(x=x, y=np.where(np.arange(N) < 5, np.nan, Y), nan_policy="omit", **weighted())
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-8)
