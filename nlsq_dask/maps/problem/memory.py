"""``TileMemory``: the memory that the task of a tile needs, and how many pixels it fits at once."""

from __future__ import annotations

from dataclasses import dataclass

from nlsq_dask.engine.memory import IMPORTED_BYTES

# Measured: what compiling the solver leaves behind, and what a task needs beside its arrays.
COMPILED_BYTES = 180 * 2**20
_TASK_BYTES = 128 * 2**20
_FILLED = 0.75  # of a worker's memory, below the share at which distributed pauses it
_SOLVER_COPIES = 3  # of the points of the pixels that one call of the kernel processes
_STATE_VALUES = 8  # numbers of the solver per pixel and parameter
_MAX_PARTS = 20  # more reads of the data would take longer than the fits


@dataclass(frozen=True)
class TileMemory:
    """Bytes of the arrays of a task."""

    point_bytes: int  # points of a pixel, with masks
    pixel_bytes: int  # states and results of a pixel
    block_bytes: int  # the blocks that are in memory while one is read
    call_bytes: int  # of a call of the kernel

    @classmethod
    def of(
        cls,
        point_bytes: int,
        result_bytes: int,
        block_bytes: int,
        n_params: int,
        points_per_call: int,
    ) -> TileMemory:
        """Return the memory of a task, given the bytes of the results and points of a pixel."""
        return cls(
            max(point_bytes, 1),
            result_bytes + 8 * _STATE_VALUES * n_params,
            block_bytes,
            8 * _SOLVER_COPIES * points_per_call,
        )

    def max_pixels(self, n_pixels: int, task_memory: int) -> int:
        """Return how many of the pixels of a tile may be in memory at once.

        ``task_memory`` is the share of a task in the memory of its process.
        """
        available = task_memory - self._fixed(n_pixels)
        return min(max(available // self.point_bytes, -(-n_pixels // _MAX_PARTS), 1), n_pixels)

    def peak(self, n_pixels: int, task_memory: int) -> int:
        """Return the peak memory of a task."""
        at_once = self.max_pixels(n_pixels, task_memory)
        return self._fixed(n_pixels) + at_once * self.point_bytes

    def _fixed(self, n_pixels: int) -> int:
        return _TASK_BYTES + self.block_bytes + self.call_bytes + n_pixels * self.pixel_bytes


def task_share(limit: int, n_threads: int) -> int:
    """Return the bytes for one of ``n_threads`` tasks in a process with this memory limit."""
    return max(int(_FILLED * limit) - IMPORTED_BYTES - COMPILED_BYTES, 0) // n_threads
