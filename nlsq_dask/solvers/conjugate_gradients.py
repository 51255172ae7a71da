"""Conjugate gradients that are given one product ``J^T J v`` at a time.

The flexible variant is used, whose preconditioner may itself be an iterative solver.

References
----------
Y. Notay, "Flexible conjugate gradients", SIAM Journal on Scientific Computing 22, 1444-1460 (2000).
J. Nocedal and S. J. Wright, "Numerical Optimization", 2nd edition, chapter 5 (2006).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh_tridiagonal

Vector = NDArray[np.float64]

NULL_EIGENVALUE = 1e-10  # of J^T J times its preconditioner; smaller is rounding
_SOLVE_RTOL = 1e-3  # of solves for standard errors, whose estimate is accurate to percents


@dataclass(frozen=True)
class LinearSolve:
    """Conjugate gradients on ``J^T J step = -J^T r`` after some iterations."""

    step: Vector
    residual: Vector
    direction: Vector  # next search direction, whose product is needed
    square: float  # squared norm of the residual, in the norm of the preconditioner
    initial_square: float  # the same for a step of zero
    reduction: float = 0.0  # of the quadratic model by the step
    alphas: tuple[float, ...] = ()  # lengths along the directions
    betas: tuple[float, ...] = ()  # coefficients of the last direction in the next

    @classmethod
    def init(cls, gradient: Vector, precondition: Callable[[Vector], Vector]) -> Self:
        """Return the state before the first iteration, with a step of zero."""
        residual = -gradient
        direction = precondition(residual)
        square = max(float(residual @ direction), 0.0)
        return cls(np.zeros_like(residual), residual, direction, square, square)

    def update(self, product: Vector, precondition: Callable[[Vector], Vector]) -> Self | None:
        """Return the state after another iteration, given ``J^T J direction``.

        None if the curvature along the direction is not positive, which ends the iteration.
        """
        curvature = float(self.direction @ product)
        if not (curvature > 0.0 and self.square > 0.0 and np.isfinite(self.square / curvature)):
            return None
        alpha = self.square / curvature
        residual = self.residual - alpha * product
        preconditioned = precondition(residual)
        square = max(float(residual @ preconditioned), 0.0)
        beta = max(square - float(self.residual @ preconditioned), 0.0) / self.square
        return replace(
            self,
            step=self.step + alpha * self.direction,
            residual=residual,
            direction=preconditioned + beta * self.direction,
            square=square,
            reduction=self.reduction + 0.5 * alpha * self.square,
            alphas=(*self.alphas, alpha),
            betas=(*self.betas, beta),
        )

    @property
    def least_ritz_value(self) -> float:
        """Estimate of the smallest eigenvalue of the preconditioned J^T J."""
        alphas, betas = np.array(self.alphas), np.array(self.betas)
        diagonal = 1.0 / alphas
        diagonal[1:] += betas[:-1] / alphas[:-1]
        off_diagonal = np.sqrt(betas[:-1]) / alphas[:-1]
        return float(
            eigvalsh_tridiagonal(diagonal, off_diagonal, select="i", select_range=(0, 0))[0]
        )


def solve_many(
    products: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    right: NDArray[np.float64],
    precondition: Callable[[Vector], Vector],
    max_iterations: int,
) -> NDArray[np.float64]:
    """Solve ``J^T J u = b`` for several b at the same time.

    Parameters
    ----------
    products : callable
        Returns ``J^T J v`` for each of k vectors v, given as an array (k, p).
    right : ndarray, shape (k, p)
        The vectors b.
    precondition : callable
        Returns an approximate inverse of ``J^T J``, applied to a vector.
    max_iterations : int

    Returns
    -------
    ndarray, shape (k, p)
        The vectors u; infinite where ``J^T J`` is singular or ``max_iterations`` is too small.
    """
    solves: list[LinearSolve | None] = [LinearSolve.init(-b, precondition) for b in right]
    active = dict.fromkeys(range(len(right)))
    zeros = np.zeros(right.shape[1])
    for _ in range(max_iterations):
        if not active:
            break
        directions = [s.direction if s and i in active else zeros for i, s in enumerate(solves)]
        new_products = products(np.array(directions))
        for i in list(active):
            solve = solves[i]
            solve = None if solve is None else solve.update(new_products[i], precondition)
            if solve is None or solve.least_ritz_value < NULL_EIGENVALUE:
                solves[i] = None
                del active[i]
                continue
            solves[i] = solve
            if solve.square <= _SOLVE_RTOL**2 * solve.initial_square:
                del active[i]
    for i in active:
        solves[i] = None
    return np.array([np.full_like(zeros, np.inf) if s is None else s.step for s in solves])
