"""Every argument of ``fit_each``, and every option that acts there, changes what can be seen.

``python -m tests.test_map_options`` lists them with the tests that show them.
"""

from __future__ import annotations

import inspect
import re
import signal
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from scipy.optimize import curve_fit

import nlsq_dask as nd
from nlsq_dask import HybridStreamingConfig as Config
from nlsq_dask.events import Event, TileFinished
from nlsq_dask.maps.problem.arguments import OPTIONS, validate_map_arguments
from tests.clocks import patch_retries
from tests.shown import Shown, assert_is_there

OPTIONS_PAGE = Path(__file__).parents[1] / "docs" / "options.md"
DATA = {"config", "model", "x_data", "y_data"}
ARGUMENTS = inspect.signature(validate_map_arguments).parameters.keys() - DATA

_MAPS = "tests/test_maps.py"
COVERED_ELSEWHERE = {
    "p0": f"{_MAPS}::test_start_values_and_bounds_vary_over_the_map",
    "bounds": f"{_MAPS}::test_start_values_and_bounds_vary_over_the_map",
    "dims": f"{_MAPS}::test_the_layout_of_the_arrays_changes_nothing",
    "sigma": f"{_MAPS}::test_sigma_of_each_point",
    "loss": f"{_MAPS}::test_each_pixel_is_fitted_as_by_scipy",
    "f_scale": f"{_MAPS}::test_each_pixel_is_fitted_as_by_scipy",
    "param_names": f"{_MAPS}::test_each_pixel_is_fitted_as_by_scipy",
    "nan_policy": f"{_MAPS}::test_failed_pixels_raise_if_asked_for",
    "errors": f"{_MAPS}::test_failed_pixels_raise_if_asked_for",
    "gauss_newton_max_iterations": f"{_MAPS}::test_failed_pixels_raise_if_asked_for",
    "fixed": f"{_MAPS}::test_parameters_are_fixed_by_numbers_and_by_maps",
    "ties": f"{_MAPS}::test_a_tied_parameter_has_the_error_of_its_function",
    "guess": f"{_MAPS}::test_a_guess_replaces_the_start",
    "store": "tests/test_map_resume.py::test_a_store_is_the_result",
    "log_file": "tests/test_map_watching.py::test_lines_of_json",
    "log_frequency": "tests/test_map_watching.py::test_lines_in_a_file",
    "max_walltime": "tests/test_map_resume.py::test_max_walltime_in_the_middle",
    "dashboard": "tests/test_dashboard.py::test_a_map_on_the_page_and_in_the_metrics",
}
NOT_YET: dict[str, str] = {}

SHOWN = Shown(
    "tests/test_map_options.py", sorted({*ARGUMENTS, *OPTIONS}), COVERED_ELSEWHERE, NOT_YET
)
shows = SHOWN.shows


def test_nothing_is_without_a_test() -> None:
    assert SHOWN.table()[1] == []


@pytest.mark.parametrize("name", COVERED_ELSEWHERE)
def test_tests_elsewhere_are_there(name: str) -> None:
    assert_is_there(name, COVERED_ELSEWHERE[name])


# --- one small cube

T = np.linspace(0.0, 3.0, 40)
P0 = {"a": 2.0, "b": 1.0}


def decay(t: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-b * t)


@pytest.fixture(scope="module")
def cube() -> xr.DataArray:
    """Noise that falls with time; pixel (0, 0) has no data, and (0, 1) seven points."""
    rng = np.random.default_rng(3)
    a, b = rng.uniform(1.5, 2.5, (4, 6)), rng.uniform(0.8, 1.2, (4, 6))
    noise = 0.1 * np.exp(-T)[:, None, None] * rng.standard_normal((40, 4, 6))
    y = a * np.exp(-b * T[:, None, None]) + noise
    y[:, 0, 0] = y[7:, 0, 1] = np.nan
    return xr.DataArray(y, {"t": T}, dims=("t", "row", "col"))


def fit_each(y: Any, p0: Any = P0, config: Config | None = None, **arguments: Any) -> xr.Dataset:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    ds: xr.Dataset = optimizer.fit_each(decay, "t", y, p0, dims="t", **arguments)
    return ds


@pytest.fixture(scope="module")
def fitted(cube: xr.DataArray) -> xr.Dataset:
    return fit_each(cube, covariance="full")


def distance(one: xr.Dataset, other: xr.Dataset) -> float:
    """Return the largest difference of parameters, in standard errors."""
    np.testing.assert_array_equal(one.status, other.status)
    return float(np.abs((one.popt - other.popt) / other.perr).max())


# --- arguments


@shows("verbose")
def test_what_is_printed(cube: xr.DataArray, capsys: pytest.CaptureFixture[str]) -> None:
    fit_each(cube, verbose=0)
    fit_each(cube.chunk())
    assert not capsys.readouterr().out
    fit_each(cube)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "Fitting a, b to 24 pixels of 40 points in 1 tile"
    assert last.endswith(": 23 converged, 1 no_data")
    fit_each(cube, verbose=2)
    assert "  24 of 24 pixels, 1 of 1 tile, " in capsys.readouterr().out


@shows("covariance")
def test_what_is_returned_of_the_covariance(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    t, y = T, cube[:, 2, 3].values
    _, expected = curve_fit(lambda t, a, b: a * np.exp(-b * t), t, y, [2.0, 1.0], xtol=1e-14)
    np.testing.assert_allclose(fitted.pcov[2, 3], expected, rtol=1e-5)
    errors, nothing = fit_each(cube), fit_each(cube, covariance=None)
    assert fitted.keys() - errors.keys() == {"pcov"}
    assert errors.keys() - nothing.keys() == {"perr"}
    xr.testing.assert_identical(fitted.drop_vars(["pcov", "cov_i", "cov_j"]), errors)


@shows("absolute_sigma")
def test_the_scale_of_the_errors(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    absolute = fit_each(cube, absolute_sigma=True)
    scale = np.sqrt(fitted.reduced_chi2)
    np.testing.assert_allclose(absolute.perr * scale, fitted.perr, rtol=1e-12)


@shows("min_points")
def test_how_many_points_a_fit_needs(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    assert fitted.n_points[0, 1] == 7
    assert fitted.status[0, 1] == 1
    least = fit_each(cube, min_points=7)
    xr.testing.assert_equal(least.popt, fitted.popt)
    more = fit_each(cube, min_points=8)
    assert more.status[0, 1] == -2
    assert np.isnan(more.popt[0, 1]).all()
    xr.testing.assert_equal(more.popt[1:], fitted.popt[1:])


# --- options of the solver


@shows("cov_type")
def test_sandwich_covariance(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    """By the formula, with the variance of the noise that is not constant."""
    a, b = fitted.popt[1, 2].values
    e = np.exp(-b * T)
    jacobian = np.column_stack([e, -a * T * e])
    residual = a * e - cube[:, 1, 2].values
    bread = np.linalg.inv(jacobian.T @ jacobian)
    expected = bread @ (jacobian.T * residual**2 @ jacobian) @ bread
    for cov_type, factor in (("HC0", 1.0), ("HC1", 40 / 38)):
        ds = fit_each(cube, config=Config(cov_type=cov_type), covariance="full")
        np.testing.assert_allclose(ds.pcov[1, 2], factor * expected, rtol=1e-5)
        assert distance(ds, fitted) < 1e-5
    assert not np.allclose(expected, fitted.pcov[1, 2], rtol=0.1)


@shows("precision")
def test_precision(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    ds = fit_each(cube, config=Config(precision="float32"))
    assert ds.popt.dtype == ds.perr.dtype == "float32"
    assert 0 < distance(ds, fitted) < 0.02


@shows("gauss_newton_tol")
def test_a_loose_tolerance_ends_sooner(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    ds = fit_each(cube, config=Config(gauss_newton_tol=1e-5))
    assert int(ds.n_iterations.sum()) < int(fitted.n_iterations.sum())
    assert 0 < distance(ds, fitted) < 1e-3


@shows("chunk_size")
def test_how_many_pixels_a_call_of_the_kernel_gets(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    few = Config(chunk_size=8 * T.size)
    assert distance(fit_each(cube, config=few), fitted) < 1e-6
    peaks = [
        nd.AdaptiveHybridStreamingOptimizer(config).plan(decay, "t", cube, dims="t").peak_memory
        for config in (few, Config())
    ]
    assert peaks[0] < peaks[1]


@shows("random_seed")
def test_the_seed_of_the_pooled_start(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    one, same, other = (fit_each(cube, None, Config(random_seed=seed)) for seed in (1, 1, 2))
    xr.testing.assert_identical(one, same)
    assert not one.identical(other)
    assert distance(one, fitted) < 1e-5 > distance(other, fitted)


# --- options of reading


class Flaky:
    """An array whose first column of chunks cannot be read the first times."""

    def __init__(self, values: np.ndarray, failures: int, error: type[Exception]) -> None:
        self.values, self.failures, self.error = values, failures, error
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim
        self.reads: Counter[bool] = Counter()

    def __getitem__(self, index: Any) -> Any:
        is_first = index[1].start == 0
        self.reads[is_first] += 1
        if is_first and self.reads[True] <= self.failures:
            raise self.error("the store does not answer")
        return self.values[index]


def from_flaky(
    cube: xr.DataArray, failures: int, error: type[Exception] = OSError, **options: Any
) -> tuple[Flaky, xr.Dataset]:
    """Return the array, and the fits of its two tiles."""
    flaky = Flaky(cube.values, failures, error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_PIXELS", 1)
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_POINTS", 1)
        chunks = (40, 2, 6)
        lazy = da.from_array(flaky, chunks, name=False, meta=np.empty(0), asarray=False)
        ds = fit_each(cube.copy(data=lazy), config=Config(**options))
    return flaky, ds


@shows("enable_fault_tolerance", "max_retries_per_batch")
def test_how_often_reading_is_tried(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    flaky, ds = from_flaky(cube, failures=2)
    with dask.config.set(scheduler="synchronous"):
        assert distance(ds.compute(), fitted) < 1e-6
        assert flaky.reads == {True: 3, False: 1}
        for options in ({"max_retries_per_batch": 1}, {"enable_fault_tolerance": False}):
            flaky, ds = from_flaky(cube, failures=2, **options)
            with pytest.raises(
                nd.BlockReadError, match=r"y_data could not .* the store does not answer"
            ):
                ds.compute()
            assert flaky.reads[True] == (2 if "max_retries_per_batch" in options else 1)


@shows("retry_seconds")
def test_an_outage_is_waited_out(
    cube: xr.DataArray, fitted: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = patch_retries(monkeypatch)
    with dask.config.set(scheduler="synchronous"):
        flaky, ds = from_flaky(cube, 5, TimeoutError, max_retries_per_batch=0)
        assert distance(ds.compute(), fitted) < 1e-6
        assert flaky.reads[True] == 6
        began = clock.now
        flaky, ds = from_flaky(cube, 5, TimeoutError, retry_seconds=0.2)
        with pytest.raises(nd.BlockReadError, match=r"after 3 attempts in block .*TimeoutError"):
            ds.compute()
        assert clock.now - began == pytest.approx(0.2)


@shows("min_success_rate")
def test_pixels_that_cannot_be_read(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    _, ds = from_flaky(cube, failures=99, min_success_rate=0.4)
    ds = ds.compute()
    assert (ds.status[:2] == -6).all()
    assert np.isnan(ds.popt[:2]).all()
    assert (ds.n_points[:2] == 0).all()
    assert distance(ds[["popt", "status"]].isel(row=[2, 3]), fitted.isel(row=[2, 3])) < 1e-6


# --- an option that ends an eager call early


@shows("stop_on_sigterm")
def test_sigterm_ends_the_call(cube: xr.DataArray, fitted: xr.Dataset) -> None:
    """After the first of two tiles."""

    def observe(event: Event) -> None:
        if isinstance(event, TileFinished):
            signal.raise_signal(signal.SIGTERM)

    optimizer = nd.AdaptiveHybridStreamingOptimizer(
        Config(stop_on_sigterm=True), observers=[observe]
    )
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="synchronous"):
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_PIXELS", 12)
        patch.setattr("nlsq_dask.maps.problem.tiles._MIN_POINTS", 1)
        with pytest.warns(UserWarning, match="stopped because SIGTERM was received"):
            ds = optimizer.fit_each(decay, "t", cube, P0, dims="t")
    is_done = ds.status != -7
    assert 0 < int(is_done.sum()) < 24
    assert distance(ds.where(is_done), fitted.where(is_done)) < 1e-6
    assert ds.popt.where(~is_done).isnull().all()


# --- the page of options


def columns() -> dict[str, tuple[str, str]]:
    """Return the columns of ``fit`` and ``fit_each`` by option, as the page has them."""
    rows = re.findall(
        r"^\| (`.*?) \| .*? \| (yes|no) \| (yes|no) \|", OPTIONS_PAGE.read_text(), re.M
    )
    listed = [(name, where) for names, *where in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(listed) == len(dict(listed)), "an option has two rows"
    return {name: (where[0], where[1]) for name, where in listed}


def test_the_page_says_where_each_option_acts() -> None:
    assert columns() == {
        option.name: ("yes", "yes" if option.name in OPTIONS else "no") for option in fields(Config)
    }


CHANGED = {
    "normalization_strategy": "p0",
    "active_switching_criteria": ["plateau"],
    "lbfgs_line_search": "backtracking",
    "gradient_clip_value": 1.0,
    "gauss_newton_solver": "qr",
    "group_variance_indices": [(0, 2)],
    "residual_weights": [1.0],
    "cache": 0,
    "checkpoint_dir": "unused",
    "resume_from_checkpoint": "unused",
    "multistart_sampler": "sobol",
    "sample_rows": 10,
}
TOGETHER = {
    "enable_group_variance_regularization": "group_variance_indices",
    "enable_residual_weighting": "residual_weights",
}


@pytest.mark.parametrize("name", [o.name for o in fields(Config) if o.name not in OPTIONS])
def test_an_option_that_does_not_act_is_refused(cube: xr.DataArray, name: str) -> None:
    default = getattr(Config(), name)
    by_type = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2}
    value = CHANGED[name] if name in CHANGED else by_type[type(default)](default)
    options = {name: value}
    for switch, needed in TOGETHER.items():
        if name in (switch, needed):
            options = {switch: True, needed: CHANGED[needed]}
    with pytest.raises(ValueError, match=rf"^fit_each does not use .*\b{name}="):
        fit_each(cube, config=Config(**options))


if __name__ == "__main__":
    listed, without = SHOWN.table()
    for name, test in listed:
        print(f"{name:<38}{test}")
    if without:
        sys.exit(f"listed not once, or no argument or option: {', '.join(without)}")
