"""A store larger than what the fit may take: measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import dask, jax.numpy as jnp, zarr
import nlsq_dask as nd

def peak_mb():
    # Not ru_maxrss, which begins with that of the parent.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

before = peak_mb()
x, y = (zarr.open_array(f"{sys.argv[1]}/{name}", mode="r") for name in "xy")
with dask.config.set(scheduler="threads", num_workers=2):
    config = nd.HybridStreamingConfig(cache=0)
    result = nd.AdaptiveHybridStreamingOptimizer(config).fit(
        lambda x, a, b, c: a * jnp.exp(-b * x) + c, x, y, [2.0, 1.0, 0.0], verbose=0)
assert result.success, result.message
print(result.n_points, peak_mb() - before)
"""

WRITE = """
import sys
import numpy as np, zarr

n, chunk = int(sys.argv[2]), 1_000_000
arrays = [
    zarr.create_array(f"{sys.argv[1]}/{name}", shape=(n,), chunks=(chunk,), dtype="f8",
                      compressors=None)
    for name in "xy"
]
for i in range(0, n, chunk):
    rng = np.random.default_rng(i)
    x = rng.uniform(0, 5, min(chunk, n - i))
    arrays[0][i : i + chunk] = x
    arrays[1][i : i + chunk] = (
        2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * rng.standard_normal(len(x))
    )
"""


def megabytes(folder: Path, n: int) -> float:
    """Write a store of n rows, fit it in a new process, and return its peak above the import."""
    folder.mkdir()
    subprocess.run([sys.executable, "-c", WRITE, folder, str(n)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder], check=True, capture_output=True, text=True
    )
    n_points, found = done.stdout.split()
    assert int(n_points) == n
    return float(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read in /proc")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A store of 1.6 GB needs no more than one of 160 MB, apart from the noise of allocation."""
    small = megabytes(tmp_path / "small", 10_000_000)
    large = megabytes(tmp_path / "large", 100_000_000)
    assert large < 600
    assert large < 1.25 * small
