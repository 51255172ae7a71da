"""A store larger than what the fit may take: measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys, threading, time
import dask, jax.numpy as jnp, zarr
import nlsq_dask as nd

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak_mb()
x, y = (zarr.open_array(f"{sys.argv[1]}/{name}", mode="r") for name in "xy")
with dask.config.set(scheduler="threads", num_workers=2):
    result = nd.AdaptiveHybridStreamingOptimizer().fit(
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_of_1_6_gb_in_less_than_1_gb(tmp_path: Path) -> None:
    n = 100_000_000
    subprocess.run([sys.executable, "-c", WRITE, tmp_path, str(n)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], check=True, capture_output=True, text=True
    )
    n_points, megabytes = done.stdout.split()
    assert int(n_points) == n
    assert float(megabytes) < 1000
