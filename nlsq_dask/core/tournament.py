"""A tournament of starts: improve all of them a little, let the worse ones go, and again.

Candidates are drawn too thinly to lie at the bottom of a narrow basin, so each is led downhill by a
few Levenberg-Marquardt steps before it is judged by its cost. A round works on a minibatch of the
sample; there are fewer candidates from round to round, and more rows to tell them apart.

All candidates of a round are improved by one call of one program, which is the same for all rounds
and any number of candidates: it takes them in groups, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.kernels.losses import LINEAR, Loss, robust
from nlsq_dask.kernels.penalty import GroupVariance
from nlsq_dask.model.jacobian import Mode, choose_mode, residual_and_jacobian
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Model
from nlsq_dask.model.program import compiled_once
from nlsq_dask.rows.rows import BLOCK_ROWS, Rows

_GROUP = 4  # candidates side by side; more would only be computed in vain in the late rounds
_STEPS = 10  # trial points of a candidate in a round
_BATCH_ROWS = 32  # of a minibatch in the first round
# Multiples of the curvature that are added to it: at first, and by what they change. The first
# steps are short, because long ones leave narrow basins.
_DAMPING, _LESS, _MORE = 1.0, 0.3, 3.0
_LEAST_DAMPING, _MOST_DAMPING = 1e-9, 1e9


class Problem(NamedTuple):
    """Everything that differs from fit to fit, as arguments of the program."""

    y: Any
    x: Any
    inverse_sigma: Any
    f_scale: Any
    scales: Any
    offsets: Any
    low: Any
    high: Any
    penalty: Any


class Objective(NamedTuple):
    """The mean squared weighted residual with half its derivatives by normalized parameters.

    A penalty is part of it, as in ``GroupVariance``.

    Infinite where anything is not finite. With a robust loss ``f_scale^2 rho`` takes the place of
    the squares.
    """

    loss: Any
    gradient: Any
    curvature: Any


class Candidate(NamedTuple):
    """A point, normalized, shape (p,), with its damping and the loss where it was last judged."""

    params: Any
    damping: Any
    loss: Any


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


def _objective(
    model: Model, mode: Mode, loss: str, problem: Problem, n_rows: Any
) -> Callable[[Any], Objective]:
    """Return the objective over the first so many rows.

    It is summed block by block, so that the Jacobian of all rows is never in memory.
    """
    size = min(BLOCK_ROWS, problem.y.shape[0])
    linearized = residual_and_jacobian(model, mode)
    factors = jnp.append(problem.scales, 1.0)
    p = model.n_params

    def objective(q: Any) -> Objective:
        params = (q * problem.scales + problem.offsets).astype(model.dtype)

        def add(i: Any, sums: Any) -> Any:
            y, x, inverse_sigma = jax.tree.map(
                lambda array: lax.dynamic_slice_in_dim(array, i * size, size),
                (problem.y, problem.x, problem.inverse_sigma),
            )
            _, stacked = linearized(x, y.astype(model.dtype), params, factors)
            counts = i * size + jnp.arange(size) < n_rows
            stacked = jnp.where(counts, stacked * inverse_sigma, 0.0)
            terms = stacked[-1] ** 2
            if loss != LINEAR:
                terms, jacobian_scale, residual_scale = robust(loss, terms / problem.f_scale**2)
                terms = problem.f_scale**2 * terms
                stacked = stacked * jnp.where(
                    jnp.arange(p + 1)[:, None] < p, jacobian_scale, residual_scale
                )
            return sums[0] + terms.sum(), sums[1] + stacked @ stacked.T

        nothing = jnp.zeros(()), jnp.zeros((p + 1, p + 1))
        n_blocks = (n_rows + size - 1) // size
        total, gram = jax.tree.map(
            lambda array: array / n_rows, lax.fori_loop(0, n_blocks, add, nothing)
        )
        further = jnp.column_stack([problem.penalty * problem.scales, problem.penalty @ params])
        total, gram = total + (further[:, p] ** 2).sum(), gram + further.T @ further
        is_finite = jnp.isfinite(total) & jnp.isfinite(gram).all()
        return Objective(jnp.where(is_finite, total, jnp.inf), gram[:p, p], gram[:p, :p])

    return objective


def _step(problem: Problem, params: Any, damping: Any, here: Objective) -> Any:
    """Return the point to which a damped Gauss-Newton step leads, inside the bounds.

    Parameters on a bound do not move outwards, so that the others are not led astray by them.
    """
    low, high = problem.low, problem.high
    held = ((params <= low) & (here.gradient > 0)) | ((params >= high) & (here.gradient < 0))
    norms = jnp.sqrt(jnp.diag(here.curvature))
    free = ~held & (norms > 0)
    scale = jnp.where(free, norms, 1.0)
    eye = jnp.eye(len(params))
    curvature = jnp.where(free[:, None] & free, here.curvature / scale[:, None] / scale, eye)
    slope = jnp.where(free, here.gradient / scale, 0.0)
    factor = jax.scipy.linalg.cho_factor(curvature + damping * eye)
    trial = jnp.clip(params - jax.scipy.linalg.cho_solve(factor, slope) / scale, low, high)
    return jnp.where(jnp.isfinite(trial).all(), trial, params)


def _improved(
    problem: Problem, objective: Callable[[Any], Objective], candidate: Candidate
) -> Candidate:
    """Lead a candidate downhill by a fixed number of trial points."""

    def attempt(_: Any, state: Any) -> Any:
        params, damping, here = state
        trial = _step(problem, params, damping, here)
        there = objective(trial)
        is_better = there.loss < here.loss
        damping = jnp.clip(
            damping * jnp.where(is_better, _LESS, _MORE), _LEAST_DAMPING, _MOST_DAMPING
        )
        kept = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), (trial, there), (params, here)
        )
        return kept[0], damping, kept[1]

    start = candidate.params, candidate.damping, objective(candidate.params)
    params, damping, here = lax.fori_loop(0, _STEPS, attempt, start)
    return Candidate(params, damping, here.loss)


@dataclass(frozen=True)
class Tournament:
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
    def prepare(
        cls,
        model: Model,
        rows: Rows,
        n_rows: int,
        affine: tuple[NDArray[np.float64], NDArray[np.float64]],
        bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
        loss: Loss,
        penalty: GroupVariance,
        fingerprint: str,
    ) -> Tournament:
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
        self, candidates: NDArray[np.float64], config: HybridStreamingConfig
    ) -> Iterator[Round]:
        """Hold the tournament.

        Parameters
        ----------
        candidates : ndarray, shape (n, p)
            Normalized, inside the bounds.
        config : HybridStreamingConfig
        """
        params = candidates.copy()
        damping = np.full(len(params), _DAMPING)
        survivors = np.arange(len(params))
        for number in range(config.elimination_rounds):
            n_rows = min(rows_of_round(number, config), self.n_rows)
            found = self._improve(params, damping, survivors, n_rows)
            params[survivors], damping[survivors] = found.params, found.damping
            losses = np.full(len(params), np.nan)
            losses[survivors] = found.loss
            n_staying = len(survivors) - int(config.elimination_fraction * len(survivors))
            n_staying = max(min(n_staying, int(np.isfinite(found.loss).sum())), 1)
            survivors = survivors[np.argsort(found.loss, kind="stable")][:n_staying]
            yield Round(n_rows, losses, survivors, params.copy())

    def _improve(
        self,
        params: NDArray[np.float64],
        damping: NDArray[np.float64],
        which: NDArray[np.int64],
        n_rows: int,
    ) -> Candidate:
        """Improve some of the candidates on so many rows."""
        # As many groups in all rounds, and a power of two: few programs are enough for all numbers.
        most_groups = 1 << (-(-len(params) // _GROUP) - 1).bit_length()
        places = np.resize(which, (most_groups, _GROUP))
        groups = Candidate(params[places], damping[places], np.zeros(places.shape))
        n_groups = -(-len(which) // _GROUP)
        with x64():
            args = jax.tree.map(jnp.asarray, (groups, n_groups, n_rows))
            program = compiled_once(
                f"{self.key} {places.shape} candidates",
                lambda: jax.jit(self._improve_groups).lower(self.problem, *args).compile(),
            )
            found = jax.tree.map(np.asarray, program(self.problem, *args))
        flat = (array.reshape(-1, *array.shape[2:])[: len(which)] for array in found)
        return Candidate(*flat)

    def _improve_groups(
        self, problem: Problem, groups: Candidate, n_groups: Any, n_rows: Any
    ) -> Candidate:
        objective = _objective(self.model, self.mode, self.loss, problem, n_rows)
        improve: Callable[[Candidate], Candidate] = jax.vmap(
            lambda candidate: _improved(problem, objective, candidate)
        )

        def improve_group(i: Any, groups: Candidate) -> Candidate:
            found = improve(Candidate(*(array[i] for array in groups)))
            pairs = zip(groups, found, strict=True)
            return Candidate(*(array.at[i].set(new) for array, new in pairs))

        result: Candidate = lax.fori_loop(0, n_groups, improve_group, groups)
        return result


def rows_of_round(number: int, config: HybridStreamingConfig) -> int:
    """Return how many rows a round is judged on if there are as many."""
    return config.batches_per_round * _BATCH_ROWS << number
