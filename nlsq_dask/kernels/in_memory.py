"""Sums over a sample of rows that is in memory, as a function of the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.dense_kernel import DenseReduction, with_accumulation
from nlsq_dask.kernels.dense_terms import Accumulation
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import GradientSums, NormalEquations, Sums
from nlsq_dask.model.model import Model
from nlsq_dask.rows.rows import Rows

Vector = NDArray[np.float64]
S = TypeVar("S", bound=Sums)
S_co = TypeVar("S_co", bound=Sums, covariant=True)

_CACHE_SIZE = 8  # points; forecasts return to points evaluated before


class SampleObjective(ABC, Generic[S_co]):
    """Function from parameters to the sums over given rows, with a cache of the last results.

    Parameters
    ----------
    rows : Rows
    penalty : GroupVariance
        Penalty that is added to the sums.

    Attributes
    ----------
    lacked_derivatives : bool
        Whether derivatives were not finite at any point so far, although the model was.
    check : callable
        Called before each evaluation; an exception that it raises ends the solve.
    """

    def __init__(self, rows: Rows, penalty: GroupVariance) -> None:
        self.lacked_derivatives = False
        self.check: Callable[[], None] = lambda: None
        self._rows = rows
        self._penalty = penalty
        self._cache: dict[bytes, S_co] = {}

    @property
    @abstractmethod
    def kernel(self) -> Kernel[S_co]:
        """Kernel that computes the sums."""

    def __call__(self, params: Vector) -> S_co:
        """Return the sums at ``params``."""
        key = params.tobytes()
        if key not in self._cache:
            if len(self._cache) == _CACHE_SIZE:
                del self._cache[next(iter(self._cache))]
            request = Request(params)
            sums = self._sum(self.kernel, request).penalized(self._penalty, request)
            self.lacked_derivatives |= sums.lacks_derivatives
            self._cache[key] = sums
        return self._cache[key]

    def _sum(self, kernel: Kernel[S], request: Request, wants_moments: bool = True) -> S:
        self.check()
        return kernel(self._rows, request, wants_moments=wants_moments)


class DenseObjective(SampleObjective[NormalEquations]):
    """Function from parameters to the ``NormalEquations`` over given rows.

    Parameters
    ----------
    model : Model
    kernel : Kernel[NormalEquations]
        Kernel of ``model``.
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
        """The kernel that computes the sums."""
        return self._kernel

    @property
    def accumulation(self) -> Accumulation:
        """Matrix that the kernel accumulates: ``J^T J``, or the factor R of a QR factorization."""
        reduction = self._kernel.reduction
        assert isinstance(reduction, DenseReduction)
        return reduction.accumulation

    def use(self, accumulation: Accumulation) -> None:
        """Compute the sums with another ``Accumulation`` from now on."""
        kernel = with_accumulation(self._kernel, accumulation, self._model)
        if kernel is not self._kernel:
            self._kernel = kernel
            self._cache.clear()

    def factors(self, params: Vector) -> tuple[float, ...]:
        """Return factors for the columns of J, and for r, that scale both to about one.

        They are powers of two, so that scaling does not round.
        """
        sums = self(params)
        squares = np.append(np.diag(sums.jtj), sums.chi2) / max(sums.n_used, 1)
        usable = np.isfinite(squares) & (squares > 0.0)
        exponents = -np.round(0.5 * np.log2(np.where(usable, squares, 1.0)))
        return tuple(np.exp2(exponents).tolist())


class GradientObjective(SampleObjective[GradientSums]):
    """Function from parameters to the ``GradientSums`` over given rows.

    Parameters
    ----------
    kernel : Kernel[GradientSums]
    diagonal : Kernel[GradientSums]
        Kernel that computes the diagonal of ``J^T J`` instead of a product.
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
        """The kernel that computes the sums."""
        return self._kernel

    def reduce(self, request: Request) -> GradientSums:
        """Return the requested sums, without ``Sums.moments`` if products are requested."""
        candidates, directions = request.candidates, request.directions
        if directions is None and (candidates is None or not len(candidates)):
            return self(request.params)
        sums = self._sum(self._kernel, request, wants_moments=directions is None)
        return sums.penalized(self._penalty, request)

    def product(self, params: Vector, vector: Vector) -> Vector:
        """Return ``J^T J v`` at ``params``."""
        (product,) = self.reduce(Request(params, directions=vector[None])).products
        return np.asarray(product)

    def diagonal(self, params: Vector) -> Vector:
        """Return the diagonal of ``J^T J`` at ``params``."""
        sums = self._sum(self._diagonal, Request(params), wants_moments=False)
        return np.asarray(sums.products[0] + self._penalty.diagonal(len(params), sums.n_used))
