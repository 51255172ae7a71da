"""Checks of the values in the data, and messages that name rows at which a model is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nlsq_dask._text import join_first
from nlsq_dask.engine.dataset import DataSet
from nlsq_dask.engine.retries import SkippedBlock
from nlsq_dask.engine.tasks import UndefinedRows
from nlsq_dask.errors import BlockReadError, CheckpointError, DataError, NonFiniteDataError
from nlsq_dask.fit.outcome import UndefinedPoint
from nlsq_dask.fit.problem import FitProblem
from nlsq_dask.kernels.sums import Sums
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.model.transform import ParameterTransform, Vector
from nlsq_dask.rows.rows import STRIP_ROWS, Layout, Rows

_MAX_LISTED = 10  # blocks in a message
_N_TRIALS, _SPREAD = 32, 3.0  # other parameters, and their distance from p0 in its scales

_OTHER_START = "choose another p0, or bounds within which the model is defined."
_BOUNDS = "set bounds within which the model is defined."
_DERIVATIVE = "at the start the model is finite, but its derivative"
_TRIAL_DERIVATIVE = "no step succeeds, because at the trial points the derivative of the model"
_OMIT = "set y_data of such rows to NaN and use nan_policy='omit'"
_NO_START = "It is not finite there with other parameters either"
_DEFINE = (
    "or define the model there, such as "
    "jnp.where(x > 0, a + b * jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)."
)
_GUARD = (
    "If jnp.where selects another expression there, the expression that is not selected must be "
    "finite as well: jnp.where(x > 0, a * jnp.sin(b * safe) / safe, a * b) with "
    "safe = jnp.where(x > 0, x, 1.0)."
)


def are_unusable(sums: Sums, omits_nan: bool) -> bool:
    """Whether some rows have an invalid sigma, or NaN or infinity that may not be omitted."""
    return bool(sums.n_bad_sigma or (sums.n_bad and not omits_nan))


def check_rows(
    sums: Sums, omits_nan: bool, data: DataSet, n_rows: int, first_bad_block: int | None
) -> None:
    """Raise a DataError if sigma or other values are invalid, or no row can be used.

    Parameters
    ----------
    sums : Sums
        Sums over all rows, which count the invalid rows.
    omits_nan : bool
        Whether rows with NaN or infinity are omitted.
    data : DataSet
        Finds the first NaN or infinity, for the message.
    n_rows : int
        Number of rows.
    first_bad_block : int or None
        Flat index of the first block with NaN or infinity.
    """
    if sums.n_bad_sigma:
        raise DataError(
            f"sigma is zero or negative at {sums.n_bad_sigma:,} of {n_rows:,} rows; it must be "
            f"positive. To omit rows, set their y_data to NaN and use nan_policy='omit'."
        )
    if first_bad_block is not None and not omits_nan:
        block, where = data.first_not_finite(first_bad_block)
        raise NonFiniteDataError(
            f"{sums.n_bad:,} of {n_rows:,} rows hold NaN or infinity in y_data, x_data or sigma; "
            f"the first of them are in block {block} of the grid {data.blocks.grid}{where}. Use "
            f"nan_policy='omit' to omit these rows.",
            sums.n_bad,
            block,
        )
    if not sums.n_used:
        raise DataError(
            f"none of the {n_rows:,} rows can be used: each is masked, or holds NaN or infinity in "
            f"y_data, x_data or sigma. Check these arrays and the mask one by one: an array "
            f"without finite values, or an inverted mask, excludes all rows."
        )


def check_share(bad: Sequence[SkippedBlock], n_all: int, min_share: float) -> None:
    """Raise a BlockReadError if too few rows can be read.

    Parameters
    ----------
    bad : sequence of SkippedBlock
        The blocks that cannot be read.
    n_all : int
        Number of rows of all blocks.
    min_share : float
        Fraction of the rows that must be readable.
    """
    n_rows = n_all - sum(block.rows for block in bad)
    if n_rows and n_rows >= min_share * n_all:
        return
    listed = join_first([block.sentence for block in bad], _MAX_LISTED, "; ", "blocks")
    raise BlockReadError(
        f"{n_rows:,} of {n_all:,} rows can be read, less than min_success_rate={min_share:g}. "
        f"{listed}. {bad[0].remedy('lower min_success_rate')}",
        bad[0].array,
        bad[0].block,
        bad[0].chunk,
    )


def check_same(before: Rows, reread: Rows) -> None:
    """Raise a CheckpointError if rows, read again, differ from those of the checkpoint."""
    for one, other in zip(before.arrays, reread.arrays, strict=True):
        if one is not None and other is not None and one.tobytes() != other.tobytes():
            raise CheckpointError(
                "the checkpoint belongs to other data: some rows were read again, and their values "
                "have changed. Restore the data, or fit again without resume_from_checkpoint."
            )


def explain_not_finite(
    point: UndefinedPoint, is_start: bool, problem: FitProblem, data: DataSet
) -> str:
    """Return a message with the rows at which the model or its derivative is not finite.

    If a function in ``ties`` is the reason, the message names its parameter instead.

    Parameters
    ----------
    point : UndefinedPoint
        The parameters, and the sums over all rows there.
    is_start : bool
        Whether the fit ended at its start; otherwise at a trial, after all nearer ones failed, too.
    problem : FitProblem
        With the model as it was used.
    data : DataSet
        The first block with such rows is read again.

    Returns
    -------
    str
        Empty if there are no such rows, because the model overflows only when it is squared.
    """
    if point.blocks is None:
        return ""
    bad = point.blocks.index[~np.isfinite(point.blocks.chi2)]
    if not len(bad):
        return ""
    if problem.is_without_matrices:
        kernel = PredictionKernel.trace_slopes(problem.model)
    else:
        kernel = PredictionKernel.trace(problem.model, STRIP_ROWS, with_std=True)
    block, rows = data.undefined_rows(int(bad.min()), kernel, point.params)
    if rows is None:
        return ""
    if problem.transform.ties and _is_finite_without_ties(rows.first, point.params, problem):
        return _explain_tie(point.params, is_start, problem.transform)
    can_move = not is_start or _is_finite_elsewhere(kernel, rows.first, problem)
    advice = _OTHER_START if is_start else _BOUNDS
    where = "at the start" if is_start else "at any trial point: at the last one,"
    first = f"the first is {_describe(rows, problem.model.layout)}"
    if rows.is_derivative:
        return (
            f"Not converged: {_DERIVATIVE if is_start else _TRIAL_DERIVATIVE} is not finite at "
            f"{rows.n_rows:,} of {rows.n_used:,} rows of block {block}; {first}. {_GUARD} "
            f"Otherwise, {advice if can_move else f'{_OMIT}.'}"
        )
    count = f"{point.sums.n_nonfinite:,} of {point.sums.n_used:,} rows"
    return f"Not converged: the model is not finite {where} at {count}; {first}. " + (
        f"{advice[0].upper()}{advice[1:]}" if can_move else f"{_NO_START}: {_OMIT}, {_DEFINE}"
    )


def _is_finite_without_ties(row: Rows, free: Vector, problem: FitProblem) -> bool:
    """Return whether the model and its derivative are finite if tied parameters keep their p0."""
    constant = problem.transform.with_constant_ties(problem.all_parameters.start)
    model = replace(problem.model, transform=constant)
    kernel = PredictionKernel.trace(model, STRIP_ROWS, with_std=True)
    return bool(np.isfinite(kernel([(row.padded(kernel.batch_rows), 1)], free)).all())


def _explain_tie(free: Vector, is_start: bool, transform: ParameterTransform) -> str:
    """Return a message on the function in ``ties`` that is not finite, or whose derivative is not.

    ``free`` are the values of the free parameters. The message is empty if all functions are
    finite.
    """
    values, rates = transform.expand(free)[transform.is_tied], transform.rates(free)
    lacks_value, lacks_rate = ~np.isfinite(values), ~np.isfinite(rates)
    if not (lacks_value.any() or lacks_rate.any()):
        return ""
    tie = int(np.argmax(lacks_value if lacks_value.any() else lacks_rate.any(axis=1)))
    names, free_names = np.array(transform.names), np.array(transform.names)[transform.is_free]
    function = f"ties[{str(names[transform.is_tied][tie])!r}]"
    is_used = rates[tie] != 0.0
    used = is_used if is_used.any() else np.ones_like(is_used)
    pairs = zip(free_names[used], free[used], strict=True)
    where = join_first([f"{name}={float(value)!r}" for name, value in pairs])
    point = "at the start" if is_start else "at any trial point: at the last one"
    if lacks_value[tie]:
        fault = f"{function} is not finite {point}, with {where}, it is {values[tie]:g}"
    else:
        listed = join_first([repr(str(name)) for name in free_names[lacks_rate[tie]]])
        fault = (
            f"the derivative of {function} with respect to {listed} is not finite {point}, with "
            f"{where}"
        )
    advice = "Choose another p0, set bounds" if is_start else "Set bounds"
    return (
        f"Not converged: {fault}. {advice} within which the function and its derivative are "
        f"finite, or write it so that they are."
    )


def _is_finite_elsewhere(kernel: PredictionKernel, row: Rows, problem: FitProblem) -> bool:
    """Return whether the model and its derivative are finite at one row with other parameters."""
    parameters, scales = problem.parameters, problem.normalizer.scales
    batch = [(row.padded(kernel.batch_rows), 1)]
    random = np.random.default_rng(0)
    shifts = _SPREAD * scales * random.uniform(-1.0, 1.0, (_N_TRIALS, len(scales)))
    trials = np.clip(parameters.start + shifts, parameters.low, parameters.high)
    return any(np.isfinite(kernel(batch, trial)).all() for trial in trials)


def _describe(rows: UndefinedRows, layout: Layout) -> str:
    """Return the element of y and the x of the first row, such as ``y_data[0], x=0``."""
    values: Any = layout.assemble([_text(leaf[0]) for leaf in rows.first.x])
    if isinstance(values, tuple):
        values = f"({', '.join(values)})"
    elif isinstance(values, dict):
        values = ", ".join(f"{name}={value}" for name, value in values.items())
        return f"y_data[{', '.join(map(str, rows.position))}], with {values}"
    return f"y_data[{', '.join(map(str, rows.position))}], with x={values}"


def _text(value: Any) -> str:
    if np.ndim(value):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.6g}"
