"""Construction of the public result from the outcome of the phases."""

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
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.results.datasets import block_statistics, row_sample
from nlsq_dask.results.result import FitResult
from nlsq_dask.status import Status

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_MULTISTART_HINT = (
    " If p0 may be far from the solution, pass finite bounds and use "
    "HybridStreamingConfig.with_multistart(n_starts=30, center_on_p0=False)."
)


def build_result(
    outcome: Outcome,
    problem: FitProblem,
    phase_history: list[dict[str, Any]],
    history: xr.Dataset,
) -> FitResult:
    """Return the public result; warn if the covariance is unreliable or rows were skipped."""
    parameters, blocks = problem.parameters, problem.blocks
    n_params, counts = len(parameters.names), outcome.counts
    sums, covariance = outcome.sums, outcome.covariance
    active = _active_mask(outcome.params, parameters)
    gradient = np.full(n_params, np.nan) if sums is None else sums.jtr
    n_used = 0 if sums is None else sums.n_used
    flags = outcome.non_identifiable if covariance is None else covariance.non_identifiable
    non_identifiable = [] if flags is None else _names(parameters, flags)
    at_bounds = _names(parameters, active != 0)
    is_outward = ((active < 0) & (gradient > 0)) | ((active > 0) & (gradient < 0))
    pcov, root = _covariance(outcome, problem)
    skipped = _skipped_message(outcome.diagnostics["left_out"], blocks)
    _warn(outcome, problem, pcov, non_identifiable, skipped)
    sentences = {
        skipped: bool(skipped),
        f"At a bound: {_join(at_bounds)}.": bool(at_bounds),
        f"The cost would decrease beyond the bound of {_join(_names(parameters, is_outward))}.": (
            bool(is_outward.any())
        ),
        f"There are fewer rows ({n_used}) than parameters ({n_params}).": (
            sums is not None and n_used < n_params
        ),
        f"The data do not constrain: {_join(non_identifiable)}.": bool(non_identifiable),
    }
    # Long, because each field of the result takes a line.
    return FitResult(
        x=outcome.params,
        success=outcome.stop.is_success,
        status=outcome.stop.code,
        message=_message(outcome, problem, [text for text, holds in sentences.items() if holds]),
        cost=np.nan if sums is None else sums.cost,
        chi2=np.nan if sums is None else sums.chi2,
        grad=gradient,
        optimality=float(np.abs(np.where(is_outward, 0.0, gradient)).max()),
        active_mask=active,
        nfev=counts.n_passes,
        njev=counts.n_passes,
        nit=outcome.iterations,
        pcov=pcov,
        absolute_sigma=problem.absolute_sigma,
        loss=problem.loss.name,
        f_scale=problem.loss.f_scale,
        cov_type=problem.config.cov_type,
        sigma_sq=_sigma_sq(sums, n_params),
        dof=n_used - n_params,
        n_points=n_used,
        n_omitted=0 if sums is None else sums.n_omitted,
        r_squared=_r_squared(sums),
        condition_number=np.nan if covariance is None else covariance.condition_number,
        block_statistics=None
        if outcome.blocks is None
        else block_statistics(outcome.blocks, blocks),
        param_names=parameters.names,
        p0=parameters.start,
        bounds=(parameters.low, parameters.high),
        n_passes=counts.n_passes,
        rows_read=counts.rows_read,
        bytes_read=counts.bytes_read,
        rows_cached=counts.rows_cached,
        phase_history=phase_history,
        history=history,
        diagnostics={
            **outcome.diagnostics,
            "parameters_at": outcome.params,
            "sums_at": outcome.sums_at,
            "last_step_without_pass": outcome.stop is Status.LAST_STEP,
            "active_bounds": at_bounds,
            "undetermined": non_identifiable,
        },
        x_units=blocks.x_units,
        sample=None if outcome.sample is None else row_sample(*outcome.sample, blocks),
        _model=problem.model,
        _root=root,
        _errors=outcome.errors,
    )


def _message(outcome: Outcome, problem: FitProblem, sentences: list[str]) -> str:
    """Return why the fit ended, what is known of the solution, and what to do next."""
    stop = outcome.stop
    message = stop.message
    if stop.suggests_another_start and _can_use_multistart(problem):
        message += _MULTISTART_HINT
    message = " ".join([message, *sentences])
    if stop.is_interruption:
        return message + resume_hint(outcome.checkpoint)
    return message if stop.is_success else message + _date_hint(problem.blocks)


def _warn(
    outcome: Outcome,
    problem: FitProblem,
    pcov: Matrix | None,
    non_identifiable: list[str],
    skipped: str,
) -> None:
    """Warn if the covariance is unreliable or rows were skipped."""
    if outcome.covariance is not None and pcov is not None and not np.isfinite(pcov).all():
        n_used = 0 if outcome.sums is None else outcome.sums.n_used
        _warn_covariance(non_identifiable, n_used, problem.model.n_params)
    if non_identifiable and problem.is_without_matrices:
        warn_caller(
            f"The data do not constrain {_join(non_identifiable)}: other values fit equally well.",
            OptimizeWarning,
        )
    if skipped:
        _warn_skipped(skipped, outcome.diagnostics["left_out"])


def _date_hint(blocks: RowBlocks) -> str:
    """Return a sentence on the units of dates, which are far from zero; empty without dates."""
    notices = blocks.date_notices()
    if not notices:
        return ""
    return f" Note that {'; '.join(notices)}. A decay or growth needs an origin near the data."


def resume_hint(checkpoint: str | None) -> str:
    """Return a sentence on how to resume a fit; empty without a checkpoint."""
    if checkpoint is None:
        return ""
    return f" To resume: HybridStreamingConfig(resume_from_checkpoint={checkpoint!r})."


def _can_use_multistart(problem: FitProblem) -> bool:
    """Return whether multistart is available for this fit and was not used."""
    return not (problem.is_without_matrices or problem.config.enable_multistart)


def _covariance(outcome: Outcome, problem: FitProblem) -> tuple[Matrix | None, Matrix | None]:
    """Return pcov and its root, None for too many parameters, infinite if unknown.

    Both are also infinite if the model is insensitive to some parameters.
    """
    if problem.is_without_matrices:
        return None, None
    if outcome.covariance is None or outcome.stop is Status.NO_SENSITIVITY:
        infinite = np.full((len(outcome.params),) * 2, np.inf)
        return infinite, infinite
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


def _join(names: list[str]) -> str:
    return join_first([*map(repr, names)])


def _warn_covariance(non_identifiable: list[str], n_used: int, n_params: int) -> None:
    if non_identifiable:
        reason = f"the data do not constrain {_join(non_identifiable)}"
    elif n_used > n_params:
        reason = "the model is insensitive to some of them at this point"
    else:
        reason = f"{n_used} rows leave no degrees of freedom for {n_params} parameters"
    warn_caller(f"Covariance of the parameters could not be estimated: {reason}.", OptimizeWarning)


def _skipped_message(records: list[dict[str, Any]], blocks: RowBlocks) -> str:
    """Return a sentence on skipped blocks; empty if there are none."""
    if not records:
        return ""
    n_rows = sum(record["rows"] for record in records)
    return (
        f"Skipped because they could not be read: {n_rows:,} of {blocks.n_rows:,} rows, in "
        f"{len(records)} of {int(np.prod(blocks.grid)):,} blocks."
    )


def _warn_skipped(message: str, records: list[dict[str, Any]]) -> None:
    listed = join_first([str(record["block"]) for record in records])
    first = records[0]
    where = "" if first["chunk"] is None else f"{first['chunk']}: "
    warn_caller(
        f"{message} Blocks: {listed}. First error, in {first['array']}: {where}{first['error']}. "
        f"All errors are in result.diagnostics['left_out'].",
        DataWarning,
    )
