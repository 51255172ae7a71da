"""``HybridStreamingConfig``: the options of a fit, with defaults, rules and documentation."""

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
from nlsq_dask.config.validation import ValidatedOptions, numpydoc_sections, option, runtime_option


@dataclass(kw_only=True, repr=False)
class HybridStreamingConfig(ValidatedOptions):
    """Options of a fit, as keyword arguments.

    Values are validated at construction and when a fit starts. A fit uses a copy, so later changes
    do not affect it.
    """

    # --- phase 0: normalization
    normalize: bool = option(True, BOOL, "Normalize the parameters in the warm-up.")
    normalization_strategy: str = option(
        "auto",
        one_of("auto", "bounds", "p0", "none"),
        "Scaling of the parameters: 'bounds' (to [0, 1]), 'p0' (by ``|p0|``, or 1 where p0 is 0), "
        "'none', or 'auto' ('bounds' if all bounds are finite, otherwise 'p0').",
    )

    # --- phase 1: L-BFGS warm-up on a sample
    warmup_iterations: int = option(
        200,
        integer(0),
        "Number of warm-up iterations before 'plateau' and 'gradient' are tested; at most "
        "max_warmup_iterations.",
    )
    max_warmup_iterations: int = option(
        500,
        integer(0),
        "Maximum number of warm-up iterations; 0 disables the warm-up. Without 'max_iter' in "
        "active_switching_criteria, the maximum is ten times as large.",
    )
    loss_plateau_threshold: float = option(
        1e-4,
        POSITIVE,
        "'plateau': end the warm-up when the relative change of the loss is smaller.",
    )
    gradient_norm_threshold: float = option(
        1e-3,
        POSITIVE,
        "'gradient': end the warm-up when the norm of the gradient is smaller. The gradient is of "
        "the relative loss with respect to the normalized parameters.",
    )
    active_switching_criteria: Sequence[str] = option(
        ["plateau", "gradient", "max_iter"],
        CRITERIA,
        "Criteria that end the warm-up; any of them suffices.",
    )
    lbfgs_history_size: int = option(10, integer(1), "Number of correction pairs of L-BFGS.")
    lbfgs_line_search: str = option(
        "wolfe",
        one_of("wolfe", "strong_wolfe", "backtracking"),
        "Line search: 'wolfe' (zoom of optax), 'strong_wolfe' (the same without the "
        "approximate-decrease test) or 'backtracking'.",
    )
    lbfgs_initial_step_size: float = option(
        0.1, FINITE_POSITIVE, "Initial step size when the relative loss is below 1 ('careful')."
    )
    lbfgs_exploration_step_size: float = option(
        0.1,
        FINITE_POSITIVE,
        "Initial step size when the relative loss is 1 or more ('exploration').",
    )
    lbfgs_refinement_step_size: float = option(
        1.0,
        FINITE_POSITIVE,
        "Initial step size when the relative loss is below 0.1 ('refinement').",
    )
    gradient_clip_value: float | None = option(
        None, or_else(POSITIVE, None), "Maximum norm of a warm-up gradient; None disables clipping."
    )

    # --- the four defense layers of the warm-up
    enable_warm_start_detection: bool = option(
        True, BOOL, "Layer 1: skip the warm-up if p0 already fits."
    )
    warm_start_threshold: float = option(
        0.01,
        POSITIVE,
        "Layer 1: relative loss, penalties included, below which the warm-up is skipped. On noisy "
        "data a perfect fit has noise / signal variance, which may exceed this.",
    )
    enable_adaptive_warmup_lr: bool = option(
        True, BOOL, "Layer 2: choose the initial step size from the relative loss."
    )
    enable_cost_guard: bool = option(
        True, BOOL, "Layer 3: end the warm-up at its best point if the loss grows."
    )
    cost_increase_tolerance: float = option(
        0.05, NON_NEGATIVE, "Layer 3: maximum growth of the loss, relative to the initial loss."
    )
    enable_step_clipping: bool = option(True, BOOL, "Layer 4: limit the length of an update.")
    max_warmup_step_size: float = option(
        0.1, POSITIVE, "Layer 4: maximum L2 norm of an update of the normalized parameters."
    )

    # --- phase 2: Gauss-Newton
    gauss_newton_max_iterations: int = runtime_option(
        100,
        integer(1),
        "Maximum number of full-data iterations; ten times as many on the sample.",
    )
    gauss_newton_tol: float = option(
        1e-8,
        TOLERANCE,
        "Tolerance for convergence, on sqrt(predicted reduction / cost), or on the relative step "
        "of each parameter if the step is also negligible compared to the standard errors.",
    )
    trust_region_initial: float = option(
        1.0,
        POSITIVE,
        "Initial trust radius, as a multiple of the scaled norm of the start. With conjugate "
        "gradients, a smaller radius damps the first step on the sample.",
    )
    regularization_factor: float = option(
        1e-10,
        TOLERANCE,
        "Singular values of the column-scaled Jacobian below this fraction of the largest are "
        "damped as if they had that size. Fractions below 1e-8 damp rounding only. Not used with "
        "conjugate gradients.",
    )
    gauss_newton_solver: str = option(
        "auto",
        one_of("auto", "normal", "qr"),
        "Solver of the linear least-squares step: 'normal', the normal equations, which square the "
        "condition number of the Jacobian; 'qr', a tree of QR factorizations, which is slower and "
        "does not; 'auto', which switches from 'normal' to 'qr' if the condition number would cost "
        "half of the digits (float64 only).",
    )
    cg_param_threshold: int = option(
        2000,
        integer(1),
        "Number of parameters from which conjugate gradients solve the step, with one pass per "
        "iteration. No p-by-p matrix is allocated, and no covariance is computed.",
    )
    cg_max_iterations: int = option(100, integer(1), "Maximum number of CG iterations per step.")
    cg_relative_tolerance: float = option(
        1e-4,
        TOLERANCE,
        "Relative tolerance on the residual of conjugate gradients, in the norm of the "
        "preconditioner; up to 0.1 for steps so long that the quadratic model is inexact.",
    )
    cg_absolute_tolerance: float = option(1e-10, NON_NEGATIVE, "Absolute tolerance, likewise.")
    cg_error_probes: int = option(
        0,
        integer(0),
        "Standard errors with conjugate gradients: 0 for none, k for stochastic diagonal "
        "estimation from k random sign vectors, k >= p for exact errors. The relative error of an "
        "estimate is about 0.7 / sqrt(k) for strongly correlated parameters, less for others. "
        "Vectors are solved for in batches of 8 MiB, so that more of them take more passes but no "
        "more memory.",
    )

    # --- phase 3: covariance
    cov_type: str = option(
        "nonrobust",
        one_of("nonrobust", "HC0", "HC1"),
        "Covariance estimator: 'nonrobust' assumes that sigma is correct, or proportional to the "
        "true errors; the sandwich estimators 'HC0' and 'HC1' (times n / (n - p)) do not, and take "
        "one more pass.",
    )

    # --- penalties and weights by group
    enable_group_variance_regularization: bool = option(
        False,
        BOOL,
        "Penalize the variance within groups of parameters: the fit minimizes "
        "1/2 (sum r^2 + group_variance_lambda * n * sum Var(group)), with n rows used and "
        "Var(group) = mean((p - mean(p))^2) over the parameters of a group. A robust loss applies "
        "to the first sum.",
    )
    group_variance_lambda: float = option(0.01, FINITE_NON_NEGATIVE, "Strength of the penalty.")
    group_variance_indices: Sequence[tuple[int, int]] | None = option(
        None,
        or_else(RANGES, None),
        "Groups of parameters as (start, end) index ranges, end excluded.",
    )
    enable_residual_weighting: bool = option(
        False,
        BOOL,
        "Weight squared residuals by group: sigma is divided by the square root of the weight. "
        "The group of a row is an integer from 0 in the first column of x_data, x[:, 0], or in the "
        "first of several arrays.",
    )
    residual_weights: Sequence[float] | None = option(
        None, or_else(WEIGHTS, None), "One weight per group."
    )

    # --- arithmetic and memory
    precision: str = option(
        "auto",
        one_of("auto", "float64", "float32"),
        "Precision of model and Jacobian; sums over more than some thousand rows are always "
        "float64. 'auto' is float64.",
    )
    chunk_size: int | str = runtime_option(
        "auto",
        or_else(integer(1), "auto"),
        "Maximum number of rows per kernel call; larger blocks are split into batches of at most "
        "4 MB. 'auto' is 2**20. It does not change the chunks of the data.",
    )
    cache: int | str = runtime_option(
        "auto",
        or_else(integer(0), "auto"),
        "Bytes of blocks to cache between passes, over all workers; 0 disables the cache. 'auto' "
        "is 20 % of the memory of each worker. Whole block groups are cached, and arrays in memory "
        "are not.",
    )

    # --- fault tolerance
    enable_checkpoints: bool = runtime_option(True, BOOL, "Write checkpoints to checkpoint_dir.")
    checkpoint_dir: str | os.PathLike[str] | None = runtime_option(
        None,
        or_else(PATH, None),
        "Directory of the checkpoints, as a path or fsspec URL; the last three of a fit are kept. "
        "None writes no checkpoints.",
    )
    checkpoint_frequency: int = runtime_option(
        100,
        integer(1),
        "Number of warm-up iterations between checkpoints. One is also written after each pass "
        "over all rows.",
    )
    checkpoint_interval: float = runtime_option(
        30.0,
        NON_NEGATIVE,
        "Seconds between checkpoints of the partial results of a pass, at least twenty times the "
        "duration of saving. 0 saves after each block group.",
    )
    resume_from_checkpoint: str | os.PathLike[str] | bool | None = runtime_option(
        None,
        PATH_OR_FLAG,
        "Checkpoint to resume from, or a directory, for its newest checkpoint. Data, model, "
        "arguments and the options that change the result must be the same. True resumes from "
        "checkpoint_dir, and starts a new fit if it is empty.",
    )
    validate_numerics: bool = option(
        True,
        BOOL,
        "If the cost or gradient at a trial point is NaN or infinite, return to the best point and "
        "try a smaller step; False ends the warm-up, or the fit, at the first such point.",
    )
    enable_fault_tolerance: bool = runtime_option(
        True,
        BOOL,
        "Retry failed reads; if False, the first failure ends the fit.",
    )
    max_retries_per_batch: int = runtime_option(
        2,
        integer(0),
        "Maximum number of retries of a failed read, with pauses that grow from 0.1 s by a factor "
        "of 4 up to 10 s.",
    )
    min_success_rate: float = runtime_option(
        1.0,
        FRACTION,
        "Minimum fraction of readable rows. Below 1, unreadable blocks are skipped with a warning "
        "as long as this fraction remains; the result lists them.",
    )
    max_walltime: float | None = runtime_option(
        None,
        or_else(POSITIVE, None),
        "Seconds after which the fit ends without success, and with a checkpoint if checkpoint_dir "
        "is set. Running block groups are completed.",
    )
    stop_on_sigterm: bool = runtime_option(
        False,
        BOOL,
        "End the fit in the same way on SIGTERM, which batch schedulers send before SIGKILL.",
    )
    enable_multi_device: bool = runtime_option(
        False, BOOL, "Distribute the blocks of a worker over its local devices."
    )

    # --- observers
    callback_frequency: int = runtime_option(
        10, integer(1), "Number of iterations between calls of the callback."
    )
    verbose: int = runtime_option(
        1,
        integer(0),
        "0 prints nothing, 1 phases and full-data iterations, 2 also iterations on the sample.",
    )
    log_frequency: int = runtime_option(
        1, integer(1), "Number of iterations between printed lines."
    )
    log_file: str | os.PathLike[str] | None = runtime_option(
        None, or_else(PATH, None), "File to which the events of the fit are appended as JSON lines."
    )
    dashboard: bool = runtime_option(
        True,
        BOOL,
        "Show the fit on the page /nlsq of the dashboard of a distributed cluster, and count it in "
        "the metrics of the scheduler.",
    )

    # --- starts and the sample
    enable_multistart: bool = option(
        False,
        BOOL,
        "Select the start by successive halving on the sample before the warm-up, without reading "
        "more data. In each round all candidates take 10 Levenberg-Marquardt steps on a minibatch "
        "and those with the highest cost are dropped. The warm-up continues from the best; up to 7 "
        "other remaining candidates, and p0 with its own warm-up, are tried as well.",
    )
    n_starts: int = option(10, integer(1), "Number of candidate starts, p0 included.")
    multistart_sampler: str = option(
        "lhs",
        one_of("lhs", "sobol", "halton"),
        "Sampler of the other candidates: 'lhs' (Latin hypercube), or scrambled 'sobol' or "
        "'halton' sequences.",
    )
    elimination_rounds: int = option(3, integer(1, 60), "Number of rounds of successive halving.")
    elimination_fraction: float = option(
        0.5,
        TOLERANCE,
        "Fraction of the candidates dropped per round of successive halving, rounded down. "
        "Candidates at which the model is not finite are always dropped.",
    )
    batches_per_round: int = option(
        50,
        integer(1),
        "Number of minibatches per round of successive halving. A minibatch has 32 rows in the "
        "first round and twice as many in each further one, limited by the sample.",
    )
    center_on_p0: bool = option(
        True,
        BOOL,
        "Draw the candidates around p0; if False, around the middle of the bounds of parameters "
        "with two finite bounds (at least one must have them).",
    )
    scale_factor: float = option(
        1.0,
        FINITE_POSITIVE,
        "Range of the candidates, as a multiple of half the distance of the bounds, or of ``|p0|`` "
        "(of 1 where p0 is 0) for parameters without two finite bounds. The bounds always hold.",
    )
    sample_rows: int | str = option(
        "auto",
        or_else(integer(1), "auto"),
        "Number of rows of the in-memory sample. Gauss-Newton is solved on it before the first "
        "pass, and it predicts the steps between passes; the warm-up uses at most 2**14 of them. "
        "'auto' is a 16th of all rows, from 2**16 to 2**17, or 32 per parameter if that is more, "
        "and at most 64 MB.",
    )
    random_seed: int = option(
        0, integer(0, 2**63 - 1), "Seed of the sample and of the successive halving."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_combinations(self)

    # --- derived values

    @property
    def read_retries(self) -> int:
        """Number of retries of a failed read."""
        return self.max_retries_per_batch if self.enable_fault_tolerance else 0

    @property
    def batch_rows(self) -> int:
        """``chunk_size`` with "auto" resolved."""
        return auto.CHUNK_SIZE if isinstance(self.chunk_size, str) else self.chunk_size

    def sample_size(self, n_rows: int, row_bytes: int, n_params: int = 1) -> int:
        """Return ``sample_rows`` with "auto" resolved."""
        if isinstance(self.sample_rows, str):
            return auto.sample_rows(n_rows, row_bytes, n_params)
        return self.sample_rows

    def is_without_matrices(self, n_params: int) -> bool:
        """Whether conjugate gradients are used for a number of parameters."""
        return n_params >= self.cg_param_threshold

    @property
    def dtype(self) -> str:
        """``precision`` with "auto" resolved."""
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
        """Select the best of several starts by successive halving before the warm-up.

        Parameters
        ----------
        n_starts : int
            Number of candidate starts, ``p0`` included.
        **overrides
            Other options, which take precedence.

        Returns
        -------
        HybridStreamingConfig
        """
        return cls(**({"enable_multistart": True, "n_starts": n_starts} | overrides))


if HybridStreamingConfig.__doc__ is not None:  # python -OO strips docstrings
    HybridStreamingConfig.__doc__ += numpydoc_sections(HybridStreamingConfig)

# Presets call it too, so that their keywords are explained as well.
_explaining = explain_keywords("HybridStreamingConfig")
HybridStreamingConfig.__init__ = _explaining(HybridStreamingConfig.__init__)  # type: ignore[method-assign]
