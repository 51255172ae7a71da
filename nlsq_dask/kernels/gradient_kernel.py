"""``GradientReduction``: sums for conjugate gradients, which need no p-by-p matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.errors import ModelError
from nlsq_dask.kernels.gradient_terms import DiagonalTerms, GradientTerms
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.reduction import Totals
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.row_terms import MakeTerms
from nlsq_dask.kernels.strip_loops import strip_rows_for
from nlsq_dask.kernels.sums import GradientSums
from nlsq_dask.model.jax_scope import CPU
from nlsq_dask.model.model import Model

# On a GPU, for millions of rows: products J v at a time, and values stored per row with them.
_MAX_DIRECTIONS, _STORED_VALUES = 8, 128


@dataclass(frozen=True)
class GradientReduction:
    """Gradient of the cost, and products ``J^T J v`` with given vectors v.

    With ``is_diagonal``, the diagonal of ``J^T J`` is computed instead of products.
    """

    n_directions: int = 1  # number of vectors v
    is_diagonal: bool = False

    sums_type = GradientSums
    name = GradientSums.__name__
    combine = add, add, max  # vectors, residuals, largest

    @property
    def key(self) -> tuple[Any, ...]:
        """Settings on which the traced program depends; a part of its key in the cache."""
        return GradientSums, self.n_directions, self.is_diagonal

    def zero(self, n_params: int, n_lanes: int) -> Totals:
        """Return the totals before the first row: J^T r and J^T J v, residual sums, largest r^2."""
        vectors = np.zeros((1 + self.n_directions, n_params))
        return vectors, np.zeros((2, n_lanes)), np.zeros(())

    def strip_rows(self, n_params: int, batch_rows: int) -> int:
        """Return the number of rows that a CPU processes at a time.

        It is at least p if possible; otherwise, most time goes into adding vectors of length p.
        """
        enough = 1 << max(n_params - 1, 1).bit_length()
        return min(max(strip_rows_for(batch_rows), enough), batch_rows)

    def row_bytes(self, n_params: int) -> int:
        """Return about how many bytes of intermediate results a GPU stores per row of a batch."""
        return 8 * _STORED_VALUES

    def terms(self, model: Model, loss: str, strip_rows: int | None) -> MakeTerms:
        """Return ``GradientTerms`` or ``DiagonalTerms`` with model and settings bound."""
        max_directions = _MAX_DIRECTIONS if strip_rows is None else max(self.n_directions, 1)
        kind = DiagonalTerms if self.is_diagonal else GradientTerms
        return partial(kind, model, loss, max_directions)

    def point(self, request: Request) -> tuple[NDArray[np.float64], ...]:
        """Return the parameters, and the vectors v of the products ``J^T J v``.

        The vectors are zero if the request has none.
        """
        if request.directions is not None:
            return request.params, request.directions
        return request.params, np.zeros((self.n_directions, len(request.params)))

    def finish(self, totals: Totals, loss: Loss, **common: Any) -> GradientSums:
        """Return the result: add up the partial sums of SIMD lanes.

        ``common`` are the fields that all ``Sums`` have.
        """
        vectors, residuals, largest = totals
        rho, chi2 = residuals.sum(axis=-1)
        twice_cost = chi2 if loss.is_linear else loss.f_scale**2 * rho
        return GradientSums(
            jtr=vectors[0],
            products=vectors[1:],
            cost=0.5 * float(twice_cost),
            chi2=float(chi2),
            largest=float(np.sqrt(largest)),
            **common,
        )


def gradient_kernel(
    model: Model,
    batch_rows: int,
    platforms: tuple[str, ...] = (CPU,),
    loss: Loss | None = None,
    longest_block: int | None = None,
    **options: Any,
) -> Kernel[GradientSums]:
    """Trace the kernel that computes ``GradientReduction(**options)`` of a model.

    The other arguments are those of ``Kernel.trace``.

    Raises
    ------
    ModelError
        If the model is not differentiable in both forward and reverse mode.
    """
    try:
        reduction = GradientReduction(**options)
        return Kernel.trace(reduction, model, batch_rows, platforms, loss, longest_block)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"Conjugate gradients, used for the {model.n_params} parameters of the model "
            f"{model.name!r}, need derivatives in forward and reverse mode "
            f"({error}). Use lax.scan instead of lax.while_loop, jax.custom_jvp instead of "
            f"custom_vjp, or a cg_param_threshold above {model.n_params}."
        ) from error
