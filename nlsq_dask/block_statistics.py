"""Chi-square, count and largest residual of every block, in the shape of the block grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.kernels.block_sums import BlockSums


def block_statistics(sums: BlockSums, blocks: RowBlocks) -> xr.Dataset:
    """Put what a pass found of each block where the block is in the data.

    Parameters
    ----------
    sums : BlockSums
    blocks : RowBlocks

    Returns
    -------
    xarray.Dataset
        ``chi2``, ``n_points``, ``reduced_chi2`` and ``largest_residual`` along the dimensions of y
        (``dim_0``, ... where it has no names), with the position of each block's first entry as
        coordinates, whose attribute ``size`` is the number of entries along the dimension.
        ``reduced_chi2`` is ``chi2 / n_points``, NaN without points: parameters are of all blocks,
        and a block has no degrees of freedom of its own.
    """

    def on_grid(values: NDArray[Any]) -> NDArray[Any]:
        grid = np.zeros(int(np.prod(blocks.grid)), values.dtype)
        grid[sums.index] = values  # blocks without rows are in no pass
        return grid.reshape(blocks.grid)

    counts, chi2 = on_grid(sums.n_used), on_grid(sums.chi2)
    reduced = np.divide(chi2, counts, out=np.full(blocks.grid, np.nan), where=counts > 0)
    values = {
        "chi2": chi2,
        "n_points": counts,
        "reduced_chi2": reduced,
        "largest_residual": np.where(counts > 0, on_grid(sums.largest), np.nan),
    }
    starts = {
        dim: (dim, np.cumsum((0, *sizes[:-1])), {"size": sum(sizes)})
        for dim, sizes in zip(blocks.dims, blocks.y.chunks, strict=True)
    }
    return xr.Dataset({name: (blocks.dims, grid) for name, grid in values.items()}, coords=starts)
