"""``NormalizedSample``: model, rows, normalization and loss for fitting a sample in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows
from nlsq_dask.warmup.normalize import ParameterNormalizer


@dataclass(frozen=True)
class NormalizedSample:
    """Arguments that L-BFGS and successive halving share."""

    model: Model
    rows: Rows  # all finite; rows after the first ``n_rows`` are padding
    n_rows: int
    normalizer: ParameterNormalizer
    loss: Loss
    penalty: GroupVariance
    fingerprint: str  # of the model and its x

    def arrays(self) -> dict[str, Any]:
        """Return rows, normalization and bounds as arrays, by field of ``lbfgs.Problem``."""
        low, high = self.normalizer.transform_bounds()
        sigma = self.rows.sigma
        return {
            "y": self.rows.y.astype(np.float64),
            "x": self.rows.x,
            "inverse_sigma": np.ones(1) if sigma is None else 1.0 / sigma.astype(np.float64),
            "f_scale": np.float64(self.loss.f_scale),
            "scales": self.normalizer.scales,
            "offsets": self.normalizer.offsets,
            "low": low,
            "high": high,
        }


def to_device(problem: Any) -> Any:
    """Return a pytree of NumPy arrays as JAX arrays of the same dtypes."""
    with x64():
        return jax.device_put(problem)
