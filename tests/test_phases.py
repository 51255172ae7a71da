"""Phases, callback, warm-up and its defence layers, as they can be observed from outside."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask.fit.iterations import Iterations
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.observers.progress import Progress
from tests import problems
from tests.problems import decay_data, exponential

X, Y = decay_data(6_000, seed=21)
START = [5.0, 0.6, 1.0]
fit = functools.partial(problems.fit, model=exponential, x=X, y=Y, p0=START)


def test_attributes_before_and_after() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    assert (optimizer.current_phase, optimizer.phase_history) == (0, [])
    before = time.time()
    result = optimizer.fit(exponential, X, Y, START, ([0, 0, 0], [9, 9, 9]), verbose=0)
    assert optimizer.current_phase == 3
    assert [record["phase"] for record in optimizer.phase_history] == [0, 1, 2, 3]
    for record in optimizer.phase_history:
        assert before <= record["start_time"] <= time.time()
        assert record["duration"] >= 0
        assert record["name"]
    assert set(optimizer.phase_status.values()) == {"done"}
    assert result.phase_history == optimizer.phase_history
    np.testing.assert_array_equal(optimizer.normalizer.scales, [9, 9, 9])
    np.testing.assert_array_equal(optimizer.normalized_bounds, [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(optimizer.normalization_jacobian, np.diag([9, 9, 9]))
    q = optimizer.normalizer.normalize(result.x)
    assert float(optimizer.normalized_model(0.0, *q)) == pytest.approx(
        result.x[0] + result.x[2], rel=1e-6
    )
    np.testing.assert_allclose(optimizer.best_params_global, result.x, rtol=1e-6)
    assert optimizer.best_cost_global == pytest.approx(result.cost)


def test_a_failed_phase_is_named_and_the_optimizer_can_be_used_again() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    with pytest.raises(nd.NonFiniteDataError):
        optimizer.fit(exponential, X, np.full_like(Y, np.nan), START, verbose=0)
    assert "failed" in optimizer.phase_status.values()
    assert optimizer.fit(exponential, X, Y, START, verbose=0).success


def test_callback_sees_numpy_in_the_original_space() -> None:
    seen: list[tuple[Any, float, int]] = []
    result = fit(callback=lambda p, loss, i: seen.append((p, loss, i)), callback_frequency=1)
    assert [i for _, _, i in seen] == list(range(1, len(seen) + 1))
    assert all(type(p) is np.ndarray and p.dtype == np.float64 for p, _, _ in seen)
    np.testing.assert_allclose(seen[-1][0], result.x, rtol=1e-6)
    assert seen[-1][1] == pytest.approx(2 * result.cost / len(X))
    assert seen[0][1] > seen[-1][1]


def test_callback_frequency() -> None:
    seen: list[int] = []
    fit(callback=lambda p, loss, i: seen.append(i), callback_frequency=7)
    assert seen
    assert all(i % 7 == 0 for i in seen)


def test_how_long_bursts_of_the_warm_up_are_changes_nothing_of_it() -> None:
    results = [
        fit(callback_frequency=frequency, checkpoint_frequency=checkpoints)
        for frequency, checkpoints in ((1, 100), (7, 100), (10_000, 100), (10_000, 3))
    ]
    assert warm_up(results[0])["iterations"] > 20
    for result in results[1:]:
        assert warm_up(result) == warm_up(results[0])
        assert result.popt.tobytes() == results[0].popt.tobytes()
        assert result.pcov.tobytes() == results[0].pcov.tobytes()


def test_a_warm_up_can_be_ended_every_ten_iterations_however_rare_the_callback_is() -> None:
    """With each report of iterations max_walltime and SIGTERM are heeded."""
    history = fit(callback_frequency=10_000).history
    iterations = history.iteration[history.stage == "warm-up"].values
    assert len(iterations) > 2
    assert np.diff(iterations, prepend=0).max() == 10


def test_the_callback_is_called_where_reports_pass_over_its_multiples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[int] = []
    iterations = Iterations(
        Progress(log_frequency=10, shows_details=True),
        lambda p, loss, i: seen.append(i),
        10,
        ParameterTransform.of_fixed(("a", "b", "c"), np.zeros(3), ()),
    )
    for n_iterations in (37, 2, 10, 10, 1):
        iterations.report("warm-up", np.ones(3), 1.0, 1.0, 1.0, n_iterations=n_iterations)
    assert seen == [37, 49, 59, 60]
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("last", [1, 3, 1000])
def test_stop_iteration_ends_the_fit_cleanly(last: int) -> None:
    def callback(params: Any, loss: float, iteration: int) -> None:
        if iteration >= last or (last == 1000 and loss < 0.0026):
            raise StopIteration

    result = fit(callback=callback, callback_frequency=1)
    assert not result.success
    assert "callback" in result.message
    assert np.isfinite(result.x).all()


def test_two_fits_at_once_on_one_optimizer() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(callback_frequency=1))
    started, release = threading.Event(), threading.Event()

    def hold(params: Any, loss: float, iteration: int) -> None:
        started.set()
        release.wait(30)

    thread = threading.Thread(
        target=optimizer.fit,
        args=(exponential, X, Y, START),
        kwargs={"callback": hold, "verbose": 0},
    )
    thread.start()
    assert started.wait(60)
    with pytest.raises(nd.FitInProgressError):
        optimizer.fit(exponential, X, Y, START, verbose=0)
    release.set()
    thread.join()
    assert optimizer.fit(exponential, X, Y, START, verbose=0).success


def test_the_callers_jax_settings_stay() -> None:
    assert not jax.config.jax_enable_x64
    fit()
    assert not jax.config.jax_enable_x64
    assert jnp.arange(3.0).dtype == jnp.float32


# --- the warm-up


def warm_up(result: nd.FitResult) -> dict[str, Any]:
    return result.diagnostics["warm_up"]


def test_layer_1_skips_the_warm_up() -> None:
    clean = 2.5 * np.exp(-1.3 * X) + 0.5
    near = fit(p0=[2.5, 1.31, 0.5], y=clean)
    assert warm_up(near)["is_warm_start"]
    assert near.diagnostics["defense"]["layer1"]["triggers"] == 1
    off = fit(p0=[2.5, 1.31, 0.5], y=clean, enable_warm_start_detection=False)
    assert not warm_up(off)["is_warm_start"]
    assert warm_up(off)["iterations"] > 0
    np.testing.assert_allclose(near.x, off.x, rtol=1e-8)


@pytest.mark.parametrize(
    ("start", "mode"),
    [([2.5, 1.2, 0.5], "refinement"), ([2.0, 1.0, 0.9], "careful"), ([9, 0.3, 4], "exploration")],
)
def test_layer_2_chooses_the_first_step(start: list[float], mode: str) -> None:
    assert warm_up(fit(p0=start))["mode"] == mode
    assert warm_up(fit(p0=start, enable_adaptive_warmup_lr=False))["mode"] == "fixed"


def test_layer_3_goes_back_to_the_best_point() -> None:
    # A line search never lets the loss grow, so the guard is given a negative margin to act on.
    from nlsq_dask.warmup.defense_layers import cost_increased

    assert bool(cost_increased(1.06, 1.0, 0.05))
    assert not bool(cost_increased(1.04, 1.0, 0.05))


def test_layer_4_limits_the_steps() -> None:
    path: list[Any] = []
    config = nd.HybridStreamingConfig(callback_frequency=1, verbose=0, max_warmup_step_size=0.03)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(exponential, X, Y, START, callback=lambda p, loss, i: path.append(p))
    n = warm_up(result)["iterations"]
    q = [optimizer.normalizer.normalize(p) for p in (np.array(START), *path[:n])]
    lengths = np.linalg.norm(np.diff(q, axis=0), axis=1)
    assert lengths.max() <= 0.03 * (1 + 1e-9)
    assert warm_up(result)["clipped"] > 0
    assert warm_up(fit(enable_step_clipping=False))["clipped"] == 0


@pytest.mark.parametrize("search", ["wolfe", "strong_wolfe", "backtracking"])
def test_line_searches(search: str) -> None:
    result = fit(lbfgs_line_search=search)
    np.testing.assert_allclose(result.x, fit().x, rtol=1e-8)
    assert warm_up(result)["loss"] < 0.01


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_warmup_iterations": 3, "warmup_iterations": 1}, "max_iter"),
        ({"warmup_iterations": 1, "loss_plateau_threshold": 10.0}, "plateau"),
        (
            {
                "warmup_iterations": 1,
                "gradient_norm_threshold": 1e9,
                "active_switching_criteria": ["gradient"],
            },
            "gradient",
        ),
        ({}, "converged"),
    ],
)
def test_criteria_end_the_warm_up(options: dict[str, Any], reason: str) -> None:
    result = fit(**options)
    assert warm_up(result)["reason"] == reason
    assert result.success


def test_warm_up_keeps_to_the_bounds() -> None:
    outside: list[Any] = []

    def callback(params: Any, loss: float, iteration: int) -> None:
        if not ((params >= [0, 0, 0.7]) & (params <= [6, 2, 3])).all():
            outside.append(params)

    bounds = ([0, 0, 0.7], [6, 2, 3])
    result = fit(bounds=bounds, callback=callback, callback_frequency=1)
    assert not outside
    assert result.x[2] == 0.7
    assert result.success


# --- telemetry


def test_telemetry_over_several_fits() -> None:
    nd.reset_defense_telemetry()
    for start in (START, [2.5, 1.2, 0.5], [9, 0.3, 4]):
        fit(p0=start)
    telemetry = nd.get_defense_telemetry()
    assert telemetry.total_warmup_calls == 3
    assert telemetry.layer2_lr_mode_counts["refinement"] == 1
    rates = telemetry.get_trigger_rates()
    assert rates["layer1_warm_start_rate"] == 0.0
    assert rates["layer2_refinement_rate"] == pytest.approx(100 / 3)
    assert sum(v for k, v in rates.items() if "layer2" in k) == pytest.approx(100)
    metrics = telemetry.export_metrics()
    assert metrics["nlsq_defense_warmup_calls_total"] == 3
    assert metrics["nlsq_defense_layer2_refinement_total"] == 1
    summary = telemetry.get_summary()
    assert set(summary["layer4"]) == {"name", "triggers", "rate_pct"}
    events = telemetry.get_recent_events(2)
    assert len(events) == 2
    assert set(events[0]) == {"type", "timestamp", "data"}
    nd.reset_defense_telemetry()
    assert telemetry.total_warmup_calls == 0
    assert telemetry.get_recent_events() == []


# --- printing


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    optimizer.fit(exponential, X, Y, START, verbose=0)
    assert capsys.readouterr().out == ""
    optimizer.fit(exponential, X, Y, START)
    out = capsys.readouterr().out
    for part in ("6,000 rows", "Phase 0", "Phase 1", "pass 1", "Phase 3", "Converged"):
        assert part in out
