"""``build_result``: the ``FitResult`` of a fit, with its message and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning

from nlsq_dask._text import join_first
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.errors import DataWarning, warn_caller
from nlsq_dask.fit.arguments.parameters import Parameters
from nlsq_dask.fit.outcome import Outcome
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.kernels.sums import NormalEquations, Sums
from nlsq_dask.results.datasets import block_statistics, row_sample
from nlsq_dask.results.result import FitResult
from nlsq_dask.results.uncertainty import (
    MIN_CORRELATION,
    are_uncertain,
    confounded_sentence,
    correlated_pairs,
    correlated_sentence,
    uncertain_sentence,
)
from nlsq_dask.solvers.covariance import infinite_covariance
from nlsq_dask.status import FIX_EXAMPLE, ONE_PASS, Status

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_NO_EFFECT = 1e-8  # relative change of the model by all parameters that is too small for a fit
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
    """Return the result of a fit; warn if it has no finite covariance or if rows were skipped.

    The outcome is that of the free parameters, the result has all parameters.
    """
    parameters, transform, blocks = problem.all_parameters, problem.transform, problem.blocks
    outcome = outcome.expanded(transform)
    n_free, counts = transform.n_free, outcome.counts
    sums = _unknown_sums(n_free) if outcome.sums is None else outcome.sums
    n_used, variation = sums.n_used, sums.total_variation
    gradient = transform.scatter(sums.jtr)
    at_low, at_high = outcome.params <= parameters.low, outcome.params >= parameters.high
    active = np.where(transform.is_free, at_high.astype(np.int64) - at_low, 0)
    covariance = outcome.covariance
    non_identifiable = _non_identifiable(outcome, parameters)
    confounded = _confounded(outcome, parameters)
    at_bounds = _names(parameters, active != 0)
    is_outward = ((active < 0) & (gradient > 0)) | ((active > 0) & (gradient < 0))
    outward = _names(parameters, is_outward)
    pcov, root = _covariance(outcome, problem)
    skipped = _skipped_message(outcome.diagnostics["left_out"], blocks)
    _warn_covariance(outcome, problem, pcov, non_identifiable)
    if skipped:
        _warn_skipped(skipped, outcome.diagnostics["left_out"])
    fixed = tuple(_names(parameters, transform.is_fixed))
    model = replace(problem.model, mode=outcome.mode)
    uncertain = _uncertain(outcome, problem, pcov, {*non_identifiable, *chain(*confounded)})
    correlated = _correlated(problem, pcov, confounded)
    has_few_rows = outcome.sums is not None and n_used < n_free
    sentences = [
        skipped,
        f"At a bound: {_join(at_bounds)}." if at_bounds else "",
        f"The cost would decrease beyond the bound of {_join(outward)}." if outward else "",
        _no_effect_hint(outcome, problem),
        f"There are fewer rows ({n_used}) than parameters ({n_free})." if has_few_rows else "",
        f"The data do not constrain: {_join(non_identifiable)}." if non_identifiable else "",
        *map(confounded_sentence, confounded),
        uncertain_sentence(uncertain) if uncertain else "",
        correlated_sentence(correlated) if correlated else "",
    ]
    return FitResult(
        x=outcome.params,
        success=outcome.stop.is_success,
        status=outcome.stop.code,
        message=_message(
            outcome,
            problem,
            [
                *non_identifiable,
                *chain(*confounded),
                *uncertain,
                *(name for name, _, _ in correlated),
            ],
            [text for text in sentences if text],
        ),
        cost=sums.cost,
        chi2=sums.chi2,
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
        sigma_sq=sums.variance(n_free) if sums.is_finite else np.nan,
        dof=n_used - n_free,
        n_points=n_used,
        n_omitted=sums.n_omitted,
        r_squared=1.0 - sums.chi2 / variation if variation > 0.0 else np.nan,
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
            "last_step_error": outcome.step_error,
            "active_bounds": at_bounds,
            "undetermined": non_identifiable,
            "confounded": confounded,
        },
        x_units=blocks.x_units,
        sample=None if outcome.sample is None else row_sample(*outcome.sample, blocks),
        _fixed=fixed,
        _tied=tuple(_names(parameters, transform.is_tied)),
        _model=model.with_fixed(parameters.names, outcome.params, fixed),
        _root=root,
        _errors=outcome.errors,
    )


def _message(
    outcome: Outcome, problem: FitProblem, blamed: Sequence[str], sentences: list[str]
) -> str:
    """Return ``FitResult.message``: what happened, the given sentences, and what to do next.

    ``blamed`` are the names of parameters that the data do not determine.
    """
    stop, names = outcome.stop, problem.all_parameters.names
    # An example with the name of a parameter that is in question, or of any.
    example = f"such as fixed=[{(*blamed, *names)[0]!r}]"
    remedy = "" if outcome.cause else stop.remedy.replace(FIX_EXAMPLE, example)
    cause = outcome.cause or stop.cause
    if stop is Status.LAST_STEP and outcome.step_error is not None:
        cause = ONE_PASS.format(outcome.step_error)
    message = " ".join(filter(None, [cause, *sentences, remedy]))
    if stop.suggests_another_start and _can_use_multistart(problem):
        message += _MULTISTART_HINT
    if stop.is_interruption and stop is not Status.NO_PROGRESS:
        return message + resume_hint(outcome.checkpoint)
    return message if stop.is_success else message + problem.blocks.date_hint


def _no_effect_hint(outcome: Outcome, problem: FitProblem) -> str:
    """Return a hint if all parameters are without effect, compared with y; otherwise ""."""
    sums = outcome.sums
    if outcome.stop is not Status.NO_SENSITIVITY or not isinstance(sums, NormalEquations):
        return ""
    free = outcome.params[problem.transform.is_free]
    sizes = np.maximum(np.abs(free), problem.normalizer.scales)
    effects = np.sqrt(np.diag(sums.jtj)) * sizes / (np.sqrt(sums.signal) or 1.0)
    if not effects.max() < _NO_EFFECT:
        return ""
    by = f" by more than {effects.max():.1g} of y" if effects.max() else ""
    return (
        f"No parameter changes the model{by}: p0 may be too small by orders of magnitude (an "
        f"amplitude should be about as large as y), or so far away that the model vanishes."
    )


def resume_hint(checkpoint: str | None) -> str:
    """Return a sentence on how to resume the fit from a checkpoint; empty if there is none."""
    if checkpoint is None:
        return ""
    return f" To resume: HybridStreamingConfig(resume_from_checkpoint={checkpoint!r})."


def _can_use_multistart(problem: FitProblem) -> bool:
    """Return whether the fit could have used multistart, but did not."""
    return not (problem.is_without_matrices or problem.config.enable_multistart)


def _covariance(outcome: Outcome, problem: FitProblem) -> tuple[Matrix | None, Matrix | None]:
    """Return pcov and its square root (see ``Covariance``).

    Both are None if there are too many parameters for matrices. Both are infinite if the covariance
    is unknown or the model is insensitive to some parameters.
    """
    if problem.is_without_matrices:
        return None, None
    if outcome.covariance is None or outcome.stop is Status.NO_SENSITIVITY:
        assert outcome.varies is not None
        infinite = infinite_covariance(outcome.varies)
        return infinite, infinite
    return outcome.covariance.pcov, outcome.covariance.root


def _unknown_sums(n_params: int) -> Sums:
    """Return the sums of a fit that ended without a pass: NaN, over no rows."""
    nan = np.full(n_params, np.nan)
    return NormalEquations(jtr=nan, cost=np.nan, chi2=np.nan, jtj=np.empty((0, 0)))


def _names(parameters: Parameters, flags: NDArray[np.bool_]) -> list[str]:
    return [name for name, flag in zip(parameters.names, flags, strict=True) if flag]


def _non_identifiable(outcome: Outcome, parameters: Parameters) -> list[str]:
    """Return the names of the parameters that the data do not constrain."""
    flags = np.zeros(len(parameters.names), bool)
    for source in (outcome, outcome.covariance):
        if source is not None and source.non_identifiable is not None:
            flags |= source.non_identifiable
    return _names(parameters, flags)


def _confounded(outcome: Outcome, parameters: Parameters) -> list[list[str]]:
    """Return the names of the parameters of each group that the data cannot tell apart."""
    flags = outcome.non_identifiable
    if outcome.covariance is not None:
        groups = outcome.covariance.confounded
    elif flags is None or flags.sum() < 2 or outcome.stop is Status.NO_SENSITIVITY:
        groups = ()
    else:  # conjugate gradients find a single null direction
        groups = (tuple(np.flatnonzero(flags)),)
    return [[parameters.names[i] for i in group] for group in groups]


def _uncertain(
    outcome: Outcome, problem: FitProblem, pcov: Matrix | None, others: set[str]
) -> list[str]:
    """Return names of free parameters with errors far above their size, except ``others``."""
    parameters, transform = problem.all_parameters, problem.transform
    errors = outcome.errors if pcov is None else np.sqrt(np.diag(pcov))
    if errors is None:
        return []
    sizes = transform.scatter(problem.normalizer.scales)
    flags = transform.is_free & are_uncertain(outcome.params, errors, sizes)
    return [name for name in _names(parameters, flags) if name not in others]


def _correlated(
    problem: FitProblem, pcov: Matrix | None, confounded: list[list[str]]
) -> list[tuple[str, str, float]]:
    """Return strongly correlated pairs of free parameters, except those of a confounded group."""
    free = np.flatnonzero(problem.transform.is_free)
    names = [problem.all_parameters.names[i] for i in free]
    pairs = correlated_pairs(
        names, None if pcov is None else pcov[np.ix_(free, free)], MIN_CORRELATION
    )
    return [pair for pair in pairs if not any({*pair[:2]} <= {*group} for group in confounded)]


def _join(names: list[str]) -> str:
    return join_first([*map(repr, names)])


def _warn_covariance(
    outcome: Outcome, problem: FitProblem, pcov: Matrix | None, non_identifiable: list[str]
) -> None:
    """Warn if the data do not constrain some parameters, or if pcov is infinite."""
    names, n_params = _join(non_identifiable), problem.model.n_params
    insensitive = f"model is insensitive to {names} at this point"
    n_used = 0 if outcome.sums is None else outcome.sums.n_used
    if pcov is None and outcome.stop is Status.NO_SENSITIVITY:
        message = f"The {insensitive}."
    elif pcov is None and non_identifiable:
        message = f"The data do not constrain {names}: other values fit equally well."
    elif outcome.covariance is None or pcov is None or np.isfinite(pcov).all():
        return
    else:
        infinite, tied = ~np.isfinite(np.diag(pcov)), problem.transform.is_tied
        if not (infinite & ~tied).any():
            listed = _join(_names(problem.all_parameters, infinite))
            reason = f"the derivative of the function in ties is not finite for {listed}"
        elif outcome.stop is Status.NO_SENSITIVITY:
            reason = f"the {insensitive}"
        elif non_identifiable:
            reason = f"the data do not constrain {names}"
        elif n_used > n_params:
            reason = "the model is insensitive to some parameters at this point"
        else:
            reason = f"{n_used} rows leave no degrees of freedom for {n_params} parameters"
        message = f"Covariance of the parameters could not be estimated: {reason}."
    warn_caller(message, OptimizeWarning)


def _skipped_message(records: list[dict[str, Any]], blocks: RowBlocks) -> str:
    """Return a sentence on the blocks that could not be read; empty if all could."""
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
