"""Two climate records, each fitted as one nonlinear model over all of its dimensions.

The first is a climate model's air temperature over North America from 1860 to 2099: when is half
of the warming reached, how fast does it come, and how much is it? The second is the measured
temperature of the sea along the equator, which has no values over land.

    python notebooks/climate_record.py --output demo-output
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import iris_sample_data
import jax.numpy as jnp
import numpy as np
import xarray as xr
from distributed import Client, LocalCluster
from matplotlib.figure import Figure

from nlsq_dask import AdaptiveHybridStreamingOptimizer, FitResult, curve_fit

SAMPLES = Path(iris_sample_data.path)


def logistic(year, midpoint, timescale):
    """Rise from 0 to 1; half of it is reached at ``midpoint``."""
    return 1 / (1 + jnp.exp(-(year - midpoint) / timescale))


def air_temperature(
    x,
    south,
    contrast,
    front,
    width,
    chill,
    centre,
    extent,
    warming,
    amplification,
    midpoint,
    timescale,
):
    """Climate of a continent between two oceans, and its logistic warming, in kelvin.

    Before the warming: ``south`` at low latitudes, colder by ``contrast`` at high ones, most
    steeply at the latitude ``front``. Inland, around the longitude ``centre``, it is colder than
    the sea by ``chill`` for every 10 degrees north of 40 N, and warmer to the south of that. The
    warming comes to ``warming`` at 40 N, and grows with latitude, exponentially, by
    ``amplification`` every 10 degrees.
    """
    year, latitude, longitude = x
    north = (latitude - 40) / 10
    land = jnp.exp(-0.5 * ((longitude - centre) / extent) ** 2)
    climate = south - contrast * logistic(latitude, front, width) - chill * north * land
    return climate + warming * jnp.exp(amplification * north) * logistic(year, midpoint, timescale)


def sea_temperature(
    x, mean, gradient, contrast, warm_pool, tongue, width, season, season_gradient, warmest
):
    """Temperature of the sea near the equator, in kelvin.

    Warmest at the longitude ``warm_pool``, coldest on the other side of the Earth; colder by
    ``tongue`` along the equator, in a band of ``width``; and through the year warmest at
    ``warmest``, a fraction of a year. The gradients are per degree of latitude.
    """
    year, latitude, longitude = x
    around = contrast * jnp.cos(jnp.deg2rad(longitude - warm_pool))
    across = gradient * latitude - tongue * jnp.exp(-0.5 * (latitude / width) ** 2)
    through_year = (season + season_gradient * latitude) * jnp.cos(2 * jnp.pi * (year - warmest))
    return mean + around + across + through_year


def store_and_open(name: str, variable: str, store: Path, chunks: dict[str, int]) -> xr.DataArray:
    """Write one variable of a sample file to a Zarr store and open that lazily."""
    with xr.open_dataset(SAMPLES / name) as dataset:
        record = dataset[[variable]].reset_coords(drop=True).drop_encoding().chunk(chunks)
        record.to_zarr(store, mode="w", consolidated=False)
    return xr.open_zarr(store, consolidated=False)[variable]


def fit_air(output: Path) -> tuple[xr.DataArray, FitResult]:
    """Fit the 240 years of air temperature."""
    chunks = {"time": 60, "latitude": 19, "longitude": 25}
    air = store_and_open(
        "A1B_north_america.nc", "air_temperature", output / "air_temperature.zarr", chunks
    )
    # The calendar has 360 days a year: dates become years and their decimal fraction.
    air = air.assign_coords(year=("time", [t.year + (t.dayofyr - 1) / 360 for t in air.time.data]))
    print(f"\nAir temperature {dict(air.sizes)} in chunks of {chunks}")
    start = {
        "south": 300,
        "contrast": 40,
        "front": 45,
        "width": 10,
        "chill": 1,
        "centre": 265,
        "extent": 20,
        "warming": 3,
        "amplification": 0.1,
        "midpoint": 2020,
        "timescale": 30,
    }
    result = AdaptiveHybridStreamingOptimizer().fit(
        air_temperature, ("year", "latitude", "longitude"), air, start, verbose=1
    )
    return air, result


def fit_sea(output: Path) -> tuple[xr.DataArray, FitResult]:
    """Fit four and a half years of sea temperature, leaving out the land."""
    chunks = {"time": 18, "latitude": 9, "longitude": 144}
    sea = store_and_open(
        "ostia_monthly.nc", "surface_temperature", output / "sea_temperature.zarr", chunks
    )
    # Times become years since 2006-01-01, of 365.25 days.
    sea = sea.assign_coords(
        year=(sea.time - np.datetime64("2006-01-01")) / np.timedelta64(1, "D") / 365.25
    )
    print(f"\nSea temperature {dict(sea.sizes)} in chunks of {chunks}")
    result = AdaptiveHybridStreamingOptimizer().fit(
        sea_temperature,
        ("year", "latitude", "longitude"),
        sea,
        [300, 0, 1, 150, 1, 2, 1, 0, 0.3],
        nan_policy="omit",
        verbose=1,
    )
    return sea, result


def describe_air(air: xr.DataArray, result: FitResult) -> None:
    """Print what the fit says about the warming, and how far its errors can be trusted."""
    value = dict(zip(result.param_names, result.popt, strict=True))
    error = dict(zip(result.param_names, result.perr, strict=True))
    spread = 2 * np.log(9)  # time scales from 10 % to 90 %
    end = float(air.year[-1])
    reached = float(logistic(end, value["midpoint"], value["timescale"]))
    print(
        f"\nHalf of the warming is reached in {value['midpoint']:.1f} +/- {error['midpoint']:.1f}."
        f"\nIt goes from 10 % to 90 % in {spread * value['timescale']:.0f} +/- "
        f"{spread * error['timescale']:.0f} years."
        f"\nIt comes to {value['warming']:.2f} +/- {error['warming']:.2f} K at 40 N, and to "
        f"{np.expm1(value['amplification']):.0%} more every 10 degrees to the north; "
        f"{reached:.0%} of it by {end:.0f}."
    )

    def yearly_mean(year, before, warming, midpoint, timescale):
        return before + warming * logistic(year, midpoint, timescale)

    means = air.mean(("latitude", "longitude"))
    popt, pcov = curve_fit(yearly_mean, air.year, means, [285, 5, 2040, 30])
    print(
        f"The standard errors assume independent residuals. Neighbouring cells are alike, so they "
        f"are too small:\nfrom the {means.size} yearly means alone, half is reached in "
        f"{popt[2]:.1f} +/- {pcov[2, 2] ** 0.5:.1f}."
    )


def describe_sea(result: FitResult) -> None:
    """Print what the fit says about the seasons."""
    value = dict(zip(result.param_names, result.popt, strict=True))
    warmest = np.datetime64("2006-01-01") + int(value["warmest"] % 1 * 365.25)
    print(
        f"\n{result.n_omitted:,} of {result.n_omitted + result.n_points:,} values are land and "
        f"were left out."
        f"\nThe sea is warmest around longitude {value['warm_pool']:.0f} and, at the equator, "
        f"{value['season']:.2f} K above its mean about {warmest.item():%d %B}.\n"
        f"El Nino and currents are not in the model: R-squared is {result.r_squared:.2f}, and here "
        f"too the errors are too small."
    )


def plot(air: xr.DataArray, air_fit: FitResult, sea: xr.DataArray, sea_fit: FitResult) -> Figure:
    """Draw data as points and fits as lines."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, data, result, name in zip(
        axes, (air, sea), (air_fit, sea_fit), ("Air", "Sea"), strict=True
    ):
        fitted = result.predict((data.year, data.latitude, data.longitude)).where(data.notnull())
        for axis, along in zip(row, ("year", "latitude"), strict=True):
            others = [dim for dim in data.dims if dim not in data[along].dims]
            axis.plot(data[along], data.mean(others), ".", color="0.6", label="data")
            axis.plot(data[along], fitted.mean(others), color="tab:red", label="fit")
            axis.set(xlabel=along, ylabel="mean temperature (K)", title=f"{name}, by {along}")
            axis.legend()
    midpoint = air_fit.popt[air_fit.param_names.index("midpoint")]
    axes[0, 0].axvline(midpoint, color="0.3", linestyle=":")
    axes[1, 0].set(xlabel="years since 2006-01-01")
    return figure


def main() -> None:
    """Fit both records on a cluster of two processes and save a plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    # NPROC=1: a worker has one thread, and so should XLA inside of it.
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", env={"NPROC": "1"}
        ) as cluster,
        Client(cluster),
    ):
        print(f"Dashboard: {cluster.dashboard_link}")
        air, air_fit = fit_air(output)
        print(air_fit.fit_report(min_correlation=0.5))
        describe_air(air, air_fit)
        sea, sea_fit = fit_sea(output)
        print(sea_fit.fit_report(min_correlation=0.5))
        describe_sea(sea_fit)
        plot(air, air_fit, sea, sea_fit).savefig(output / "climate_record.png", dpi=120)
    print(f"\nPlot: {output / 'climate_record.png'} ({time.perf_counter() - began:.0f} s)")
    if not (air_fit.success and sea_fit.success):
        raise SystemExit("a fit did not converge")


if __name__ == "__main__":
    main()
