"""Events of ``fit_each``, when it computes: for arrays in memory, or with a store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.events.base import Event


@dataclass(frozen=True)
class MapStarted(Event):
    """The arguments were validated and the fits of a map begin.

    Attributes
    ----------
    model : str
        Name of the model.
    n_points : int
        Number of points of each fit.
    shape, grid : tuple of int
        Number of pixels and of tiles along each dimension of the map.
    dims, param_names : tuple of str
        Names of the dimensions of the map, and of the parameters.
    store : str or None
        Path or URL of the store to which tiles are written; None without one.
    notes : tuple of str
        Sentences on what the caller may not expect, such as how dates are converted to numbers.
    """

    model: str
    n_points: int
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    dims: tuple[str, ...]
    param_names: tuple[str, ...]
    store: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_pixels(self) -> int:
        """Number of pixels, each of which is fitted."""
        return math.prod(self.shape)

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class MapResumed(Event):
    """The store has tiles of an earlier run, which are not fitted again.

    Attributes
    ----------
    tiles, n_tiles : int
        Number of tiles in the store, and of all tiles.
    pixels, n_pixels : int
        Number of pixels in these tiles, and of all pixels.
    totals : dict of str to int
        Number of pixels in the store by name of the status.
    n_damaged : int
        Number of tiles whose chunks are damaged; they are fitted again.
    """

    tiles: int
    n_tiles: int
    pixels: int
    n_pixels: int
    totals: dict[str, int]
    n_damaged: int = 0


@dataclass(frozen=True)
class TileFinished(Event):
    """A tile, some pixels that one task fits, is complete.

    Attributes
    ----------
    index : tuple of int
        Position of the tile in the grid of tiles.
    counts : dict of str to int
        Number of its pixels by name of the status.
    tiles, n_tiles : int
        Number of complete tiles, including those of an earlier run, and of all tiles.
    pixels, n_pixels : int
        Number of pixels in the complete tiles, including those of an earlier run, and of all
        pixels.
    fitted : int
        Number of pixels fitted by this run.
    totals : dict of str to int
        Number of pixels in all complete tiles by name of the status.
    seconds : float
        Time since this run began to fit.
    """

    is_transient: ClassVar[bool] = True

    index: tuple[int, ...]
    counts: dict[str, int]
    tiles: int
    n_tiles: int
    pixels: int
    n_pixels: int
    fitted: int
    totals: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class MapDrawn(Event):
    """A reduced picture of the map so far; emitted now and then while tiles finish, and at the end.

    Attributes
    ----------
    parameter : str
        Name of the parameter that ``values`` shows.
    dims : tuple of str
        Names of the one or two dimensions of the picture.
    size, step : tuple of int
        Number of pixels of the map along each of these dimensions, and of those in a cell.
    over : tuple of str
        Names of the other dimensions of the map with more than one pixel, which a cell includes.
    status : ndarray of int8
        The lowest status of the pixels in a cell; -128 where no tile is complete.
    values : ndarray of float32
        Mean of the parameter over the pixels in a cell whose fits converged; NaN where there are
        none.
    """

    is_transient: ClassVar[bool] = True

    parameter: str
    dims: tuple[str, ...]
    size: tuple[int, ...]
    step: tuple[int, ...]
    over: tuple[str, ...]
    status: NDArray[np.int8]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class MapEnded(Event):
    """The fits of a map ended, all of them or at ``max_walltime`` or SIGTERM.

    Attributes
    ----------
    is_complete : bool
        Whether all tiles are complete.
    pixels, n_pixels : int
        Number of pixels in complete tiles, and of all pixels.
    fitted : int
        Number of pixels fitted by this run.
    totals : dict of str to int
        Number of pixels in complete tiles by name of the status.
    seconds : float
        Time since this run began.
    message : str
        Why the run ended.
    """

    is_transient: ClassVar[bool] = True

    is_complete: bool
    pixels: int
    n_pixels: int
    fitted: int
    totals: dict[str, int]
    seconds: float
    message: str
