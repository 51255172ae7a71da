"""``HybridStreamingConfig``: every option of a fit, one home each for default, rule and doc."""

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
from nlsq_dask.config.validation import ValidatedOptions, aside, option, parameters_section


@dataclass(kw_only=True, repr=False)
class HybridStreamingConfig(ValidatedOptions):
    """Options of a fit, as flat keyword arguments.

    Every value is checked at construction; a fit checks and copies the options
    once more when it starts, so that changing them meanwhile changes nothing.
    """

    # --- phase 0: normalization
    normalize: bool = option(True, BOOL, "Normalize the parameters for the warm-up.")
    normalization_strategy: str = option(
        "auto",
        one_of("auto", "bounds", "p0", "none"),
        "'auto' (by bounds if all are finite, else by p0), 'bounds' (to [0, 1]), "
        "'p0' (by ``|p0|``, 1 where it is 0) or 'none'.",
    )

    # --- phase 1: L-BFGS warm-up on a sample
    warmup_iterations: int = option(
        200,
        integer(0),
        "Iterations before 'plateau' and 'gradient' are tested; never more than "
        "max_warmup_iterations.",
    )
    max_warmup_iterations: int = option(
        500,
        integer(0),
        "Its most iterations; 0 for no warm-up. Without 'max_iter' among the criteria only ten "
        "times as many end it.",
    )
    loss_plateau_threshold: float = option(
        1e-4, POSITIVE, "'plateau': relative change of the loss below this ends the warm-up."
    )
    gradient_norm_threshold: float = option(
        1e-3,
        POSITIVE,
        "'gradient': a norm below this ends the warm-up; gradient of the relative loss with "
        "respect to the normalized parameters.",
    )
    active_switching_criteria: Sequence[str] = option(
        ["plateau", "gradient", "max_iter"], CRITERIA, "The criteria in force; any one switches."
    )
    lbfgs_history_size: int = option(10, integer(1), "Pairs that L-BFGS remembers.")
    lbfgs_line_search: str = option(
        "wolfe",
        one_of("wolfe", "strong_wolfe", "backtracking"),
        "'wolfe' (optax's zoom search), 'strong_wolfe' (without its approximate-decrease test) or "
        "'backtracking'.",
    )
    lbfgs_initial_step_size: float = option(
        0.1, FINITE_POSITIVE, "First step size when the relative loss is below 1 ('careful')."
    )
    lbfgs_exploration_step_size: float = option(
        0.1,
        FINITE_POSITIVE,
        "First step size when the relative loss is 1 or more ('exploration').",
    )
    lbfgs_refinement_step_size: float = option(
        1.0, FINITE_POSITIVE, "First step size when the relative loss is below 0.1 ('refinement')."
    )
    gradient_clip_value: float | None = option(
        None, or_else(POSITIVE, None), "Largest norm of a warm-up gradient; None for no clipping."
    )

    # --- the four defence layers of the warm-up
    enable_warm_start_detection: bool = option(
        True, BOOL, "Layer 1: skip the warm-up when p0 already fits."
    )
    warm_start_threshold: float = option(
        0.01,
        POSITIVE,
        "Layer 1: relative loss below which the warm-up is skipped; penalties count. On noisy "
        "data that of a perfect fit is noise / signal variance, so this can never fire there.",
    )
    enable_adaptive_warmup_lr: bool = option(
        True, BOOL, "Layer 2: choose the first step size by the relative loss."
    )
    enable_cost_guard: bool = option(
        True, BOOL, "Layer 3: abort when the loss grows, back to the best point."
    )
    cost_increase_tolerance: float = option(
        0.05, NON_NEGATIVE, "Layer 3: relative growth over the first loss that aborts."
    )
    enable_step_clipping: bool = option(True, BOOL, "Layer 4: limit the length of an update.")
    max_warmup_step_size: float = option(
        0.1, POSITIVE, "Layer 4: largest L2 norm of an update, in normalized space."
    )

    # --- phase 2: Gauss-Newton
    gauss_newton_max_iterations: int = aside(
        100,
        integer(1),
        "Most trial points over all rows; ten times as many on the sample, which is in memory.",
    )
    gauss_newton_tol: float = option(
        1e-8,
        TOLERANCE,
        "Converged when sqrt(predicted reduction / cost) is below this; or the step of each "
        "parameter relative to it, and the whole step is negligible beside the standard errors.",
    )
    trust_region_initial: float = option(
        1.0,
        POSITIVE,
        "First trust radius, as a multiple of the scaled length of the start; with conjugate "
        "gradients a smaller one damps the first step on the sample more.",
    )
    regularization_factor: float = option(
        1e-10,
        TOLERANCE,
        "Singular values of the column-scaled Jacobian below this fraction of the largest are "
        "damped as if they were that large. Fractions below 1e-8 damp rounding only. Conjugate "
        "gradients, which leave small ones out by themselves, do not need it.",
    )
    gauss_newton_solver: str = option(
        "auto",
        one_of("auto", "normal", "qr"),
        "Sums from which the step is solved: 'normal', the normal equations, which square the "
        "condition number of the Jacobian; 'qr', a tree of QR factorizations, which does not and "
        "takes longer to compute; 'auto' goes over from the first to the second where the "
        "condition number says that the first would lose half of the digits (float64 only).",
    )
    cg_param_threshold: int = option(
        2000,
        integer(1),
        "Parameters from which on conjugate gradients solve the step, with one pass an iteration "
        "and nothing larger than a vector of the parameters; there is no covariance then.",
    )
    cg_max_iterations: int = option(100, integer(1), "Most conjugate-gradient iterations a step.")
    cg_relative_tolerance: float = option(
        1e-4,
        TOLERANCE,
        "Residual that ends them, relative to the first one, in the norm of the preconditioner; up "
        "to 0.1 where the step is so long that its quadratic is not exact.",
    )
    cg_absolute_tolerance: float = option(1e-10, NON_NEGATIVE, "Absolute residual, likewise.")
    cg_error_probes: int = option(
        0,
        integer(0),
        "Standard errors with conjugate gradients: 0 for none; k for estimates from k random "
        "vectors of signs, whose errors have a relative spread of some 0.7 / sqrt(k) where "
        "parameters are strongly correlated, less elsewhere; k >= p for exact ones. At most 8 MiB "
        "of them are solved for at once, so more of them take more passes and no more memory.",
    )

    # --- phase 3: covariance
    cov_type: str = option(
        "nonrobust",
        one_of("nonrobust", "HC0", "HC1"),
        "Covariance: 'nonrobust' relies on sigma being right in each row, or in proportion; 'HC0' "
        "and 'HC1' (times n / (n - p)) are sandwich estimators that do not. They take one pass "
        "more.",
    )

    # --- penalties and weights by group
    enable_group_variance_regularization: bool = option(
        False,
        BOOL,
        "Penalize the variance within groups of parameters: the fit minimizes "
        "1/2 (sum r^2 + group_variance_lambda * n * sum Var(group)), with n rows used and "
        "Var(group) = mean((p - mean(p))^2) over the parameters of a group, as they are given; "
        "the first sum as the loss has it.",
    )
    group_variance_lambda: float = option(0.01, FINITE_NON_NEGATIVE, "Strength of that penalty.")
    group_variance_indices: Sequence[tuple[int, int]] | None = option(
        None,
        or_else(RANGES, None),
        "The groups, as (start, end) ranges of parameters, the end excluded.",
    )
    enable_residual_weighting: bool = option(
        False,
        BOOL,
        "Weight squared residuals by group: sigma is divided by the root of the group's weight. "
        "The group is the first column of x_data (x[:, 0], or the first of several arrays), an "
        "integer from 0.",
    )
    residual_weights: Sequence[float] | None = option(
        None, or_else(WEIGHTS, None), "One weight a group."
    )

    # --- arithmetic and memory
    precision: str = option(
        "auto",
        one_of("auto", "float64", "float32"),
        "Arithmetic of model and Jacobian; sums beyond some thousand rows are always float64. "
        "'auto' is float64.",
    )
    chunk_size: int | str = aside(
        "auto",
        or_else(integer(1), "auto"),
        "Most rows that one kernel call is given; a larger chunk is taken in pieces, of 4 MB at "
        "most. 'auto' is 2**20.",
    )
    cache: int | str = aside(
        "auto",
        or_else(integer(0), "auto"),
        "Bytes of memory, over all workers, in which blocks may stay between passes; 0 for none. "
        "'auto' is 20 % of each worker's memory. Blocks stay by whole groups; arrays in memory are "
        "not kept twice.",
    )

    # --- surviving
    enable_checkpoints: bool = aside(True, BOOL, "Write checkpoints to checkpoint_dir.")
    checkpoint_dir: str | os.PathLike[str] | None = aside(
        None,
        or_else(PATH, None),
        "Folder of the checkpoints, or an fsspec URL of one; the last three of a fit are kept. "
        "None writes no files.",
    )
    checkpoint_frequency: int = aside(
        100,
        integer(1),
        "Iterations of the warm-up between checkpoints; there is one at the end of each pass over "
        "all rows, too.",
    )
    checkpoint_interval: float = aside(
        30.0,
        NON_NEGATIVE,
        "Seconds between checkpoints inside a pass, of what has been summed so far; twenty times "
        "as many as saving takes if that is more. 0 saves whenever a block group has been summed.",
    )
    resume_from_checkpoint: str | os.PathLike[str] | bool | None = aside(
        None,
        PATH_OR_FLAG,
        "A checkpoint, or a folder whose newest one is taken, to go on from. Data, model, "
        "arguments and those options that change the fit must be the same. True goes on from what "
        "is in checkpoint_dir, and begins if nothing is.",
    )
    validate_numerics: bool = option(
        True,
        BOOL,
        "Where cost or gradient at a trial point are NaN or infinite, go back to the best point "
        "and try a smaller step; False ends the warm-up, or the fit, at the first such point.",
    )
    enable_fault_tolerance: bool = aside(
        True,
        BOOL,
        "Try again what could not be read; False makes the first error of the source the end.",
    )
    max_retries_per_batch: int = aside(
        2,
        integer(0),
        "How often reading is tried again, at the step of a block that failed, with pauses that "
        "grow from 0.1 s by a factor of 4, to 10 s at most.",
    )
    min_success_rate: float = aside(
        1.0,
        FRACTION,
        "Share of the rows that must be readable. Below 1, blocks that stay unreadable are left "
        "out as long as so many rows remain, with a warning; the result says which.",
    )
    max_walltime: float | None = aside(
        None,
        or_else(POSITIVE, None),
        "Seconds after which the fit ends, with a checkpoint if there is a checkpoint_dir, and "
        "without success. Block groups that are being computed then are waited for.",
    )
    stop_on_sigterm: bool = aside(
        False,
        BOOL,
        "End the fit in the same way on SIGTERM, which batch schedulers send before they kill.",
    )
    enable_multi_device: bool = aside(
        False, BOOL, "Share a worker's blocks among its local devices."
    )

    # --- watching
    callback_frequency: int = aside(10, integer(1), "Iterations between calls of the callback.")
    verbose: int = aside(
        1,
        integer(0),
        "0 prints nothing, 1 phases and iterations over all rows, 2 those on the sample, too.",
    )
    log_frequency: int = aside(1, integer(1), "Iterations between printed lines.")
    log_file: str | os.PathLike[str] | None = aside(
        None, or_else(PATH, None), "File for a JSON-lines record of the fit."
    )
    dashboard: bool = aside(
        True,
        BOOL,
        "Show the fit on a page, /nlsq, of a distributed cluster's dashboard, and count it in the "
        "metrics of the cluster's scheduler. With False it is in neither.",
    )

    # --- starts and the sample
    enable_multistart: bool = option(
        False,
        BOOL,
        "Hold a tournament of starts on the sample before the warm-up; it reads nothing more. In "
        "each round all candidates take 10 Levenberg-Marquardt steps on a minibatch, are judged by "
        "their cost on it, and the worse ones leave. The warm-up goes on from the winner; up to 7 "
        "other survivors, and p0 with a warm-up of its own, are tried as well.",
    )
    n_starts: int = option(10, integer(1), "Candidates of the tournament, the first of them p0.")
    multistart_sampler: str = option(
        "lhs",
        one_of("lhs", "sobol", "halton"),
        "How the other candidates are drawn: 'lhs' (Latin hypercube), or scrambled 'sobol' or "
        "'halton' sequences.",
    )
    elimination_rounds: int = option(3, integer(1, 60), "Rounds of the tournament.")
    elimination_fraction: float = option(
        0.5,
        TOLERANCE,
        "Share of the candidates that leave in a round, rounded down to whole ones; those at which "
        "the model is not finite leave in any case.",
    )
    batches_per_round: int = option(
        50,
        integer(1),
        "Minibatches on which a round works. They have 32 rows in the first round and twice as "
        "many in each further one, as long as the sample has them.",
    )
    center_on_p0: bool = option(
        True,
        BOOL,
        "Draw the candidates around p0; False: around the middle of the bounds, those parameters "
        "that have two finite ones (one at least must).",
    )
    scale_factor: float = option(
        1.0,
        FINITE_POSITIVE,
        "How far from there they are drawn, as a multiple of half the distance of the bounds, or "
        "of ``|p0|`` (of 1 where it is 0) for a parameter without two finite ones; never outside "
        "of the bounds.",
    )
    sample_rows: int | str = option(
        "auto",
        or_else(integer(1), "auto"),
        "Rows of the in-memory sample on which Gauss-Newton is solved before the first pass and "
        "that forecasts the steps between passes; the warm-up takes at most 2**14 of them. 'auto' "
        "is a 16th of all rows, from 2**16 to 2**17, or 32 a parameter; fewer where these would "
        "take more than 64 MB.",
    )
    random_seed: int = option(0, integer(0, 2**63 - 1), "Seed of the sample and of the tournament.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_combinations(self)

    # --- what "auto" means, and what options mean together

    @property
    def read_retries(self) -> int:
        """How often reading is tried again."""
        return self.max_retries_per_batch if self.enable_fault_tolerance else 0

    @property
    def batch_rows(self) -> int:
        """The number of rows that ``chunk_size`` stands for."""
        return auto.CHUNK_SIZE if isinstance(self.chunk_size, str) else self.chunk_size

    def sample_size(self, n_rows: int, row_bytes: int, n_params: int = 1) -> int:
        """Return the number of rows that ``sample_rows`` stands for."""
        if isinstance(self.sample_rows, str):
            return auto.sample_rows(n_rows, row_bytes, n_params)
        return self.sample_rows

    def is_without_matrices(self, n_params: int) -> bool:
        """Whether so many parameters are solved for by conjugate gradients."""
        return n_params >= self.cg_param_threshold

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic that ``precision`` stands for."""
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
        """Search for the best of several starts before the warm-up.

        Parameters
        ----------
        n_starts : int
            Number of candidate starts, ``p0`` among them.
        **overrides
            Further options; they take precedence.

        Returns
        -------
        HybridStreamingConfig
        """
        return cls(**({"enable_multistart": True, "n_starts": n_starts} | overrides))


_RAISES = """
    Raises
    ------
    ValueError
        For a value that is not allowed, or options that contradict each other.
    TypeError
        For a keyword that is no option.
    AttributeError
        Where something that is no option is set.
"""


if HybridStreamingConfig.__doc__ is not None:  # python -OO strips docstrings
    HybridStreamingConfig.__doc__ += parameters_section(HybridStreamingConfig) + _RAISES

# Presets construct one, too, so that their keywords are explained as well.
_explaining = explain_keywords("HybridStreamingConfig")
HybridStreamingConfig.__init__ = _explaining(HybridStreamingConfig.__init__)  # type: ignore[method-assign]
