"""``TileTask``: what the Dask task of a tile does, and the arrays that it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.engine.source_graph import GroupReader
from nlsq_dask.engine.workers import process_memory
from nlsq_dask.errors import NonFiniteDataError, PixelFitError
from nlsq_dask.maps.problem.memory import TileMemory, task_share
from nlsq_dask.maps.problem.parameter_maps import ParameterMaps
from nlsq_dask.maps.problem.tiles import Tile
from nlsq_dask.maps.tasks.columns import ColumnReader, NotReadError
from nlsq_dask.maps.tasks.outputs import Outputs, counted, failure_text
from nlsq_dask.maps.tasks.starts import Bounded, Index, LaneFitter, TilePart, tile_seed
from nlsq_dask.model.guess import GuessKernel
from nlsq_dask.solvers.lanes.records import LaneStatus

Array = NDArray[Any]


@dataclass(frozen=True)
class TileTask:
    """Reads the points of a tile and fits its pixels."""

    reader: ColumnReader
    parameters: ParameterMaps
    fitter: LaneFitter
    guess: GuessKernel | None
    outputs: Outputs
    memory: TileMemory
    is_given: bool  # whether the caller gives the start of each parameter
    omits_nan: bool  # the nan_policy
    raises: bool  # whether a fit that fails is an error
    seed: int

    def __call__(self, own: tuple[GroupReader, Tile], *inputs: Any) -> dict[str, Array]:
        """Return the arrays of a tile, by name of the variable of the Dataset."""
        try:
            return self.fit(own, inputs)
        except NotReadError as error:
            tile = own[1]
            if self.raises:
                raise PixelFitError(
                    f"{math.prod(self.pixels(tile)):,} fits failed (not_read) in the tile that "
                    f"begins at {tile.origin}: {error}."
                ) from None
            return self.outputs.failed(self.pixels(tile), LaneStatus.NOT_READ)

    def pixels(self, tile: Tile) -> tuple[int, ...]:
        """Return the number of pixels of a tile along each dimension of the map."""
        return tuple(tile.shape[axis] for axis in self.outputs.map_axes)

    def fit(self, own: tuple[GroupReader, Tile], inputs: Sequence[Any]) -> dict[str, Array]:
        """Return the arrays of a tile.

        Raises
        ------
        NotReadError
            If one of the blocks cannot be read.
        """
        reader, tile = own
        n_pixels = math.prod(self.pixels(tile))
        most = self.memory.max_pixels(n_pixels, task_share(*process_memory()))
        whole: TilePart | None = None

        def load(index: Index) -> TilePart:
            if most < n_pixels:
                return self._part(reader, inputs, tile, index)
            nonlocal whole
            if whole is None:
                whole = self._part(reader, inputs, tile, None)
            is_all = len(index) == n_pixels
            return whole if is_all else whole.take(index)

        fits = self.fitter(load, n_pixels, most, tile_seed(self.seed, tile.index))
        if self.raises and (text := failure_text(counted(fits.status))):
            raise PixelFitError(f"{text} in the tile that begins at {tile.origin}.")
        return self.outputs.of(fits, self.pixels(tile))

    def _part(
        self, reader: GroupReader, inputs: Sequence[Any], tile: Tile, index: Index | None
    ) -> TilePart:
        data = self.reader(reader, inputs, tile, index)
        if data.n_bad and not self.omits_nan:
            raise NonFiniteDataError(
                f"{data.n_bad:,} points of the tile that begins at {tile.origin} have NaN or "
                f"infinity in y, x or sigma. Use nan_policy='omit' (in curvefit, skipna=True) to "
                f"omit them.",
                data.n_bad,
                tile.origin,
            )
        bounded = Bounded(*self.parameters.at_pixels(data.maps))
        if self.guess is None:
            return TilePart(data.lanes, bounded, self.is_given)
        start = self.guess(data.lanes.x, data.lanes.y, bounded.start)
        is_given = np.asarray(np.isfinite(start).all(axis=0))
        return TilePart(data.lanes, replace(bounded, start=start), is_given)
