"""Every option changes something that can be seen from outside, and every preset does what it says.

``python -m tests.test_every_option`` lists the options with the tests that show them.
"""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask import HybridStreamingConfig as Config
from tests import problems
from tests.problems import NO_WARMUP, decay_data, exponential
from tests.shown import Shown, assert_is_there

# --- which test shows which option

COVERED_ELSEWHERE = {
    "enable_one_pass": (
        "tests/test_one_pass.py::test_the_switch_and_a_strict_tolerance_take_a_second_pass"
    ),
    "enable_multi_device": "tests/test_engine.py::test_several_devices_share_the_work",
    "enable_multistart": (
        "tests/test_multistart.py::test_it_is_off_by_default_and_one_start_is_no_more_than_p0"
    ),
    "n_starts": (
        "tests/test_multistart.py::test_it_is_off_by_default_and_one_start_is_no_more_than_p0"
    ),
    "multistart_sampler": (
        "tests/test_multistart.py::test_samplers_cover_the_box_in_different_ways"
    ),
    "elimination_rounds": "tests/test_multistart.py::test_rounds_fraction_and_batches",
    "elimination_fraction": "tests/test_multistart.py::test_rounds_fraction_and_batches",
    "batches_per_round": "tests/test_multistart.py::test_rounds_fraction_and_batches",
    "center_on_p0": "tests/test_multistart.py::test_the_box",
    "scale_factor": "tests/test_multistart.py::test_the_box",
    "enable_checkpoints": "tests/test_checkpoints.py::test_nothing_is_written_unless_asked_for",
    "checkpoint_dir": "tests/test_checkpoints.py::test_a_finished_fit_is_remembered",
    "resume_from_checkpoint": "tests/test_checkpoints.py::test_a_finished_fit_is_remembered",
    "checkpoint_frequency": "tests/test_checkpoints.py::test_how_often_is_saved",
    "checkpoint_interval": "tests/test_checkpoints.py::test_how_often_is_saved",
    "max_walltime": "tests/test_checkpoints.py::test_max_walltime_in_the_middle_of_a_pass",
    "stop_on_sigterm": "tests/test_survival.py::test_sigterm_ends_a_fit_with_a_checkpoint",
    "enable_fault_tolerance": "tests/test_data_faults.py::test_how_often_reading_is_tried",
    "max_retries_per_batch": "tests/test_data_faults.py::test_how_often_reading_is_tried",
    "retry_seconds": "tests/test_data_faults.py::test_an_outage_is_waited_out",
    "min_success_rate": "tests/test_data_faults.py::test_how_many_rows_may_be_missing",
    "dashboard": "tests/test_dashboard.py::test_dashboard_false_tells_nobody",
    "log_file": "tests/test_watching.py::test_json_lines_say_what_happened",
    "validate_numerics": "tests/test_numerics.py::test_validate_numerics_goes_back",
}
NOT_YET: dict[str, str] = {}

SHOWN = Shown(
    "tests/test_every_option.py",
    (option.name for option in fields(Config)),
    COVERED_ELSEWHERE,
    NOT_YET,
)
shows = SHOWN.shows


def test_no_option_is_without_a_test() -> None:
    assert SHOWN.table()[1] == []


@pytest.mark.parametrize("name", COVERED_ELSEWHERE)
def test_tests_elsewhere_are_there(name: str) -> None:
    assert_is_there(name, COVERED_ELSEWHERE[name])


# --- one small problem

X, Y = decay_data(6_000, seed=21)
CLEAN = 2.5 * np.exp(-1.3 * X) + 0.5
START = [5.0, 0.6, 1.0]  # relative loss 10.2: "exploration"
CAREFUL = [2.0, 1.0, 0.9]  # 0.55
NEAR = [2.5, 1.2, 0.5]  # 0.012: "refinement"
FAR = [20.0, 0.1, 9.0]  # 1700; 295 iterations with a short memory and short steps
LAZY_X, LAZY_Y = (da.from_array(a, chunks=600) for a in (X, Y))


fit = functools.partial(problems.fit, model=exponential, x=X, y=Y, p0=START)


def warm_up(start: Any = START, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = fit(p0=start, **options).diagnostics["warm_up"]
    return found


TINY_SAMPLE = {"sample_rows": 3, "callback_frequency": 1, "verbose": 0}


def all_rows(**options: Any) -> tuple[nd.FitResult, list[np.ndarray]]:
    """Fit with a sample that is too small to be used, so that all is done over all rows."""
    path: list[np.ndarray] = []
    result = fit(
        callback=lambda p, loss, i: path.append(p),
        **{**TINY_SAMPLE, **options},
    )
    return result, path


def jacobian(params: np.ndarray) -> np.ndarray:
    a, b, _ = params
    decay = np.exp(-b * X)
    return np.column_stack([decay, -a * X * decay, np.ones_like(X)])


def way_left(result: nd.FitResult) -> float:
    """Return how far from the solution a fit has ended, in units of the residual."""
    params = exact()
    residual = params[0] * np.exp(-params[1] * X) + params[2] - Y
    left = jacobian(params) @ (result.x - params)
    return float(np.linalg.norm(left) / np.linalg.norm(residual))


def exact() -> np.ndarray:
    """Return the solution by Gauss-Newton in NumPy, from close by."""
    params = np.array([2.5, 1.3, 0.5])
    for _ in range(20):
        residual = params[0] * np.exp(-params[1] * X) + params[2] - Y
        params = params - np.linalg.lstsq(jacobian(params), residual)[0]
    return params


# --- phase 0


@shows("normalize", "normalization_strategy")
def test_normalization() -> None:
    def strategy(bounds: Any = None, **options: Any) -> str:
        return str(fit(bounds=bounds, **options).phase_history[0]["strategy"])

    both = ([0, 0, 0], [9, 9, 9])
    assert strategy() == "p0"
    assert strategy(both) == "bounds"
    assert strategy(both, normalization_strategy="p0") == "p0"
    assert strategy(both, normalize=False) == strategy(normalization_strategy="none") == "none"
    # Another space, another path.
    assert warm_up(normalize=False)["iterations"] != warm_up()["iterations"]


# --- phase 1


@shows("warmup_iterations", "loss_plateau_threshold")
def test_when_criteria_begin_to_count() -> None:
    for least in (2, 9):
        found = warm_up(warmup_iterations=least, loss_plateau_threshold=1e9)
        assert (found["iterations"], found["reason"]) == (least, "plateau")
    assert warm_up(warmup_iterations=2)["iterations"] > 9


@shows("max_warmup_iterations", "active_switching_criteria")
def test_the_limit_and_which_criteria_are_in_force() -> None:
    found = warm_up(max_warmup_iterations=7)
    assert (found["iterations"], found["reason"]) == (7, "max_iter")
    other = warm_up(max_warmup_iterations=7, active_switching_criteria=["plateau"])
    assert other["iterations"] > 7
    assert other["reason"] != "max_iter"
    none = warm_up(max_warmup_iterations=0)
    assert "iterations" not in none


@shows("gradient_norm_threshold")
def test_gradient_criterion() -> None:
    options = {"warmup_iterations": 1, "active_switching_criteria": ["gradient"]}
    early = warm_up(gradient_norm_threshold=1.0, **options)
    late = warm_up(gradient_norm_threshold=1e-2, **options)
    assert early["reason"] == late["reason"] == "gradient"
    assert early["iterations"] < late["iterations"]
    assert early["loss"] > late["loss"]


@shows("lbfgs_history_size")
def test_a_short_memory_takes_more_iterations() -> None:
    assert warm_up(lbfgs_history_size=1)["iterations"] > 1.5 * warm_up()["iterations"]
    # Whether the memory was filled is counted by its size.
    few = {"max_warmup_iterations": 7}
    assert not warm_up(**few)["history_filled"]
    assert warm_up(lbfgs_history_size=1, **few)["history_filled"]


@shows("lbfgs_line_search")
def test_line_searches_differ() -> None:
    # Where the loss falls by rounding only, the strong conditions alone cannot be met.
    found = {
        search: warm_up(y=CLEAN, lbfgs_line_search=search, gradient_norm_threshold=1e-30)
        for search in ("wolfe", "strong_wolfe")
    }
    assert found["wolfe"]["line_search_failures"] == 0
    assert found["strong_wolfe"]["line_search_failures"] == 1
    # Zoom shortens an absurd first step by any factor, backtracking by 0.8^20.
    ends = {search: warm_up(**absurd(search))["reason"] for search in ("wolfe", "backtracking")}
    assert ends["wolfe"] != "line_search"
    assert ends["backtracking"] == "line_search"


def absurd(search: str) -> dict[str, Any]:
    """Return options with a first step that is far too long."""
    return {
        "lbfgs_line_search": search,
        "enable_step_clipping": False,
        "enable_cost_guard": False,
        "lbfgs_exploration_step_size": 1e4,
    }


@shows("lbfgs_initial_step_size", "lbfgs_exploration_step_size", "lbfgs_refinement_step_size")
@pytest.mark.parametrize(
    ("mode", "start", "name"),
    [
        ("careful", CAREFUL, "lbfgs_initial_step_size"),
        ("exploration", START, "lbfgs_exploration_step_size"),
        ("refinement", NEAR, "lbfgs_refinement_step_size"),
    ],
)
def test_first_steps(mode: str, start: list[float], name: str) -> None:
    """A shorter first step gains less; the options of the other modes change nothing."""
    one = {"max_warmup_iterations": 1}
    plain, short = warm_up(start, **one), warm_up(start, **one, **{name: 1e-6})
    assert plain["mode"] == short["mode"] == mode
    assert short["loss"] > plain["loss"]
    others = {
        f"lbfgs_{other}_step_size": 1e-6
        for other in ("initial", "exploration", "refinement")
        if f"lbfgs_{other}_step_size" != name
    }
    assert warm_up(start, **one, **others) == plain


@shows("gradient_clip_value")
def test_clipped_gradients_slow_the_warm_up() -> None:
    few = {"max_warmup_iterations": 7}
    clipped, wide = (warm_up(gradient_clip_value=value, **few) for value in (1e-3, 1e9))
    assert clipped["loss"] > wide["loss"]
    assert wide == warm_up(**few)


# --- defence layers


@shows("enable_warm_start_detection", "warm_start_threshold")
def test_layer_1() -> None:
    nd.reset_defense_telemetry()
    assert not warm_up(NEAR)["is_warm_start"]
    skipped = warm_up(NEAR, warm_start_threshold=0.05)
    assert skipped["is_warm_start"]
    assert "iterations" not in skipped
    assert nd.get_defense_telemetry().layer1_warm_start_triggers == 1
    off = warm_up(NEAR, warm_start_threshold=0.05, enable_warm_start_detection=False)
    assert off["iterations"] > 0
    assert nd.get_defense_telemetry().layer1_warm_start_triggers == 1


@shows("enable_adaptive_warmup_lr")
def test_layer_2() -> None:
    assert warm_up()["mode"] == "exploration"
    fixed = warm_up(enable_adaptive_warmup_lr=False, lbfgs_exploration_step_size=1e-6)
    assert fixed["mode"] == "fixed"
    # The step of its mode is not taken, lbfgs_initial_step_size is.
    shorter = warm_up(enable_adaptive_warmup_lr=False, lbfgs_initial_step_size=1e-6)
    assert shorter["iterations"] != fixed["iterations"]


@shows("enable_cost_guard", "cost_increase_tolerance")
def test_layer_3() -> None:
    """A line search that has failed may leave a loss that has grown."""
    nd.reset_defense_telemetry()
    options = absurd("backtracking") | {"enable_cost_guard": True}
    guarded = warm_up(**options)
    assert guarded["cost_guard"]
    assert guarded["reason"] == "cost_guard"
    assert guarded["loss"] == pytest.approx(guarded["relative_loss"] * Y.var())  # of the start
    assert nd.get_defense_telemetry().layer3_cost_guard_triggers == 1
    for other in ({"enable_cost_guard": False}, {"cost_increase_tolerance": 1e30}):
        assert not warm_up(**options | other)["cost_guard"]
    assert nd.get_defense_telemetry().layer3_cost_guard_triggers == 1


def longest_step(config: Config, start: Any = START) -> float:
    """Return the length of the longest step of the warm-up, in normalized space."""
    path = [np.array(start)]
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    result = optimizer.fit(exponential, X, Y, start, callback=lambda p, loss, i: path.append(p))
    assert optimizer.normalizer is not None
    n = result.diagnostics["warm_up"]["iterations"]
    steps = np.diff([optimizer.normalizer.normalize(p) for p in path[: n + 1]], axis=0)
    return float(np.linalg.norm(steps, axis=1).max())


@shows("enable_step_clipping", "max_warmup_step_size")
def test_layer_4() -> None:
    options = {"callback_frequency": 1, "verbose": 0}
    for limit in (0.02, 0.1):
        longest = longest_step(Config(max_warmup_step_size=limit, **options))
        assert longest == pytest.approx(limit)
    assert longest_step(Config(enable_step_clipping=False, **options)) > 0.1
    assert warm_up()["clipped"] > 0
    assert warm_up(enable_step_clipping=False)["clipped"] == 0


# --- phase 2


@shows("gauss_newton_max_iterations")
@pytest.mark.filterwarnings("ignore:Covariance")
def test_limit_of_trials() -> None:
    for limit in (2, 3):
        result, path = all_rows(gauss_newton_max_iterations=limit)
        assert not result.success
        assert "gauss_newton_max_iterations" in result.message
        assert result.nit == len(path) == limit
    assert all_rows()[0].success


@shows("gauss_newton_tol")
def test_tolerance() -> None:
    loose, tight = (all_rows(gauss_newton_tol=tol)[0] for tol in (1e-2, 1e-10))
    assert loose.success
    assert tight.success
    assert loose.nit < tight.nit
    assert way_left(tight) <= 1e-10 < way_left(loose) <= 1e-2


@shows("trust_region_initial")
def test_first_trust_radius() -> None:
    """The scaled length of the first trial is the radius times that of the start."""
    scale = np.linalg.norm(jacobian(np.array(START)), axis=0)
    for radius in (1e-2, 1e-4):
        _, trials = all_rows(trust_region_initial=radius, gauss_newton_max_iterations=1)
        length = np.linalg.norm((trials[0] - START) * scale)
        assert length <= 1.1 * radius * np.linalg.norm(START * scale)


@shows("regularization_factor")
def test_damped_directions() -> None:
    """Directions below the fraction are damped, so that a step along them is too short."""
    plain, strong = (
        all_rows(p0=NEAR, regularization_factor=factor, gauss_newton_max_iterations=1)[0]
        for factor in (1e-10, 0.3)
    )
    assert way_left(strong) > 1.2 * way_left(plain)


@shows("gauss_newton_solver")
def test_solver() -> None:
    for solver, used in (("auto", "normal"), ("normal", "normal"), ("qr", "qr")):
        assert fit(gauss_newton_solver=solver).phase_history[2]["solver"] == used


CENTRES = np.linspace(0, 5, 10)


def bumps(x: Any, *p: Any) -> Any:
    value = jnp.exp(-0.5 * ((x[:, None] - CENTRES) / 0.4) ** 2) @ jnp.stack(p)
    return value + 0.1 * value**2


BY_GRADIENTS = {
    "cg_param_threshold": 10,
    "sample_rows": 300,
    "max_warmup_iterations": 0,
    "verbose": 0,
}


def by_gradients(**options: Any) -> tuple[nd.FitResult, dict[str, Any]]:
    """Fit ten parameters by conjugate gradients."""
    result = fit(**bump_data(), **{**BY_GRADIENTS, **options})
    return result, result.phase_history[2]


def bump_data() -> dict[str, Any]:
    x = X[:1_500]
    clean = np.exp(-0.5 * ((x[:, None] - CENTRES) / 0.4) ** 2) @ (1 + 0.3 * np.cos(CENTRES))
    y = clean + 0.1 * clean**2 + 0.05 * np.random.default_rng(1).standard_normal(len(x))
    return {"model": bumps, "x": x, "y": y, "p0": np.ones(10)}


@shows("cg_param_threshold")
def test_from_when_on_gradients_are_used() -> None:
    result, record = by_gradients()
    assert result.success
    assert record["solver"] == "conjugate gradients"
    assert result.pcov is None
    other, record = by_gradients(cg_param_threshold=11)
    assert record["solver"] == "normal"
    assert other.pcov is not None
    np.testing.assert_allclose(result.x, other.x, rtol=1e-6)


@shows("cg_max_iterations", "cg_relative_tolerance", "cg_absolute_tolerance")
@pytest.mark.filterwarnings("ignore:Covariance")
def test_when_a_step_is_solved() -> None:
    plain = by_gradients()[1]
    limit = {"gauss_newton_max_iterations": 10}
    for options in (
        {"cg_max_iterations": 1},
        {"cg_relative_tolerance": 0.9},
        {"cg_absolute_tolerance": 1e6},
    ):
        found = by_gradients(**options, **limit)[1]
        assert found["products"] / found["iterations"] < plain["products"] / plain["iterations"]
        assert found["iterations"] > plain["iterations"]
        if "cg_relative_tolerance" not in options:
            assert found["products"] <= found["iterations"] + 1


@shows("cg_error_probes")
def test_errors_by_probing() -> None:
    none, some, every = (by_gradients(cg_error_probes=probes)[0] for probes in (0, 6, 10))
    matrix = by_gradients(cg_param_threshold=11)[0].perr
    assert np.isnan(none.perr).all()
    np.testing.assert_allclose(every.perr, matrix, rtol=1e-2)
    np.testing.assert_allclose(some.perr, matrix, rtol=1.0)
    assert not np.allclose(some.perr, every.perr, rtol=1e-6)


# --- phase 3, penalties and weights


@shows("cov_type")
def test_covariance() -> None:
    plain, hc0, hc1 = (fit(cov_type=name, **NO_WARMUP) for name in ("nonrobust", "HC0", "HC1"))
    assert hc0.n_passes == plain.n_passes + 1
    assert not np.allclose(hc0.pcov, plain.pcov, rtol=1e-4)
    np.testing.assert_allclose(hc1.pcov, hc0.pcov * 6_000 / 5_997, rtol=1e-9)


@shows("enable_group_variance_regularization", "group_variance_lambda", "group_variance_indices")
def test_penalty() -> None:
    def spread(first: int, strength: float, switch: bool = True) -> float:
        indices = [(first, first + 2)]
        options = {
            "enable_group_variance_regularization": switch,
            "group_variance_lambda": strength,
            "group_variance_indices": indices if switch else None,
        }
        params = fit(**options, **NO_WARMUP).x
        return float(np.ptp(params[first : first + 2]))

    off = spread(0, 1.0, switch=False)
    weak, strong = spread(0, 1e-3), spread(0, 1.0)
    assert strong < 0.2 * weak < weak < off
    assert spread(1, 1.0) < 0.5 * spread(1, 1.0, switch=False)  # of the other two


@shows("enable_residual_weighting", "residual_weights")
def test_weights() -> None:
    group = np.arange(len(X)) % 2
    y = Y + np.where(group == 1, 0.5, 0.0)  # a higher floor in the second group

    def grouped(x: Any, a: Any, b: Any, c: Any) -> Any:
        return a * jnp.exp(-b * x[1]) + c

    def floor(switch: bool, weights: list[float]) -> float:
        options = {
            "enable_residual_weighting": switch,
            "residual_weights": weights if switch else None,
        }
        return float(fit(y=y, x=(group, X), model=grouped, **options, **NO_WARMUP).x[2])

    assert floor(False, [1.0, 1e6]) == pytest.approx(0.75, abs=0.02)
    assert floor(True, [1.0, 1e6]) == pytest.approx(1.0, abs=0.02)
    assert floor(True, [1e6, 1.0]) == pytest.approx(0.5, abs=0.02)


# --- arithmetic and memory


def seen_by_the_model(config: Config) -> tuple[set[int], set[str]]:
    """Return how many rows, and of which dtype, a model is given."""
    lengths, dtypes = set(), set()

    def watched(x: Any, a: Any, b: Any, c: Any) -> Any:
        lengths.add(x.shape[0])
        dtypes.add(str(x.dtype))
        return a * jnp.exp(-b * x) + c

    fit(config=config, model=watched)
    return lengths, dtypes


@shows("chunk_size", "precision")
def test_what_the_model_is_given() -> None:
    usual, dtypes = seen_by_the_model(Config(verbose=0))
    assert dtypes == {"float64"}
    small, dtypes = seen_by_the_model(Config(verbose=0, chunk_size=64, precision="float32"))
    assert 64 in small - usual
    assert "float32" in dtypes
    # Rounding is seen in the cost alone: the last step is exact in float64.
    rough, fine = (fit(precision=precision) for precision in ("float32", "float64"))
    assert rough.cost != fine.cost
    assert rough.cost == pytest.approx(fine.cost, rel=1e-5)


def from_source(config: Config) -> nd.FitResult:
    """Fit data that have to be computed in each pass."""
    x, y = (a.map_blocks(np.copy) for a in (LAZY_X, LAZY_Y))
    return fit(config=config, x=x, y=y)


@shows("cache")
def test_what_stays_between_passes() -> None:
    kept, read = (
        from_source(Config(verbose=0, sample_rows=100, cache=size, **NO_WARMUP))
        for size in (10**6, 0)
    )
    assert kept.rows_cached == (kept.n_passes - 1) * len(X) > 0
    assert read.rows_cached == 0
    assert read.bytes_read > kept.bytes_read


# --- watching


@shows("callback_frequency")
def test_how_often_the_callback_is_called() -> None:
    calls: dict[int, list[int]] = {1: [], 6: []}
    for frequency, seen in calls.items():
        fit(callback=lambda p, loss, i: seen.append(i), callback_frequency=frequency)
    assert calls[6] == [i for i in calls[1] if i % 6 == 0] != []


@shows("verbose", "log_frequency")
def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(**options: Any) -> list[str]:
        fit(p0=CAREFUL, max_warmup_iterations=3, callback_frequency=1, **options)
        return capsys.readouterr().out.splitlines()

    assert printed(verbose=0) == []
    usual, more, rare = printed(verbose=1), printed(verbose=2), printed(verbose=2, log_frequency=2)
    assert any("Phase 1" in line for line in usual)
    assert not any("warm-up    " in line for line in usual)
    iterations = [line for line in more if " loss " in line and "|gradient|" in line]
    fewer = [line for line in rare if " loss " in line and "|gradient|" in line]
    assert len(more) - len(iterations) == len(rare) - len(fewer) > 0
    assert len(fewer) == len(iterations) // 2 > 0


# --- the sample


@shows("sample_rows", "random_seed")
def test_the_sample() -> None:
    def sampled(rows: int, seed: int) -> nd.FitResult:
        return fit(y=LAZY_Y, x=LAZY_X, sample_rows=rows, random_seed=seed)

    # All of them are padded to as many rows, so that they share a program.
    one, again, other, more = sampled(600, 1), sampled(600, 1), sampled(600, 2), sampled(900, 1)
    assert one.diagnostics["sample"]["rows"] == 600
    assert more.diagnostics["sample"]["rows"] == 900
    losses = [r.diagnostics["warm_up"]["relative_loss"] for r in (one, again, other)]
    assert losses[0] == losses[1] != losses[2]
    np.testing.assert_allclose(one.x, other.x, rtol=1e-7)


# --- presets

LIMITS = {
    "aggressive": (50, 100),
    "conservative": (30, 80),
    "memory_optimized": (40, 100),
    "defense_strict": (25, 60),
    "defense_relaxed": (50, 120),
    "scientific_default": (35, 100),
}


@pytest.mark.filterwarnings("ignore:Covariance")
@pytest.mark.parametrize("name", LIMITS)
def test_warm_ups_of_presets_are_short(name: str) -> None:
    """On a problem that takes 295 iterations: at least so many, at most so many."""
    hard = {
        "lbfgs_history_size": 1,
        "max_warmup_step_size": 0.02,
        "gauss_newton_max_iterations": 1,
        "verbose": 0,
    }

    def ended(**options: Any) -> tuple[int, str]:
        config = getattr(Config, name)(**hard, **options)
        found = fit(config=config, p0=FAR).diagnostics["warm_up"]
        return found["iterations"], found["reason"]

    least, most = LIMITS[name]
    assert ended(active_switching_criteria=["max_iter"]) == (most, "max_iter")
    assert ended(loss_plateau_threshold=1e9) == (least, "plateau")


@pytest.mark.parametrize(
    ("name", "tol"),
    [("aggressive", 1e-7), ("conservative", 1e-10), ("scientific_default", 1e-10)],
)
def test_presets_converge_to_their_tolerance(name: str, tol: float) -> None:
    config = getattr(Config, name)(verbose=0, sample_rows=3)
    result = fit(config=config)
    assert result.success
    assert way_left(result) <= tol


def test_conservative_takes_a_smaller_first_step() -> None:
    scale = np.linalg.norm(jacobian(np.array(START)), axis=0)
    lengths = []
    for config in (Config(**TINY_SAMPLE), Config.conservative(**TINY_SAMPLE)):
        path: list[np.ndarray] = []
        fit(config=config, callback=lambda p, loss, i, path=path: path.append(p))
        lengths.append(np.linalg.norm((path[0] - START) * scale))
    assert lengths[1] < lengths[0]


def test_memory_optimized_keeps_nothing_and_calculates_in_float32() -> None:
    config = Config.memory_optimized(verbose=0, sample_rows=100)
    assert "float32" in seen_by_the_model(config)[1]
    result = from_source(config)
    assert result.rows_cached == 0 < from_source(Config(verbose=0, sample_rows=100)).rows_cached
    assert (np.abs(result.x - exact()) <= 1e-2 * result.perr).all()


def test_memory_optimized_uses_gradients_for_a_thousand_parameters() -> None:
    """Which cannot keep bounds, and says so."""
    bounds = (-1.0, 1.0)

    def constant(x: Any, *p: Any) -> Any:
        return p[0] + 0.0 * x

    few = X[:10]
    for config, refuses in ((Config.memory_optimized(), True), (Config(), False)):
        optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
        with pytest.raises(ValueError, match="conjugate") if refuses else nullcontext():
            optimizer.plan(constant, few, few, np.zeros(1_000), bounds)


def test_with_multistart_runs_successive_halving() -> None:
    for config, n in ((Config.with_multistart(), 10), (Config.with_multistart(4), 4)):
        config.verbose = 0
        assert len(fit(config=config).diagnostics["multistart"]["candidates"]) == n


@pytest.mark.parametrize(
    ("name", "limit"),
    [("defense_strict", 0.05), ("defense_relaxed", 0.5), ("scientific_default", 0.1)],
)
def test_how_far_presets_let_the_warm_up_go(name: str, limit: float) -> None:
    config = getattr(Config, name)(callback_frequency=1, verbose=0)
    assert 0.9 * limit <= longest_step(config, START) <= limit * (1 + 1e-9)


def test_which_starts_presets_take_for_warm() -> None:
    """The relative loss is 0.02 at one start and 0.1 at the other; strict ends at 0.01."""
    for start, low, high in (([2.5, 1.15, 0.5], 0.01, 0.05), ([2.3, 1.0, 0.6], 0.05, 0.5)):
        loss = warm_up(start)["relative_loss"]
        assert low < loss < high
        for name, threshold in (
            ("defense_strict", 0.01),
            ("scientific_default", 0.05),
            ("defense_relaxed", 0.5),
        ):
            found = fit(config=getattr(Config, name)(verbose=0), p0=start).diagnostics["warm_up"]
            assert found["is_warm_start"] == (loss < threshold)


def test_defense_disabled_disables_all_four() -> None:
    nd.reset_defense_telemetry()
    for start in (NEAR, START):
        fit(config=Config.defense_disabled(verbose=0, warm_start_threshold=0.5), p0=start)
    search = absurd("backtracking")
    del search["enable_step_clipping"], search["enable_cost_guard"]
    search["lbfgs_initial_step_size"] = search.pop("lbfgs_exploration_step_size")
    fit(config=Config.defense_disabled(verbose=0, **search))
    metrics = nd.get_defense_telemetry().export_metrics()
    assert metrics["nlsq_defense_warmup_calls_total"] == 3
    assert metrics["nlsq_defense_layer2_fixed_total"] == 3
    layers = [n for name, n in metrics.items() if "_layer" in name and "fixed" not in name]
    assert len(layers) == 7
    assert not any(layers)


if __name__ == "__main__":
    listed, without = SHOWN.table()
    for option, test in listed:
        print(f"{option:<38}{test}")
    if without:
        sys.exit(f"listed not once, or no option: {', '.join(without)}")
