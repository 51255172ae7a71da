"""Options: defaults, rules, presets."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import nlsq_dask as nd
from nlsq_dask import HybridStreamingConfig as Config
from nlsq_dask.config.validation import default_of

PRESETS = {
    "aggressive": dict(
        chunk_size=2**21,
        warmup_iterations=50,
        max_warmup_iterations=100,
        loss_plateau_threshold=5e-4,
        gradient_norm_threshold=5e-3,
        gauss_newton_tol=1e-7,
    ),
    "conservative": dict(
        warmup_iterations=30,
        max_warmup_iterations=80,
        loss_plateau_threshold=1e-5,
        gradient_norm_threshold=1e-4,
        gauss_newton_tol=1e-10,
        gauss_newton_max_iterations=200,
        trust_region_initial=0.5,
    ),
    "memory_optimized": dict(
        chunk_size=2**17,
        precision="float32",
        cache=0,
        warmup_iterations=40,
        max_warmup_iterations=100,
        checkpoint_frequency=50,
        cg_param_threshold=1000,
    ),
    "with_multistart": dict(enable_multistart=True),
    "defense_strict": dict(
        max_warmup_step_size=0.05, warmup_iterations=25, max_warmup_iterations=60
    ),
    "defense_relaxed": dict(
        warm_start_threshold=0.5,
        cost_increase_tolerance=0.5,
        max_warmup_step_size=0.5,
        warmup_iterations=50,
        max_warmup_iterations=120,
    ),
    "defense_disabled": dict(
        enable_warm_start_detection=False,
        enable_adaptive_warmup_lr=False,
        enable_cost_guard=False,
        enable_step_clipping=False,
    ),
    "scientific_default": dict(
        warm_start_threshold=0.05,
        cost_increase_tolerance=0.2,
        warmup_iterations=35,
        max_warmup_iterations=100,
        gauss_newton_tol=1e-10,
        gauss_newton_max_iterations=200,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_differ_by_their_row_alone(name: str) -> None:
    preset, default = getattr(Config, name)(), Config()
    differing = {
        f.name: getattr(preset, f.name)
        for f in fields(Config)
        if getattr(preset, f.name) != getattr(default, f.name)
    }
    assert differing == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_help_shows_what_presets_set(name: str) -> None:
    preset = getattr(Config, name)
    assert preset.__qualname__ == f"HybridStreamingConfig.{name}"
    assert "overrides" in inspect.signature(preset).parameters
    doc = inspect.getdoc(preset) or ""
    for section in ("Parameters", "Returns"):
        assert f"\n\n{section}\n{'-' * len(section)}\n" in doc
    if name != "with_multistart":
        assert all(f"``{option}={value!r}``" in doc for option, value in PRESETS[name].items())


def test_presets_explain_unknown_keywords() -> None:
    with pytest.raises(TypeError, match=r"no argument .max_iter.\. .*gauss_newton_max_iterations"):
        Config.aggressive(max_iter=3)


def test_presets_take_overrides() -> None:
    assert Config.with_multistart(n_starts=3, verbose=0).n_starts == 3
    assert Config.aggressive(random_seed=4).random_seed == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warmup_iterations", -1),
        ("warmup_iterations", 2.5),
        ("warmup_iterations", True),
        ("normalize", 1),
        ("normalization_strategy", "magic"),
        ("gauss_newton_tol", 0.0),
        ("gauss_newton_tol", float("nan")),
        ("active_switching_criteria", []),
        ("active_switching_criteria", ["sometimes"]),
        ("active_switching_criteria", "plateau"),
        ("active_switching_criteria", [["plateau"]]),
        ("chunk_size", 0),
        ("chunk_size", "large"),
        ("cache", -1),
        ("precision", "float16"),
        ("min_success_rate", 0.0),
        ("retry_seconds", -1.0),
        ("group_variance_indices", [(3, 1)]),
        ("residual_weights", [1.0, -1.0]),
        ("residual_weights", [1.0, float("inf")]),
        ("residual_weights", [[1.0], [1.0, 2.0]]),
        ("residual_weights", np.array(2.0)),
        ("residual_weights", np.ones((2, 2))),
        ("residual_weights", {1.0: 2.0}),
        ("lbfgs_initial_step_size", float("inf")),
        ("lbfgs_exploration_step_size", float("inf")),
        ("lbfgs_refinement_step_size", float("inf")),
        ("group_variance_lambda", float("inf")),
        ("scale_factor", float("inf")),
        pytest.param("scale_factor", 10**400, id="scale_factor-huge"),
        ("checkpoint_dir", 3),
        ("verbose", -1),
    ],
)
def test_errors_name_field_value_and_rule(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be .*; got ") as caught:
        Config(**{field: value})
    assert repr(value) in str(caught.value)


def test_unknown_names() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        Config(learning_rate=1)


OPTIMIZER = nd.AdaptiveHybridStreamingOptimizer
SCIPY = {"method": "lm"}, {"jac": None}, {"epsfcn": 1e-8}, {"check_finite": False}


@pytest.mark.parametrize(
    ("call", "keywords", "sentence"),
    [
        (OPTIMIZER, {"cov_type": "HC1"}, "Did you mean HybridStreamingConfig(..., cov_type=...)?"),
        (OPTIMIZER, {"sigma": 1.0}, "Did you mean fit(..., sigma=...)?"),
        (OPTIMIZER, {"verbos": 0}, "Did you mean fit(..., verbose=...)?"),
        (
            OPTIMIZER().fit,
            {"config": Config()},
            "Did you mean AdaptiveHybridStreamingOptimizer(..., config=...)?",
        ),
        *(
            (call, {name: 10}, "Did you mean HybridStreamingConfig(..., gauss_newton_max_it")
            for name in ("max_iter", "maxiter", "max_nfev")
            for call in (Config, OPTIMIZER, OPTIMIZER().fit, nd.curve_fit)
            if (name, call) != ("max_nfev", nd.curve_fit)
        ),
        *(
            (call, keywords, sentence)
            for call in (OPTIMIZER().fit, OPTIMIZER().plan)
            for keywords, sentence in zip(
                SCIPY,
                ("the only method is", "computed by JAX", "computed by JAX", "Use nan_policy="),
                strict=True,
            )
        ),
    ],
)
def test_what_is_said_of_a_keyword_that_a_call_does_not_have(
    call: Any, keywords: dict[str, Any], sentence: str
) -> None:
    (name,) = keywords
    data = () if call in (Config, OPTIMIZER) else (model, X, Y)
    with pytest.raises(TypeError, match=rf"\(\) has no argument '{name}'\. ") as caught:
        call(*data, **keywords)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("keyword", "sentence"),
    [
        ("weights", "sigma=1 / np.sqrt(weights) if they multiply squared residuals"),
        ("sample_weight", "Use sigma=1 / weights if the weights multiply residuals"),
        ("x_scale", "Omit it: parameters are scaled automatically"),
        ("sigma_x", "Errors of x are not supported"),
        ("xerr", "Errors of x are not supported"),
        ("yerr", "Did you mean fit(..., sigma=...)?"),
        ("absolute_sigm", "Did you mean fit(..., absolute_sigma=...)?"),
        ("nanpolicy", "Did you mean fit(..., nan_policy=...)?"),
        ("fix", "Did you mean fit(..., fixed=...)?"),
        ("tied", "Did you mean fit(..., ties=...)?"),
        ("params", "Use p0={'a': 1.0, ...} for initial values, bounds="),
        ("min", "Use bounds={'a': (0, np.inf), ...}"),
        ("max", "Use bounds={'a': (0, np.inf), ...}"),
        ("x0", "Did you mean fit(..., p0=...)?"),
        ("limits", "Did you mean fit(..., bounds=...)?"),
        ("vary", "Use fixed=['b', ...] with the names"),
        ("constraints", "Use ties={'b': lambda p: 2 * p['a']}"),
        ("gauss_newton_iterations", "HybridStreamingConfig(..., gauss_newton_max_iterations=...)?"),
    ],
)
def test_a_suggestion_has_the_meaning_of_the_keyword(keyword: str, sentence: str) -> None:
    with pytest.raises(TypeError) as caught:
        OPTIMIZER().fit(model, X, Y, **{keyword: 1})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "keyword", ["y_scale", "scale", "x_bounds", "sigma2", "p_scale", "n_sample"]
)
def test_an_argument_of_another_meaning_is_not_suggested(keyword: str) -> None:
    with pytest.raises(TypeError, match=rf"^fit\(\) has no argument '{keyword}'\.$"):
        OPTIMIZER().fit(model, X, Y, **{keyword: 1})


def test_numpy_integers_are_integers() -> None:
    config = Config(chunk_size=np.int64(2000), n_starts=np.int32(3))
    assert type(config.chunk_size) is int
    assert type(config.n_starts) is int


def test_infinity_is_a_limit_that_is_never_met() -> None:
    limits = ("max_walltime", "max_warmup_step_size", "gradient_clip_value", "checkpoint_interval")
    assert Config(**dict.fromkeys(limits, np.inf)).max_walltime == np.inf


def test_numpy_flags_are_flags() -> None:
    config = Config(normalize=np.False_, checkpoint_dir="a", resume_from_checkpoint=np.True_)
    assert config.normalize is False
    assert config.resume_from_checkpoint is True


@pytest.mark.parametrize("form", [list, tuple, np.array, lambda v: np.array(v, "i4")])
def test_weights_in_any_form_are_kept_as_one(form: Any) -> None:
    config = Config(enable_residual_weighting=True, residual_weights=form([1, 2]))
    assert config.residual_weights == (1.0, 2.0)
    assert config == replace(config)
    assert "residual_weights=(1.0, 2.0)" in repr(config)
    config.residual_weights = form([3, 4])
    assert "residual_weights=(3.0, 4.0)" in repr(config)


def test_attributes_are_options_and_nothing_else() -> None:
    config = Config()
    with pytest.raises(
        AttributeError, match=r"no option 'gauss_newton_tolerance'. Did you mean .*"
    ):
        config.gauss_newton_tolerance = 1e-3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no option 'dtype'"):
        config.dtype = "float32"  # type: ignore[misc]
    config.gauss_newton_tol = 1e-3
    assert config == pickle.loads(pickle.dumps(config)) == Config(gauss_newton_tol=1e-3)


def test_going_on_needs_a_folder() -> None:
    with pytest.raises(ValueError, match=r"=True resumes from checkpoint_dir, which is None"):
        Config(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"=True requires enable_checkpoints=True"):
        Config(resume_from_checkpoint=True, checkpoint_dir="a", enable_checkpoints=False)


def test_the_docstring_describes_every_option() -> None:
    doc = inspect.getdoc(Config) or ""
    for option in fields(Config):
        default = "all" if option.name == "active_switching_criteria" else repr(default_of(option))
        allowed = option.metadata["rule"].allowed
        assert f"\n{option.name} : {allowed}, default {default}\n    " in doc
    assert "\n\nRaises\n------\nValueError\n" in doc


def test_a_fit_checks_and_copies_its_options() -> None:
    config = Config(verbose=0)
    optimizer = nd.AdaptiveHybridStreamingOptimizer(config)
    config.gauss_newton_tol = -1.0
    with pytest.raises(ValueError, match="gauss_newton_tol"):
        optimizer.fit(lambda x, a: a * x, np.ones(3), np.ones(3))
    with pytest.raises(TypeError, match="HybridStreamingConfig"):
        nd.AdaptiveHybridStreamingOptimizer({"verbose": 0})  # type: ignore[arg-type]


X = np.linspace(0, 4, 2_000)
Y = 2 * np.exp(-0.8 * X) + 0.1 + 0.01 * np.random.default_rng(0).standard_normal(len(X))


def model(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"memory_optimized"}))
def test_every_preset_fits(name: str) -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(getattr(Config, name)(verbose=0))
    result = optimizer.fit(model, X, Y, [1.0, 1.0, 0.0])
    assert result.success
    exact = nd.AdaptiveHybridStreamingOptimizer(Config(verbose=0)).fit(model, X, Y)
    np.testing.assert_allclose(result.popt, exact.popt, rtol=1e-8)


def test_checkpoints_without_a_folder_ask_for_nothing() -> None:
    config = Config(enable_checkpoints=True, checkpoint_dir=None, verbose=0)
    assert nd.AdaptiveHybridStreamingOptimizer(config).fit(model, X, Y).success
    off = Config(enable_checkpoints=False, checkpoint_dir="unused", verbose=0)
    assert nd.AdaptiveHybridStreamingOptimizer(off).fit(model, X, Y).success


@pytest.mark.parametrize(
    ("n_rows", "row_bytes", "expected"),
    [
        (1_000, 16, 2**16),
        (2**20, 16, 2**16),
        (1_500_000, 16, 93_750),
        (10**9, 16, 2**17),
        (10**9, 10_000, 6710),
    ],
)
def test_how_many_rows_are_sampled(n_rows: int, row_bytes: int, expected: int) -> None:
    assert nd.HybridStreamingConfig().sample_size(n_rows, row_bytes) == expected
    assert nd.HybridStreamingConfig(sample_rows=77).sample_size(n_rows, row_bytes) == 77
