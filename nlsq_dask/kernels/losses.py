"""Robust losses, with SciPy's definitions and its second-order scaling.

The cost is ``1/2 sum C^2 rho(z)`` with ``z = (r / C)^2`` and the scale C (``f_scale``). With the
Jacobian multiplied by ``s = sqrt(rho' + 2 rho'' z)`` and the residual by ``rho' / s``, ``J^T r`` is
the gradient of the cost, and ``J^T J`` its Hessian without the second derivatives of the model.

References
----------
B. Triggs, P. F. McLauchlan, R. I. Hartley and A. W. Fitzgibbon, "Bundle adjustment: a modern
synthesis", Vision Algorithms: Theory and Practice, Lecture Notes in Computer Science 1883, 298-372
(2000), section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np

LINEAR = "linear"
SMALLEST, LARGEST = 1e-140, 1e140  # beyond these, squares overflow or underflow float64

_Rho = Callable[[Any], tuple[Any, Any, Any]]


def _huber(z: Any) -> tuple[Any, Any, Any]:
    is_small = z <= 1
    root = jnp.sqrt(jnp.where(is_small, 1, z))
    return (
        jnp.where(is_small, z, 2 * root - 1),
        1 / root,
        jnp.where(is_small, 0, -0.5 / root**3),
    )


def _soft_l1(z: Any) -> tuple[Any, Any, Any]:
    root = jnp.sqrt(1 + z)
    # 2 (sqrt(1 + z) - 1), without cancellation for small z.
    return 2 * z / (root + 1), 1 / root, -0.5 / root**3


def _cauchy(z: Any) -> tuple[Any, Any, Any]:
    return jnp.log1p(z), 1 / (1 + z), -1 / (1 + z) ** 2


def _arctan(z: Any) -> tuple[Any, Any, Any]:
    t = 1 + z**2
    return jnp.arctan(z), 1 / t, -2 * z / t**2


_RHO: dict[str, _Rho] = {
    "soft_l1": _soft_l1,
    "huber": _huber,
    "cauchy": _cauchy,
    "arctan": _arctan,
}
LOSSES = (LINEAR, *_RHO)


@dataclass(frozen=True)
class Loss:
    """A loss, by its SciPy name, and its scale."""

    name: str = LINEAR  # one of LOSSES
    f_scale: float = 1.0  # residuals much smaller than this are treated as in "linear"

    @property
    def is_linear(self) -> bool:
        """Whether the cost is half the sum of squares."""
        return self.name == LINEAR


def check_loss(loss: Any, f_scale: Any) -> None:
    """Raise a ValueError if ``loss`` is unknown or ``f_scale`` is not a positive number."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}; got {loss!r}.")
    if not isinstance(f_scale, Real) or not SMALLEST < float(f_scale) < LARGEST:
        raise ValueError(
            f"f_scale must be a number between {SMALLEST:g} and {LARGEST:g}; got {f_scale!r}."
        )


def rho(name: str, z: Any) -> Any:
    """Return ``rho(z)`` per row, in JAX, for squared residuals z in units of ``f_scale``."""
    return z if name == LINEAR else _RHO[name](z)[0]


def robust(name: str, z: Any) -> tuple[Any, Any, Any]:
    """Return ``rho(z)``, and the factors by which Jacobian and residual are multiplied, per row.

    Parameters
    ----------
    name : str
        One of ``LOSSES``, except "linear".
    z : array, shape (b,)
        Squared residuals in units of ``f_scale``.

    Returns
    -------
    rho, jacobian_scale, residual_scale : array, each of shape (b,)
    """
    value, first, second = _RHO[name](z)
    # Where the loss is concave, the Hessian could be negative; bounded by epsilon as in SciPy.
    scale = jnp.sqrt(jnp.maximum(first + 2 * second * z, np.finfo(z.dtype).eps))
    return value, scale, first / scale
