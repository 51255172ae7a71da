"""The same answers as SciPy, whatever the model, the kind of array and the scheduler."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import nlsq_dask as nd
from tests.problems import (
    PROBLEMS,
    SEPARABLE_START,
    fit,
    scipy_fit,
    separable,
    separable_data,
)

KINDS = ["numpy", "dask", "zarr", "xarray"]
IN_MAPS = ("logistic", "power law", "damped sine")


def assert_same(result: nd.FitResult, popt: np.ndarray, pcov: np.ndarray) -> None:
    assert result.success, result.message
    perr = np.sqrt(np.diag(pcov))
    allowed = 1e-8 * np.abs(popt) + 1e-6 * perr
    assert (np.abs(result.popt - popt) <= allowed).all(), (result.popt - popt) / allowed
    scale = np.outer(perr, perr)
    np.testing.assert_allclose(result.pcov / scale, pcov / scale, atol=1e-6)


# Pieces are as long whatever the kind of array, so that all kinds share the programs of a problem.
PIECES = {"chunk_size": 8_192}
# A sample that is a tenth of the rows, so that all rows have something left to say.
STREAMED = {"sample_rows": 5_000, **PIECES}


@functools.cache
def reference(i_problem: int, with_sigma: bool) -> tuple[np.ndarray, np.ndarray]:
    problem = PROBLEMS[i_problem]
    options = {"sigma": problem.sigma, "absolute_sigma": True} if with_sigma else {}
    return scipy_fit(problem.model, problem.x, problem.y, problem.start, **options)


def combinations() -> Iterator[Any]:
    """Yield problems with all kinds of arrays, on threads and processes.

    The fast run has each problem once on threads, except those that ``test_maps.py`` compares as
    well, and each kind of array once on processes.
    """
    for i, problem in enumerate(PROBLEMS):
        for j, kind in enumerate(KINDS):
            for with_sigma in (False, True):
                weights = "sigma" if with_sigma else "unweighted"
                for scheduler in ("threads", "processes"):
                    is_fast = j == i % len(KINDS) and with_sigma == ((i + i // 4) % 2 == 1)
                    if scheduler == "processes":
                        is_fast &= i < len(KINDS)
                    elif i >= len(KINDS):
                        is_fast &= problem.name not in IN_MAPS
                    yield pytest.param(
                        i,
                        kind,
                        with_sigma,
                        scheduler,
                        id=f"{scheduler}-{problem.name}-{kind}-{weights}",
                        marks=[] if is_fast else [pytest.mark.slow],
                    )


@pytest.mark.parametrize(
    ("i_problem", "kind", "with_sigma", "scheduler"), list(combinations()), indirect=["scheduler"]
)
def test_agrees_with_scipy(
    i_problem: int, kind: str, with_sigma: bool, scheduler: str, as_kind: Any
) -> None:
    problem = PROBLEMS[i_problem]
    sigma = as_kind(kind, problem.sigma) if with_sigma else None
    # On processes, where passes of so few rows are slow, the sample is all of them.
    options = STREAMED if scheduler == "threads" else PIECES
    result = fit(
        problem.model,
        as_kind(kind, problem.x),
        as_kind(kind, problem.y),
        problem.start,
        sigma=sigma,
        absolute_sigma=with_sigma,
        **options,
    )
    assert_same(result, *reference(i_problem, with_sigma))
    assert result.n_points == len(problem.y)


@functools.cache
def separable_reference() -> tuple[np.ndarray, np.ndarray]:
    time, latitude, longitude, y = separable_data()
    grid = np.broadcast_arrays(
        time[:, None, None], latitude[None, :, None], longitude[None, None, :]
    )
    return scipy_fit(separable, tuple(g.ravel() for g in grid), y.ravel(), SEPARABLE_START)


@pytest.mark.parametrize("kind", KINDS)
def test_separable_model_with_broadcast_coordinates(
    kind: str, scheduler: str, as_kind: Any
) -> None:
    time, latitude, longitude, y = separable_data()
    x_data: Any
    y_data: Any
    if kind == "xarray":
        coords = {"time": time, "latitude": latitude, "longitude": longitude}
        y_data = xr.DataArray(y, coords=coords, dims=list(coords)).chunk(
            time=17, latitude=10, longitude=29
        )
        x_data = ("time", "latitude", "longitude")
    else:
        x_data = (time[:, None, None], latitude[:, None], longitude)
        y_data = as_kind(kind, y)
    result = fit(separable, x_data, y_data, SEPARABLE_START, **STREAMED)
    assert_same(result, *separable_reference())


LOW = [0.0, 0.0, 0.0, -5.0, 0.25]  # the slope's truth is 0.2
HIGH = [10.0, 10.0, 5.0, 5.0, 1.0]
BOUNDED_START = (3.0, 2.6, 0.9, 0.5, 0.5)


@functools.cache
def bounded_reference(with_sigma: bool) -> np.ndarray:
    problem, bounds = PROBLEMS[2], (LOW, HIGH)
    options = {"sigma": problem.sigma, "absolute_sigma": True} if with_sigma else {}
    return scipy_fit(problem.model, problem.x, problem.y, BOUNDED_START, bounds=bounds, **options)[
        0
    ]


@pytest.mark.parametrize("with_sigma", [False, True], ids=["unweighted", "sigma"])
@pytest.mark.parametrize("kind", ["numpy", "zarr"])
def test_a_bound_that_is_active(kind: str, with_sigma: bool, scheduler: str, as_kind: Any) -> None:
    problem = PROBLEMS[2]
    popt = bounded_reference(with_sigma)
    options: dict[str, Any] = {}
    if with_sigma:
        options = {"sigma": as_kind(kind, problem.sigma), "absolute_sigma": True}
    result = fit(
        problem.model,
        as_kind(kind, problem.x),
        as_kind(kind, problem.y),
        BOUNDED_START,
        (LOW, HIGH),
        **STREAMED,
        **options,
    )
    assert result.success
    assert result.popt[4] == 0.25
    np.testing.assert_array_equal(result.active_mask, [0, 0, 0, 0, -1])
    assert "b" in result.message
    np.testing.assert_allclose(result.popt[:4], popt[:4], rtol=1e-6)


def wide(x: Any, height: Any, slope: Any, rate: Any, floor: Any) -> Any:
    return height * jnp.exp(-rate * x) + slope * 1e9 * x + floor


WIDE_TRUTH = np.array([1e6, 1e-6, 3.0, 20.0])


@functools.cache
def wide_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 10, 40_000)
    height, slope, rate, floor = WIDE_TRUTH
    y = height * np.exp(-rate * x) + slope * 1e9 * x + floor
    return x, y + 10.0 * rng.standard_normal(len(x))


@functools.cache
def wide_reference(factor: float) -> tuple[np.ndarray, np.ndarray]:
    return scipy_fit(wide, *wide_data(), WIDE_TRUTH * factor)


@pytest.mark.parametrize("strategy", ["auto", "bounds", "p0", "none"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_parameters_over_twelve_orders_of_magnitude(strategy: str, factor: float) -> None:
    bounds = ([0, 0, 0, -1e3], [1e7, 1e-4, 50, 1e3]) if strategy in ("auto", "bounds") else None
    config = nd.HybridStreamingConfig(normalization_strategy=strategy, sample_rows=5_000, verbose=0)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(wide, *wide_data(), WIDE_TRUTH * factor, bounds)
    assert_same(result, *wide_reference(factor))
    assert optimizer.normalizer is not None
    assert optimizer.normalizer.strategy == (strategy if strategy != "auto" else "bounds")
