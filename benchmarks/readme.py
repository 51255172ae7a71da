"""Write the table of figures in the README from the results of the benchmarks: ``make figures``.

    python -m benchmarks.readme

The table stands between two comments of README.md. A test compares it with the results, so that
neither can change without the other.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
Row = tuple[str, str]


@cache
def record(suite: str) -> dict[str, Any]:
    """Return the record of a suite, with its figures and where they were measured."""
    result: dict[str, Any] = json.loads((RESULTS / f"{suite}.json").read_text())
    return result


def figures(suite: str) -> Any:
    """Return the figures of a suite."""
    return record(suite)["figures"]


def median(suite: str, *path: str) -> float:
    """Return the median time of a measurement, in seconds."""
    found = figures(suite)
    for name in path:
        found = found[name]
    return float(found["median"])


def span(values: Sequence[float]) -> str:
    """Return the least and the largest value, or one if they agree to two digits."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def rows_of_reading() -> Iterator[Row]:
    """Return how often the data are read, and how long a fit takes against reading them once."""
    fits = figures("passes")["fits"]
    n_models = len({fit["model"] for fit in fits})
    for n_rows, chunks in record("passes")["settings"]["sizes"]:
        read = {
            order: [
                fit["rows_read_per_row"]
                for fit in fits
                if (fit["n_rows"], fit["chunks"], fit["order"]) == (n_rows, chunks, order)
            ]
            for order in ("mixed", "ordered")
        }
        text = f"{span(read['mixed'])}, median {np.median(read['mixed']):.2f}"
        if read["ordered"]:
            text += f"; with x ordered, as in a time series, {span(read['ordered'])}, median "
            text += f"{np.median(read['ordered']):.2f}"
        yield (f"rows read / rows, {n_models} models, {n_rows:,} rows in {chunks} chunks", text)
    left = max(fit["step_left_in_standard_errors"] for fit in fits)
    yield "distance to the solution after these fits", f"at most {left:.0e} standard errors"
    large = figures("beyond_memory")
    ratios = [run["fit"]["seconds"] / run["bare_read"] for run in large["runs"]]
    two = [run["fit, enable_one_pass=False"]["seconds"] / run["bare_read"] for run in large["runs"]]
    yield (
        f"fit / bare read, {large['n_rows']:,} rows, {large['bytes'] / 1e9:.0f} GB, 2 threads",
        f"{span(ratios)}; with `enable_one_pass=False` {span(two)}; "
        f"{large['memory_mb']:.0f} MB of memory",
    )
    n_rows = record("out_of_core")["settings"]["n_rows"]
    for store, name in (("zstd", "compressed"), ("raw", "uncompressed")):
        for what in ("fit, cache=0", 'fit, cache="auto"', "textbook loop"):
            ratios = [
                median("out_of_core", f"{store}, {workers}", what)
                / median("out_of_core", f"{store}, {workers}", "bare read")
                for workers in ("threads", "processes")
            ]
            label = what.replace("fit, ", "fit with `") + "`" * what.startswith("fit")
            yield (
                f"{label} / bare read, {n_rows:,} rows, Zarr, {name}",
                f"{ratios[0]:.1f} on 2 threads, {ratios[1]:.1f} on 2 processes",
            )
    chunks = [
        median("small_chunks", kind, "pass") / median("small_chunks", kind, "bare sums")
        for kind in ("made by Dask", "Zarr")
    ]
    yield (
        "one pass / bare read, 4,000 chunks of 1,000 rows, 2 processes",
        f"{chunks[0]:.2f} made by Dask, {chunks[1]:.2f} in Zarr",
    )


def rows_of_scale() -> Iterator[Row]:
    """Return figures of memory, workers, parameters, checkpoints and observers."""
    fits = {(fit["n_rows"], fit["cache"]): fit for fit in figures("memory")["fits"]}
    small, large = (fits[n_rows, 0]["above_import_mb"] for n_rows in (10**7, 10**8))
    yield (
        "memory above the import, 100 million rows, 2 threads, `cache=0`",
        f"{large:.0f} MB, {large / small:.2f} x that of 10 million rows",
    )
    yield "two workers / one worker, 30 parameters", f"{figures('scaling')['ratio']:.2f} x as fast"
    many = [figures("many_parameters")[kind] for kind in ("linear", "rate")]
    yield (
        "5,000 linear parameters / and a common rate, a million rows, 2 processes",
        f"{many[0]['passes']} / {many[1]['passes']} passes; {many[0]['worker_mb']:.0f} / "
        f"{many[1]['worker_mb']:.0f} MB per worker",
    )
    share = figures("checkpoints")["shares"]["default"]
    yield "saving checkpoints, at default settings", f"{share:.1%} of the time of the passes"
    watched = [figures("watching")[kind]["everything / nothing"] for kind in ("fit", "map")]
    yield (
        "time with page, printed lines and log / without",
        f"{watched[0]:.2f} for a fit, {watched[1]:.2f} for a map",
    )


def rows_of_speed() -> Iterator[Row]:
    """Return figures of data in memory."""
    own = median("in_memory", "nlsq_dask")
    scipy = [median("in_memory", name) / own for name in ("SciPy", "SciPy, analytic Jacobian")]
    yield (
        "a million rows in memory",
        f"{own:.2f} s; SciPy's `curve_fit` {scipy[0]:.1f} x as long, "
        f"with an analytic Jacobian {scipy[1]:.1f} x",
    )
    peer = median("in_memory", "nlsq, aggressive") / own
    yield "the same with the `nlsq` package, preset `aggressive`", f"{peer:.0f} x as long"
    timings = next(each for each in figures("kernel")["models"] if each["p"] == 3)["timings"]
    rate, single, plain = (
        timings[name]["rate"]
        for name in ("rule, float64", "rule, float32", "vmap(jacrev), float64")
    )
    yield (
        "kernel in memory, one core",
        f"{rate / 1e6:.0f} million rows/s, {rate / plain:.0f} x `vmap(jacrev)` and `J.T @ J`; "
        f"float32 {single / rate:.2f} x that",
    )


def rows_of_maps() -> Iterator[Row]:
    """Return figures of fits for every pixel."""
    speed = figures("maps")["speed"]
    rates = {name: each["fits"] / each["median"] for name, each in speed.items()}
    peer = max(rates["SciPy curve_fit"], rates["xarray curvefit"])
    for precision in ("float64", "float32"):
        yield (
            f"fits for every pixel, 100 points, in memory, one core, {precision}",
            f"{rates[precision]:,.0f} fits/s, {rates[precision] / peer:.0f} x SciPy in a loop and "
            "xarray's `curvefit`",
        )
    workers = figures("maps")["workers"]
    for chunks, text in ((1, "a chunk"), (20, "20 chunks")):
        one, two = (workers[f"{chunks} chunks, {n} workers"]["median"] for n in (1, 2))
        yield (
            f"the same from Zarr to a store, points of a pixel in {text}, two workers",
            f"{workers['n_pixels'] / two:,.0f} fits/s, {one / two:.1f} x one worker",
        )
    memory = [figures("maps")[f"memory, {n},000,000 pixels"]["above_import_mb"] for n in (1, 4)]
    yield (
        "memory above the import, maps of one / four million pixels, 2 threads",
        f"{memory[0]:.0f} / {memory[1]:.0f} MB",
    )


def rows_of_gpu() -> Iterator[Row]:
    """Return the rates of passes over rows that stay in the memory of a GPU."""
    rates = dict(record("gpu")["headlines"])
    large, small = (
        float(rates[f"GPU: kept pass, Zarr, chunks of {rows} rows"].split()[0].replace(",", ""))
        for rows in ("16,777,216", "4,194,304")
    )
    yield (
        f"a pass over rows in the memory of a GPU, {record('gpu')['settings']['device']}",
        f"{large / 1000:.1f} billion rows/s in chunks of 17 million rows, {small / 1000:.1f} in "
        "chunks of 4 million",
    )


def table() -> str:
    """Return where the figures were measured, and the table, in Markdown."""
    suites = (
        "passes",
        "beyond_memory",
        "out_of_core",
        "in_memory",
        "kernel",
        "memory",
        "watching",
        "maps",
    )
    found = [record(suite)["environment"] for suite in suites]
    versions = ", ".join(f"{name} {found[0]['versions'][name]}" for name in ("jax", "dask", "zarr"))
    dates = sorted(each["date"][:10] for each in found)
    rows = [
        row
        for part in (rows_of_reading, rows_of_scale, rows_of_speed, rows_of_maps, rows_of_gpu)
        for row in part()
    ]
    where = (
        f"Measured on {found[0]['cores']} cores of a virtual machine ({found[0]['cpu']}), Python "
        f"{found[0]['python']}, {versions}, {dates[0]} to {dates[-1]}."
    )
    lines = textwrap.fill(where, 100, break_on_hyphens=False)
    return f"{lines}\n\n{common.markdown(['what', 'measured'], rows)}\n"


def parts(text: str) -> tuple[str, str, str]:
    """Return what stands before the table in the README, the table, and what follows it."""
    before, begin, rest = text.partition(BEGIN)
    middle, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no lines {BEGIN.strip()} and {END.strip()}")
    return before + begin, middle, end + after


def main() -> None:
    """Write the table into the README."""
    before, _, after = parts(README.read_text())
    README.write_text(before + table() + after)


if __name__ == "__main__":
    main()
