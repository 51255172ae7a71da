"""``GradientKernel``: the sums for many parameters, without matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import ModelError
from nlsq_dask.kernels.gradient_loops import (
    combined_gradients,
    gradient_block_rows,
    gradient_loops,
    no_gradient,
)
from nlsq_dask.kernels.kernel import RowKernel, RowSource, no_rows, trace_sums
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.sums import GradientSums, Sums
from nlsq_dask.model.jax_scope import CPU, x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program, traced_once
from nlsq_dask.rows.device_rows import PlacedRows


def _trace(
    model: Model, loss: str, n_directions: int, is_diagonal: bool, piece_rows: int, platform: str
) -> Program:
    p = model.n_params
    nothing = no_gradient(p, n_directions, piece_rows, platform)
    return trace_sums(
        model,
        gradient_loops(model, loss, is_diagonal, piece_rows, platform),
        piece_rows,
        no_rows(nothing, piece_rows, platform),
        ((p,), (n_directions, p)),
        platform,
    )


@dataclass(frozen=True, kw_only=True)
class GradientKernel(RowKernel[GradientSums]):
    """Rows, parameters and directions in, ``GradientSums`` out.

    Attributes
    ----------
    n_directions : int
        How many directions it takes.
    """

    sums_type: ClassVar[type[Sums]] = GradientSums

    n_directions: int = 1

    @classmethod
    def trace(
        cls,
        model: Model,
        piece_rows: int,
        platforms: tuple[str, ...] = (CPU,),
        loss: Loss | None = None,
        n_directions: int = 1,
        is_diagonal: bool = False,
    ) -> Self:
        """Trace the kernel of this model for pieces of this length.

        With ``is_diagonal`` the diagonal of ``J^T J`` takes the place of the one product.

        Raises
        ------
        ModelError
            If the model cannot be differentiated in both directions.
        """
        with x64():
            jaxpr = model.jaxpr()
        loss = loss or Loss()
        how = loss.name, n_directions, is_diagonal, piece_rows
        what = (cls, model.layout, model.dtype, model.n_params, *how)
        try:
            programs = {
                platform: traced_once(
                    (*what, platform), jaxpr, partial(_trace, model, *how, platform)
                )
                for platform in platforms
            }
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"The model {model.name!r} has {model.n_params} parameters, which asks for "
                f"conjugate gradients, and these for derivatives in forward and in reverse mode "
                f"({error}). Use lax.scan instead of lax.while_loop, jax.custom_jvp instead of "
                f"custom_vjp, or a larger cg_param_threshold."
            ) from error
        return cls(
            programs,
            model.layout,
            model.n_params,
            piece_rows,
            {
                platform: gradient_block_rows(model.n_params, piece_rows, platform)
                for platform in platforms
            },
            loss=loss,
            n_directions=n_directions,
        )

    def _no_sums(self, platform: str) -> Any:
        return no_gradient(self.n_params, self.n_directions, self.piece_rows, platform)

    def _combined(self, one: Any, other: Any) -> Any:
        return combined_gradients(one, other)

    def __call__(
        self,
        source: RowSource | PlacedRows,
        params: NDArray[np.float64],
        *,
        candidates: NDArray[np.float64] | None = None,
        wants_moments: bool = True,
        directions: NDArray[np.float64] | None = None,
    ) -> GradientSums:
        """Sum over some rows, in pieces of ``piece_rows``.

        Parameters
        ----------
        source : RowSource or PlacedRows
        params : ndarray, shape (p,)
        candidates : ndarray, shape (k, p), optional
            At most ``MOST_CANDIDATES`` points at which the cost is wanted, too.
        wants_moments : bool
            Whether to sum what depends on the data alone.
        directions : ndarray, shape (n_directions, p), optional
            Where ``J^T J v`` is wanted; zeros if not given.
        """
        if directions is None:
            directions = np.zeros((self.n_directions, self.n_params))
        found, common = self._sum(source, (params, directions), candidates, wants_moments)
        vectors, residuals, largest = found
        rho, chi2 = residuals.sum(axis=-1)
        twice_cost = chi2 if self.loss.is_linear else self.loss.f_scale**2 * rho
        return GradientSums(
            jtr=vectors[0],
            products=vectors[1:],
            cost=0.5 * float(twice_cost),
            chi2=float(chi2),
            **common,
            largest=float(np.sqrt(largest)),
        )
