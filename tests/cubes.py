"""Cubes to be fitted along their first dimensions, with SciPy's fit of each pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy.optimize import least_squares


@dataclass
class Cube:
    """A model, its data, and the arguments of ``fit_each`` and of SciPy."""

    name: str
    model: Callable[..., Any]  # takes jax.numpy or numpy as ``np``
    y: xr.DataArray  # fitted dimensions first, then ("row", "col")
    x: Any  # names of coordinates
    p0: dict[str, float]
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    sigma: xr.DataArray | None = None
    loss: str = "linear"
    f_scale: float = 1.0
    fixed: dict[str, float] = field(default_factory=dict)

    @property
    def dims(self) -> list[str]:
        return [dim for dim in self.y.dims if dim not in ("row", "col")]

    def jax_model(self) -> Callable[..., Any]:
        model = self.model

        def with_jax(x: Any, *params: Any) -> Any:
            return model(jnp, x, *params)

        return with_jax

    def pixels(self) -> Iterator[tuple[int, int]]:
        return np.ndindex(self.y.sizes["row"], self.y.sizes["col"])

    def scipy(self, row: int, col: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Return parameters, errors and cost of SciPy's fit of a pixel; None if it fails."""
        y = self.y.isel(row=row, col=col).values.ravel().astype(float)
        xs = [
            self.y.coords[x].broadcast_like(self.y.isel(row=0, col=0))
            for x in np.atleast_1d(self.x)
        ]
        xs = [x.transpose(*self.dims).values.ravel() for x in xs]
        weight = np.ones_like(y)
        if self.sigma is not None:
            weight = 1 / self.sigma.isel(row=row, col=col).values.ravel()
        used = np.isfinite(y)
        x = tuple(each[used] for each in xs) if len(xs) > 1 else xs[0][used]
        names = [name for name in self.p0 if name not in self.fixed]
        low, high = np.array([self.bounds.get(n, (-np.inf, np.inf)) for n in names]).T

        def full(p: np.ndarray) -> list[float]:
            free = dict(zip(names, p, strict=True))
            return [self.fixed.get(name, free.get(name)) for name in self.p0]

        def residual(p: np.ndarray) -> np.ndarray:
            return (self.model(np, x, *full(p)) - y[used]) * weight[used]

        def jacobian(p: np.ndarray) -> np.ndarray:
            return complex_step(residual, p)

        start = np.clip([self.p0[name] for name in names], low, high)
        fit = least_squares(
            residual,
            start,
            jac=jacobian,
            bounds=(low, high),
            loss=self.loss,
            f_scale=self.f_scale,
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=1000,
            x_scale="jac",
        )
        dof = used.sum() - len(names)
        with np.errstate(all="ignore"):
            variance = 2 * fit.cost / dof
            try:
                cov = np.linalg.inv(fit.jac.T @ fit.jac) * variance
            except np.linalg.LinAlgError:
                return None
        errors = np.zeros(len(self.p0))
        errors[[list(self.p0).index(n) for n in names]] = np.sqrt(np.diag(cov))
        return np.array(full(fit.x)), errors, fit.cost if fit.success else np.inf


def complex_step(function: Callable[[Any], Any], p: np.ndarray) -> np.ndarray:
    """Return the exact Jacobian of an analytic function."""
    step = 1e-30
    columns = []
    for i in range(len(p)):
        moved = p.astype(complex)
        moved[i] += 1j * step
        columns.append(function(moved).imag / step)
    return np.stack(columns, axis=1)


def exponential(np: Any, t: Any, a: Any, b: Any, c: Any) -> Any:
    return a * np.exp(-b * t) + c


def gaussian_on_slope(np: Any, x: Any, height: Any, center: Any, width: Any, a: Any, b: Any) -> Any:
    return height * np.exp(-0.5 * ((x - center) / width) ** 2) + a + b * x


def damped_sine(np: Any, t: Any, a: Any, rate: Any, freq: Any, phase: Any) -> Any:
    return a * np.exp(-rate * t) * np.sin(freq * t + phase)


def logistic(np: Any, t: Any, top: Any, rate: Any, mid: Any) -> Any:
    return top / (1 + np.exp(-rate * (t - mid)))


def spot(np: Any, xy: Any, height: Any, cx: Any, cy: Any, width: Any, base: Any) -> Any:
    x, y = xy
    return height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2)) + base


def seasons(np: Any, t: Any, mean: Any, trend: Any, c: Any, s: Any) -> Any:
    return mean + trend * t + c * np.cos(6.283185307179586 * t) + s * np.sin(6.283185307179586 * t)


def power_law(np: Any, x: Any, a: Any, k: Any) -> Any:
    return a * x**k


def two_decays(np: Any, t: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * np.exp(-b * t) + c * np.exp(-d * t)


def _cube(
    model: Callable[..., Any],
    coords: dict[str, np.ndarray],
    truth: list[float],
    spread: list[float],
    noise: float,
    rng: np.random.Generator,
    size: tuple[int, int],
) -> xr.DataArray:
    """Return data with true values that vary over the map, by these relative spreads."""
    grids = np.meshgrid(*coords.values(), indexing="ij")
    x = [grid[..., None, None] for grid in grids]
    params = [v * (1 + s * rng.standard_normal(size)) for v, s in zip(truth, spread, strict=True)]
    clean = model(np, x if len(x) > 1 else x[0], *params)
    y = clean + noise * rng.standard_normal(clean.shape)
    dims = (*coords, "row", "col")
    return xr.DataArray(y, dims=dims, coords=coords, name="signal", attrs={"units": "V"})


def cubes(size: tuple[int, int] = (5, 7)) -> list[Cube]:
    """Return the eight cubes."""
    rng = np.random.default_rng(7)

    def make(model: Any, coords: Any, truth: Any, spread: Any, noise: float) -> xr.DataArray:
        return _cube(model, coords, truth, spread, noise, rng, size)

    def holes(y: xr.DataArray) -> xr.DataArray:
        return y.where(rng.random(y.shape) > 0.1)

    t = np.linspace(0.1, 5, 60)
    every = [
        Cube(
            "exponential",
            exponential,
            holes(make(exponential, {"t": t}, [2.5, 1.3, 0.5], [0.2] * 3, 0.05)),
            "t",
            {"a": 2.0, "b": 1.0, "c": 0.3},
        ),
        Cube(
            "gaussian_on_slope",
            gaussian_on_slope,
            make(gaussian_on_slope, {"t": t}, [3, 2.5, 0.4, 0.5, 0.1], [0.1] * 5, 0.05),
            "t",
            {"height": 2.0, "center": 2.4, "width": 0.5, "a": 0.0, "b": 0.0},
        ),
        Cube(
            "damped_sine",
            damped_sine,
            make(damped_sine, {"t": t}, [2, 0.4, 3, 0.5], [0.1, 0.1, 0.02, 0.1], 0.05),
            "t",
            {"a": 1.5, "rate": 0.3, "freq": 3.0, "phase": 0.4},
        ),
        Cube(
            "logistic",
            logistic,
            make(logistic, {"t": t}, [4, 2, 2.5], [0.1] * 3, 0.1),
            "t",
            {"top": 3.0, "rate": 1.0, "mid": 2.0},
            bounds={"top": (0.0, 4.0), "rate": (0.0, np.inf)},
        ),
        Cube(
            "spot",
            spot,
            make(
                spot,
                {"u": np.arange(6.0), "v": np.arange(5.0)},
                [500, 2.5, 2, 1.2, 10],
                [0.05] * 5,
                5,
            ),
            ("u", "v"),
            {"height": 400.0, "cx": 2.3, "cy": 2.2, "width": 1.0, "base": 5.0},
        ),
        Cube(
            "seasons",
            seasons,
            make(seasons, {"t": t}, [10, 0.3, 1, 2], [0.1] * 4, 0.3),
            "t",
            {"mean": 0.0, "trend": 0.0, "c": 1.0, "s": 1.0},
            loss="soft_l1",
            f_scale=0.3,
        ),
        Cube(
            "power_law",
            power_law,
            make(power_law, {"t": t}, [3, 0.7], [0.1] * 2, 0.05),
            "t",
            {"a": 1.0, "k": 1.0},
        ),
        Cube(
            "two_decays",
            two_decays,
            make(two_decays, {"t": t}, [2, 0.4, 3, 3], [0.05, 0.0, 0.05, 0.05], 0.01),
            "t",
            {"a": 1.5, "b": 0.4, "c": 2.0, "d": 2.5},
            fixed={"b": 0.4},
        ),
    ]
    power = every[6]
    power.sigma = xr.DataArray(
        0.03 + 0.05 * rng.random(power.y.shape), dims=power.y.dims, coords=power.y.coords
    )
    return every
