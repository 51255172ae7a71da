"""``NormalEquationsKernel``: the sums from which a step is solved with dense matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.block_loops import block_rows_for
from nlsq_dask.kernels.dense_loops import Product, combined_products, no_product, product_loops
from nlsq_dask.kernels.kernel import RowKernel, RowSource, no_rows, trace_sums
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.sums import NormalEquations, Sums
from nlsq_dask.model.jacobian import Mode, choose_mode
from nlsq_dask.model.jax_scope import CPU, x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program, traced_once
from nlsq_dask.rows.device_rows import PlacedRows


def _trace(
    model: Model, loss: str, product: Product, piece_rows: int, mode: Mode, platform: str
) -> Program:
    p = model.n_params
    return trace_sums(
        model,
        product_loops(model, loss, product, piece_rows, mode, platform),
        piece_rows,
        no_rows(no_product(p, piece_rows, platform, product), piece_rows, platform),
        ((p,), (p + 1,)),
        platform,
    )


@dataclass(frozen=True, kw_only=True)
class NormalEquationsKernel(RowKernel[NormalEquations]):
    """Rows and parameters in, ``NormalEquations`` out.

    Attributes
    ----------
    factors : tuple of float
        Powers of two, one a column of the Jacobian and one for the residual, by which these are
        multiplied before their products are summed; they keep float32 away from its limits.
    product : Product
        With ``SCORES``, R is that of ``r J``, whose ``R^T R = sum r^2 J^T J`` is the middle of a
        sandwich covariance; with a robust loss ``rho' r`` takes the place of r.
    """

    sums_type: ClassVar[type[Sums]] = NormalEquations

    factors: tuple[float, ...]
    product: Product = Product.GRAM

    @property
    def makes(self) -> str:
        """Which sums it makes."""
        return self.product.value

    @classmethod
    def trace(
        cls,
        model: Model,
        piece_rows: int,
        mode: Mode | None = None,
        platforms: tuple[str, ...] = (CPU,),
        loss: Loss | None = None,
        product: Product = Product.GRAM,
    ) -> Self:
        """Trace the kernel of this model for pieces of this length.

        The mode of the Jacobian is chosen by ``choose_mode`` unless it is given.
        """
        with x64():
            jaxpr = model.jaxpr()
            mode = mode or choose_mode(model, jaxpr)
        loss = loss or Loss()
        how = loss.name, product, piece_rows, mode
        what = (cls, model.layout, model.dtype, model.n_params, *how)
        programs = {
            platform: traced_once((*what, platform), jaxpr, partial(_trace, model, *how, platform))
            for platform in platforms
        }
        return cls(
            programs,
            model.layout,
            model.n_params,
            piece_rows,
            {platform: block_rows_for(piece_rows, platform) for platform in platforms},
            loss=loss,
            factors=(1.0,) * (model.n_params + 1),
            product=product,
        )

    def making(self, product: Product, model: Model) -> Self:
        """Return the kernel of the same model that makes another product.

        With a robust loss, ``ROOT`` takes the place of ``TRIANGLE``.
        """
        if product is Product.TRIANGLE and not self.loss.is_linear:
            product = Product.ROOT
        if product is self.product:
            return self
        platforms = tuple(self.programs)
        other = self.trace(
            model, self.piece_rows, platforms=platforms, loss=self.loss, product=product
        )
        return replace(self, programs=other.programs, product=product)

    def _no_sums(self, platform: str) -> Any:
        return no_product(self.n_params, self.piece_rows, platform, self.product)

    def _combined(self, one: Any, other: Any) -> Any:
        return combined_products(one, other, self.product)

    def __call__(
        self,
        source: RowSource | PlacedRows,
        params: NDArray[np.float64],
        *,
        candidates: NDArray[np.float64] | None = None,
        wants_moments: bool = True,
    ) -> NormalEquations:
        """Sum over some rows, in pieces of ``piece_rows``.

        The running sums are carried from piece to piece. In float64, and without rows left out,
        where the rows are cut has no influence on the bits of the result.

        Parameters
        ----------
        source : RowSource or PlacedRows
        params : ndarray, shape (p,)
        candidates : ndarray, shape (k, p), optional
            At most ``MOST_CANDIDATES`` points at which the cost is wanted, too.
        wants_moments : bool
            Whether to sum what depends on the data alone.
        """
        p, factors = self.n_params, np.array(self.factors)
        (lanes, residuals), common = self._sum(source, (params, factors), candidates, wants_moments)
        jtj, jtr, square, triangle = self._unscaled(lanes.sum(axis=-1), factors)
        rho, squares = residuals.sum(axis=-1)
        # With the linear loss the product holds the sum of squares.
        twice_cost, chi2 = self.loss.f_scale**2 * rho, squares / factors[p] ** 2
        if self.loss.is_linear:
            twice_cost = chi2 = square
        largest = np.sqrt(lanes[p, 0].max()) / factors[p]
        return NormalEquations(
            jtj=jtj,
            jtr=jtr,
            triangle=triangle,
            cost=0.5 * float(twice_cost),
            chi2=float(chi2),
            **common,
            largest=float(largest),
        )

    def _unscaled(
        self, product: NDArray[np.float64], factors: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], float, NDArray[np.float64] | None]:
        """Return ``J^T J``, ``J^T r``, ``r^T r`` and R, if there is one, without the factors."""
        p, upper = self.n_params, np.triu(product)
        if self.product is Product.GRAM:
            upper = upper / factors[:, None] / factors
            gram = upper + np.triu(upper, 1).T
            return gram[:p, :p], gram[:p, p], gram[p, p], None
        upper = upper / factors
        is_root = self.product is Product.ROOT
        triangle = upper[:p, :p] if is_root else upper
        if self.product is Product.SCORES:
            triangle[:p, :p] /= factors[p]
        gram = triangle.T @ triangle
        if is_root:
            return gram, upper[:p, p] / factors[:p], np.nan, triangle
        return gram[:p, :p], gram[:p, p], gram[p, p], triangle
