"""``Summary``: what the accessor of a result of ``fit_each`` shows, as text and as HTML."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from nlsq_dask import _html as html
from nlsq_dask.data.sources.from_array import is_in_memory
from nlsq_dask.maps.results.statuses import format_share, is_determined, status_table
from nlsq_dask.maps.results.variables import every_kth, has_variable, parameter_names, variable_of

_MAX_PIXELS = 2**20  # whose parameters are sorted
_HEADER = ("parameter", "median", "quartiles", "relative error", "")
_LAZY = "not in memory; .compute() loads or computes them"


@dataclass(frozen=True)
class Summary:
    """Texts on a result; ``statuses`` and ``parameters`` are empty if it is lazy."""

    facts: list[tuple[str, str]]
    statuses: list[tuple[str, str, str, str]]  # flag, pixels, share, meaning
    parameters: list[tuple[str, str, str, str, str]]  # as in ``_HEADER``
    n_pixels: int
    n_solved: int
    k: int  # parameters are those of every k-th pixel

    @classmethod
    def of(cls, ds: xr.Dataset) -> Summary:
        """Summarize a result, for which ``is_result`` is true."""
        keys = [key for key in ("popt", "perr", "status") if has_variable(ds, key)]
        arrays = {key: variable_of(ds, key) for key in keys}
        status, names = arrays["status"], parameter_names(arrays["popt"])
        facts = {
            "Model": ds.attrs.get("model", ""),
            "Data": ds.attrs.get("data", ""),
            "Fitted along": ds.attrs.get("fitted_dims", ""),
            "Dates": ds.attrs.get("dates", ""),
            "Parameters": ", ".join(names),
            "Map": " x ".join(f"{n:,} {dim}" for dim, n in status.sizes.items()),
        }
        if not all(map(is_in_memory, arrays.values())):
            facts["Values"] = _LAZY
            return cls(_listed(facts), [], [], status.size, 0, 1)
        table = status_table(status)
        rows = [
            (row.Index, f"{row.pixels:,}", format_share(row.share), row.meaning)
            for row in table.itertuples()
        ]
        some, k = every_kth(xr.Dataset(arrays), status.dims, _MAX_PIXELS)
        n_solved = int(is_determined(status).sum())
        return cls(_listed(facts), rows, _parameters(some, names), status.size, n_solved, k)

    def __str__(self) -> str:
        lines = [f"{name:<14}{text}" for name, text in self.facts]
        if self.statuses:
            lines += ["", *_columns([("status", "pixels", "share", ""), *self.statuses])]
            lines += ["", *_columns([_HEADER, *self.parameters]), *self._notes]
        return "\n".join(lines)

    def html(self) -> str:
        """Return the summary as HTML."""
        if not self.statuses:
            return html.page(html.facts(self.facts))
        all_solved = self.n_solved == self.n_pixels
        text = f"{self.n_solved:,} of {self.n_pixels:,} pixels have the status 1 or 2"
        return html.page(
            html.paragraph(html.badge(text, html.GOOD if all_solved else html.CAUTION)),
            html.facts(self.facts),
            html.table(("status", "pixels", "share", "meaning"), self.statuses),
            html.table(_HEADER, self.parameters),
            html.bullets(self._notes),
        )

    @property
    def _notes(self) -> list[str]:
        of = "" if self.k == 1 else f", every k-th along each dimension, k = {self.k}"
        return [f"Parameters of the pixels with status 1 or 2{of}."]


def is_result(ds: xr.Dataset) -> bool:
    """Return whether a Dataset is a result of ``fit_each``, or of ``curvefit`` for one variable."""
    return has_variable(ds, "popt") and has_variable(ds, "status")


def _listed(facts: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, str(text)) for name, text in facts.items() if text]


def _parameters(some: xr.Dataset, names: list[str]) -> list[tuple[str, str, str, str, str]]:
    """Return median, quartiles and median relative error of each parameter."""
    status = some["status"]
    is_solved = is_determined(status).values
    rows = []
    for i, name in enumerate(names):
        each = some.isel(param=i) if "param" in some.dims else some
        values = each["popt"].transpose(*status.dims).values[is_solved]
        if not values.size:
            rows.append((name, "", "", "", ""))
            continue
        low, middle, high = np.percentile(values, (25, 50, 75))
        relative = ""
        if "perr" in each:
            errors = each["perr"].transpose(*status.dims).values[is_solved]
            with np.errstate(divide="ignore", invalid="ignore"):
                relative = f"{np.median(errors / np.abs(values)):.2%}"
        rows.append((name, f"{middle:.4g}", f"{low:.4g} to {high:.4g}", relative, ""))
    return rows


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Return lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
