"""Settings of the warm-up and the solvers, from the options of the user."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.solvers.iterate import Settings
from nlsq_dask.solvers.newton_cg import CgSettings
from nlsq_dask.warmup.defense_layers import StartSettings
from nlsq_dask.warmup.lbfgs import WarmupSettings
from nlsq_dask.warmup.multistart import MultistartSettings

# Multiple of the iteration limit of the warm-up if "max_iter" is not among the criteria.
_UNLIMITED_FACTOR = 10
# Iterations on the sample read no data: limits relative to those over all rows, for conjugate
# gradients and for Gauss-Newton.
CG_SAMPLE_FACTOR, _SAMPLE_FACTOR = 10, 20
# Iterations without progress, relative to the limits: over all rows, at least 15; on the sample.
_PATIENCE_SHARE, _MIN_PATIENCE = 0.15, 15
_SAMPLE_PATIENCE_SHARE = 0.25


def start_settings(config: HybridStreamingConfig) -> StartSettings:
    """Return the settings that decide whether a warm-up is needed, and its first step size."""
    return StartSettings(
        warm_start_threshold=config.warm_start_threshold
        if config.enable_warm_start_detection
        else 0.0,
        is_adaptive=config.enable_adaptive_warmup_lr,
        refinement_step=config.lbfgs_refinement_step_size,
        careful_step=config.lbfgs_initial_step_size,
        exploration_step=config.lbfgs_exploration_step_size,
    )


def warmup_settings(config: HybridStreamingConfig) -> WarmupSettings:
    """Return the settings of L-BFGS, with limits on cost increases and step lengths."""
    criteria, limit = config.active_switching_criteria, config.max_warmup_iterations
    return WarmupSettings(
        history_size=config.lbfgs_history_size,
        line_search=config.lbfgs_line_search,
        min_iterations=config.warmup_iterations,
        max_iterations=limit if "max_iter" in criteria else limit * _UNLIMITED_FACTOR,
        plateau=config.loss_plateau_threshold if "plateau" in criteria else 0.0,
        gradient=config.gradient_norm_threshold if "gradient" in criteria else 0.0,
        max_gradient=config.gradient_clip_value,
        cost_tolerance=config.cost_increase_tolerance if config.enable_cost_guard else None,
        max_step=config.max_warmup_step_size if config.enable_step_clipping else None,
    )


def multistart_settings(config: HybridStreamingConfig) -> MultistartSettings:
    """Return the settings of successive halving, which chooses the best of many starts."""
    return MultistartSettings(
        n_starts=config.n_starts,
        sampler=config.multistart_sampler,
        n_rounds=config.elimination_rounds,
        elimination_fraction=config.elimination_fraction,
        batches_per_round=config.batches_per_round,
        center_on_p0=config.center_on_p0,
        scale_factor=config.scale_factor,
        seed=config.random_seed,
    )


def gauss_newton_settings(problem: FitProblem) -> Settings:
    """Return the settings of Gauss-Newton over all rows."""
    config, parameters = problem.config, problem.parameters
    return Settings(
        low=parameters.low,
        high=parameters.high,
        tol=config.gauss_newton_tol,
        max_iterations=config.gauss_newton_max_iterations,
        patience=_patience(problem),
        sizes=problem.normalizer.scales,
        regularization=config.regularization_factor,
        initial_radius=config.trust_region_initial,
        epsilon=_epsilon(problem),
        recovers=config.validate_numerics,
    )


def _patience(problem: FitProblem) -> int:
    """Return after how many iterations over all rows without progress a solve ends.

    They may evaluate as many rows as the iterations on the sample that are allowed without
    progress. If the sample has all rows, these have been used up.
    """
    limit = problem.config.gauss_newton_max_iterations
    patience = max(_MIN_PATIENCE, round(_PATIENCE_SHARE * limit))
    n_sample, n_rows = problem.sample_rows, problem.blocks.n_rows
    if n_sample >= n_rows:
        return patience
    return max(patience, _sample_patience(limit) * n_sample // n_rows)


def _sample_patience(max_iterations: int) -> int:
    """Return after how many iterations on the sample without progress a solve ends."""
    return round(_SAMPLE_PATIENCE_SHARE * _SAMPLE_FACTOR * max_iterations)


def sample_settings(settings: Settings) -> Settings:
    """Return the settings of Gauss-Newton on the sample, given those over all rows."""
    return replace(
        settings,
        epsilon=float(np.finfo(np.float64).eps),
        max_iterations=_SAMPLE_FACTOR * settings.max_iterations,
        patience=_sample_patience(settings.max_iterations),
    )


def newton_cg_settings(problem: FitProblem) -> CgSettings:
    """Return the settings of conjugate gradients over all rows."""
    config = problem.config
    return CgSettings(
        tol=config.gauss_newton_tol,
        max_iterations=config.gauss_newton_max_iterations,
        cg_max_iterations=config.cg_max_iterations,
        cg_relative=config.cg_relative_tolerance,
        cg_absolute=config.cg_absolute_tolerance,
        epsilon=_epsilon(problem),
        recovers=config.validate_numerics,
    )


def _epsilon(problem: FitProblem) -> float:
    return float(np.finfo(problem.model.dtype).eps)
