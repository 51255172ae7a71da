"""Parameters that are fixed, by value, by name or by equal bounds, and parameters that are tied."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client
from scipy import optimize

import nlsq_dask as nd
from nlsq_dask.errors import CheckpointError
from nlsq_dask.events import Event, FitStarted, IterationFinished, PassFinished
from tests import problems
from tests.problems import NO_WARMUP, decay_data, exponential

X, Y = decay_data(4_000)
RATE = 1.3
ONLY_B = {"b": (RATE, RATE)}


def reduced(x: Any, a: Any, c: Any) -> Any:
    """``exponential`` with b fixed."""
    return exponential(x, a, RATE, c)


def peaks(x: Any, h1: Any, w1: Any, h2: Any, w2: Any) -> Any:
    first = h1 * jnp.exp(-0.5 * ((x - 1) / w1) ** 2)
    return first + h2 * jnp.exp(-0.5 * ((x - 3) / w2) ** 2)


def one_width(x: Any, h1: Any, w1: Any, h2: Any) -> Any:
    """``peaks`` with w2 tied."""
    return peaks(x, h1, w1, h2, jnp.sqrt(w1) + h1)


def width2(p: Any) -> Any:
    return jnp.sqrt(p["w1"]) + p["h1"]


NOISE = 0.05 * np.random.default_rng(0).standard_normal(X.size)
PEAKS = np.asarray(one_width(X, 0.4, 0.3, 1.0)) + NOISE
PEAKS_START = [0.3, 0.25, 0.8]

fit = functools.partial(problems.fit, model=exponential, x=X, y=Y, p0=[1.0, 1.0, 0.0])
fit_reduced = functools.partial(problems.fit, model=reduced, x=X, y=Y, p0=[1.0, 0.0])
fit_peaks = functools.partial(
    problems.fit, model=peaks, x=X, y=PEAKS, p0=[*PEAKS_START, np.nan], ties={"w2": width2}
)
fit_one_width = functools.partial(problems.fit, model=one_width, x=X, y=PEAKS, p0=PEAKS_START)


def assert_reduced(result: nd.FitResult, expected: nd.FitResult) -> None:
    """Assert that the free parameters of ``result`` are all parameters of ``expected``."""
    free = result.free
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    close(result.popt[free], expected.popt)
    close(result.perr[free], expected.perr)
    close(result.cost, expected.cost)
    close(result.sigma_sq, expected.sigma_sq)
    if expected.pcov is not None:
        assert result.pcov is not None
        close(result.pcov[np.ix_(free, free)], expected.pcov)
    assert (result.dof, result.n_passes) == (expected.dof, expected.n_passes)
    assert not result.grad[~free].any()
    assert not result.active_mask[~free].any()


# --- the same as the reduced model

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qr": {"gauss_newton_solver": "qr", **NO_WARMUP},
    "sandwich": {"cov_type": "HC1", **NO_WARMUP},
    "float32": {"precision": "float32", "gauss_newton_tol": 1e-6, **NO_WARMUP},
    "loss": {"loss": "soft_l1", "f_scale": 0.1, **NO_WARMUP},
    "multistart": {"enable_multistart": True, "n_starts": 4, **NO_WARMUP},
}


SLOW = ("qr", "loss", "multistart")  # which the transform of the model does not see


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS]
)
def test_a_fixed_parameter_is_a_constant_of_the_model(kind: str) -> None:
    result = fit(fixed={"b": RATE}, **KINDS[kind])
    assert_reduced(result, fit_reduced(**KINDS[kind]))
    assert result.popt[1] == RATE
    assert result.perr[1] == 0.0
    assert result.pcov is not None
    assert not result.pcov[1].any()
    assert not result.pcov[:, 1].any()
    assert result.free.tolist() == result["free"].tolist() == [True, False, True]


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "sandwich"])
def test_a_tied_parameter_has_the_errors_of_the_delta_method(kind: str) -> None:
    result, expected = fit_peaks(**KINDS[kind]), fit_one_width(**KINDS[kind])
    assert_reduced(result, expected)
    assert result.free.tolist() == [True, True, True, False]
    h1, w1, _ = expected.popt
    assert result.popt[3] == pytest.approx(np.sqrt(w1) + h1, rel=1e-14)
    jacobian = np.vstack([np.eye(3), [1.0, 0.5 / np.sqrt(w1), 0.0]])
    assert expected.pcov is not None
    np.testing.assert_allclose(result.pcov, jacobian @ expected.pcov @ jacobian.T, rtol=1e-12)


def test_fixed_and_tied_at_once_and_ties_of_fixed_parameters() -> None:
    ties = {"w2": lambda p: jnp.sqrt(p["w1"]) + p["h1"]}
    result = fit_peaks(fixed={"h1": 0.4}, ties=ties, **NO_WARMUP)
    assert result.success
    assert result.free.tolist() == [False, True, True, False]
    assert result.perr[3] == pytest.approx(0.5 * result.perr[1] / np.sqrt(result.popt[1]))
    value, error = result.derive(lambda p: p["w1"] + p["w2"] + p["h1"])
    assert value == pytest.approx(result.popt[1] + result.popt[3] + 0.4)
    assert error == pytest.approx(result.perr[1] + result.perr[3])
    assert result.derive(lambda p: p["h1"] ** 2) == (pytest.approx(0.16), 0.0)
    constant = fit_peaks(fixed={"h1": 0.4}, ties={"w2": lambda p: 2 * p["h1"]}, **NO_WARMUP)
    assert constant.popt[3] == 0.8
    assert constant.perr[3] == 0.0
    assert constant.dof == X.size - 2


@pytest.mark.parametrize(
    "held",
    [
        {"fixed": ["b"], "p0": [1.0, RATE, 0.0]},
        {"fixed": {"b": True, "a": False}, "p0": {"a": 1.0, "b": RATE, "c": 0.0}},
        {"fixed": {"b": np.float64(RATE)}, "p0": {"a": 1.0, "c": 0.0}},
        {"fixed": {"b": np.array(RATE)}, "bounds": {"b": (0, 2)}},
        {"bounds": ONLY_B, "p0": {"a": 1.0, "c": 0.0}},
        {"bounds": ([-np.inf, RATE, -np.inf], [np.inf, RATE, np.inf]), "p0": [1.0, RATE, 0.0]},
    ],
)
def test_ways_to_fix_a_parameter(held: dict[str, Any]) -> None:
    result, expected = fit(**held, **NO_WARMUP), fit(fixed={"b": RATE}, **NO_WARMUP)
    np.testing.assert_array_equal(result.popt, expected.popt)
    np.testing.assert_array_equal(result.pcov, expected.pcov)
    assert result.free.tolist() == [True, False, True]


def test_bounds_act_on_free_parameters_and_mark_only_them() -> None:
    bounds = {"a": (0, 2.0), "b": (RATE, 2.0), "c": (0, 1)}
    start = [1.0, RATE, 0.5]
    result = fit(p0=start, bounds=bounds, fixed=["b"], **NO_WARMUP)
    assert result.popt[0] == 2.0
    assert result.active_mask.tolist() == [1, 0, 0]
    assert result.diagnostics["active_bounds"] == ["a"]
    np.testing.assert_array_equal(result.bounds[0], [0, RATE, 0])


def test_a_parameter_without_a_derivative_can_be_fixed() -> None:
    def power(x: Any, a: Any, n: Any, c: Any) -> Any:
        step = lambda s: (s[0] + 1, s[1] * x)  # noqa: E731
        powers = jax.lax.while_loop(lambda s: s[0] < n, step, (0.0 * n, jnp.ones_like(x)))
        return a * powers[1] + c * x ** (n - 2)  # the derivative by n is not finite at 0

    x = np.linspace(0.0, 2.0, 300)
    result = problems.fit(power, x, 3.0 * x**2 + 0.5, [1.0, 2.0, 0.0], fixed=["n"], **NO_WARMUP)
    np.testing.assert_allclose(result.popt, [3.0, 2.0, 0.5], rtol=1e-10)
    value, error = result.predict(x[:3], return_std=True)
    np.testing.assert_allclose(value, 3.0 * x[:3] ** 2 + 0.5)
    assert np.isfinite(error).all()


def test_options_in_the_signature() -> None:
    def model(x: Any, a: Any, kind: Any = None, b: float = RATE, c: float = 0.0) -> Any:
        return exponential(x, a, b, c)

    result = fit(model=model, p0={"a": 1.0}, fixed=["b"], **NO_WARMUP)
    np.testing.assert_array_equal(result.popt, fit(fixed={"b": RATE}, **NO_WARMUP).popt)


# --- many parameters

N_GROUPS = 70
GROUP = np.random.default_rng(1).integers(0, N_GROUPS, 8_000)
LEVELS = np.random.default_rng(2).uniform(1, 2, N_GROUPS)
TIME = np.linspace(0, 2, GROUP.size)
MANY = LEVELS[GROUP] * np.exp(-0.5 * TIME)
MANY = MANY + 0.01 * np.random.default_rng(3).standard_normal(GROUP.size)


def levels(x: Any, *params: Any) -> Any:
    time, group = x
    return jnp.stack(params[1:])[group.astype(int)] * jnp.exp(-params[0] * time)


def fewer_levels(x: Any, *params: Any) -> Any:
    rate, *rest = params
    return levels(x, rate, *rest[:3], LEVELS[3], *rest[3:-1], LEVELS[-2], rest[-1])


@pytest.mark.parametrize(
    "options",
    [
        {"cg_param_threshold": 40, "cg_error_probes": 80, **NO_WARMUP},
        pytest.param(NO_WARMUP, marks=pytest.mark.slow),
    ],
    ids=["cg", "dense"],
)
def test_many_parameters(options: dict[str, Any]) -> None:
    start, tight = [0.5, *np.ones(N_GROUPS)], {"gauss_newton_tol": 1e-12}
    held = {"p3": 1.0, "p4": LEVELS[3], f"p{N_GROUPS - 1}": LEVELS[-2]}
    del held["p3"]
    x = (TIME, GROUP.astype(float))
    result = problems.fit(levels, x, MANY, start, fixed=held, **tight, **options)
    expected = problems.fit(fewer_levels, x, MANY, start[2:], **tight, **options)
    free = result.free
    assert np.count_nonzero(~free) == 2
    np.testing.assert_allclose(result.popt[free], expected.popt, rtol=1e-9)
    np.testing.assert_allclose(result.perr[free], expected.perr, rtol=1e-6)
    assert not result.perr[~free].any()
    assert result.dof == expected.dof
    assert (result.pcov is None) == ("cg_param_threshold" in options)


def test_conjugate_gradients_refuse_ties_and_take_equal_bounds() -> None:
    few = {"cg_param_threshold": 2, **NO_WARMUP}
    with pytest.raises(ValueError, match=r"^ties cannot be combined with conjugate gradients"):
        fit_peaks(**few)
    result = fit(bounds=ONLY_B, p0={"a": 1.0, "c": 0.0}, **few)
    np.testing.assert_allclose(result.popt, fit(fixed={"b": RATE}, **NO_WARMUP).popt, rtol=1e-6)
    assert np.isnan(result.perr).tolist() == [True, False, True]
    assert result.perr[1] == 0.0


# --- what the data do not determine


def test_an_infinite_covariance_keeps_the_zeros_of_fixed_parameters() -> None:
    def twice(x: Any, c: Any, a: Any, b: Any, d: Any, e: Any) -> Any:
        return (a + b) * x + c + 0.0 * (d + e)

    held: dict[str, Any] = {"fixed": {"c": 0.0, "d": 5.0}, "ties": {"e": lambda p: p["a"] ** 2}}
    with pytest.warns(optimize.OptimizeWarning, match="not constrain 'a', 'b'"):
        result = problems.fit(twice, X, 2.0 * X + 1.0, p0=[0, 1, 1, 0, 0], **held, **NO_WARMUP)
    expected = np.zeros((5, 5))
    expected[np.ix_([1, 2, 4], [1, 2, 4])] = np.inf
    np.testing.assert_array_equal(result.pcov, expected)
    assert result.perr.tolist() == [0.0, np.inf, np.inf, 0.0, np.inf]
    errors = result.derive(lambda p: jnp.stack([p["a"] + p["b"], p["c"], 0 * p["a"]]))[1]
    assert errors.tolist() == [np.inf, 0.0, 0.0]
    assert result.diagnostics["undetermined"] == ["a", "b"]
    assert result.diagnostics["confounded"] == [["a", "b"]]
    assert "The data cannot tell 'a', 'b' apart" in result.message


def test_a_penalty_of_groups_of_free_parameters() -> None:
    options = {"enable_group_variance_regularization": True, "group_variance_lambda": 0.1}
    result = fit(fixed={"a": 2.5}, **options, group_variance_indices=[(1, 3)], **NO_WARMUP)

    def without_a(x: Any, b: Any, c: Any) -> Any:
        return exponential(x, 2.5, b, c)

    expected = problems.fit(
        without_a, X, Y, [1.0, 0.0], **options, group_variance_indices=[(0, 2)], **NO_WARMUP
    )
    assert_reduced(result, expected)
    with pytest.raises(ValueError, match=r"the range \(0, 3\) with 'b', fixed or tied"):
        fit(fixed={"b": 1.0}, **options, group_variance_indices=[(0, 3)])


# --- where it runs, and what is kept


def test_threads_and_processes(process_client: Client) -> None:
    ties = {"w2": lambda p: jnp.sqrt(p["w1"]) + p["h1"]}
    lazy = {"x": da.from_array(X, chunks=999), "y": da.from_array(PEAKS, chunks=999)}
    options: dict[str, Any] = {"ties": ties, "fixed": {"h2": 1.0}, **NO_WARMUP}
    threads = fit_peaks(**lazy, **options)
    with process_client.as_current():
        processes = fit_peaks(**lazy, **options)
    np.testing.assert_array_equal(processes.popt, threads.popt)
    np.testing.assert_array_equal(processes.pcov, threads.pcov)

    def both(x: Any, h1: Any, w1: Any) -> Any:
        return one_width(x, h1, w1, 1.0)

    assert_reduced(threads, fit_one_width(model=both, p0=PEAKS_START[:2], **lazy, **NO_WARMUP))


class CutError(Exception):
    pass


def test_after_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "x": da.from_array(X, chunks=999),
        "y": da.from_array(PEAKS, chunks=999),
        "sample_rows": 200,
        "callback_frequency": 1,
        "checkpoint_interval": 0.0,
        "max_warmup_iterations": 20,
        "gauss_newton_tol": 1e-12,
        "fixed": {"h2": 1.0},
    }
    seen: list[tuple[int, np.ndarray]] = []
    expected = fit_peaks(**options, callback=lambda params, loss, i: seen.append((i, params)))
    assert all(params.shape == (4,) and params[2] == 1.0 for _, params in seen)
    assert all(params[3] == pytest.approx(float(width2(named(params)))) for _, params in seen)
    for i in (seen[len(seen) // 2][0], seen[-1][0]):
        folder = tmp_path / str(i)

        def cut(params: Any, loss: float, iteration: int, at: int = i) -> None:
            if iteration == at:
                raise CutError

        with pytest.raises(CutError):
            fit_peaks(**options, callback=cut, checkpoint_dir=folder)
        written = folder if any(folder.glob("*.nlsq")) else None
        resumed = fit_peaks(**options, resume_from_checkpoint=written)
        np.testing.assert_array_equal(resumed.popt, expected.popt)
        np.testing.assert_array_equal(resumed.pcov, expected.pcov)
        assert resumed.n_passes == expected.n_passes
    other = {**options, "resume_from_checkpoint": folder}
    with pytest.raises(CheckpointError, match=r"fixed was \[\['h2', 1.0\]\] and is \[\['h2', 1.1"):
        fit_peaks(**{**other, "fixed": {"h2": 1.1}})
    with pytest.raises(CheckpointError, match=r"fixed was .* and is None"):
        fit_peaks(**{**other, "fixed": None})
    with pytest.raises(CheckpointError, match="the model computes a different function"):
        fit_peaks(**{**other, "ties": {"w2": lambda p: 1.001 * width2(p)}})
    with pytest.raises(CheckpointError, match=r"ties was \['w2'\] and is None"):
        fit_peaks(**{**other, "ties": None, "p0": [*PEAKS_START, 1.0]})


def named(params: np.ndarray) -> dict[str, float]:
    return dict(zip(("h1", "w1", "h2", "w2"), params, strict=True))


def test_an_interrupted_fit_keeps_all_parameters(tmp_path: Path) -> None:
    def stop(params: Any, loss: float, i: int) -> None:
        raise StopIteration

    stopped = fit(fixed={"b": RATE}, callback=stop, callback_frequency=1)
    assert stopped.status == -4
    assert stopped.popt[1] == RATE
    assert stopped.pcov is not None
    assert np.isinf(stopped.pcov[np.ix_([0, 2], [0, 2])]).all()
    assert stopped.perr[1] == 0.0
    late = fit(fixed={"b": RATE}, max_walltime=1e-9, checkpoint_dir=tmp_path)
    assert late.status == -8
    resumed = fit(fixed={"b": RATE}, max_walltime=1e-9, resume_from_checkpoint=tmp_path)
    assert resumed.popt[1] == late.popt[1] == RATE


def test_save_load_and_predict(tmp_path: Path) -> None:
    path, at = tmp_path / "result.nlsq", X[:20]
    result = fit_peaks(fixed={"h2": 1.0}, **NO_WARMUP)
    result.save(path)
    loaded = nd.FitResult.load(path, model=peaks)
    assert loaded.fit_report() == result.fit_report() == copy.deepcopy(result).fit_report()
    np.testing.assert_array_equal(loaded.free, result.free)
    np.testing.assert_array_equal(loaded.pcov, result.pcov)
    both = [one.predict(at, return_std=True) for one in (result, loaded)]
    np.testing.assert_array_equal(*both)
    np.testing.assert_allclose(loaded.predict(at), peaks(at, *result.popt), rtol=1e-6)

    def both_fixed(x: Any, h1: Any, w1: Any) -> Any:
        return one_width(x, h1, w1, 1.0)

    expected = fit_one_width(model=both_fixed, p0=PEAKS_START[:2], **NO_WARMUP)
    np.testing.assert_allclose(both[0], expected.predict(at, return_std=True), rtol=1e-10)
    with pytest.raises(ValueError, match="differs from 'peaks'"):
        nd.FitResult.load(path, model=lambda x, h1, w1, h2, w2: peaks(x, h1, w1, h2, 2 * w2))


def test_reports_mark_fixed_and_tied_parameters() -> None:
    result = fit_peaks(fixed={"h2": 1.0}, **NO_WARMUP)
    report = result.fit_report()
    assert "\n    h2: 1 (fixed)\n" in report
    assert "%) (tied)\n" in report
    assert "# variables            = 2\n" in report
    assert "C(h1, w1)" in report
    assert "h2)" not in report
    html = result._repr_html_()
    assert "fixed" in html
    assert "tied" in html
    attrs = result.to_xarray().attrs
    assert (attrs["fixed"], attrs["tied"]) == ("h2", "w2")
    np.testing.assert_array_equal(result.p0[:3], [*PEAKS_START[:2], 1.0])
    assert result.p0[3] == pytest.approx(np.sqrt(0.25) + 0.3)
    assert result.conf_interval()[2].tolist() == [1.0, 1.0]


def test_observers_see_all_parameters() -> None:
    events: list[Event] = []
    options: dict[str, Any] = {"enable_multistart": True, "n_starts": 4, "callback_frequency": 1}
    result = fit_peaks(fixed={"h2": 1.0}, observers=[events.append], **options)
    (started,) = [event for event in events if isinstance(event, FitStarted)]
    assert started.param_names == ("h1", "w1", "h2", "w2")
    assert started.notes == ("Fixed: h2 = 1.", "Tied (at p0): w2 = 0.8.")
    points = [e.params for e in events if isinstance(e, IterationFinished | PassFinished)]
    candidates = result.diagnostics["multistart"]["candidates"]
    assert len(candidates) == 4
    for point in [*points, *candidates, result.diagnostics["multistart"]["start"]]:
        np.testing.assert_allclose(point[2:], [1.0, width2(named(point))], rtol=1e-6)
    assert result.history.params.shape[1] == 4
    assert result.diagnostics["sums_at"].shape == (4,)


def test_the_optimizer_normalizes_free_parameters() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0))
    result = optimizer.fit(exponential, X, Y, [2.0, 9.0, 0.0], fixed={"b": RATE})
    assert optimizer.normalizer is not None
    assert optimizer.normalizer.scales.tolist() == [2.0, 1.0]
    assert optimizer.best_params_global is not None
    assert optimizer.best_params_global[1] == RATE
    assert optimizer.normalized_model is not None
    np.testing.assert_allclose(
        optimizer.normalized_model(X[:5], 1.0, 0.5), exponential(X[:5], 2.0, RATE, 0.5), rtol=1e-6
    )
    assert result.success


def test_plan() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    plan = optimizer.plan(exponential, X, Y, {"a": 1.0, "c": 0.0}, fixed={"b": RATE})
    assert plan.problems == optimizer.plan(reduced, X, Y, [1.0, 0.0]).problems
    assert "Parameters                Fixed: b = 1.3.\n" in str(plan)
    assert "Parameters" not in str(optimizer.plan(reduced, X, Y, [1.0, 0.0]))
    with pytest.raises(ValueError, match="unknown parameter names in fixed: 'd'"):
        optimizer.plan(exponential, X, Y, fixed=["d"])


def test_curve_fit() -> None:
    expected = fit(fixed={"b": RATE}, **NO_WARMUP)
    config = nd.HybridStreamingConfig(verbose=0, **NO_WARMUP)
    calls: list[dict[str, Any]] = [
        {"p0": [1.0, RATE, 0.0], "fixed": ["b"]},
        {"p0": [1.0, RATE, 0.0], "bounds": ([-9, RATE, -9], [9, RATE, 9]), "method": "trf"},
        {"p0": [1.0, RATE, 0.0], "bounds": optimize.Bounds([-9, RATE, -9], [9, RATE, 9])},
        {"p0": [1.0, np.nan, 0.0], "ties": {"b": lambda p: RATE + 0 * p["a"]}},
    ]
    for call in calls:
        popt, pcov = nd.curve_fit(exponential, X, Y, config=config, **call)
        np.testing.assert_allclose(popt, expected.popt, rtol=1e-9)
        np.testing.assert_allclose(pcov, expected.pcov, rtol=1e-6)

    rows = {"xdata": [0.0, 1.0], "ydata": [3.0, 1.5], "sigma": [0.1, 0.1], "absolute_sigma": True}
    popt, pcov = nd.curve_fit(exponential, **rows, p0=[1, 1, 0], fixed=["b"], config=config)
    np.testing.assert_allclose(popt[[0, 2]], np.linalg.solve([[1, 1], [np.exp(-1), 1]], [3, 1.5]))
    assert np.isfinite(pcov).all()

    def jac(x: Any, a: Any, b: Any, c: Any) -> Any:
        rise = jnp.exp(-b * x)
        return jnp.stack([rise, -a * x * rise, jnp.ones_like(x)], axis=1)

    popt, _ = nd.curve_fit(exponential, X, Y, [1, 1, 0], jac=jac, fixed={"b": RATE}, config=config)
    np.testing.assert_allclose(popt, expected.popt, rtol=1e-9)


# --- errors


def message(model: Any = exponential, p0: Any = None, bounds: Any = None, **arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        nd.AdaptiveHybridStreamingOptimizer().fit(model, X, Y, p0, bounds, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        ({"d": 1.0}, "unknown parameter names in fixed: 'd'. The parameters are a, b, c."),
        (["a", "d"], "unknown parameter names in fixed: 'd'. The parameters are a, b, c."),
        ("b", "fixed must be a dict or a list of names; got 'b'. Write fixed={'c': 0.5} for a"),
        (7, "fixed must be a dict or a list of names; got 7."),
        ([False, True, False], "fixed must be a dict or a list of names; got [False, True, False]"),
        ({"b": np.nan}, "fixed['b'] must be finite; got nan."),
        ({"b": -np.inf}, "fixed['b'] must be finite; got -inf."),
        ({"b": None}, "fixed['b'] must be one real number, True for the initial value, or False"),
        ({"b": "p0"}, "free parameter; got 'p0'."),
        ({"b": 1j}, "free parameter; got 1j."),
        ({"b": np.ones((2, 3))}, "free parameter; got an array of shape (2, 3)."),
        ({"b": 3.0}, "the fixed value 3 of parameter 'b' is outside its bounds [0, 2]. Move it"),
        (["a"], "fixed has 'a' without a value, and neither p0 nor the signature of the model"),
        ({"a": True}, "model has one. Write fixed={'a': 0.5}, or give it in p0."),
        ({"a": 1, "b": 1, "c": 1}, "no parameter is left to fit: a, b, c are all fixed or tied."),
    ],
)
def test_what_fixed_may_be(fixed: Any, expected: str) -> None:
    assert expected in message(p0={"c": 0.0}, bounds={"b": (0, 2)}, fixed=fixed)


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ({"d": width2}, "unknown parameter names in ties: 'd'. The parameters are a, b, c."),
        (width2, "ties must be a dict of functions by name; got <function wid"),
        ({"b": "2 * a"}, "ties['b'] must be a function of the other parameters; got '2 * a'. Wr"),
        ({"b": 2.0}, "Write ties={'c': lambda p: 2 * p['a']}, or fixed={...} for a constant."),
        ({"b": lambda p: p["z"]}, "ties['b'] uses 'z', which is not a parameter. It can use a, c."),
        ({"b": lambda p: p["b"]}, "ties['b'] uses 'b', which is tied itself. It can use a, c."),
        ({"b": lambda p: p["a"], "a": lambda p: 2 * p["b"]}, "which is tied itself. It can use c"),
        ({"b": lambda: 2.0}, "ties['b'] raised TypeError: "),
        ({"b": lambda p: np.exp(p["a"])}, "Write it with jax.numpy instead of numpy or math"),
        ({"b": lambda p: p["a"] if p["a"] > 0 else 0.0}, "Write jnp.where(x > 3, this, that)"),
        ({"b": lambda p: jnp.ones(2) * p["a"]}, "must return one real number; it returned an arr"),
        ({"b": lambda p: p["a"] > 0}, "must return one real number; it returned dtype bool."),
        ({"b": lambda p: jnp.log(-p["a"])}, "ties['b'] is nan at the initial values of the other"),
        (
            {"a": lambda p: 2.0, "b": lambda p: 2.0, "c": lambda p: 2.0},
            "no parameter is left to fit: a, b, c are all fixed or tied.",
        ),
    ],
)
def test_what_ties_may_be(ties: Any, expected: str) -> None:
    assert expected in message(ties=ties)


def test_fixed_ties_and_bounds_that_exclude_each_other() -> None:
    ties: dict[str, Any] = {"b": lambda p: p["a"]}
    both = "'b' is both in fixed and in ties. Leave it out of one of them."
    assert message(ties=ties, fixed={"b": 1.0}) == both
    bound = "parameter 'b' is tied and cannot have bounds; got [0, inf]."
    assert message(ties=ties, bounds={"b": (0, np.inf)}).startswith(bound)
    assert message(ties=ties, bounds=(0, np.inf)).startswith(bound)
    assert "got [1, 1]" in message(ties=ties, bounds={"b": (1, 1)})
    free = "fixed['b'] is False, but the bounds of 'b' are equal, 1, which fixes it."
    assert message(fixed={"b": False}, bounds={"b": (1, 1)}).startswith(free)
    assert "outside its bounds [1, 1]" in message(fixed={"b": 2}, bounds={"b": (1, 1)})
    assert "p0 of parameter 'b' is 2, outside its bounds [0, 1]" in (
        message(p0=[1, 2, 0], bounds={"b": (0, 1)})
    )
    assert "lower bound inf of parameter 'b'" in message(bounds={"b": (np.inf, np.inf)})
    assert "p0 of parameter 'a' is nan" in message(p0=[np.nan, np.nan, 0.0], ties=ties)
    assert "p0 of parameter 'b' is nan" in message(p0=[1.0, np.nan, 0.0], fixed=["b"])
    assert "p0 has 2 values" in message(p0=[1.0, 0.0], fixed={"b": 1.0})


@pytest.mark.parametrize(
    "pairs", [[(0, 1), (0, 2)], [(0, 10), (0, 10)], np.array([[0, 1], [0, 2]])]
)
def test_two_pairs_are_not_equal_bounds(pairs: Any) -> None:
    """They are bounds of two parameters for many libraries, and would fix one of them here."""
    said = message(reduced, bounds=pairs)
    assert "the lower bound 0 of parameter 'a' must be less than its upper bound 0. To fix" in said
    assert f"bounds={{'a': (0, {pairs[0][1]}), 'c': (0, {pairs[1][1]})}}." in said
    explicit = optimize.Bounds([0, RATE, -1], [3, RATE, 1])
    assert fit(p0=None, bounds=explicit, **NO_WARMUP).free.tolist() == [True, False, True]


def test_partial_and_keyword_only_parameters() -> None:
    said = message(functools.partial(exponential, b=RATE))
    assert said.endswith("To fix a parameter, pass the function itself, and fixed={'b': 1.3}.")

    def by_keyword(x: Any, *, a: float = 1.0, b: float = 1.0) -> Any:
        return a * x + b

    assert message(by_keyword).endswith("but a, b can be passed by keyword only.")


# --- what a fit says about the parameters that are left


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_a_start_without_effect_beside_a_fixed_parameter() -> None:
    x, y = decay_data()
    result = problems.fit(
        lambda x, c, h, m, w: c + h * jnp.exp(-0.5 * ((x - m) / w) ** 2),
        x,
        y,
        [0.0, 1.0, 500.0, 1.0],
        fixed=["c"],
        **NO_WARMUP,
    )
    assert not result.success
    assert "No parameter changes the model" in result.message


def test_rows_at_which_the_model_is_undefined_beside_a_fixed_parameter() -> None:
    x, y = decay_data()
    result = problems.fit(
        lambda x, c, a, b: c + a * jnp.log(x - b), x, y, [0.0, 1.0, 1.0], fixed=["c"], **NO_WARMUP
    )
    assert not result.success
    assert f"{np.count_nonzero(x <= 1.0)} of" in result.message


# --- ties whose derivative is not finite, and values of p0 that are not used


def test_a_tie_without_a_finite_derivative_leaves_the_other_errors() -> None:
    """rate ends at its bound 0, where the derivative of 1 / rate is infinite."""
    x, noise = np.linspace(0.0, 1.0, 200), np.random.default_rng(3).normal(size=200)
    y = 1.0 + 0.3 * x + 0.01 * noise

    def growing(x: Any, a: Any, rate: Any, tau: Any) -> Any:
        return a * jnp.exp(-rate * x)

    bounds = {"rate": (0.0, np.inf)}
    expected = problems.fit(growing, x, y, [1, 1, 1], bounds, fixed=["tau"], **NO_WARMUP)
    with pytest.warns(optimize.OptimizeWarning, match=r"ties is not finite for 'tau'"):
        result = problems.fit(
            growing, x, y, [1, 1, 1], bounds, ties={"tau": lambda p: 1 / p["rate"]}, **NO_WARMUP
        )
    np.testing.assert_allclose(result.perr[:2], expected.perr[:2], rtol=1e-6)
    assert np.isinf(result.perr[2])
    assert result.derive(lambda p: p["a"])[1] == pytest.approx(expected.perr[0], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "tie", "start", "sentence"),
    [
        (
            problems.line,
            lambda p: jnp.where(p["a"] != 1.0, jnp.nan, p["a"]),
            1.0,
            r"ties\['b'\] is not finite at any trial point: at the last one, with a=\S+, it is nan",
        ),
        (
            problems.line,
            lambda p: jnp.sqrt(p["a"]),
            0.0,
            r"derivative of ties\['b'\] with respect to 'a' is not finite at the start, with a=0.0",
        ),
        (  # the tie is not at fault, although its derivative is infinite
            lambda x, a, b: a + jnp.sqrt(x - 1.0) + 0.0 * jnp.maximum(b, 1.0),
            lambda p: jnp.sqrt(p["a"]),
            0.0,
            r"the model is not finite at the start at \S+ of .* rows",
        ),
    ],
    ids=["value", "derivative", "model"],
)
def test_what_is_not_finite_is_named(model: Any, tie: Any, start: float, sentence: str) -> None:
    x = np.linspace(0.0, 2.0, 200)
    result = problems.fit(model, x, 1.0 - 2.0 * x, [start, 1.0], ties={"b": tie}, **NO_WARMUP)
    assert not result.success
    assert re.search(sentence, result.message), result.message


@pytest.mark.parametrize(
    ("p0", "arguments"),
    [
        ([1.0, np.nan, 0.0], {"fixed": {"b": RATE}}),
        ([1.0, 9.0, 0.0], {"fixed": {"b": RATE}, "bounds": {"b": (0.5, 2.0)}}),
        ([1.0, 9.0, 0.0], {"bounds": ONLY_B}),
    ],
)
def test_p0_of_a_parameter_that_has_a_value_is_not_used(
    p0: list[float], arguments: dict[str, Any]
) -> None:
    expected = fit(p0=[1.0, RATE, 0.0], fixed=["b"], **NO_WARMUP)
    result = fit(p0=p0, **arguments, **NO_WARMUP)
    np.testing.assert_array_equal(result.x, expected.x)


def test_an_initial_value_in_the_signature_must_be_finite() -> None:
    def model(x: Any, a: Any, b: Any = np.nan) -> Any:
        return a * x + b

    assert message(model, p0={"a": 1.0}) == (
        "p0 of parameter 'b' is nan; expected a finite number."
    )


@pytest.mark.parametrize("returned", [None, "k"])
def test_ties_and_derive_that_return_no_number(returned: Any) -> None:
    kind = type(returned).__name__
    with pytest.raises(ValueError, match=f"one real number; it returned an object of type {kind}"):
        fit(ties={"c": lambda p: returned})
    result = fit(fixed={"b": RATE}, **NO_WARMUP)
    with pytest.raises(ValueError, match=f"real numbers; it returned an object of type {kind}"):
        result.derive(lambda p: returned)
