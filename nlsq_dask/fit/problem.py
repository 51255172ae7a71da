"""``FitProblem``: the arguments of ``fit`` or ``plan``, validated before any data are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nlsq_dask._text import join_first
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.alignment import RowBlocks, align
from nlsq_dask.errors import DataWarning, warn_caller
from nlsq_dask.fit.arguments.parameters import Parameters, parse_parameters
from nlsq_dask.fit.iterations import Callback
from nlsq_dask.kernels.losses import Loss, check_loss
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.model.check import float32_constants
from nlsq_dask.model.model import Model
from nlsq_dask.model.transform import ParameterTransform
from nlsq_dask.solvers.one_step import MAX_PARAMS
from nlsq_dask.warmup.normalize import ParameterNormalizer


@dataclass(frozen=True)
class FitProblem:
    """Model, data and options of a fit, after validation.

    The fit computes with the free parameters: ``model``, ``parameters``, ``normalizer`` and
    ``penalty`` are those of the free ones. ``transform`` leads back to all parameters, which are
    what users see.
    """

    config: HybridStreamingConfig  # copy of the options, with ``verbose`` of the call
    model: Model
    parameters: Parameters  # the free ones
    all_parameters: Parameters  # with the fixed and tied ones
    normalizer: ParameterNormalizer  # scales the parameters for the warm-up
    penalty: GroupVariance  # added to the cost; zero by default
    blocks: RowBlocks  # y, x and sigma, split into blocks of rows
    loss: Loss
    nan_policy: str  # "raise" or "omit"
    absolute_sigma: bool  # as in scipy.optimize.curve_fit
    callback: Callback | None  # called with parameters, loss and iteration

    @cached_property
    def exact_model(self) -> Model:
        """The model, evaluated in float64 whatever the option ``precision``."""
        return self.model if self.is_exact else replace(self.model, dtype="float64")

    @property
    def is_exact(self) -> bool:
        """Whether the option ``precision`` selects float64, not float32."""
        return self.model.dtype == "float64"

    @property
    def is_without_matrices(self) -> bool:
        """Whether the fit uses conjugate gradients, which need no matrix of p by p numbers."""
        return self.config.is_without_matrices(len(self.all_parameters.names))

    @property
    def may_end_after_one_pass(self) -> bool:
        """Whether subsets of the blocks, and a last step after the first pass, are considered."""
        return self.config.enable_one_pass and self.model.n_params <= MAX_PARAMS

    @property
    def transform(self) -> ParameterTransform:
        """The map from the free parameters to all parameters."""
        return self.all_parameters.transform

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages on how the arguments are interpreted, for the user."""
        parameters = self.all_parameters
        notice = [parameters.notice] if parameters.notice else []
        return (*notice, *parameters.not_free, *(f"{note}." for note in self.blocks.date_notices()))

    @property
    def sample_rows(self) -> int:
        """Number of rows in the sample on which a fit begins."""
        layout, n_params = self.model.layout, self.model.n_params
        return self.config.sample_size(self.blocks.n_rows, layout.row_bytes, n_params)

    @property
    def forecast_rows(self) -> int:
        """Number of rows of the sample that the first pass over all rows returns."""
        layout, n_params = self.model.layout, self.model.n_params
        return self.config.forecast_size(self.blocks.n_rows, layout.row_bytes, n_params)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that must be equal when a fit is resumed.

        Model, data and options are compared separately.
        """
        return {
            **self.all_parameters.arguments,
            "nan_policy": self.nan_policy,
            "absolute_sigma": self.absolute_sigma,
            "loss": self.loss.name,
            "f_scale": self.loss.f_scale,
        }


def validate_arguments(
    config: HybridStreamingConfig,
    model: Callable[..., Any],
    x_data: Any,
    y_data: Any,
    p0: Any = None,
    bounds: Any = None,
    *,
    sigma: Any = None,
    absolute_sigma: bool = False,
    loss: str = "linear",
    f_scale: float = 1.0,
    nan_policy: str = "raise",
    fixed: Any = None,
    ties: Any = None,
    param_names: Sequence[str] | None = None,
    callback: Callback | None = None,
    verbose: int | None = None,
) -> FitProblem:
    """Validate the arguments of ``fit`` and return them as a ``FitProblem``.

    Except for ``config``, signature and defaults are those of ``fit`` and ``plan``.

    Raises
    ------
    DataError, ModelError, ValueError, TypeError
        If an argument is invalid. Values of the data are not checked, because no data are read.
    """
    if nan_policy not in ("raise", "omit"):
        raise ValueError(f"nan_policy must be 'raise' or 'omit'; got {nan_policy!r}.")
    _check_callback(callback)
    if not isinstance(absolute_sigma, bool | np.bool_):
        raise TypeError(f"absolute_sigma must be True or False; got {absolute_sigma!r}.")
    check_loss(loss, f_scale)
    config = config.validated_copy() if verbose is None else replace(config, verbose=verbose)
    x_parts = parts_of_x(x_data)
    all_parameters = parse_parameters(
        model, p0, bounds, param_names, *x_parts, fixed=fixed, ties=ties
    )
    parameters = all_parameters.free
    _check_many_parameters(all_parameters, config)
    _check_box(parameters, config)
    normalizer = ParameterNormalizer(
        parameters.start,
        (parameters.low, parameters.high),
        config.normalization_strategy if config.normalize else "none",
    )
    penalty = _penalty(config, all_parameters)
    weights = config.residual_weights if config.enable_residual_weighting else None
    blocks = align(x_data, y_data, sigma, weights)
    transform = all_parameters.transform
    traced = Model(
        model,
        transform.n_free,
        blocks.layout,
        config.dtype,
        transform=None if transform.is_identity else transform,
    )
    for notice in blocks.notices:
        warn_caller(notice, DataWarning)
    _warn_of_float32(traced)
    return FitProblem(
        config=config,
        model=traced,
        parameters=parameters,
        all_parameters=all_parameters,
        normalizer=normalizer,
        penalty=penalty,
        blocks=blocks,
        loss=Loss(loss, float(f_scale)),
        nan_policy=nan_policy,
        absolute_sigma=bool(absolute_sigma),
        callback=callback,
    )


def _check_callback(callback: Any) -> None:
    """Raise a TypeError unless the callback accepts three arguments, or its signature is unknown.

    SciPy calls a callback with one argument.
    """
    if callback is None:
        return
    try:
        is_valid = callable(callback)
        inspect.signature(callback).bind(None, None, None)
    except ValueError:  # a built-in without a signature
        pass
    except TypeError:
        is_valid = False
    if not is_valid:
        raise TypeError(f"callback must be callable(params, loss, iteration); got {callback!r}.")


def parts_of_x(x_data: Any) -> tuple[int, str]:
    """Return the number of arrays in x, and code that lists them, such as ``x['t'], x['u']``."""
    if isinstance(x_data, dict):
        return len(x_data), ", ".join(f"x[{key!r}]" for key in x_data)
    are_names = isinstance(x_data, list) and all(isinstance(name, str) for name in x_data)
    return (len(x_data) if isinstance(x_data, tuple) or are_names else 1), "x"


def _check_many_parameters(parameters: Parameters, config: HybridStreamingConfig) -> None:
    """Raise a ValueError if conjugate gradients are used with options they do not support."""
    n_params = len(parameters.names)
    if not config.is_without_matrices(n_params):
        return
    unsupported = {
        "bounds": parameters.free.has_bounds,
        "ties": bool(parameters.transform.ties),
        f"cov_type={config.cov_type!r}": config.cov_type != "nonrobust",
        f"gauss_newton_solver={config.gauss_newton_solver!r}": config.gauss_newton_solver != "auto",
        "enable_multistart": config.enable_multistart,
    }
    conflicts = [name for name, is_used in unsupported.items() if is_used]
    if conflicts:
        raise ValueError(
            f"{', '.join(conflicts)} cannot be combined with conjugate gradients, which are used "
            f"for {n_params} parameters with cg_param_threshold={config.cg_param_threshold}. "
            f"Leave these settings at their defaults, or use a full matrix "
            f"({8 * n_params**2 / 2**20:.0f} MiB per task) by setting cg_param_threshold above "
            f"{n_params}."
        )


def _check_box(parameters: Parameters, config: HybridStreamingConfig) -> None:
    """Raise a ValueError if random starts need finite bounds and there are none."""
    if not config.enable_multistart or config.center_on_p0:
        return
    low, high = parameters.low, parameters.high
    if not (np.isfinite(low) & np.isfinite(high)).any():
        raise ValueError(
            f"center_on_p0=False draws starts around the middle of the bounds, but no parameter "
            f"has two finite bounds; got lower={low.tolist()}, upper={high.tolist()}. Set bounds, "
            f"or use center_on_p0=True."
        )


def _penalty(config: HybridStreamingConfig, parameters: Parameters) -> GroupVariance:
    """Return the penalty of the options; raise a ValueError if its ranges are invalid."""
    indices, n_params = config.group_variance_indices, len(parameters.names)
    if not config.enable_group_variance_regularization or indices is None:
        return GroupVariance()
    is_free = parameters.transform.is_free
    n_before = np.concatenate([[0], np.cumsum(is_free)])  # number of free ones before each
    for start, end in indices:
        if not is_free[start:end].all():
            bad = [
                repr(parameters.names[i])
                for i in range(start, min(end, n_params))
                if not is_free[i]
            ]
            raise ValueError(
                f"group_variance_indices has the range ({start}, {end}) with {join_first(bad)}, "
                f"fixed or tied, but the penalty is of free parameters. Leave them free, or use "
                f"ranges of indices without them."
            )
        if end > n_params:
            raise ValueError(
                f"group_variance_indices has the range ({start}, {end}), but the model has "
                f"{n_params} parameters; the end of a range, which is excluded, may be at most "
                f"{n_params}."
            )
    groups = tuple((int(n_before[a]), int(n_before[b])) for a, b in indices)
    return GroupVariance(config.group_variance_lambda, groups)


def _warn_of_float32(model: Model) -> None:
    """Warn if a float64 model uses JAX arrays that were created in float32."""
    names = float32_constants(model) if model.dtype == "float64" else []
    if names:
        warn_caller(
            f"the model uses {', '.join(names)}, float32 JAX arrays created outside of it, which "
            f"have only 7 digits. Use NumPy arrays, or create them inside the model."
        )
