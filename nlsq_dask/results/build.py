"""From what the phases found to the verdict that a person reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning

from nlsq_dask._text import join_first
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.errors import DataWarning, warn_caller
from nlsq_dask.fit.outcome import Outcome
from nlsq_dask.fit.parameters import Parameters
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.model import Model
from nlsq_dask.results.datasets import block_statistics, row_sample
from nlsq_dask.results.result import FitResult
from nlsq_dask.status import StopReason

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_MULTISTART = (
    " If the start may be far off: finite bounds and HybridStreamingConfig.with_multistart("
    "n_starts=30, center_on_p0=False) try many."
)


def make_result(
    outcome: Outcome,
    model: Model,
    parameters: Parameters,
    blocks: RowBlocks,
    phase_history: list[dict[str, Any]],
    history: xr.Dataset,
    loss: Loss,
    cov_type: str,
) -> FitResult:
    """Make the public result, and warn where the covariance cannot be trusted."""
    n_params = len(parameters.names)
    sums, found = outcome.sums, outcome.covariance
    active = _active_mask(outcome.params, parameters)
    gradient = np.full(n_params, np.nan) if sums is None else sums.jtr
    n_used = 0 if sums is None else sums.n_used
    lost = outcome.undetermined if found is None else found.undetermined
    undetermined = [] if lost is None else _names(parameters, lost)
    at_bounds = _names(parameters, active != 0)
    outward = ((active < 0) & (gradient > 0)) | ((active > 0) & (gradient < 0))
    beyond = _names(parameters, outward)
    pcov, root = _covariance(outcome)
    if found is not None and pcov is not None and not np.isfinite(pcov).all():
        _warn_of_covariance(undetermined, n_used, n_params)
    if undetermined and not outcome.has_covariance:
        warn_caller(
            f"The data do not determine {join_first(undetermined)}: other values fit as well as "
            f"those that were found.",
            OptimizeWarning,
        )
    message = outcome.stop.sentence
    if outcome.stop.may_have_started_far_off and _could_use_multistart(outcome):
        message += _MULTISTART
    left_out = _left_out(outcome.diagnostics["left_out"], blocks)
    if left_out:
        message += f" {left_out}"
        _warn_of_rows(left_out, outcome.diagnostics["left_out"])
    if at_bounds:
        message += f" At a bound: {join_first(at_bounds)}."
    if outward.any():
        message += f" The fit would be better beyond the bound of {join_first(beyond)}."
    if sums is not None and n_used < n_params:
        message += f" There are fewer rows ({n_used}) than parameters ({n_params})."
    if undetermined:
        message += f" The data do not determine: {join_first(undetermined)}."
    if not outcome.stop.is_success and not outcome.stop.is_interruption:
        message += _on_dates(blocks)
    if outcome.stop.is_interruption:
        message += to_go_on(outcome.checkpoint)
    return FitResult(
        x=outcome.params,
        success=outcome.stop.is_success,
        status=outcome.stop.status,
        message=message,
        cost=np.nan if sums is None else sums.cost,
        chi2=np.nan if sums is None else sums.chi2,
        grad=gradient,
        optimality=float(np.abs(np.where(outward, 0.0, gradient)).max()),
        active_mask=active,
        nfev=outcome.n_passes,
        njev=outcome.n_passes,
        nit=outcome.iterations,
        pcov=pcov,
        absolute_sigma=outcome.absolute_sigma,
        loss=loss.name,
        f_scale=loss.f_scale,
        cov_type=cov_type,
        sigma_sq=_sigma_sq(sums, n_params),
        dof=n_used - n_params,
        n_points=n_used,
        n_omitted=0 if sums is None else sums.n_omitted,
        r_squared=_r_squared(sums),
        condition_number=np.nan if found is None else found.condition_number,
        block_statistics=None
        if sums is None or sums.blocks is None
        else block_statistics(sums.blocks, blocks),
        param_names=parameters.names,
        p0=parameters.start,
        bounds=(parameters.low, parameters.high),
        n_passes=outcome.n_passes,
        rows_read=outcome.rows_read,
        bytes_read=outcome.bytes_read,
        rows_cached=outcome.rows_cached,
        phase_history=phase_history,
        history=history,
        diagnostics={
            **outcome.diagnostics,
            "parameters_at": outcome.params,
            "sums_at": outcome.sums_at,
            "last_step_without_pass": outcome.stop is StopReason.LAST_STEP,
            "active_bounds": at_bounds,
            "undetermined": undetermined,
        },
        x_units=blocks.x_units,
        sample=None if outcome.shown is None else row_sample(*outcome.shown, blocks),
        _model=model,
        _root=root,
        _errors=outcome.errors,
    )


def _on_dates(blocks: RowBlocks) -> str:
    """Say which numbers the model gets for dates: a decay from 1970 on is nothing today."""
    notes = blocks.date_notes()
    if not notes:
        return ""
    return f" Note that {'; '.join(notes)}. A decay or growth needs an origin near the data."


def to_go_on(checkpoint: str | None) -> str:
    """Return the sentence that says how to resume a fit; nothing without a checkpoint."""
    if checkpoint is None:
        return ""
    return f" To go on: HybridStreamingConfig(resume_from_checkpoint={checkpoint!r})."


def _could_use_multistart(outcome: Outcome) -> bool:
    """Whether it was not used, and is possible: not without a matrix of the parameters."""
    return outcome.has_covariance and "multistart" not in outcome.diagnostics


def _covariance(outcome: Outcome) -> tuple[Matrix | None, Matrix | None]:
    """Return pcov and its root: None for too many parameters, infinite where nothing was found.

    Where the model does not react to some parameters, what rounding makes of them is nothing.
    """
    if not outcome.has_covariance:
        return None, None
    if outcome.covariance is None or outcome.stop is StopReason.NO_SENSITIVITY:
        nothing = np.full((len(outcome.params),) * 2, np.inf)
        return nothing, nothing
    return outcome.covariance.pcov, outcome.covariance.root


def _sigma_sq(sums: Sums | None, n_params: int) -> float:
    if sums is None or not sums.is_finite:
        return np.nan
    return sums.variance(n_params)


def _active_mask(params: Vector, parameters: Parameters) -> NDArray[np.int64]:
    at_low = (params <= parameters.low).astype(np.int64)
    at_high = (params >= parameters.high).astype(np.int64)
    return at_high - at_low


def _names(parameters: Parameters, flags: NDArray[np.bool_]) -> list[str]:
    return [name for name, flag in zip(parameters.names, flags, strict=True) if flag]


def _r_squared(sums: Sums | None) -> float:
    if sums is None or sums.total_variation <= 0.0:
        return float("nan")
    return 1.0 - sums.chi2 / sums.total_variation


def _warn_of_covariance(undetermined: list[str], n_used: int, n_params: int) -> None:
    if undetermined:
        reason = f"the data do not determine {join_first(undetermined)}"
    elif n_used > n_params:
        reason = "at this point the model does not react to some of them"
    else:
        reason = f"{n_used} rows leave no degrees of freedom for {n_params} parameters"
    warn_caller(f"Covariance of the parameters could not be estimated: {reason}.", OptimizeWarning)


def _left_out(records: list[dict[str, Any]], blocks: RowBlocks) -> str:
    """Return the sentence on blocks that could not be read, empty if there are none."""
    if not records:
        return ""
    n_rows = sum(record["rows"] for record in records)
    return (
        f"Left out, because they could not be read: {n_rows:,} of {blocks.n_rows:,} rows, in "
        f"{len(records)} of {int(np.prod(blocks.grid)):,} blocks."
    )


def _warn_of_rows(sentence: str, records: list[dict[str, Any]]) -> None:
    listed = join_first([str(record["block"]) for record in records])
    first = records[0]
    where = "" if first["chunk"] is None else f"{first['chunk']}: "
    warn_caller(
        f"{sentence} Blocks {listed}; the first because of {first['array']}: {where}"
        f"{first['error']}. All are in result.diagnostics['left_out'].",
        DataWarning,
    )
