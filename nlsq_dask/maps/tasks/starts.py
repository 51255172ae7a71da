"""Starts of the pixels of a tile: those of the caller, then the pooled start, then the median.

No start comes from a neighbor in order, so the order of the pixels changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.solvers.lanes.batched_lm import LaneSolver
from nlsq_dask.solvers.lanes.records import LaneFits, Lanes, LaneStatus
from nlsq_dask.warmup.multistart import MultistartSettings, draw_starts

Array = NDArray[Any]
Index = NDArray[np.int64]
Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_N_CANDIDATES = 32  # starting points of the pooled fit
_BOX = 3.0  # half-width of the box of these points, relative to the start
_N_POOLED = 512  # pixels from which those of the pooled fit are drawn, at most
_MIN_POOLED = 16  # the same, at least
_POOLED_POINTS = 2**22  # of these pixels, which are in memory at once, between the two
_N_ATTEMPTS = 4  # at finding pixels with data among them
# Pixels drawn for a point of the pooled fit, of which the one with the median of y is used, so that
# some saturated or dead pixels do not spoil the start of all others.
_N_DRAWS = 9
_N_SCATTERED = 8  # further starts of pixels that still fail

# Statuses after which another start is tried. A singular solution may be a plateau far away.
_RETRIED = (
    LaneStatus.ITERATION_LIMIT,
    LaneStatus.NON_FINITE,
    LaneStatus.STALLED,
    LaneStatus.SINGULAR,
)
_SOLVED = (LaneStatus.CONVERGED, LaneStatus.AT_BOUND)


@dataclass(frozen=True)
class Bounded:
    """Start and bounds of the p free parameters of m pixels, each of shape (p, m) or (p, 1)."""

    start: Matrix
    low: Matrix
    high: Matrix

    def take(self, index: Index) -> Bounded:
        """Return those of some pixels."""
        arrays = (self.start, self.low, self.high)
        return Bounded(*(a if a.shape[1] == 1 else a[:, index] for a in arrays))

    def typical(self) -> tuple[Vector, Vector, Vector]:
        """Return the medians of start and bounds over the pixels."""
        start, low, high = map(_median, (self.start, self.low, self.high))
        high = np.maximum(low, high)
        return np.clip(start, low, high), low, high


def _median(array: Matrix) -> Vector:
    """Return the median of each row without its NaNs; 0 for a row of NaN."""
    valid = [row[~np.isnan(row)] for row in array]
    # Not np.median, whose mean of two infinite values, -inf and inf, is NaN.
    return np.array([np.sort(row)[len(row) // 2] if len(row) else 0.0 for row in valid])


@dataclass(frozen=True)
class TilePart:
    """Some pixels of a tile."""

    lanes: Lanes
    bounded: Bounded
    is_given: NDArray[np.bool_] | bool  # which pixels have a start; the others get the pooled one

    def take(self, index: Index) -> TilePart:
        """Return those at an index."""
        is_given = self.is_given
        return TilePart(
            self.lanes.take(index),
            self.bounded.take(index),
            is_given[index] if isinstance(is_given, np.ndarray) else is_given,
        )


# Returns the pixels at an index. It may read all blocks of the tile.
Load = Callable[[Index], TilePart]


@dataclass(frozen=True)
class LaneFitter:
    """Fits the pixels of a tile, and those that fail from other starts."""

    solver: LaneSolver
    is_free: NDArray[np.bool_]  # which parameters are neither fixed nor tied, for all pixels

    def __call__(self, load: Load, n_pixels: int, most: int, seed: int) -> LaneFits:
        """Return the fits of all pixels.

        Parameters
        ----------
        load : callable
        n_pixels : int
        most : int
            Number of pixels that are loaded at once, at most; the starts do not depend on it.
        seed : int
            Of the pixels for the pooled start.
        """
        pooled = _Once(lambda: self._pooled_start(load, n_pixels, seed))
        everything = np.arange(n_pixels)
        fits = _joined([self._first(load(part), pooled) for part in _split(everything, most)])
        failed = _failed(fits)
        solved = fits.params[self.is_free][:, np.isin(fits.status, _SOLVED)]
        median = np.median(solved, axis=1) if solved.shape[1] else None
        for part in _split(failed, most) if len(failed) else []:
            again = self._again(load(part), _taken(fits, part), pooled, median)
            fits = _replaced(fits, part, again, np.arange(len(part)))
        return fits

    def _first(self, part: TilePart, pooled: _Once) -> LaneFits:
        m = part.lanes.y.shape[1]
        given = np.broadcast_to(part.is_given, m)
        start = np.broadcast_to(part.bounded.start, (len(part.bounded.start), m))
        if not given.all():
            start = np.where(given, start, pooled()[:, None])
        return self._solve(part.lanes, replace(part.bounded, start=start))

    def _again(
        self, part: TilePart, fits: LaneFits, pooled: _Once, median: Vector | None
    ) -> LaneFits:
        """Return the fits of pixels that failed, replaced where another start is better."""
        given = np.broadcast_to(part.is_given, part.lanes.y.shape[1])
        # Pixels without a start of the caller began at the pooled one.
        fits = self._from(pooled()[:, None], part, fits, np.flatnonzero(given))
        fits = self._from(None, part, fits, np.flatnonzero(~given))
        if median is not None:
            fits = self._from(median[:, None], part, fits, _failed(fits))
        varies = np.nanmax(part.lanes.y, axis=0) > np.nanmin(part.lanes.y, axis=0)
        for start in self._scattered(part, median):
            failed = _failed(fits)
            fits = self._from(start[:, None], part, fits, failed[varies[failed]])
        return fits

    def _scattered(self, part: TilePart, center: Vector | None) -> Matrix:
        """Return starts around a point, by default the typical start, and around ones."""
        start, low, high = part.bounded.typical()
        return _around([start if center is None else center, np.ones_like(start)], low, high)

    def _from(self, start: Matrix | None, part: TilePart, fits: LaneFits, index: Index) -> LaneFits:
        """Fit some pixels again, by default from ``part.bounded.start``."""
        if not len(index):
            return fits
        some = part.take(index)
        bounded = some.bounded if start is None else replace(some.bounded, start=start)
        again = self._solve(some.lanes, bounded)
        is_lower = np.isfinite(again.cost) & ~(again.cost >= fits.cost[index])
        was_failure = fits.status[index] <= 0
        chosen = np.flatnonzero(is_lower | (was_failure & (again.status > 0)))
        return _replaced(fits, index[chosen], again, chosen)

    def _solve(self, lanes: Lanes, bounded: Bounded) -> LaneFits:
        start = np.broadcast_to(bounded.start, (len(bounded.start), lanes.y.shape[1]))
        return self.solver(lanes, start, bounded.low, bounded.high)

    def _pooled_start(self, load: Load, n_pixels: int, seed: int) -> Vector:
        """Return the parameters that fit a typical pixel of a tile best.

        At each point it has the median of random pixels. Its fits start from many points.
        """
        rng = np.random.default_rng(seed)
        most = max(_POOLED_POINTS // self.solver.shapes.n_points, _MIN_POOLED)
        n_pooled = min(n_pixels, most, _N_POOLED)
        for _ in range(_N_ATTEMPTS):
            pixels = np.sort(rng.choice(n_pixels, n_pooled, replace=False))
            part = load(pixels)
            valid = np.flatnonzero(np.isfinite(part.lanes.y).any(axis=0))
            if len(valid):
                break
        start, low, high = part.bounded.typical()
        if not len(valid):
            return start
        # The start of the caller may be far away, so other points are drawn around ones.
        starts = _around([start, np.ones_like(start)], low, high, _N_CANDIDATES, seed).T
        candidates = Bounded(starts, low[:, None], high[:, None])
        fits = self._solve(self._sampled(part.lanes.take(valid), rng), candidates)
        cost = np.where(np.isfinite(fits.cost), fits.cost, np.inf)
        converged = np.where(fits.status > 0, cost, np.inf)
        best = int((converged if np.isfinite(converged).any() else cost).argmin())
        params: Vector = fits.params[self.is_free, best]
        return params if np.isfinite(params).all() else start

    def _sampled(self, lanes: Lanes, rng: np.random.Generator) -> Lanes:
        """Return the median of some random pixels for each point, repeated for each candidate."""
        n, m = lanes.y.shape
        points = np.arange(n)
        draws = rng.integers(0, m, (_N_DRAWS, n))
        y = lanes.y[points, draws]
        order = np.argsort(y, axis=0)  # NaN comes last
        middle = np.maximum(np.isfinite(y).sum(axis=0) - 1, 0) // 2
        pixels = draws[order[middle, points], points]

        def repeated(array: Array) -> Array:
            return np.broadcast_to(array[points, pixels][:, None], (n, _N_CANDIDATES))

        x = (
            repeated(leaf) if varies else leaf
            for leaf, varies in zip(lanes.x, lanes.x_varies or (), strict=True)
        )
        sigma = lanes.sigma
        if sigma is not None and sigma.shape == lanes.y.shape:
            sigma = repeated(sigma)
        return Lanes(repeated(lanes.y), tuple(x), sigma, lanes.x_varies)


def _around(
    centers: Sequence[Vector], low: Vector, high: Vector, n: int = _N_SCATTERED, seed: int = 0
) -> Matrix:
    """Return n points within the bounds, shape (n, p), the same number around each center."""
    settings = MultistartSettings(n // len(centers), "sobol", 1, 0.5, 1, True, _BOX, seed)
    inside = (np.clip(center, low, high) for center in centers)
    return np.concatenate([draw_starts(center, low, high, settings) for center in inside])


class _Once:
    """Function without arguments that is called at most once."""

    def __init__(self, function: Callable[[], Vector]) -> None:
        self._function = function
        self._value: Vector | None = None

    def __call__(self) -> Vector:
        if self._value is None:
            self._value = self._function()
        return self._value


def _split(index: Index, most: int) -> list[Index]:
    return np.array_split(index, -(-len(index) // most)) if len(index) else [index]


def _failed(fits: LaneFits) -> Index:
    return np.flatnonzero(np.isin(fits.status, _RETRIED))


def _taken(fits: LaneFits, index: Index) -> LaneFits:
    return _each(lambda array: array[..., index], fits)


def _joined(parts: list[LaneFits]) -> LaneFits:
    return parts[0] if len(parts) == 1 else _each(lambda *a: np.concatenate(a, axis=-1), *parts)


def _each(function: Callable[..., Array], *fits: LaneFits) -> LaneFits:
    """Apply a function to each array that is present."""
    arrays: dict[str, Any] = {}
    for field in fields(LaneFits):
        given = [getattr(each, field.name) for each in fits]
        arrays[field.name] = None if given[0] is None else function(*given)
    return LaneFits(**arrays)


def _replaced(fits: LaneFits, index: Index, others: LaneFits, chosen: Index) -> LaneFits:
    """Return fits in which those at ``index`` are the ``chosen`` ones of others."""

    def replace_in(array: Array, other: Array) -> Array:
        array = array.copy()
        array[..., index] = other[..., chosen]
        return array

    return _each(replace_in, fits, others)


def tile_seed(seed: int, index: tuple[int, ...]) -> int:
    """Return a seed that depends on the position of the tile."""
    state = np.random.SeedSequence([seed, *index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
