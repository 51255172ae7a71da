"""``GroupVariance``: a penalty on the variance of parameters within groups.

The objective is

    1/2 (sum_i C^2 rho((r_i / C)^2) + lambda n sum_g Var(p_g))

with rho and C the function and the scale of the loss, n the number of rows used, and
``Var(p_g) = 1/m sum_j (p_gj - mean(p_g))^2`` over the m parameters of a group, in the caller's
units. It is a sum of squares, so it enters cost, gradient and ``J^T J`` as additional rows with
residuals ``sqrt(lambda n / m) (p_gj - mean(p_g))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class GroupVariance:
    """Penalty on the variance of the parameters within each group; zero without groups."""

    strength: float = 0.0  # lambda: for n rows, the penalty is lambda n / 2 times all variances
    groups: tuple[tuple[int, int], ...] = ()  # ranges of parameter indices, the end excluded

    def residuals(self, params: Vector, n_rows: int) -> Vector:
        """Return the penalty residuals; half their sum of squares is the penalty."""
        values = [self._factor(a, b, n_rows) * _centered(params[a:b]) for a, b in self.groups]
        return np.concatenate([np.zeros(0), *values])

    def jacobian(self, n_params: int, n_rows: int) -> NDArray[np.float64]:
        """Return the Jacobian of the penalty residuals, which is constant."""
        unit = np.eye(n_params)
        values = [self._factor(a, b, n_rows) * _centered(unit[a:b]) for a, b in self.groups]
        return np.vstack([np.zeros((0, n_params)), *values])

    def _factor(self, start: int, end: int, n_rows: int) -> float:
        return float(np.sqrt(self.strength * n_rows / (end - start)))

    def product(self, vector: Vector, n_rows: int) -> Vector:
        """Return ``J^T J @ vector`` of the penalty residuals; for the parameters, the gradient."""
        product = np.zeros_like(vector)
        for a, b in self.groups:
            product[a:b] += self._factor(a, b, n_rows) ** 2 * _centered(vector[a:b])
        return product

    def diagonal(self, n_params: int, n_rows: int) -> Vector:
        """Return the diagonal of ``J^T J`` of the penalty residuals."""
        diagonal = np.zeros(n_params)
        for a, b in self.groups:
            diagonal[a:b] += self._factor(a, b, n_rows) ** 2 * (1.0 - 1.0 / (b - a))
        return diagonal

    def costs(self, points: NDArray[np.float64], n_rows: int) -> Vector:
        """Return the penalty for each of k parameter vectors, given as an array (k, p)."""
        return np.array([0.5 * np.sum(self.residuals(point, n_rows) ** 2) for point in points])


def _centered(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values - values.mean(axis=0))


def total_variance(params: Any, groups: tuple[tuple[int, int], ...]) -> Any:
    """Return the sum over groups of the variance of their parameters, in JAX."""
    return sum((jnp.var(params[a:b]) for a, b in groups), jnp.zeros((), params.dtype))
