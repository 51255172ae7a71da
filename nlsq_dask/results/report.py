"""Reports of a ``FitResult``: as text, as HTML and as a Dataset."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from nlsq_dask import _html as html_parts
from nlsq_dask._text import wrap
from nlsq_dask.results.uncertainty import confounded_sentence, correlated_pairs

if TYPE_CHECKING:
    from nlsq_dask.results.result import FitResult

_SCALAR_FIELDS = (
    "loss",
    "f_scale",
    "cov_type",
    "success",
    "status",
    "message",
    "cost",
    "chi2",
    "reduced_chi2",
    "dof",
    "n_points",
    "n_omitted",
    "r_squared",
    "condition_number",
    "n_passes",
    "rows_read",
    "bytes_read",
    "rows_cached",
)
_COV_DIMS = ("cov_i", "cov_j")
_LARGE_RATIO = 1e3  # relative errors above this are printed with 3 digits
_MAX_REDUCED_CHI2 = 2.0  # larger values get a hint; chance gives up to 1.3 for 100 rows
_MIN_DOF = 100  # with fewer degrees of freedom, the reduced chi-square varies too much
_MAX_LISTED = 200  # parameters and correlations in a report
_MAX_PAIRS, _MAX_BLOCKS, _MAX_LETTERS = 20, 10, 120  # in HTML: correlations, blocks, letters


def _statistics(result: FitResult) -> list[tuple[str, str]]:
    n, p = result.n_points, int(np.count_nonzero(result.free))
    likelihood = n * np.log(result.chi2 / n) if n and result.chi2 > 0 else np.nan
    # Only fits by conjugate gradients have no covariance.
    method = "streaming Gauss-Newton" + (", conjugate gradients" if result.pcov is None else "")
    settings = [
        ("loss", "" if result.loss == "linear" else f"{result.loss}, f_scale = {result.f_scale:g}"),
        ("covariance", "" if result.cov_type == "nonrobust" else result.cov_type),
        ("standard errors", _error_scale(result)),
    ]
    return [
        ("fitting method", method),
        *((label, text) for label, text in settings if text),
        ("data points", f"{n:,}"),
        ("omitted points", f"{result.n_omitted:,}"),
        ("variables", f"{p}"),
        ("chi-square", f"{result.chi2:.8g}"),
        ("reduced chi-square", f"{result.reduced_chi2:.8g}{_sigma_hint(result)}"),
        ("Akaike info crit", f"{likelihood + 2 * p:.8g}"),
        ("Bayesian info crit", f"{likelihood + np.log(max(n, 1)) * p:.8g}"),
        ("R-squared", f"{result.r_squared:.8g}"),
        ("passes over the data", f"{result.n_passes}"),
    ]


def _variables(result: FitResult) -> list[tuple[str, str, str, str, str]]:
    """Return a row per parameter: name, value, standard error, relative error and notes.

    Errors of fixed parameters are empty.
    """
    rows, errors, (lows, highs) = [], result.perr, result.bounds
    fixed, tied = set(result._fixed), set(result._tied)
    for i, name in enumerate(result.param_names[:_MAX_LISTED]):
        value, error, low, high = result.x[i], errors[i], lows[i], highs[i]
        if name in fixed:
            rows.append((name, f"{value:.8g}", "", "", "fixed"))
            continue
        relative = _percent(abs(error / value)) if value and np.isfinite(error) else "??"
        notes = ["tied"] if name in tied else [f"init = {result.p0[i]:g}"]
        if np.isfinite(low) or np.isfinite(high):
            notes.append(f"bounds = {low:g}:{high:g}")
        if result.active_mask[i]:
            notes.append("at bound")
        rows.append((name, f"{value:.8g}", f"{error:.4g}", relative, ", ".join(notes)))
    n_more = len(result.param_names) - len(rows)
    if n_more > 0:
        rows.append((f"... {n_more} more in popt", "", "", "", ""))
    return rows


def _percent(ratio: float) -> str:
    return f"{ratio:.2%}" if ratio < _LARGE_RATIO else f"{100.0 * ratio:.3g}%"


def _sigma_hint(result: FitResult) -> str:
    """Return a warning if sigma is absolute and the reduced chi-square is far from 1, or ""."""
    if not result.absolute_sigma or result.cov_type != "nonrobust" or result.dof < _MIN_DOF:
        return ""
    if result.reduced_chi2 > _MAX_REDUCED_CHI2:
        return "  (residuals are larger than sigma: check the model and sigma)"
    if result.reduced_chi2 < 1.0 / _MAX_REDUCED_CHI2:
        return "  (residuals are smaller than sigma: check sigma)"
    return ""


def _error_scale(result: FitResult) -> str:
    """Return a text on how ``absolute_sigma`` scales the standard errors.

    It is empty if the errors do not depend on it, as for a sandwich covariance, or are not known.
    """
    has_sigma = result.sample is not None and "sigma" in result.sample
    if result.cov_type != "nonrobust" or not (has_sigma or result.absolute_sigma):
        return ""
    if result.absolute_sigma:
        given = "sigma" if has_sigma else "sigma = 1 (default)"
        return f"from {given} (absolute_sigma=True)"
    return "scaled by the variance of residuals (absolute_sigma=False)"


def _correlations(result: FitResult, least: float) -> list[tuple[str, str, float]]:
    """Return the pairs of free parameters to list, with their correlation."""
    free = np.flatnonzero(result.free)
    pcov = None if result.pcov is None else result.pcov[np.ix_(free, free)]
    return correlated_pairs([result.param_names[i] for i in free], pcov, least)[:_MAX_LISTED]


def fit_report(result: FitResult, min_correlation: float) -> str:
    """Return the report as text, in the layout of the package lmfit."""
    lines = ["[[Fit Statistics]]"]
    lines += [f"    # {label:<20} = {value}" for label, value in _statistics(result)]
    lines.append("[[Variables]]")
    variables = _variables(result)
    width = max(len(name) for name, *_ in variables)
    lines += [
        f"    {name + ':':<{width + 1}} {value}"
        + (f" +/- {error} ({relative})" if error else "")
        + (f" ({note})" if note else "")
        for name, value, error, relative, note in variables
    ]
    confounded = result.diagnostics.get("confounded") or []
    lines += [wrap(f"    # {confounded_sentence(names)}", "# ") for names in confounded]
    correlations = _correlations(result, min_correlation)
    if correlations:
        lines.append(f"[[Correlations]] (unreported correlations are < {min_correlation:.3f})")
        pair_width = max(len(a) + len(b) for a, b, _ in correlations)
        lines += [
            f"    {f'C({a}, {b})':<{pair_width + 5}} = {value:+.4f}" for a, b, value in correlations
        ]
    lines.append(f"[[{'Success' if result.success else 'FAILED'}]]")
    lines.append(wrap(f"    {result.message}", ""))
    return "\n".join(lines)


def html(result: FitResult) -> str:
    """Return the report as HTML, which notebooks show."""
    badge = ("Fit succeeded", html_parts.GOOD) if result.success else ("Fit failed", html_parts.BAD)
    variables = html_parts.table(
        ("parameter", "value", "standard error", "relative error", ""), _variables(result)
    )
    pairs = _correlations(result, 0.1)[:_MAX_PAIRS]
    correlations = html_parts.table(
        ("", "", "correlation", ""), [(a, b, f"{value:+.4f}", "") for a, b, value in pairs], 2
    )
    return html_parts.page(
        html_parts.paragraph(html_parts.badge(*badge), escape(result.message)),
        html_parts.bullets(_notices(result)),
        variables,
        html_parts.collapsed("Statistics", html_parts.facts(_statistics(result)), is_open=True),
        html_parts.collapsed("Largest correlations", correlations) if pairs else "",
        html_parts.collapsed("Phases", phases(result.phase_history)),
    )


def phases(phase_history: list[dict[str, Any]]) -> str:
    """Return an HTML table with a row per phase; see ``FitResult.phase_history``."""
    common = ("phase", "name", "start_time", "duration")
    rows = []
    for record in phase_history:
        details = "; ".join(
            f"{key.replace('_', ' ')}: {_format_value(value)}"
            for key, value in record.items()
            if key not in common and value is not None
        )
        rows.append((record["name"], f"{record['duration']:.2f}", details))
    return html_parts.table(("phase", "seconds", "details"), rows)


def _format_value(value: Any) -> str:
    """Return a value of ``FitResult.phase_history`` as a short text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_value, value[:_MAX_BLOCKS]))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]}..."


def _notices(result: FitResult) -> list[str]:
    """Return sentences on the fit that are not in its message."""
    diagnostics = result.diagnostics
    notes = []
    if diagnostics.get("retries"):
        notes.append(f"Number of retried reads: {diagnostics['retries']}.")
    notes += [
        f"Skipped block {block['block']} with {block['rows']:,} rows: {block['error']}"
        for block in diagnostics.get("left_out", [])[:_MAX_BLOCKS]
    ]
    non_finite = diagnostics.get("non_finite") or {}
    if non_finite:
        trials = ", ".join(f"{count} ({stage})" for stage, count in non_finite.items())
        notes.append(f"Trial points with non-finite values: {trials}.")
    if result.pcov is None and not np.isfinite(result.perr).all():
        notes.append("Standard errors are not available; `cg_error_probes` estimates them.")
    if result.x_units:
        units = "; ".join(f"{name}: {unit}" for name, unit in result.x_units.items())
        notes.append(f"Units of dates: {units}.")
    return notes


def _not_free(result: FitResult) -> dict[str, tuple[str, ...]]:
    """Return the names of fixed and of tied parameters, if there are any."""
    return {
        key: names for key, names in (("fixed", result._fixed), ("tied", result._tied)) if names
    }


def dataset(result: FitResult) -> xr.Dataset:
    """Return parameters, standard errors and covariance; see ``FitResult.to_xarray``."""
    names = list(result.param_names)
    values = {
        "curvefit_coefficients": ("param", result.x),
        "curvefit_errors": ("param", result.perr),
    }
    matrix = {} if result.pcov is None else {"curvefit_covariance": (_COV_DIMS, result.pcov)}
    return xr.Dataset(
        values | matrix,
        coords={"param": names} | (dict.fromkeys(_COV_DIMS, names) if matrix else {}),
        # netCDF has no booleans.
        attrs={name: result[name] for name in _SCALAR_FIELDS}
        | {"success": int(result.success)}
        | {key: ", ".join(held) for key, held in _not_free(result).items()},
    )
