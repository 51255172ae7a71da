"""Fit with the ``nlsq`` package, in its own environment: ``in_memory.py`` runs this.

    .venv-nlsq/bin/python benchmarks/nlsq_fit.py DATA.npy P0 REPEATS

Prints a line of JSON a fit, each at once, so that what was measured survives a crash.
"""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
from nlsq import AdaptiveHybridStreamingOptimizer, HybridStreamingConfig


def exponential(x, a, b, c):
    """Return ``a exp(-b x) + c``."""
    import jax.numpy as jnp  # nlsq sets 64-bit arithmetic up when it is imported

    return a * jnp.exp(-b * x) + c


def main() -> None:
    """Fit the data so many times."""
    x, y = np.load(sys.argv[1])
    p0 = np.array(json.loads(sys.argv[2]))
    for _ in range(int(sys.argv[3])):
        began = time.perf_counter()
        optimizer = AdaptiveHybridStreamingOptimizer(HybridStreamingConfig.aggressive())
        result = optimizer.fit((x, y), exponential, p0, verbose=0)
        record = {
            "seconds": time.perf_counter() - began,
            "params": np.asarray(result["x"]).tolist(),
            "success": bool(result["success"]),
            "versions": {name: version(name) for name in ("nlsq", "jax", "numpy")},
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
