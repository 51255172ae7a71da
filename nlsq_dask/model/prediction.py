"""``PredictionKernel``: computes values of the model and their standard errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jacobian import choose_mode, residual_and_jacobian
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import Program, has_custom_rules, traced_once
from nlsq_dask.rows.rows import STRIP_ROWS, Layout, Rows

_MAX_DERIVATIVES = 2**22  # that ``trace_slopes`` computes at once


@dataclass(frozen=True)
class PredictionKernel:
    """Compiled program that evaluates the model at rows of data, as ``predict`` does."""

    program: Program
    layout: Layout
    batch_rows: int  # rows per call of the program
    with_std: bool = False  # whether there is a second output: standard errors, or ``trace_slopes``
    n_root: int = 0  # size of the argument ``root``
    # Whether the model has its own rules of differentiation, which its values do not identify.
    has_custom_rules: bool = False

    @classmethod
    def trace(
        cls, model: Model, batch_rows: int = STRIP_ROWS * 16, with_std: bool = False
    ) -> PredictionKernel:
        """Trace the model, with standard errors if requested, for ``batch_rows`` rows per call."""
        p = model.n_params
        with x64():
            jaxpr = model.jaxpr()

        def values(x: Any, params: Any, root: Any) -> Any:
            return model(x, params.astype(model.dtype))[None]

        def values_and_std(x: Any, params: Any, root: Any) -> Any:
            ones = jnp.ones(p + 1, model.dtype)
            linearized = residual_and_jacobian(model, choose_mode(model, jaxpr))
            out, stacked = linearized(
                x, jnp.zeros(batch_rows, model.dtype), params.astype(model.dtype), ones
            )
            return jnp.stack([out, jnp.linalg.norm(root.T @ stacked[:p], axis=0)])

        def trace() -> Program:
            return Program.trace(
                values_and_std if with_std else values,
                model.x_specs(batch_rows),
                jax.ShapeDtypeStruct((p,), np.dtype("f8")),
                jax.ShapeDtypeStruct((p, p) if with_std else (0, 0), np.dtype("f8")),
            )

        signature = (cls, model.layout, model.dtype, model.mode, p, batch_rows, with_std)
        program = traced_once(signature, jaxpr, trace)
        n_root = p if with_std else 0
        return cls(program, model.layout, batch_rows, with_std, n_root, has_custom_rules(jaxpr))

    @classmethod
    def trace_slopes(cls, model: Model) -> PredictionKernel:
        """Trace the model, with the sum of its derivatives by all parameters in reverse mode.

        The sum shows whether all of them are finite, without a matrix of derivatives of many rows.
        """
        p = model.n_params
        batch_rows = max(min(_MAX_DERIVATIVES // p, STRIP_ROWS), 1)

        def of_row(row: Any, params: Any) -> Any:
            return model(tuple(leaf[None] for leaf in row), params)[0]

        def values_and_slopes(x: Any, params: Any, root: Any) -> Any:
            differentiated = jax.vmap(jax.value_and_grad(of_row, argnums=1), (0, None))
            values, gradients = differentiated(x, params.astype(model.dtype))
            return jnp.stack([values, gradients.sum(axis=1)])

        program = Program.trace(
            values_and_slopes,
            model.x_specs(batch_rows),
            jax.ShapeDtypeStruct((p,), np.dtype("f8")),
            jax.ShapeDtypeStruct((0, 0), np.dtype("f8")),
        )
        return cls(program, model.layout, batch_rows, with_std=True)

    def __call__(
        self,
        batches: Iterable[tuple[Rows, int]],
        params: NDArray[np.float64],
        root: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Evaluate the model at the rows of all batches.

        Parameters
        ----------
        batches : iterable of (Rows, int)
            Batches padded to ``batch_rows`` rows, each with its number of rows before padding.
        params : ndarray, shape (p,)
            Parameters of the model.
        root : ndarray, shape (p, p), optional
            Matrix for which ``root @ root.T`` is the covariance of the parameters, if there are
            standard errors; by default the identity.

        Returns
        -------
        ndarray, shape (1, n) or (2, n)
            Values at the n rows of all batches and, if ``with_std``, the second output.
        """
        if root is None:
            root = np.eye(self.n_root)
        results = [np.empty((1 + self.with_std, 0))]
        for rows, n_rows in batches:
            x = tuple(
                np.asarray(leaf, dtype)
                for leaf, dtype in zip(rows.x, self.layout.x_dtypes, strict=True)
            )
            results.append(np.asarray(self.program(x, params, root), np.float64)[:, :n_rows])
        return np.concatenate(results, axis=1)
