"""A tournament of starts: improve all of them a little, let the worse ones go, and again.

Candidates are drawn too thinly to lie at the bottom of a narrow basin, so each is led downhill by a
few Levenberg-Marquardt steps before it is judged by its cost. A round works on a minibatch of the
sample; there are fewer candidates from round to round, and more rows to tell them apart.

All candidates of a round are improved by one call of one program, which is the same for all rounds
and any number of candidates: it takes them in groups, side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from nlsq_dask.kernels.losses import Loss
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.model.jacobian import Mode, choose_mode
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import compiled_once
from nlsq_dask.rows.rows import Rows
from nlsq_dask.solvers.batched_lm import FIRST_DAMPING, Candidate, Problem, improve_groups

Vector = NDArray[np.float64]

_GROUP_SIZE = 4  # candidates side by side; more would only be computed in vain in the late rounds
_BATCH_ROWS = 32  # of a minibatch in the first round


@dataclass(frozen=True)
class MultistartSettings:
    """The options of the tournament; see those of ``HybridStreamingConfig``."""

    n_starts: int
    sampler: str  # "lhs", "sobol" or "halton"
    n_rounds: int
    elimination_fraction: float
    batches_per_round: int
    center_on_p0: bool
    scale_factor: float
    seed: int

    def rows_of_round(self, number: int) -> int:
        """Return how many rows a round is judged on if there are as many."""
        return self.batches_per_round * _BATCH_ROWS << number

    @property
    def max_rows(self) -> int:
        """Rows of the last round."""
        return self.rows_of_round(self.n_rounds - 1)


@dataclass(frozen=True)
class Round:
    """What a round has found.

    Attributes
    ----------
    n_rows : int
    losses : ndarray, shape (n,)
        The mean squared weighted residual (with a robust loss ``f_scale^2 rho``) of each candidate
        at the end of the round: infinite where the model is not finite, NaN for those that had left
        before.
    survivors : ndarray of int
        Candidates that stay, the best one first.
    params : ndarray, shape (n, p)
        Where the candidates are, normalized.
    """

    n_rows: int
    losses: NDArray[np.float64]
    survivors: NDArray[np.int64]
    params: NDArray[np.float64]


@dataclass(frozen=True)
class SuccessiveHalving:
    """A tournament that is ready to be held.

    Attributes
    ----------
    model : Model
    problem : Problem
    mode : Mode
        In which the Jacobian is made.
    loss : str
    n_rows : int
        Rows that there are at most for a round.
    key : str
        Identifies the program in the process's cache.
    """

    model: Model
    problem: Problem
    mode: Mode
    loss: str
    n_rows: int
    key: str

    @classmethod
    def build(
        cls,
        model: Model,
        rows: Rows,
        n_rows: int,
        affine: tuple[NDArray[np.float64], NDArray[np.float64]],
        bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
        loss: Loss,
        penalty: GroupVariance,
        fingerprint: str,
    ) -> SuccessiveHalving:
        """Gather what the program needs.

        Parameters
        ----------
        model : Model
        rows : Rows
            In random order, all finite; the first ``n_rows`` count.
        n_rows : int
        affine : tuple of ndarray, each of shape (p,)
            Scales and offsets of the normalization.
        bounds : tuple of ndarray, each of shape (p,)
            Lower and upper bounds, normalized.
        loss : Loss
        penalty : GroupVariance
        fingerprint : str
            Of the model and its x.
        """
        sigma = np.ones(len(rows)) if rows.sigma is None else rows.sigma.astype(np.float64)
        problem = Problem(
            y=rows.y.astype(np.float64),
            x=rows.x,
            inverse_sigma=1.0 / sigma,
            f_scale=np.float64(loss.f_scale),
            scales=affine[0],
            offsets=affine[1],
            low=bounds[0],
            high=bounds[1],
            penalty=penalty.jacobian(model.n_params, 1),
        )
        with x64():
            mode = choose_mode(model, model.jaxpr())
            problem = jax.tree.map(jnp.asarray, problem)
        key = f"tournament {fingerprint} {len(rows)} rows {loss.name} {penalty.groups}"
        return cls(model, problem, mode, loss.name, n_rows, key)

    def rounds(
        self, candidates: NDArray[np.float64], settings: MultistartSettings
    ) -> Iterator[Round]:
        """Hold the tournament.

        Parameters
        ----------
        candidates : ndarray, shape (n, p)
            Normalized, inside the bounds.
        settings : MultistartSettings
        """
        params = candidates.copy()
        damping = np.full(len(params), FIRST_DAMPING)
        survivors = np.arange(len(params))
        for number in range(settings.n_rounds):
            n_rows = min(settings.rows_of_round(number), self.n_rows)
            improved = self._improve(params, damping, survivors, n_rows)
            params[survivors], damping[survivors] = improved.params, improved.damping
            losses = np.full(len(params), np.nan)
            losses[survivors] = improved.loss
            n_survivors = len(survivors) - int(settings.elimination_fraction * len(survivors))
            n_survivors = max(min(n_survivors, int(np.isfinite(improved.loss).sum())), 1)
            survivors = survivors[np.argsort(improved.loss, kind="stable")][:n_survivors]
            yield Round(n_rows, losses, survivors, params.copy())

    def _improve(
        self,
        params: NDArray[np.float64],
        damping: NDArray[np.float64],
        survivors: NDArray[np.int64],
        n_rows: int,
    ) -> Candidate:
        """Improve some of the candidates on so many rows."""
        # As many groups in all rounds, and a power of two: few programs are enough for all numbers.
        max_groups = 1 << (-(-len(params) // _GROUP_SIZE) - 1).bit_length()
        indices = np.resize(survivors, (max_groups, _GROUP_SIZE))
        groups = Candidate(params[indices], damping[indices], np.zeros(indices.shape))
        n_groups = -(-len(survivors) // _GROUP_SIZE)
        improve = partial(improve_groups, self.model, self.mode, self.loss)
        with x64():
            args = jax.tree.map(jnp.asarray, (groups, n_groups, n_rows))
            program = compiled_once(
                f"{self.key} {indices.shape} candidates",
                lambda: jax.jit(improve).lower(self.problem, *args).compile(),
            )
            improved = jax.tree.map(np.asarray, program(self.problem, *args))
        flat = (array.reshape(-1, *array.shape[2:])[: len(survivors)] for array in improved)
        return Candidate(*flat)


def draw_box(
    start: Vector, low: Vector, high: Vector, settings: MultistartSettings
) -> tuple[Vector, Vector]:
    """Return the box from which candidates are drawn, which lies inside the bounds.

    Parameters
    ----------
    start, low, high : ndarray, each of shape (p,)
        The caller's start and bounds, which may be infinite.
    settings : MultistartSettings
        Its ``scale_factor`` and ``center_on_p0`` say how; the rule stands there.
    """
    is_bounded = np.isfinite(low) & np.isfinite(high)
    below, above = np.where(is_bounded, 0.5 * low, 0.0), np.where(is_bounded, 0.5 * high, 0.0)
    is_centered = is_bounded & (not settings.center_on_p0)
    center = np.where(is_centered, below + above, start)
    size = np.where(is_bounded, above - below, np.where(start == 0.0, 1.0, np.abs(start)))
    half_width = settings.scale_factor * size
    return np.maximum(center - half_width, low), np.minimum(center + half_width, high)


def draw_starts(
    start: Vector, low: Vector, high: Vector, settings: MultistartSettings
) -> NDArray[np.float64]:
    """Return all candidates, shape (n_starts, p), the first of which is ``start`` itself.

    Parameters
    ----------
    start, low, high : ndarray, each of shape (p,)
    settings : MultistartSettings
    """
    n_drawn, n_params = settings.n_starts - 1, len(start)
    rng = np.random.default_rng(settings.seed)
    match settings.sampler:
        case "sobol":
            # Balanced for powers of two only; the first of so many are still well spread.
            unit = qmc.Sobol(n_params, rng=rng).random_base2(n_drawn.bit_length())[:n_drawn]
        case "halton":
            unit = qmc.Halton(n_params, rng=rng).random(n_drawn)
        case _:
            unit = qmc.LatinHypercube(n_params, rng=rng).random(n_drawn)
    box_low, box_high = draw_box(start, low, high, settings)
    return np.concatenate([start[None], box_low + unit * (box_high - box_low)])
