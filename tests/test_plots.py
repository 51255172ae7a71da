"""What is drawn, read back from the artists; what notebooks show, read back from the HTML."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import pickle
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import dask.array as da
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import dates as mdates
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import nlsq_dask as nd
from nlsq_dask.data.alignment import align
from nlsq_dask.results.datasets import row_sample
from nlsq_dask.results.saving import MissingModel
from nlsq_dask.rows.rows import Rows
from tests import problems
from tests.problems import NO_WARMUP, exponential, fading

CONFIG = nd.HybridStreamingConfig(verbose=0, sample_rows=3_000, **NO_WARMUP)


fit = functools.partial(problems.fit, config=CONFIG)


@pytest.fixture(scope="module", autouse=True)
def _agg() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def _no_figure_stays() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


def noisy(n: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 10, n)
    sigma = rng.uniform(0.05, 0.3, n)
    return x, 3 * np.exp(-0.5 * x) + 1 + sigma * rng.standard_normal(n), sigma


@pytest.fixture(scope="module")
def few() -> nd.FitResult:
    """90 points with their errors, two of them left out."""
    x, y, sigma = noisy(90)
    y[[3, 50]] = np.nan
    return fit(exponential, x, y, [1, 1, 0], sigma=sigma, nan_policy="omit")


@pytest.fixture(scope="module")
def many() -> nd.FitResult:
    """8,000 points without errors, three of them far out."""
    x, _, _ = noisy(8_000)
    y = decay_of(x) + 0.1 * np.random.default_rng(2).standard_normal(len(x))
    y[::400] += 5.0
    return fit(exponential, x, y, [2, 1, 0], loss="soft_l1", f_scale=0.1)


def decay_of(x: Any) -> Any:
    return 3 * np.exp(-0.5 * x) + 1


@pytest.fixture(scope="module")
def cube() -> nd.FitResult:
    """A record of three dimensions, with a bad block and one without values."""
    rng = np.random.default_rng(3)
    time, latitude = np.linspace(0, 5, 40), np.linspace(-2, 2, 30)
    y = 2 * np.exp(-0.7 * time[:, None, None]) + 0.5 * latitude[:, None] + np.zeros((40, 30, 20))
    y += 0.1 * rng.standard_normal(y.shape)
    y[10:20, 15:20, 10:20] += 0.4
    y[30:40, 0:5, :] = np.nan
    record = xr.DataArray(
        y,
        {
            "time": ("time", time, {"units": "h"}),
            "lat": ("lat", latitude, {"long_name": "latitude", "units": "degrees"}),
        },
        dims=("time", "lat", "lon"),
        name="signal",
        attrs={"units": "V"},
    ).chunk(time=10, lat=5, lon=10)
    return fit(fading, ("time", "lat"), record, [1, 1, 0], nan_policy="omit")


def axes_of(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.axison]


def line(axes: Any, label: str) -> Any:
    return next(one for one in axes.lines if one.get_label() == label)


def levels_of(panel: Any) -> list[float]:
    """Return where lines lie across a whole panel of residuals."""
    return [float(one.get_ydata()[1]) for one in panel.lines if list(one.get_xdata()) == [0, 1]]


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# --- the rows that are kept


def test_the_sample_holds_rows_that_were_used(few: nd.FitResult) -> None:
    x, y, sigma = noisy(90)
    sample = few.sample
    assert sample is not None
    assert dict(sample.sizes) == {"row": 88}
    kept = np.searchsorted(np.sort(x), sample.x)
    order = np.argsort(x)
    np.testing.assert_array_equal(y[order][kept], sample.y_data)
    np.testing.assert_array_equal(sigma[order][kept], sample.sigma)
    np.testing.assert_allclose(sample.fitted, few.predict(sample.x.values), rtol=1e-14)
    assert "sample" in few.keys()  # noqa: SIM118  a result is not iterable


def test_the_sample_is_small_and_the_same_each_time(many: nd.FitResult) -> None:
    assert many.sample is not None
    assert many.sample.sizes["row"] == 2_000
    x, _, _ = noisy(8_000)
    y = decay_of(x) + 0.1 * np.random.default_rng(2).standard_normal(len(x))
    y[::400] += 5.0
    again = fit(exponential, x, y, [2, 1, 0], loss="soft_l1", f_scale=0.1)
    xr.testing.assert_identical(many.sample, again.sample)


def test_the_sample_has_the_names_of_the_data(cube: nd.FitResult) -> None:
    sample = cube.sample
    assert sample is not None
    assert list(sample.data_vars) == ["y_data", "fitted", "time", "lat"]
    assert sample.lat.attrs["long_name"] == "latitude"
    assert sample.y_data.attrs == {"long_name": "signal", "units": "V"}


def test_names_that_the_sample_needs_itself_are_changed() -> None:
    x, y, sigma = noisy(50)
    blocks = align({"sigma": x, "y": x**2, "row": x}, y, sigma)
    sample = row_sample(Rows(y, (x, x**2, x), sigma), y, blocks)
    assert list(sample.data_vars) == ["y_data", "fitted", "sigma", "x_sigma", "y", "x_row"]
    same = xr.DataArray(x, dims="row", name="t")
    sample = row_sample(Rows(y, (x, x)), y, align((same, same), y))
    assert list(sample.data_vars) == ["y_data", "fitted", "t", "t_3"]


def test_no_array_takes_the_name_of_another() -> None:
    x, y, _ = noisy(50)
    columns = [i * x for i in range(5)]
    named = [
        xr.DataArray(column, dims="row", name=name)
        for column, name in zip(columns, ("s_4", "s", "s", "s", "s_6"), strict=True)
    ]
    sample = row_sample(Rows(y, tuple(columns)), y, align(tuple(named), y))
    assert len(set(sample.data_vars)) == 7
    for array in sample.data_vars.values():
        if "position" in array.attrs:
            np.testing.assert_array_equal(array, columns[array.attrs["position"]])


def test_names_that_files_refuse(tmp_path: Path) -> None:
    x, y, _ = noisy(50)
    blocks = align({"m/s": x, "m_s": x, "a/b": xr.DataArray(x, attrs={"long_name": "ratio"})}, y)
    sample = row_sample(Rows(y, (x, x, x)), y, blocks)
    assert list(sample.data_vars)[2:4] == ["m_s", "m_s_3"]
    assert [sample[name].attrs["long_name"] for name in list(sample)[2:]] == ["m/s", "m_s", "ratio"]
    sample.to_zarr(tmp_path / "sample.zarr", zarr_format=2)


# --- result.plot()


def test_points_curve_and_band(few: nd.FitResult) -> None:
    figure = few.plot()
    assert isinstance(figure, Figure)
    upper, lower, across = axes_of(figure)
    sample = few.sample
    assert sample is not None
    container = upper.containers[0]
    np.testing.assert_array_equal(container.lines[0].get_xdata(), sample.x)
    np.testing.assert_array_equal(container.lines[0].get_ydata(), sample.y_data)
    bars = container.lines[2][0].get_segments()
    one = np.sqrt(few.sigma_sq)  # sigma is not absolute
    np.testing.assert_allclose(np.ptp([bar[:, 1] for bar in bars], axis=1), 2 * one * sample.sigma)
    curve = line(upper, "fit")
    values, std = few.predict(curve.get_xdata(), return_std=True)
    np.testing.assert_allclose(curve.get_ydata(), values)
    # The spread of a measurement is not the same for all.
    assert legend(upper) == ["data", "± 2 standard errors of the fit", "fit"]
    corners = upper.collections[1].get_paths()[0].vertices
    highest = [corners[corners[:, 0] == x, 1].max() for x in curve.get_xdata()[1:-1]]
    np.testing.assert_allclose(highest, (values + 2 * std)[1:-1])
    residuals = (sample.y_data - sample.fitted) / sample.sigma
    np.testing.assert_allclose(lower.lines[0].get_ydata(), residuals)
    levels = levels_of(lower)
    assert levels == pytest.approx([0, -one, one])
    assert lower.get_xlabel() == "x"
    assert lower.get_ylabel() == "(data − fit) / σ"  # noqa: RUF001
    assert sum(patch.get_width() for patch in across.patches) == pytest.approx(1)
    assert figure.get_suptitle().startswith("exponential: 88 points")


def test_many_rows_with_outliers(many: nd.FitResult) -> None:
    upper, lower, _ = axes_of(many.plot())
    assert legend(upper)[0] == "data (2,000 of 8,000 rows)"
    assert "± 2 s.d. of a measurement" in legend(upper)
    sample = many.sample
    assert sample is not None
    n_far = int((sample.y_data - sample.fitted > 2.0).sum())
    assert f"{n_far} beyond" in [text.get_text() for text in lower.texts]
    assert lower.get_ylim()[1] < 1.5
    # The outliers do not widen the lines of one standard deviation.
    assert levels_of(lower) == pytest.approx([0, -0.1, 0.1], abs=0.01)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_sigma_that_is_far_too_small(absolute: bool) -> None:
    """Band, error bars, lines and density tell of one spread, and the histogram stays readable."""
    x = np.linspace(0, 10, 400)
    y = decay_of(x) + 0.5 * np.random.default_rng(5).standard_normal(400)
    sigma = np.full(400, 0.005)
    result = fit(exponential, x, y, [2, 1, 0], sigma=sigma, absolute_sigma=absolute)
    upper, lower, across = axes_of(result.plot())
    spread = 0.005 if absolute else 0.005 * np.sqrt(result.sigma_sq)
    curve = line(upper, "fit").get_ydata()
    corners = upper.collections[0].get_paths()[0].vertices
    assert corners[:, 1].max() == pytest.approx((curve + 2 * spread).max(), rel=0.02)
    assert levels_of(lower)[2] == pytest.approx(spread / 0.005)
    tallest = max(bar.get_width() for bar in across.patches)
    assert tallest < across.get_xlim()[1] < 2.5 * tallest
    density = line(across, "normal").get_xdata()
    assert (density.max() > 10 * tallest) == absolute


def test_weights_without_sigma() -> None:
    rng = np.random.default_rng(6)
    group, t = np.repeat([0, 1], 60), np.tile(np.linspace(0, 5, 60), 2)
    noise = 0.01 * np.where(group == 0, 0.1, 1.0)
    y = 2 * np.exp(-t) + noise * rng.standard_normal(120)
    config = dataclasses.replace(
        CONFIG, enable_residual_weighting=True, residual_weights=(100.0, 1.0)
    )

    def model(x: Any, a: Any, b: Any) -> Any:
        return a * jnp.exp(-b * x[1])

    result = fit(model, (group, t), y, [1, 1.5], config=config)
    sample = result.sample
    assert sample is not None
    np.testing.assert_allclose(np.unique(sample.sigma), [0.1, 1])
    *_, panel = axes_of(result.plot())
    assert levels_of(panel) == pytest.approx([0, -0.01, 0.01], rel=0.2)


def test_several_quantities(cube: nd.FitResult) -> None:
    observed, across, *panels = axes_of(cube.plot())
    sample = cube.sample
    assert sample is not None
    np.testing.assert_array_equal(observed.lines[0].get_xdata(), sample.fitted)
    np.testing.assert_array_equal(observed.lines[0].get_ydata(), sample.y_data)
    diagonal = line(observed, "data = fit")
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert observed.get_ylabel() == "signal (V)"
    assert [panel.get_xlabel() for panel in panels] == ["time (h)", "latitude (degrees)"]
    assert across.get_xlabel() == panels[0].get_ylabel() == "data − fit"  # noqa: RUF001


def test_one_of_several_quantities(cube: nd.FitResult) -> None:
    upper, lower, _ = axes_of(cube.plot(x="lat"))
    mean = line(upper, "mean of the fit")
    sample = cube.sample
    assert sample is not None
    expected = sample.fitted.groupby(sample.lat).mean()
    np.testing.assert_allclose(mean.get_xdata(), expected.lat)
    np.testing.assert_allclose(mean.get_ydata(), expected)
    assert lower.get_xlabel() == "latitude (degrees)"
    with pytest.raises(ValueError, match=r"x must be one of 'time', 'lat', or None; got 'lon'\."):
        cube.plot(x="lon")


def test_columns_of_a_table() -> None:
    rng = np.random.default_rng(4)
    table = rng.uniform(-1, 1, (300, 8))

    def plane(x: Any, *p: Any) -> Any:
        return x @ jnp.stack(p)

    names = [f"p{i}" for i in range(8)]
    y = table @ np.arange(8) + 0.1 * rng.standard_normal(300)
    result = fit(plane, table, y, np.zeros(8), param_names=names)
    figure = result.plot()
    panels = axes_of(figure)[2:]
    assert [panel.get_xlabel() for panel in panels] == [f"x[{i}]" for i in range(6)]
    assert "6 of 8 x are shown" in figure.get_suptitle()
    assert axes_of(result.plot(x="x[7]"))[1].get_xlabel() == "x[7]"


@pytest.mark.parametrize("years", [0.1, 1.9, 41.0])
@pytest.mark.parametrize("n_quantities", [1, 3])
def test_dates_do_not_run_into_each_other(n_quantities: int, years: float) -> None:
    t = np.datetime64("1979-01-17") + np.linspace(0, years * 31_556_952, 200).astype("m8[s]")
    others = [np.linspace(i, 10, 200) for i in range(1, n_quantities)]
    result = fit(
        lambda x, a: a * (x if n_quantities == 1 else x[-1]),
        (t, *others)[:n_quantities] if others else t,
        np.linspace(1, 2, 200),
        [1.0],
    )
    figure = result.plot()
    figure.canvas.draw()
    axes = next(axes for axes in figure.axes if axes.get_xlabel().startswith("x"))
    assert isinstance(axes.xaxis.get_major_formatter(), mdates.ConciseDateFormatter)
    low, high = axes.get_xlim()
    ticks = [t for t in axes.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    assert len(boxes) >= 2
    assert all(one.x1 < next_one.x0 for one, next_one in itertools.pairwise(boxes))


@pytest.mark.parametrize("calendar", ["standard", "noleap"])
def test_dates(calendar: str) -> None:
    if calendar == "standard":
        t: Any = np.datetime64("2020-01-01") + np.arange(60) * np.timedelta64(1, "D")
    else:
        t = xr.date_range("2020-01-01", periods=60, calendar=calendar, use_cftime=True)
    y = xr.DataArray(np.random.default_rng(0).normal(5, 1, 60), {"time": t}, dims="time")
    result = fit(lambda x, a: a + 0.0 * x, "time", y, [1])
    lower = axes_of(result.plot())[1]
    if calendar == "standard":
        assert isinstance(lower.xaxis.get_major_formatter(), mdates.ConciseDateFormatter)
        assert mdates.num2date(lower.lines[0].get_xdata().min()).date() == t[0].astype(object)
        assert lower.get_xlabel() == "time"
    else:
        assert lower.get_xlabel() == "time (days since 1970-01-01, calendar noleap)"


def test_a_dollar_is_not_mathematics() -> None:
    """``$x_$`` cannot be typeset, so that drawing it as mathematics is an error."""
    rng = np.random.default_rng(7)
    time, table = np.linspace(0, 5, 60), pd.DataFrame({"$a_$": rng.uniform(0, 1, 60), "b": 1.0})
    cost = {"long_name": "cost $x_$", "units": "$_$"}
    y = xr.DataArray(rng.normal(5, 1, (60, 4)), dims=("$x_$", "$y_$"), attrs=cost)
    given = xr.DataArray(np.tile(time[:, None], 4), dims=y.dims, name="$t_$")

    def flat(x: Any, a: Any) -> Any:
        return a + 0.0 * x

    flat.__name__ = "$f_$"
    result = fit(flat, given, y.chunk({"$x_$": 20, "$y_$": 2}), [1])
    upper, lower, _ = (figure := result.plot()).axes
    figure.canvas.draw()
    assert upper.get_ylabel() == r"cost \$x_\$ (\$_\$)"
    assert lower.get_xlabel() == r"\$t_\$"
    assert figure.get_suptitle().startswith(r"\$f_\$: ")
    for dims in (None, "$x_$"):
        (figure := result.plot_blocks(dims=dims)).canvas.draw()
        assert r"\$x_\$ (position)" in (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())
    result.plot_history().canvas.draw()

    def plane(x: Any, a: Any, b: Any) -> Any:
        return a * x[:, 0] + b

    of_columns = fit(plane, table, table["$a_$"] + 0.1 * rng.normal(size=60), [1, 0])
    for x in (None, "$a_$"):
        (figure := of_columns.plot(x=x)).canvas.draw()
        assert r"\$a_\$" in [axes.get_xlabel() for axes in figure.axes]


def test_draws_into_a_given_figure(few: nd.FitResult) -> None:
    given = Figure()
    left, right = given.subfigures(1, 2)
    assert few.plot(figure=left) is left
    assert few.plot_history(figure=right) is right
    assert left.axes
    assert not plt.get_fignums()
    with pytest.raises(TypeError, match="figure must be a matplotlib Figure"):
        few.plot(figure=few)  # type: ignore[arg-type]


def test_without_a_model_or_a_covariance(few: nd.FitResult) -> None:
    model = dataclasses.replace(few._model, function=MissingModel("decay", "", {}))
    bare = dataclasses.replace(few, _model=model, _root=None)
    upper = axes_of(bare.plot())[0]
    sample = few.sample
    assert sample is not None
    np.testing.assert_array_equal(line(upper, "fit").get_xdata(), np.unique(sample.x))
    assert legend(upper) == ["data", "fit"]
    undetermined = dataclasses.replace(few, pcov=np.full((3, 3), np.inf))
    assert legend(axes_of(undetermined.plot())[0]) == ["data", "fit"]


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_next_to_no_rows(n: int) -> None:
    """Neither a spread nor a covariance; x and y of any size, in float32."""
    x = np.array([1e6, 2e-6], np.float32)[:n]
    with pytest.warns(Warning, match="Covariance"):
        result = fit(lambda x, a, b: a + b * x, x, x, [1, 1])
    figure = result.plot()
    figure.canvas.draw()
    assert legend(axes_of(figure)[0])[0] == "data"
    result.plot_blocks().canvas.draw()


def test_a_failed_fit_says_so(few: nd.FitResult) -> None:
    figure = dataclasses.replace(few, success=False).plot()
    assert figure.get_suptitle().startswith("FIT FAILED")


def test_nothing_to_plot(few: nd.FitResult) -> None:
    empty = dataclasses.replace(
        few, sample=None, block_statistics=None, history=few.history.isel(iteration=slice(0))
    )
    with pytest.raises(ValueError, match="nothing to plot: this result holds no rows"):
        empty.plot()
    with pytest.raises(ValueError, match="nothing to plot: no iteration was recorded"):
        empty.plot_history()
    with pytest.raises(ValueError, match=r"nothing to plot: .* no pass over all rows"):
        empty.plot_blocks()
    assert not plt.get_fignums()


def test_without_matplotlib(few: nd.FitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (few.plot, few.plot_history, few.plot_blocks):
        with pytest.raises(ImportError, match=r"pip install 'nlsq-dask\[plot\]'"):
            draw()


def test_a_notebook_shows_a_figure_once(few: nd.FitResult, monkeypatch: Any) -> None:
    """The inline backend shows what is open at the end of a cell; so what is shown is closed."""
    figure: Any = few.plot()
    with pytest.raises(NotImplementedError):  # IPython goes on with the other representations
        figure._ipython_display_()
    assert plt.get_fignums()
    monkeypatch.setattr(mpl, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    with pytest.raises(NotImplementedError):
        figure._ipython_display_()
    assert not plt.get_fignums()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_figure_is_shown_once(few: nd.FitResult, copied: Any, monkeypatch: Any) -> None:
    figure = few.plot()
    again = copied(figure)
    monkeypatch.setattr(mpl, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    before = len(plt.get_fignums())
    with pytest.raises(NotImplementedError):
        again._ipython_display_()
    assert len(plt.get_fignums()) == before - 1
    assert plt.fignum_exists(figure.number)


# --- result.plot_history()


def test_history(few: nd.FitResult) -> None:
    n = 7
    stages = ["warm-up"] * 3 + ["sample"] * 2 + ["all rows"] * 2
    history = xr.Dataset(
        {
            "loss": ("iteration", [5.0, 2, 1, 1, 0.9, 1.1, 1.0]),
            "gradient_norm": ("iteration", 10.0 ** -np.arange(n)),
            "step_norm": ("iteration", [1.0, 1, 0.1, 0.01, 0, 0.1, 0.01]),
            "trust_radius": ("iteration", [np.nan] * 3 + [10.0] * 4),
            "accepted": ("iteration", [True] * 4 + [False] + [True] * 2),
            "n_passes": ("iteration", [0] * 5 + [1, 2]),
        },
        {"iteration": [10, 20, 30, 31, 32, 33, 34], "stage": ("iteration", stages)},
    )
    figure = dataclasses.replace(few, history=history, n_passes=3).plot_history()
    figure.canvas.draw()
    loss, slope, step, passes = figure.axes
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 3 + ["linear"]
    for stage, expected in (("warm-up", [5, 2, 1]), ("sample", [1]), ("all rows", [1.1, 1])):
        assert list(line(loss, stage).get_ydata()) == expected
    colors = {line(loss, stage).get_color() for stage in ("warm-up", "sample", "all rows")}
    assert len(colors) == 3
    rejected = line(slope, "rejected trial")
    assert (list(rejected.get_xdata()), rejected.get_marker()) == ([32], "x")
    assert legend(loss) == ["warm-up", "sample", "all rows", "rejected trial"]
    assert legend(step) == ["trust radius"]
    assert list(passes.lines[0].get_ydata()) == [0] * 5 + [1, 2]
    assert figure.get_suptitle() == "34 iterations, 3 passes over all rows"


def test_history_of_a_fit(few: nd.FitResult, cube: nd.FitResult) -> None:
    for result in (few, cube):
        loss = result.plot_history().axes[0]
        drawn = [line(loss, stage) for stage in set(result.history.stage.values)]
        n = sum(len(one.get_xdata()) for one in drawn)
        assert n == int(result.history.accepted.sum())


def test_the_scale_of_a_history_is_that_of_its_values(few: nd.FitResult) -> None:
    """Lines that separate stages lie between 0 and 1 of their axes, which is no loss."""
    history = xr.Dataset(
        {
            "loss": ("iteration", [101.0, 100.0, 100.0]),
            "gradient_norm": ("iteration", [0.02, 0.01, 0.015]),
            "step_norm": ("iteration", [1.0, 1.1, 1.2]),
            "trust_radius": ("iteration", [np.nan, np.nan, 10.0]),
            "accepted": ("iteration", [True] * 3),
            "n_passes": ("iteration", [0, 0, 1]),
        },
        {"iteration": [10, 20, 21], "stage": ("iteration", ["warm-up", "warm-up", "all rows"])},
    )
    axes = dataclasses.replace(few, history=history).plot_history().axes
    assert [one.get_yscale() for one in axes] == ["linear", "linear", "log", "linear"]


@pytest.mark.parametrize("n", [1, 3])
def test_passes_and_iterations_are_counted_in_integers(few: nd.FitResult, n: int) -> None:
    """Where no pass was made, the panel goes from 0 to 1; where one iteration was, beside it."""
    first = few.history.isel(iteration=[0] * n).assign_coords(iteration=10 + np.arange(n))
    figure = dataclasses.replace(few, history=first.assign(n_passes=0 * first.loss)).plot_history()
    figure.canvas.draw()
    passes = figure.axes[-1]
    low, high = passes.get_ylim()
    assert low == 0
    assert 1 < high < 2
    for axis in (passes.xaxis, passes.yaxis):
        left, right = axis.get_view_interval()
        shown = [tick for tick in axis.get_ticklocs() if left <= tick <= right]
        assert shown
        assert all(float(tick).is_integer() for tick in shown)


def test_history_without_anything_positive(few: nd.FitResult) -> None:
    flat = few.history.assign(loss=0.0 * few.history.loss)
    figure = dataclasses.replace(few, history=flat).plot_history()
    figure.canvas.draw()
    assert figure.axes[0].get_yscale() == "linear"


# --- result.plot_blocks()


def test_a_map_of_blocks_with_the_worst_one(cube: nd.FitResult) -> None:
    figure = cube.plot_blocks()
    axes, bar = figure.axes
    (mesh,) = (one for one in axes.collections if hasattr(one, "get_coordinates"))
    found = cube.block_statistics
    assert found is not None
    expected = found.reduced_chi2.max("lon")
    np.testing.assert_array_equal(mesh.get_array().filled(np.nan), expected)
    assert mesh.get_array().mask[3, 0]
    assert "no rows were used" in legend(axes)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("lat (position)", "time (position)")
    assert axes.get_xlim() == (0, 30)
    assert axes.get_ylim() == (40, 0)
    title = axes.get_title()
    assert "maximum over lon" in title
    assert "in the block from time 10, lat 15, lon 10" in title
    assert bar.get_ylabel() == "reduced χ² of a block"
    (frame,) = axes.patches
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((15, 10), 5, 10)


def test_other_dimensions_and_quantities(cube: nd.FitResult) -> None:
    found = cube.block_statistics
    assert found is not None
    axes = cube.plot_blocks("n_points", dims="lat").axes[0]
    (profile,) = axes.patches
    np.testing.assert_array_equal(profile.get_data().values, found.n_points.sum(("time", "lon")))
    assert "sum over time, lon" in axes.get_title()
    assert "least: 0, in the block from time 30, lat 0" in axes.get_title()
    axes = cube.plot_blocks("largest_residual", dims=("lon", "time")).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time (position)", "lon (position)")
    for bad in ("latitude", ("lat", "lat"), (), ("time", "lat", "lon"), 0, (0, "lat"), False):
        with pytest.raises(
            ValueError, match="dims must be one or two different dimensions of 'time', "
        ):
            cube.plot_blocks(dims=bad)
    with pytest.raises(ValueError, match=r"quantity must be one of 'reduced_chi2', .*'chisq'"):
        cube.plot_blocks("chisq")


def test_dimensions_that_are_not_text() -> None:
    y = xr.DataArray(np.random.default_rng(8).normal(5, 1, (20, 30)), dims=(0, 1))
    result = fit(lambda x, a: a + 0.0 * x, np.zeros((20, 30)), y.chunk({0: 5, 1: 10}), [1.0])
    for dims in (0, "0", [0], ("0",)):
        assert result.plot_blocks(dims=dims).axes[0].get_xlabel() == "0 (position)"
    assert result.plot_blocks(dims=(1, "0")).axes[0].get_ylabel() == "1 (position)"
    with pytest.raises(
        ValueError, match=r"one or two different dimensions of '0', '1'; got \(1, '1'\)"
    ):
        result.plot_blocks(dims=(1, "1"))


def test_a_profile_of_blocks() -> None:
    x, y, _ = noisy(4_000)
    y[1_000:2_000] += 0.5
    result = fit(exponential, da.from_array(x, 1_000), da.from_array(y, 1_000), [2, 1, 0])
    axes = result.plot_blocks().axes[0]
    found = result.block_statistics
    assert found is not None
    (profile,) = axes.patches
    np.testing.assert_array_equal(profile.get_data().values, found.reduced_chi2)
    np.testing.assert_array_equal(profile.get_data().edges, [0, 1_000, 2_000, 3_000, 4_000])
    assert "in the block from dim_0 1000" in axes.get_title()


# --- HTML


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.styles: list[str] = []
        self.text: list[str] = []
        self.rows = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.rows += tag == "tr"
        self.styles.append(dict(attrs).get("style") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def readable(page: Page) -> bool:
    """Whether no colour is set without the other of its pair."""
    return all(("background" in s) == (";color" in s) for s in page.styles)


def test_html_of_a_result(few: nd.FitResult) -> None:
    page = Page(few._repr_html_())
    for part in ("Fit succeeded", few.message, "a", "Statistics", "Phases", "Gauss-Newton"):
        assert part in page.text
    assert readable(page)


def test_html_escapes_and_tells_what_matters(few: nd.FitResult) -> None:
    left_out = {"block": (2,), "rows": 1_000, "array": "y_data", "chunk": None, "error": "<oh>"}
    awkward = dataclasses.replace(
        few,
        success=False,
        message="a < b & c",
        param_names=("<script>", "b&b", 'c"'),
        x_units={"x_data": "days"},
        diagnostics={**few.diagnostics, "retries": 3, "left_out": [left_out]},
    )
    text = awkward._repr_html_()
    assert "<script>" not in text
    page = Page(text)
    for part in ("Fit failed", "a < b & c", "<script>", "b&b"):
        assert part in page.text
    said = " ".join(page.text)
    assert "Number of retried reads: 3." in said
    assert "Skipped block (2,) with 1,000 rows: <oh>" in said
    assert "x_data: days" in said


def test_html_of_thousands_of_parameters(few: nd.FitResult) -> None:
    p = 5_000
    large = dataclasses.replace(
        few,
        x=np.ones(p),
        p0=np.ones(p),
        active_mask=np.zeros(p, np.int64),
        bounds=(np.full(p, -np.inf), np.full(p, np.inf)),
        param_names=tuple(f"p{i}" for i in range(p)),
        pcov=None,
        _errors=None,
    )
    page = Page(large._repr_html_())
    assert page.rows < 250
    assert "... 4800 more in popt" in page.text
    assert "cg_error_probes" in " ".join(page.text)


def test_only_the_largest_correlations_are_listed(few: nd.FitResult) -> None:
    p = 300
    large = dataclasses.replace(
        few,
        x=np.ones(p),
        p0=np.ones(p),
        active_mask=np.zeros(p, np.int64),
        bounds=(np.full(p, -np.inf), np.full(p, np.inf)),
        param_names=tuple(f"p{i}" for i in range(p)),
        pcov=np.full((p, p), 0.5) + 0.5 * np.eye(p),
    )
    assert large.fit_report().count("C(") == 200


def test_html_of_an_optimizer_and_a_plan() -> None:
    x, y, _ = noisy(500)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(CONFIG)
    assert repr(optimizer) == (
        "AdaptiveHybridStreamingOptimizer(HybridStreamingConfig(max_warmup_iterations=0, "
        "verbose=0, sample_rows=3000))"
    )
    before = Page(optimizer._repr_html_())
    assert "sample_rows" in before.text
    assert "best cost over all rows" not in before.text
    result = optimizer.fit(exponential, x, y, [2, 1, 0])
    after = Page(optimizer._repr_html_())
    assert f"{result.cost:.8g}" in after.text
    assert any("covariance: done" in text for text in after.text)
    default = Page(nd.AdaptiveHybridStreamingOptimizer()._repr_html_())
    assert "defaults only" in default.text
    plan = optimizer.plan(exponential, x, y, [2, 1, 0])
    page = Page(plan._repr_html_())
    assert "Tasks per pass" in page.text
    assert all(readable(one) for one in (before, after, default, page))
    for problem in plan.problems:
        assert problem in page.text


def test_the_repr_of_a_configuration_can_be_evaluated() -> None:
    config = nd.HybridStreamingConfig.aggressive(verbose=0)
    again = eval(repr(config), {"HybridStreamingConfig": nd.HybridStreamingConfig})
    assert again == config
    assert repr(nd.HybridStreamingConfig()) == "HybridStreamingConfig()"
