"""A result in words, as HTML and as a Dataset."""

from __future__ import annotations

import html as html_escape
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from nlsq_dask.result import FitResult

_SCALARS = (
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
_PAIR = ("cov_i", "cov_j")
_MOST_LISTED = 200  # parameters; of more, the first so many


def _statistics(result: FitResult) -> list[tuple[str, str]]:
    n, p = result.n_points, len(result.x)
    likelihood = n * np.log(result.chi2 / n) if n and result.chi2 > 0 else np.nan
    return [
        ("fitting method", "streaming Gauss-Newton"),
        ("function evals", f"{result.nfev}"),
        ("data points", f"{n:,}"),
        ("omitted points", f"{result.n_omitted:,}"),
        ("variables", f"{p}"),
        ("chi-square", f"{result.chi2:.8g}"),
        ("reduced chi-square", f"{result.reduced_chi2:.8g}"),
        ("Akaike info crit", f"{likelihood + 2 * p:.8g}"),
        ("Bayesian info crit", f"{likelihood + np.log(max(n, 1)) * p:.8g}"),
        ("R-squared", f"{result.r_squared:.8g}"),
        ("passes over the data", f"{result.n_passes}"),
    ]


def _variables(result: FitResult) -> list[tuple[str, str, str, str, str]]:
    """Return name, value, standard error, relative error and remark of every parameter."""
    rows = []
    bounds = zip(*result.bounds, strict=True)
    for name, value, error, init, (low, high), active in zip(
        result.param_names,
        result.x,
        result.perr,
        result.p0,
        bounds,
        result.active_mask,
        strict=True,
    ):
        relative = f"{abs(error / value):.2%}" if value and np.isfinite(error) else "??"
        remarks = [f"init = {init:g}"]
        if np.isfinite(low) or np.isfinite(high):
            remarks.append(f"bounds = {low:g}:{high:g}")
        if active:
            remarks.append("at its bound")
        rows.append((name, f"{value:.8g}", f"{error:.4g}", relative, ", ".join(remarks)))
        if len(rows) == _MOST_LISTED < len(result.x):
            rows.append((f"... {len(result.x) - _MOST_LISTED} more in popt", "", "", "", ""))
            break
    return rows


def _correlations(result: FitResult, least: float) -> list[tuple[str, str, float]]:
    errors, pcov = result.perr, result.pcov
    if pcov is None or not np.isfinite(errors).all() or not (errors > 0).all():
        return []
    matrix = pcov / np.outer(errors, errors)
    pairs = [
        (result.param_names[i], result.param_names[j], float(matrix[i, j]))
        for i in range(len(errors))
        for j in range(i + 1, len(errors))
        if abs(matrix[i, j]) >= least
    ]
    return sorted(pairs, key=lambda pair: -abs(pair[2]))


def fit_report(result: FitResult, min_correlation: float) -> str:
    """Return the report that lmfit users know."""
    lines = ["[[Fit Statistics]]"]
    lines += [f"    # {label:<20} = {value}" for label, value in _statistics(result)]
    lines.append("[[Variables]]")
    variables = _variables(result)
    width = max(len(name) for name, *_ in variables)
    lines += [
        f"    {name + ':':<{width + 1}} {value} +/- {error} ({relative}) ({remark})"
        for name, value, error, relative, remark in variables
    ]
    correlations = _correlations(result, min_correlation)
    if correlations:
        lines.append(f"[[Correlations]] (unreported correlations are < {min_correlation:.3f})")
        pair_width = max(len(a) + len(b) for a, b, _ in correlations)
        lines += [
            f"    {f'C({a}, {b})':<{pair_width + 5}} = {value:+.4f}" for a, b, value in correlations
        ]
    lines.append(f"[[{'Success' if result.success else 'FAILED'}]]")
    lines.append(f"    {result.message}")
    return "\n".join(lines)


def html(result: FitResult) -> str:
    """Return the report as HTML tables, for notebooks."""

    def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
        head = "".join(f"<th>{html_escape.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html_escape.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    verdict = "Fit succeeded" if result.success else "Fit FAILED"
    parts = [
        f"<h4>{verdict}</h4><p>{html_escape.escape(result.message)}</p>",
        table(
            ("parameter", "value", "standard error", "relative error", ""),
            [tuple(row) for row in _variables(result)],
        ),
        table(("statistic", ""), [tuple(row) for row in _statistics(result)]),
    ]
    return "".join(parts)


def dataset(result: FitResult) -> xr.Dataset:
    """Return parameters, errors and covariance as a Dataset."""
    names = list(result.param_names)
    values = {
        "curvefit_coefficients": ("param", result.x),
        "curvefit_errors": ("param", result.perr),
    }
    matrix = {} if result.pcov is None else {"curvefit_covariance": (_PAIR, result.pcov)}
    return xr.Dataset(
        values | matrix,
        coords={"param": names} | (dict.fromkeys(_PAIR, names) if matrix else {}),
        attrs={
            name: int(value) if isinstance(value, bool) else value
            for name, value in ((name, result[name]) for name in _SCALARS)
        },
    )
