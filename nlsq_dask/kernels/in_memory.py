"""Sums over rows in memory, which cost no reading."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_kernel import DenseReduction, with_accumulation
from nlsq_dask.kernels.dense_loops import Accumulation
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import GradientSums, NormalEquations, Sums
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows

Vector = NDArray[np.float64]
S_co = TypeVar("S_co", bound=Sums, covariant=True)

_CACHE_SIZE = 8  # points; forecasts come back to those that they have tried


class SampleObjective(ABC, Generic[S_co]):
    """Sums over rows, as a function of the parameters; the last few are remembered.

    Parameters
    ----------
    rows : Rows
    penalty : GroupVariance
        Added to the sums.
    """

    def __init__(self, rows: Rows, penalty: GroupVariance) -> None:
        self._rows = rows
        self._penalty = penalty
        self._cache: dict[bytes, S_co] = {}

    @property
    @abstractmethod
    def kernel(self) -> Kernel[S_co]:
        """The kernel that makes them."""

    def __call__(self, params: Vector) -> S_co:
        """Sum at ``params``."""
        key = params.tobytes()
        if key not in self._cache:
            if len(self._cache) == _CACHE_SIZE:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = self.kernel(self._rows, Request(params)).penalized(
                self._penalty, params
            )
        return self._cache[key]


class DenseObjective(SampleObjective[NormalEquations]):
    """Normal equations over rows in memory, or what takes their place.

    Parameters
    ----------
    model : Model
    kernel : Kernel[NormalEquations]
        Of this model.
    rows : Rows
    penalty : GroupVariance
    """

    def __init__(
        self, model: Model, kernel: Kernel[NormalEquations], rows: Rows, penalty: GroupVariance
    ) -> None:
        super().__init__(rows, penalty)
        self._model = model
        self._kernel = kernel

    @property
    def kernel(self) -> Kernel[NormalEquations]:
        """The kernel that makes them."""
        return self._kernel

    @property
    def accumulation(self) -> Accumulation:
        """The accumulation in use."""
        reduction = self._kernel.reduction
        assert isinstance(reduction, DenseReduction)
        return reduction.accumulation

    def use(self, accumulation: Accumulation) -> None:
        """Use another accumulation from now on."""
        kernel = with_accumulation(self._kernel, accumulation, self._model)
        if kernel is not self._kernel:
            self._kernel = kernel
            self._cache.clear()

    def factors(self, params: Vector) -> tuple[float, ...]:
        """Return powers of two that bring Jacobian and residual at ``params`` near one."""
        sums = self(params)
        squares = np.append(np.diag(sums.jtj), sums.chi2) / max(sums.n_used, 1)
        usable = np.isfinite(squares) & (squares > 0.0)
        exponents = -np.round(0.5 * np.log2(np.where(usable, squares, 1.0)))
        return tuple(np.exp2(exponents).tolist())


class GradientObjective(SampleObjective[GradientSums]):
    """Gradients over rows in memory, products with ``J^T J`` and its diagonal.

    Parameters
    ----------
    kernel : Kernel[GradientSums]
    diagonal : Kernel[GradientSums]
        The same with the diagonal in the place of a product.
    rows : Rows
    penalty : GroupVariance
    """

    def __init__(
        self,
        kernel: Kernel[GradientSums],
        diagonal: Kernel[GradientSums],
        rows: Rows,
        penalty: GroupVariance,
    ) -> None:
        super().__init__(rows, penalty)
        self._kernel = kernel
        self._diagonal = diagonal

    @property
    def kernel(self) -> Kernel[GradientSums]:
        """The kernel that makes them."""
        return self._kernel

    def reduce(self, request: Request) -> GradientSums:
        """Sum what is asked for; what depends on the data alone is left out with a direction."""
        params, candidates, directions = request.params, request.candidates, request.directions
        if directions is None and (candidates is None or not len(candidates)):
            return self(params)
        sums = self._kernel(self._rows, request, wants_moments=directions is None)
        return sums.penalized(self._penalty, params, candidates, directions)

    def product(self, params: Vector, vector: Vector) -> Vector:
        """Return ``J^T J v`` at ``params``."""
        (product,) = self.reduce(Request(params, directions=vector[None])).products
        return np.asarray(product)

    def diagonal(self, params: Vector) -> Vector:
        """Return the diagonal of ``J^T J`` at ``params``."""
        sums = self._diagonal(self._rows, Request(params), wants_moments=False)
        return np.asarray(sums.products[0] + self._penalty.diagonal(len(params), sums.n_used))
