"""``HybridStreamingConfig``: the options of a fit, with their defaults and rules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from nlsq_dask._keywords import explain_keywords
from nlsq_dask.config import auto
from nlsq_dask.config.presets import preset
from nlsq_dask.config.rules import (
    BOOL,
    CRITERIA,
    FINITE_NON_NEGATIVE,
    FINITE_POSITIVE,
    FRACTION,
    NON_NEGATIVE,
    PATH,
    PATH_OR_FLAG,
    POSITIVE,
    RANGES,
    TOLERANCE,
    WEIGHTS,
    check_combinations,
    integer,
    one_of,
    or_else,
)
from nlsq_dask.config.validation import ValidatedOptions, option, runtime_option


@dataclass(kw_only=True, repr=False)
class HybridStreamingConfig(ValidatedOptions):
    """Options of a fit, as keyword arguments.

    Values are validated at construction and again when a fit starts. A fit uses a copy, so later
    changes do not affect it.

    Terms: a pass reads all rows once. The sample is a subset of the rows, kept in memory. A block
    is one chunk of y with the matching rows of the other arrays; a task reads one or several
    blocks. The relative loss is the mean squared residual divided by the variance of y, both
    weighted by sigma: 0 if all residuals are 0, and 1 for the best constant model. Four numbered
    layers of defense guard the warm-up against bad starts and steps.

    Parameters
    ----------
    normalize : True or False, default True
        Scale the parameters in the warm-up; ``normalization_strategy`` says how.
    normalization_strategy : one of 'auto', 'bounds', 'p0', 'none', default 'auto'
        Scaling of the parameters: 'bounds' maps the interval between the bounds to [0, 1], 'p0'
        divides by ``|p0|`` (by 1 where p0 is 0), 'none' scales nothing, and 'auto' is 'bounds' if
        all bounds are finite, otherwise 'p0'.
    warmup_iterations : an integer >= 0, default 200
        Minimum number of warm-up iterations before the criteria 'plateau' and 'gradient' can end
        the warm-up.
    max_warmup_iterations : an integer >= 0, default 500
        Maximum number of warm-up iterations; 0 disables the warm-up. If
        ``active_switching_criteria`` does not contain 'max_iter', ten times as many are allowed.
    loss_plateau_threshold : a number > 0, default 0.0001
        The criterion 'plateau' is met if an iteration changes the loss by less than this fraction.
    gradient_norm_threshold : a number > 0, default 0.001
        The criterion 'gradient' is met if the norm of the gradient is below this value. The
        gradient is the one of the relative loss with respect to the scaled parameters.
    active_switching_criteria : a non-empty list of 'plateau', 'gradient', 'max_iter', default all
        Criteria for the end of the warm-up, which ends as soon as one of them is met: 'plateau'
        (see ``loss_plateau_threshold``), 'gradient' (see ``gradient_norm_threshold``), 'max_iter'
        (see ``max_warmup_iterations``). Whatever the criteria, the warm-up also ends if the loss
        has converged to rounding errors, or if the line search finds no better point.
    lbfgs_history_size : an integer >= 1, default 10
        Number of recent iterations from which L-BFGS approximates the Hessian matrix.
    lbfgs_line_search : one of 'wolfe', 'strong_wolfe', 'backtracking', default 'wolfe'
        Line search: 'wolfe' (the zoom line search of optax), 'strong_wolfe' (the zoom line search
        without the test for an approximate decrease) or 'backtracking'.
    lbfgs_initial_step_size : a finite number > 0, default 0.1
        Initial step size of the warm-up if the relative loss of the start is from 0.1 to 1.
    lbfgs_exploration_step_size : a finite number > 0, default 0.1
        Initial step size of the warm-up if the relative loss of the start is 1 or more.
    lbfgs_refinement_step_size : a finite number > 0, default 1.0
        Initial step size of the warm-up if the relative loss of the start is below 0.1.
    gradient_clip_value : a number > 0, or None, default None
        Maximum norm of the gradient in the warm-up: a longer gradient is shortened to it. None
        disables this.
    enable_warm_start_detection : True or False, default True
        Layer 1: skip the warm-up if p0 already fits well; ``warm_start_threshold`` says how well.
    warm_start_threshold : a number > 0, default 0.01
        Layer 1: skip the warm-up if the relative loss at p0, penalties included, is below this
        value. On noisy data even a perfect fit has a relative loss of (noise variance / variance of
        y), which may be larger than the threshold.
    enable_adaptive_warmup_lr : True or False, default True
        Layer 2: choose the initial step size by the relative loss of the start, among the three
        options ``lbfgs_..._step_size``. If False, use ``lbfgs_initial_step_size``.
    enable_cost_guard : True or False, default True
        Layer 3: if the loss grows too much, end the warm-up and continue from its best point.
        ``cost_increase_tolerance`` is the limit.
    cost_increase_tolerance : a number >= 0, default 0.05
        Layer 3: maximum growth of the loss in the warm-up, as a fraction of the initial loss.
    enable_step_clipping : True or False, default True
        Layer 4: limit the length of each step of the warm-up to ``max_warmup_step_size``.
    max_warmup_step_size : a number > 0, default 0.1
        Layer 4: maximum L2 norm of a step of the warm-up, in the scaled parameters.
    gauss_newton_max_iterations : an integer >= 1, default 100
        Maximum number of iterations over all rows. On the sample, 20 times as many are allowed. The
        number of iterations without much progress after which a fit ends increases with it.
    gauss_newton_tol : a number > 0 and < 1, default 1e-08
        Tolerance ``tol`` for convergence. The fit has converged if sqrt(predicted reduction of the
        cost / cost) is at most ``tol``, or if the step of each parameter p is at most
        ``tol * (tol + |p|)`` and much smaller than the standard error of p.
    enable_one_pass : True or False, default True
        Read the data as little more than once, if possible: approach the solution on growing
        subsets of the blocks, and take the last step after the first pass over all rows without a
        further pass, if its estimated error is at most ``1e5 * gauss_newton_tol`` standard errors
        (0.001 by default). If False, at least one more pass verifies the solution.
    trust_region_initial : a number > 0, default 1.0
        Initial radius of the trust region, as a multiple of the norm of the start in the variables
        of the trust region, which are scaled by the column norms of the Jacobian. With conjugate
        gradients, there is no trust region, and the value only affects the first step on the
        sample: it is the shorter, the smaller the value.
    regularization_factor : a number > 0 and < 1, default 1e-10
        Lower limit of the singular values of the Jacobian with scaled columns, as a fraction of the
        largest: a smaller one is damped as if it had this size. A limit below 1e-8 suppresses only
        rounding errors. Not used with conjugate gradients.
    gauss_newton_solver : one of 'auto', 'normal', 'qr', default 'auto'
        Solver of the linear least-squares problem of each step. 'normal' solves the normal
        equations, which square the condition number of the Jacobian. 'qr' uses QR factorizations,
        which keep the condition number but are slower. 'auto' begins with 'normal' and switches to
        'qr' if 'normal' would lose half of the digits of float64.
    cg_param_threshold : an integer >= 1, default 2000
        Number of parameters from which the step is solved by conjugate gradients (CG). Each CG
        iteration reads all rows once. No p-by-p matrix is allocated, and no covariance is computed.
    cg_max_iterations : an integer >= 1, default 100
        Maximum number of CG iterations per step.
    cg_relative_tolerance : a number > 0 and < 1, default 0.0001
        Relative tolerance of CG on the residual, measured in the norm of the preconditioner. For a
        step so long that the quadratic model is inexact, the tolerance is larger, up to 0.1.
    cg_absolute_tolerance : a number >= 0, default 1e-10
        Absolute tolerance of CG on the residual, in the norm of the preconditioner.
    cg_error_probes : an integer >= 0, default 0
        Standard errors with CG: 0 computes none, k estimates them from k random vectors of signs,
        and k >= p computes them exactly for p parameters. The relative error of an estimate is
        about 0.7 / sqrt(k) for strongly correlated parameters, and less for others. Vectors are
        processed in batches of 8 MiB: more vectors need more passes over the data, but not more
        memory.
    cov_type : one of 'nonrobust', 'HC0', 'HC1', default 'nonrobust'
        Covariance estimator. 'nonrobust' assumes that sigma is correct, or proportional to the true
        errors. The sandwich estimators 'HC0' and 'HC1' (HC0 times n / (n - p)) do not assume this,
        and read all rows once more.
    enable_group_variance_regularization : True or False, default False
        Penalize the variance within groups of parameters. The fit then minimizes 1/2 (sum r^2 +
        ``group_variance_lambda`` * n * sum Var(group)), with the number n of fitted rows and
        Var(group) = mean((p - mean(p))^2) over the parameters p of a group. A robust loss applies
        to the residuals r only.
    group_variance_lambda : a finite number >= 0, default 0.01
        Strength of the penalty on the variance within groups.
    group_variance_indices : a list of pairs (start, end), 0 <= start < end, or None, default None
        Groups of parameters for the penalty, as ranges of indices: start is included, end is not.
    enable_residual_weighting : True or False, default False
        Weight squared residuals by group of rows: sigma is divided by the square root of the
        weight. The group of a row is an integer from 0 in the first column of x_data, x[:, 0], or
        in the first array if x_data has several.
    residual_weights : a sequence of finite numbers > 0, one per group, or None, default None
        Weights of the groups of rows: entry i is the weight of group i.
    precision : one of 'auto', 'float64', 'float32', default 'auto'
        Precision of the model and the Jacobian; 'auto' is float64. Sums over more than a few
        thousand rows are always float64.
    chunk_size : an integer >= 1, or 'auto', default 'auto'
        Maximum number of rows that one call of compiled code processes on a CPU; 'auto' is 2**20.
        Fewer rows are processed at a time if they have more than 4 MB. A GPU processes whole
        blocks. The chunks of the data do not change.
    cache : an integer >= 0, or 'auto', default 'auto'
        Number of bytes of blocks that all workers together keep in memory between passes; 0
        disables the cache, and 'auto' is 20 % of the memory of each worker. With 'auto', blocks
        are cached only where reading them again would take longer than keeping them, as each worker
        measures, and not in a pass that is likely the last; a number of bytes is used in any case.
        All blocks of a task are cached, or none. Arrays that are in memory already are not cached.
        The rows that stay in the memory of GPUs are limited by the same number, and with 'auto' by
        what is free there.
    enable_checkpoints : True or False, default True
        Write checkpoints to ``checkpoint_dir``.
    checkpoint_dir : a path (str or os.PathLike), or None, default None
        Directory of the checkpoints, as a path or fsspec URL. It is created if it does not exist,
        but a bucket is not. The last three checkpoints of a fit are kept. None writes no
        checkpoints.
    checkpoint_frequency : an integer >= 1, default 100
        Number of warm-up iterations between two checkpoints. After each pass over all rows a
        checkpoint is written in any case.
    checkpoint_interval : a number >= 0, default 30.0
        Minimum number of seconds between two checkpoints during a pass or the warm-up; with 0, one
        follows the other. They are written in a thread; the interval is at least 20 times as long
        as it takes to collect the state for one.
    resume_from_checkpoint : a path (str or os.PathLike), True, False or None, default None
        Path of a checkpoint to resume from, or of a directory, to resume from its newest
        checkpoint. Data, model, arguments and the options that change the result must be as in the
        interrupted fit. True resumes from ``checkpoint_dir``, or starts a new fit if that directory
        is empty; False and None start a new fit.
    validate_numerics : True or False, default True
        If the cost or gradient at a trial point is NaN or infinite, return to the best point and
        try a smaller step. If False, the first such point ends the warm-up, or the fit.
    enable_fault_tolerance : True or False, default True
        Retry failed reads, and failed writes of the store of ``fit_each``. If False, the first
        failure ends the fit.
    max_retries_per_batch : an integer >= 0, default 2
        Maximum number of retries of a failed read or write, apart from those of ``retry_seconds``.
        The pause before a retry is about 0.1 s at first and 4 times as long each time, up to 10 s.
    retry_seconds : a number >= 0, default 120.0
        Number of seconds, from its first failure, for which a read or write is retried while the
        network or the server fails: connection errors, timeouts, and the HTTP statuses 408, 429 and
        5xx. The pauses are the same. Missing keys (404) and denied access (401, 403) are never
        retried.
    min_success_rate : a number > 0 and <= 1, default 1.0
        Minimum fraction of rows that must be readable. With a value below 1, unreadable blocks are
        skipped with a warning, and the result lists them; the fit fails if too few rows remain.
    max_walltime : a number > 0, or None, default None
        Maximum duration of a fit in seconds. A fit that reaches it completes the tasks that are
        running, writes a checkpoint if ``checkpoint_dir`` is set, and returns its best parameters
        with success=False.
    stop_on_sigterm : True or False, default False
        On the signal SIGTERM, end the fit as at ``max_walltime``. Batch schedulers send SIGTERM
        some time before they kill a job.
    enable_multi_device : True or False, default False
        Distribute the blocks of a worker over all its devices, such as GPUs.
    callback_frequency : an integer >= 1, default 10
        Number of iterations between two calls of the callback.
    verbose : an integer >= 0, default 1
        Amount of printed output: 0 nothing, 1 phases and iterations over all rows, 2 also
        iterations on the sample.
    log_frequency : an integer >= 1, default 1
        Number of iterations between two printed lines.
    log_file : a path (str or os.PathLike), or None, default None
        File to which the events of the fit are appended, one JSON object per line.
    dashboard : True or False, default True
        On a distributed cluster, show the fit on the page /nlsq of the Dask dashboard and count it
        in the metrics of the scheduler.
    enable_multistart : True or False, default False
        Choose the start among random candidates by successive halving, before the warm-up. Only the
        sample is used, so no more data are read. In each round, every candidate takes 10
        Levenberg-Marquardt steps on some rows of the sample, and the candidates with the highest
        cost are dropped. One warm-up starts from the best candidate and one from p0. Then
        Gauss-Newton on the sample starts from the ends of both, from up to 8 remaining candidates
        and from p0, and the fit continues from the best solution.
    n_starts : an integer >= 1, default 10
        Number of candidate starts, including p0.
    multistart_sampler : one of 'lhs', 'sobol', 'halton', default 'lhs'
        Sampler of the candidates besides p0: 'lhs' (Latin hypercube), or the scrambled sequences
        'sobol' or 'halton'.
    elimination_rounds : an integer from 1 to 60, default 3
        Number of rounds of successive halving.
    elimination_fraction : a number > 0 and < 1, default 0.5
        Fraction of the candidates that each round of successive halving drops; their number is
        rounded down. Candidates at which the model is not finite are always dropped.
    batches_per_round : an integer >= 1, default 50
        Number of minibatches of 32 rows on which the first round of successive halving compares the
        candidates. Each further round uses twice as many rows as the round before, up to all rows
        of the sample.
    center_on_p0 : True or False, default True
        Draw the candidates around p0. If False, draw parameters with two finite bounds around the
        middle of the bounds, and the others around p0. At least one parameter must have two finite
        bounds then.
    scale_factor : a finite number > 0, default 1.0
        Half-width of the range from which candidates are drawn. It is a multiple of half the
        distance of the bounds, or of ``|p0|`` (of 1 where p0 is 0) for parameters without two
        finite bounds. No candidate is outside the bounds.
    sample_rows : an integer >= 1, or 'auto', default 'auto'
        Number of rows of the sample, which is kept in memory. The sample is fitted before the first
        pass over all rows and predicts the steps between passes; the warm-up uses at most 2**14 of
        its rows. 'auto' is a 16th of all rows, but from 2**16 to 2**17, at least 32 per parameter,
        and at most 64 MB.
    random_seed : an integer from 0 to 9223372036854775807, default 0
        Seed of the choice of the sample and of the candidate starts.

    Raises
    ------
    ValueError
        If a value is not allowed, or if options contradict each other.
    TypeError
        If a keyword is not the name of an option.
    AttributeError
        If an attribute is set that is not an option.
    """

    # --- phase 0: normalization
    normalize: bool = option(True, BOOL)
    normalization_strategy: str = option("auto", one_of("auto", "bounds", "p0", "none"))

    # --- phase 1: L-BFGS warm-up on a sample
    warmup_iterations: int = option(200, integer(0))
    max_warmup_iterations: int = option(500, integer(0))
    loss_plateau_threshold: float = option(1e-4, POSITIVE)
    gradient_norm_threshold: float = option(1e-3, POSITIVE)
    active_switching_criteria: Sequence[str] = option(["plateau", "gradient", "max_iter"], CRITERIA)
    lbfgs_history_size: int = option(10, integer(1))
    lbfgs_line_search: str = option("wolfe", one_of("wolfe", "strong_wolfe", "backtracking"))
    lbfgs_initial_step_size: float = option(0.1, FINITE_POSITIVE)
    lbfgs_exploration_step_size: float = option(0.1, FINITE_POSITIVE)
    lbfgs_refinement_step_size: float = option(1.0, FINITE_POSITIVE)
    gradient_clip_value: float | None = option(None, or_else(POSITIVE, None))

    # --- the four defense layers of the warm-up
    enable_warm_start_detection: bool = option(True, BOOL)
    warm_start_threshold: float = option(0.01, POSITIVE)
    enable_adaptive_warmup_lr: bool = option(True, BOOL)
    enable_cost_guard: bool = option(True, BOOL)
    cost_increase_tolerance: float = option(0.05, NON_NEGATIVE)
    enable_step_clipping: bool = option(True, BOOL)
    max_warmup_step_size: float = option(0.1, POSITIVE)

    # --- phase 2: Gauss-Newton
    gauss_newton_max_iterations: int = runtime_option(100, integer(1))
    gauss_newton_tol: float = option(1e-8, TOLERANCE)
    enable_one_pass: bool = option(True, BOOL)
    trust_region_initial: float = option(1.0, POSITIVE)
    regularization_factor: float = option(1e-10, TOLERANCE)
    gauss_newton_solver: str = option("auto", one_of("auto", "normal", "qr"))
    cg_param_threshold: int = option(2000, integer(1))
    cg_max_iterations: int = option(100, integer(1))
    cg_relative_tolerance: float = option(1e-4, TOLERANCE)
    cg_absolute_tolerance: float = option(1e-10, NON_NEGATIVE)
    cg_error_probes: int = option(0, integer(0))

    # --- phase 3: covariance
    cov_type: str = option("nonrobust", one_of("nonrobust", "HC0", "HC1"))

    # --- penalties and weights by group
    enable_group_variance_regularization: bool = option(False, BOOL)
    group_variance_lambda: float = option(0.01, FINITE_NON_NEGATIVE)
    group_variance_indices: Sequence[tuple[int, int]] | None = option(None, or_else(RANGES, None))
    enable_residual_weighting: bool = option(False, BOOL)
    residual_weights: Sequence[float] | None = option(None, or_else(WEIGHTS, None))

    # --- arithmetic and memory
    precision: str = option("auto", one_of("auto", "float64", "float32"))
    chunk_size: int | str = runtime_option("auto", or_else(integer(1), "auto"))
    cache: int | str = runtime_option("auto", or_else(integer(0), "auto"))

    # --- fault tolerance
    enable_checkpoints: bool = runtime_option(True, BOOL)
    checkpoint_dir: str | os.PathLike[str] | None = runtime_option(None, or_else(PATH, None))
    checkpoint_frequency: int = runtime_option(100, integer(1))
    checkpoint_interval: float = runtime_option(30.0, NON_NEGATIVE)
    resume_from_checkpoint: str | os.PathLike[str] | bool | None = runtime_option(
        None, PATH_OR_FLAG
    )
    validate_numerics: bool = option(True, BOOL)
    enable_fault_tolerance: bool = runtime_option(True, BOOL)
    max_retries_per_batch: int = runtime_option(2, integer(0))
    retry_seconds: float = runtime_option(120.0, NON_NEGATIVE)
    min_success_rate: float = runtime_option(1.0, FRACTION)
    max_walltime: float | None = runtime_option(None, or_else(POSITIVE, None))
    stop_on_sigterm: bool = runtime_option(False, BOOL)
    enable_multi_device: bool = runtime_option(False, BOOL)

    # --- observers
    callback_frequency: int = runtime_option(10, integer(1))
    verbose: int = runtime_option(1, integer(0))
    log_frequency: int = runtime_option(1, integer(1))
    log_file: str | os.PathLike[str] | None = runtime_option(None, or_else(PATH, None))
    dashboard: bool = runtime_option(True, BOOL)

    # --- starts and the sample
    enable_multistart: bool = option(False, BOOL)
    n_starts: int = option(10, integer(1))
    multistart_sampler: str = option("lhs", one_of("lhs", "sobol", "halton"))
    elimination_rounds: int = option(3, integer(1, 60))
    elimination_fraction: float = option(0.5, TOLERANCE)
    batches_per_round: int = option(50, integer(1))
    center_on_p0: bool = option(True, BOOL)
    scale_factor: float = option(1.0, FINITE_POSITIVE)
    sample_rows: int | str = option("auto", or_else(integer(1), "auto"))
    random_seed: int = option(0, integer(0, 2**63 - 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_combinations(self)

    # --- derived values

    @property
    def batch_rows(self) -> int:
        """``chunk_size`` as a number, also if the option is "auto"."""
        return auto.CHUNK_SIZE if isinstance(self.chunk_size, str) else self.chunk_size

    def sample_size(self, n_rows: int, row_bytes: int, n_params: int = 1) -> int:
        """Return ``sample_rows`` as a number, computed from the arguments if it is "auto"."""
        if isinstance(self.sample_rows, str):
            return auto.sample_rows(n_rows, row_bytes, n_params)
        return self.sample_rows

    def forecast_size(self, n_rows: int, row_bytes: int, n_params: int) -> int:
        """Return how many rows the first pass returns as a sample."""
        if isinstance(self.sample_rows, str):
            return auto.forecast_rows(n_rows, row_bytes, n_params)
        return self.sample_rows

    def is_without_matrices(self, n_params: int) -> bool:
        """Return whether a fit of ``n_params`` parameters uses conjugate gradients."""
        return n_params >= self.cg_param_threshold

    @property
    def dtype(self) -> str:
        """``precision`` as the name of a NumPy dtype, also if the option is "auto"."""
        return "float64" if self.precision == "auto" else self.precision

    # --- presets

    aggressive = preset("aggressive")
    conservative = preset("conservative")
    memory_optimized = preset("memory_optimized")
    defense_strict = preset("defense_strict")
    defense_relaxed = preset("defense_relaxed")
    defense_disabled = preset("defense_disabled")
    scientific_default = preset("scientific_default")

    @classmethod
    def with_multistart(cls, n_starts: int = 10, **overrides: Any) -> Self:
        """Return options for a fit that first selects the best of several starts.

        The starts are compared by successive halving, as ``enable_multistart`` describes.

        Parameters
        ----------
        n_starts : int
            Number of candidate starts, ``p0`` included.
        **overrides
            Other options by name. They override the options set here.

        Returns
        -------
        HybridStreamingConfig
        """
        return cls(**({"enable_multistart": True, "n_starts": n_starts} | overrides))


# Presets call __init__ too, so unknown keywords of presets are explained as well.
_explaining = explain_keywords("HybridStreamingConfig")
HybridStreamingConfig.__init__ = _explaining(HybridStreamingConfig.__init__)  # type: ignore[method-assign]
