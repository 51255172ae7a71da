"""Show in the terminal what nlsq_dask does: ``make demo``.

    python -m docs.demo [--output FOLDER] [--wait]

On a cluster of two processes: one fit for all values of a climate record, a fit in each of its
cells, and a fit in each pixel of a film. The pictures are written to ``demo-output``.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import iris_sample_data
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import xarray as xr
from distributed import Client, LocalCluster
from matplotlib import pyplot as plt
from scipy.optimize import curve_fit

import nlsq_dask

FIRST, LAST = 1860, 2099  # years of the record
SIDE, TIMES, NOISE = 512, np.linspace(0, 8, 64), 0.05  # of the film
N_SCIPY = 200  # pixels that SciPy fits as well


# --- models


def share(year: Any, midpoint: Any, timescale: Any) -> Any:
    """Return a logistic curve that rises from 0 in the first year to 1 in the last one."""
    first, last, now = (jnp.tanh((u - midpoint) / timescale / 2) for u in (FIRST, LAST, year))
    return (now - first) / (last - first)


def continent(x: Any, before: Any, rise: Any, growth: Any, midpoint: Any, timescale: Any) -> Any:
    """Return the warming of a continent, which grows by a factor per 10 degrees of latitude."""
    year, latitude = x
    height = rise * growth ** ((latitude - 40) / 10)
    return before + height * share(year, midpoint, timescale)


def cell(year: Any, before: Any, rise: Any, midpoint: Any, timescale: Any) -> Any:
    """Return the temperature of a cell."""
    return before + rise * share(year, midpoint, timescale)


def decay(t: Any, lifetime: Any, height: Any, background: Any) -> Any:
    """Return the brightness of a pixel of the film."""
    return height * jnp.exp(-t / lifetime) + background


# --- text for a terminal of 80 columns


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def say(text: str) -> None:
    """Print lines, each of them wrapped, with its indentation."""
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        print(textwrap.fill(line, 79, subsequent_indent=indent, break_long_words=False), flush=True)


def show_map(values: xr.DataArray) -> None:
    """Print a map, north up: a digit per cell, 9 also for more, a dot where there is no value."""
    for row in values.isel(latitude=slice(None, None, -2)).values:
        digits = ("." if np.isnan(value) else str(min(round(value), 9)) for value in row)
        print("    " + "".join(digits))


# --- data


def open_record(folder: Path) -> xr.DataArray:
    """Write the climate record to a Zarr store and open it lazily."""
    path = Path(iris_sample_data.path) / "A1B_north_america.nc"
    with xr.open_dataset(path) as dataset:
        record = dataset[["air_temperature"]].reset_coords(drop=True).drop_encoding()
        record.chunk(time=60).to_zarr(folder / "air.zarr", consolidated=False)
    air = xr.open_zarr(folder / "air.zarr", consolidated=False).air_temperature
    return air.assign_coords(year=("time", [each.year for each in air.time.values]))


def open_film(folder: Path) -> xr.DataArray:
    """Simulate a film with a column of dead pixels, write it to a store and open it lazily."""
    lifetime = true_lifetime().chunk(128)
    t = xr.DataArray(TIMES, {"t": TIMES}, "t")
    film = 3 * np.exp(-t / lifetime) + 0.5
    noise = da.random.default_rng(0).normal(0, NOISE, film.shape, chunks=film.chunks)
    film = (film + noise).where(abs(film.x) > 0.01).astype("float32").rename("film")
    film.to_zarr(folder / "film.zarr", consolidated=False)
    return xr.open_zarr(folder / "film.zarr", consolidated=False).film


def true_lifetime() -> xr.DataArray:
    """Return the lifetimes of the film."""
    y, x = (xr.DataArray(side := np.linspace(-1, 1, SIDE), {dim: side}, dim) for dim in "yx")
    return 1.5 + np.exp(-4 * (y**2 + x**2))


# --- parts


def fit_continent(air: xr.DataArray, early: xr.DataArray) -> nlsq_dask.FitResult:
    """Fit one model to all values of the record."""
    title("1. One fit for everything")
    say(
        f"{air.size:,} temperatures of a climate model (North America, 1860 to 2099, scenario A1B) "
        "in a Zarr store. One model of year and latitude, weighted by area:"
    )
    sigma = np.sqrt(1 / np.cos(np.deg2rad(air.latitude)))
    p0 = {"before": 0, "rise": 4, "growth": 1.2, "midpoint": 2040, "timescale": 25}
    result = (air - early).nlsq.fit(continent, ("year", "latitude"), p0, sigma=sigma)
    print()
    say(result.fit_report())
    value = dict(zip(result.param_names, result.popt, strict=True))
    say(
        f"\nAt 40 N the air warms by {value['rise']:.1f} K, half of that until "
        f"{value['midpoint']:.0f}. The standard errors assume independent residuals; neighboring "
        "cells are alike, so these are too small."
    )
    return result


def fit_cells(air: xr.DataArray, early: xr.DataArray, folder: Path) -> xr.Dataset:
    """Fit a curve in each cell of the record, with initial values that are maps."""
    title("2. One fit per cell")
    say("The same record, with four parameters for each cell:")
    late = air[-20:].mean("time")
    p0 = {"before": early, "rise": late - early, "midpoint": 2040, "timescale": 25}
    bounds = {"timescale": (0, np.inf)}
    store = folder / "cells.zarr"
    fits = air.nlsq.fit_each(cell, "year", p0, bounds, dims="time", store=store).load()
    print(f"\n{nlsq_dask.status_table(fits)}\n")
    say("The rise in kelvin, every second row of the map (9 for more, dots for failed fits):")
    show_map(fits.popt.sel(param="rise").where(fits.status > 0))
    say(
        "Hudson Bay loses its ice and warms most. The cells that failed are in the Labrador Sea: "
        "their warming accelerates until 2099, so the data have no midpoint."
    )
    return fits


def fit_film(folder: Path) -> xr.Dataset:
    """Fit a decay in each pixel of a film, and in some of them with SciPy."""
    title("3. One fit per pixel, many of them")
    film = open_film(folder)
    say(f"A simulated film of {SIDE} x {SIDE} pixels and {TIMES.size} times, in a Zarr store:")
    fits = film.nlsq.fit_each(decay, "t", dims="t", store=folder / "maps.zarr").load()
    print(f"\n{nlsq_dask.status_table(fits)}\n")
    lifetime, error = (fits[name].sel(param="lifetime") for name in ("popt", "perr"))
    pull = (lifetime - true_lifetime()) / error
    dof = TIMES.size - fits.sizes["param"]
    say(
        f"Deviations from the truth, in standard errors: mean {pull.mean():.3f}, standard "
        f"deviation {pull.std():.3f}; 0 and {np.sqrt(dof / (dof - 2)):.3f} are expected of "
        f"Student's t with {dof} degrees of freedom."
    )
    some = fits.isel(y=SIDE // 4, x=slice(N_SCIPY))
    began, worst = time.perf_counter(), 0.0
    for points, fit in zip(film.isel(y=SIDE // 4).values.T, some.popt.values, strict=False):
        popt, pcov = curve_fit(numpy_decay, TIMES, points, [1, 1, 1])
        worst = max(worst, np.abs((fit - popt) / np.sqrt(np.diag(pcov))).max())
    seconds = (time.perf_counter() - began) / N_SCIPY * fits.status.size
    say(
        f"SciPy's curve_fit, pixel by pixel, has the same solutions within {worst:.0e} standard "
        f"errors. It would need {seconds:.0f} s for all pixels."
    )
    return fits


def numpy_decay(t: Any, lifetime: Any, height: Any, background: Any) -> Any:
    """Return what ``decay`` does, for SciPy."""
    return height * np.exp(-t / lifetime) + background


# --- pictures


def draw_overview(
    air: xr.DataArray, early: xr.DataArray, result: nlsq_dask.FitResult, fits: xr.Dataset
) -> Any:
    """Draw the fit of the continent beside the map of the cells."""
    area = np.cos(np.deg2rad(air.latitude))
    mean = (air - early).weighted(area).mean(("latitude", "longitude"))
    curve = result.predict((air.year, air.latitude)).weighted(area).mean("latitude")
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    axes[0].plot(air.year, mean, ".", color="0.6", label="mean of the data")
    axes[0].plot(air.year, curve, color="C3", label="fit")
    axes[0].set(title="One fit for everything", xlabel="year", ylabel="warming (K)")
    axes[0].legend(frameon=False)
    solved = fits.where(fits.status > 0)
    panels = ("popt", "One fit per cell: rise (K)"), ("perr", "standard error of the rise (K)")
    for ax, (name, heading) in zip(axes[1:], panels, strict=True):
        values = solved[name].sel(param="rise")
        values.plot(ax=ax, cmap="magma_r", robust=True, cbar_kwargs={"label": ""})
        ax.set(title=heading, xlabel="degrees east", ylabel="degrees north")
    return figure


def save(figures: Sequence[tuple[str, Any]], folder: Path) -> None:
    """Write the pictures and say where they are."""
    title("Pictures")
    for name, figure in figures:
        figure.savefig(folder / name, dpi=150)
        print(f"  {folder.name}/{name}")


def main() -> None:
    """Run all parts on a cluster."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="FOLDER")
    parser.add_argument("--wait", action="store_true", help="keep the cluster until Enter")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    began = time.perf_counter()
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "env": {"NPROC": "1"}}
    options |= {"dashboard_address": ":0", "silence_logs": logging.ERROR}
    with (
        tempfile.TemporaryDirectory() as name,
        LocalCluster(**options) as cluster,
        Client(cluster),
    ):
        print(f"nlsq_dask {nlsq_dask.__version__}, on a Dask cluster of two processes.")
        page = cluster.dashboard_link.replace("/status", "/nlsq")
        say(f"Live page, from the start of the first fit: {page}")
        folder = Path(name)
        air = open_record(folder)
        early = air[:50].mean("time").compute()
        result = fit_continent(air, early)
        cells = fit_cells(air, early, folder)
        film = fit_film(folder)
        figures = [
            ("overview.png", draw_overview(air, early, result, cells)),
            ("continent.png", result.plot()),
            ("cells.png", nlsq_dask.plot_map(cells, "rise")),
            ("film.png", nlsq_dask.plot_map(film, "lifetime")),
        ]
        save(figures, args.output)
        say(f"\n{time.perf_counter() - began:.0f} s in all. More: README.md and docs/gallery.md.")
        if args.wait:
            input("Press Enter to close the live page. ")


if __name__ == "__main__":
    main()
