"""What a fit for every pixel prints."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from nlsq_dask.maps.outputs import counted


def show_summary(statuses: NDArray[Any], seconds: float) -> None:
    """Print the number of pixels by status."""
    listed = ", ".join(
        f"{n:,} {status.name.lower()}" for status, n in sorted(counted(statuses).items())[::-1]
    )
    print(f"fit_each: {statuses.size:,} pixels in {seconds:.1f} s: {listed}")
