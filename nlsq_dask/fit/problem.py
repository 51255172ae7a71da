"""``FitProblem``: the arguments of ``fit`` or ``plan``, validated before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.data.alignment import RowBlocks, align
from nlsq_dask.errors import DataWarning, warn_caller
from nlsq_dask.fit.iterations import Callback
from nlsq_dask.fit.parameters import Parameters, parse_parameters
from nlsq_dask.kernels.losses import Loss, check_loss
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.model.check import float32_constants
from nlsq_dask.model.model import Model
from nlsq_dask.warmup.normalize import ParameterNormalizer


@dataclass(frozen=True)
class FitProblem:
    """Model, data and options of a fit."""

    config: HybridStreamingConfig  # copy, with ``verbose`` of the call
    model: Model
    parameters: Parameters
    normalizer: ParameterNormalizer
    penalty: GroupVariance
    blocks: RowBlocks
    loss: Loss
    nan_policy: str  # "raise" or "omit"
    absolute_sigma: bool
    callback: Callback | None

    @property
    def exact_model(self) -> Model:
        """Model in float64, evaluated on the sample."""
        return replace(self.model, dtype="float64")

    @property
    def is_exact(self) -> bool:
        """Whether the model is evaluated in float64 over all rows."""
        return self.model.dtype == "float64"

    @property
    def is_without_matrices(self) -> bool:
        """Whether conjugate gradients solve the step, and no p-by-p matrix is allocated."""
        return self.config.is_without_matrices(self.model.n_params)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notices about the interpretation of the arguments."""
        notice = [self.parameters.notice] if self.parameters.notice else []
        return (*notice, *(f"{note}." for note in self.blocks.date_notices()))

    @property
    def sample_rows(self) -> int:
        """Number of rows of the sample."""
        layout, n_params = self.model.layout, self.model.n_params
        return self.config.sample_size(self.blocks.n_rows, layout.row_bytes, n_params)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that must be equal when the fit is resumed, besides model, data and options."""
        return {
            "p0": self.parameters.start,
            "lower bounds": self.parameters.low,
            "upper bounds": self.parameters.high,
            "param_names": self.parameters.names,
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
    param_names: Sequence[str] | None = None,
    callback: Callback | None = None,
    verbose: int | None = None,
) -> FitProblem:
    """Validate the arguments of ``fit`` and return them as a ``FitProblem``.

    Except for ``config``, signature and defaults are those of ``fit`` and ``plan``.

    Raises
    ------
    DataError, ModelError, ValueError, TypeError
        If an argument is invalid, as far as known without reading data.
    """
    if nan_policy not in ("raise", "omit"):
        raise ValueError(f"nan_policy must be 'raise' or 'omit'; got {nan_policy!r}.")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable(params, loss, iteration); got {callback!r}.")
    if not isinstance(absolute_sigma, bool | np.bool_):
        raise TypeError(f"absolute_sigma must be True or False; got {absolute_sigma!r}.")
    check_loss(loss, f_scale)
    config = config.validated_copy() if verbose is None else replace(config, verbose=verbose)
    parameters = parse_parameters(model, p0, bounds, param_names, *_parts_of_x(x_data))
    n_params = len(parameters.names)
    _check_many_parameters(parameters, config)
    _check_box(parameters, config)
    normalizer = ParameterNormalizer(
        parameters.start,
        (parameters.low, parameters.high),
        config.normalization_strategy if config.normalize else "none",
    )
    penalty = _penalty(config, n_params)
    weights = config.residual_weights if config.enable_residual_weighting else None
    blocks = align(x_data, y_data, sigma, weights)
    traced = Model(model, n_params, blocks.layout, config.dtype)
    for notice in blocks.notices:
        warn_caller(notice, DataWarning)
    _warn_of_float32(traced)
    return FitProblem(
        config=config,
        model=traced,
        parameters=parameters,
        normalizer=normalizer,
        penalty=penalty,
        blocks=blocks,
        loss=Loss(loss, float(f_scale)),
        nan_policy=nan_policy,
        absolute_sigma=bool(absolute_sigma),
        callback=callback,
    )


def _parts_of_x(x_data: Any) -> tuple[int, str]:
    """Return the number of arrays in x and the expression for all of them in a model."""
    if isinstance(x_data, dict):
        return len(x_data), ", ".join(f"x[{key!r}]" for key in x_data)
    are_names = isinstance(x_data, list) and all(isinstance(name, str) for name in x_data)
    return (len(x_data) if isinstance(x_data, tuple) or are_names else 1), "x"


def _check_many_parameters(parameters: Parameters, config: HybridStreamingConfig) -> None:
    """Raise a ValueError for options that conjugate gradients do not support."""
    n_params = len(parameters.names)
    if not config.is_without_matrices(n_params):
        return
    unsupported = {
        "bounds": parameters.has_bounds,
        f"cov_type={config.cov_type!r}": config.cov_type != "nonrobust",
        f"gauss_newton_solver={config.gauss_newton_solver!r}": config.gauss_newton_solver != "auto",
        "enable_multistart": config.enable_multistart,
    }
    conflicts = [name for name, is_used in unsupported.items() if is_used]
    if conflicts:
        raise ValueError(
            f"{', '.join(conflicts)} cannot be combined with conjugate gradients, which are used "
            f"for {n_params} parameters with cg_param_threshold={config.cg_param_threshold}. "
            f"Remove it, or raise cg_param_threshold to solve the step with the full matrix "
            f"({8 * n_params**2 / 2**20:.0f} MiB per task)."
        )


def _check_box(parameters: Parameters, config: HybridStreamingConfig) -> None:
    """Raise a ValueError if ``center_on_p0=False`` without finite bounds."""
    if not config.enable_multistart or config.center_on_p0:
        return
    low, high = parameters.low, parameters.high
    if not (np.isfinite(low) & np.isfinite(high)).any():
        raise ValueError(
            f"center_on_p0=False draws starts around the middle of the bounds, but no parameter "
            f"has two finite bounds; got lower={low.tolist()}, upper={high.tolist()}. Set bounds, "
            f"or use center_on_p0=True."
        )


def _penalty(config: HybridStreamingConfig, n_params: int) -> GroupVariance:
    """Return the penalty, or raise a ValueError for invalid parameter ranges."""
    indices = config.group_variance_indices
    if not config.enable_group_variance_regularization or indices is None:
        return GroupVariance()
    for start, end in indices:
        if end > n_params:
            raise ValueError(
                f"group_variance_indices has the range ({start}, {end}), but the model has "
                f"{n_params} parameters; the end of a range, which is excluded, may be at most "
                f"{n_params}."
            )
    return GroupVariance(config.group_variance_lambda, tuple((int(a), int(b)) for a, b in indices))


def _warn_of_float32(model: Model) -> None:
    """Warn if a model in float64 uses arrays in float32."""
    names = float32_constants(model) if model.dtype == "float64" else []
    if names:
        warn_caller(
            f"the model uses {', '.join(names)}, float32 JAX arrays created outside of it, which "
            f"have only 7 digits. Use NumPy arrays, or create them inside the model."
        )
