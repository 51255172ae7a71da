"""Normalization of parameters, for the warm-up and for users who fit normalized parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlsq_dask.model.call import call_model

_STRATEGIES = ("auto", "bounds", "p0", "none")


class ParameterNormalizer:
    """Affine map between parameters ``p`` and normalized parameters ``q``.

    ``p = q * scales + offsets``.

    Parameters
    ----------
    p0 : array_like, shape (p,)
        Initial values; their magnitudes are the scales of strategy "p0".
    bounds : tuple of array_like, optional
        ``(lower, upper)``, each a scalar or of shape (p,).
    strategy : {"auto", "bounds", "p0", "none"}
        "bounds" maps the bounds to [0, 1], "p0" divides by ``|p0|`` (by 1 where it is 0), "none"
        is the identity, and "auto" is "bounds" if all bounds are finite, otherwise "p0".

    Attributes
    ----------
    strategy : str
        The strategy used; never "auto".
    scales, offsets : ndarray, shape (p,)

    Raises
    ------
    ValueError
        If the strategy is unknown, or "bounds" is requested without finite bounds.
    """

    def __init__(
        self,
        p0: ArrayLike,
        bounds: tuple[ArrayLike, ArrayLike] | None = None,
        strategy: str = "auto",
    ) -> None:
        if strategy not in _STRATEGIES:
            allowed = ", ".join(map(repr, _STRATEGIES))
            raise ValueError(f"strategy must be one of {allowed}; got {strategy!r}.")
        start = np.atleast_1d(np.asarray(p0, dtype=np.float64))
        low, high = (-np.inf, np.inf) if bounds is None else bounds
        self._low = np.broadcast_to(np.asarray(low, dtype=np.float64), start.shape)
        self._high = np.broadcast_to(np.asarray(high, dtype=np.float64), start.shape)
        finite = bool(np.isfinite(self._low).all() and np.isfinite(self._high).all())
        if strategy == "auto":
            strategy = "bounds" if finite else "p0"
        if strategy == "bounds" and not finite:
            raise ValueError(
                "strategy 'bounds' needs finite lower and upper bounds for every parameter; got "
                f"lower={self._low.tolist()}, upper={self._high.tolist()}. Use 'p0' or 'auto'."
            )
        self.strategy = strategy
        self.scales: NDArray[np.float64] = np.ones_like(start)
        self.offsets: NDArray[np.float64] = np.zeros_like(start)
        if strategy == "bounds":
            width = self._high - self._low
            self.scales = np.where(width > 0.0, width, 1.0)
            self.offsets = self._low.copy()
        elif strategy == "p0":
            self.scales = np.where(start != 0.0, np.abs(start), 1.0)

    def normalize(self, p: ArrayLike) -> NDArray[np.float64]:
        """Return the normalized parameters of ``p``, shape (p,)."""
        return (np.asarray(p, dtype=np.float64) - self.offsets) / self.scales

    def denormalize(self, q: ArrayLike) -> NDArray[np.float64]:
        """Return the parameters of normalized ``q``, shape (p,)."""
        return np.asarray(q, dtype=np.float64) * self.scales + self.offsets

    def transform_bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the normalized bounds, infinite where there are none."""
        return self.normalize(self._low), self.normalize(self._high)

    @property
    def normalization_jacobian(self) -> NDArray[np.float64]:
        """``dp / dq = diag(scales)``, shape (p, p)."""
        return np.diag(self.scales)


class NormalizedModelWrapper:
    """Model as a function of normalized parameters: ``wrapper(x, *q)``.

    Parameters
    ----------
    model_fn : callable
        ``model(x, *params)``.
    normalizer : ParameterNormalizer
    """

    def __init__(self, model_fn: Callable[..., Any], normalizer: ParameterNormalizer) -> None:
        self.model_fn = model_fn
        self.normalizer = normalizer

    def __call__(self, x: Any, *q: Any) -> Any:
        """Evaluate the model at normalized parameters."""
        expected = len(self.normalizer.scales)
        if len(q) != expected:
            raise TypeError(f"expected {expected} normalized parameters; got {len(q)}.")
        scaled = zip(q, self.normalizer.scales, self.normalizer.offsets, strict=True)
        params = (value * scale + offset for value, scale, offset in scaled)
        return call_model(self.model_fn, x, params)
