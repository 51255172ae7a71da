"""Multistart by successive halving: improve all candidates, eliminate the worst, repeat.

A candidate is a starting point. Random points rarely lie at the bottom of a narrow basin, so each
is improved by a few Levenberg-Marquardt steps before its cost is compared. From round to round,
there are fewer candidates and more rows, all of them from the sample. A call of one compiled
program improves a few candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.jacobian import choose_mode
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.model.program import compiled_once
from nlsq_dask.solvers.candidates import FIRST_DAMPING, Candidate, Problem, improve_group
from nlsq_dask.warmup.normalized_sample import NormalizedSample, to_device

Vector = NDArray[np.float64]

_GROUP_SIZE = 4  # vectorized candidates; larger groups waste work in the late rounds
_BATCH_ROWS = 32  # per minibatch in the first round


@dataclass(frozen=True)
class MultistartSettings:
    """Settings of successive halving; ``HybridStreamingConfig`` explains them."""

    n_starts: int
    sampler: str  # "lhs", "sobol" or "halton"
    n_rounds: int
    elimination_fraction: float
    batches_per_round: int
    center_on_p0: bool
    scale_factor: float
    seed: int

    def rows_of_round(self, number: int) -> int:
        """Return how many rows round ``number``, from 0, uses if the sample is large enough."""
        return self.batches_per_round * _BATCH_ROWS << number

    @property
    def max_rows(self) -> int:
        """Number of rows that the last round uses if the sample is large enough."""
        return self.rows_of_round(self.n_rounds - 1)


@dataclass(frozen=True)
class Round:
    """Result of a round."""

    n_rows: int
    # Mean squared weighted residual (f_scale^2 rho with a robust loss) per candidate, shape (n,);
    # infinite for a non-finite model, NaN for candidates eliminated in earlier rounds.
    losses: NDArray[np.float64]
    survivors: NDArray[np.int64]  # remaining candidates, the best first
    params: NDArray[np.float64]  # of all candidates, normalized, shape (n, p)


@dataclass(frozen=True)
class SuccessiveHalving:
    """Successive halving for one sample; ``key`` is that of its compiled function in the cache."""

    model: Model
    problem: Problem
    mode: Mode  # forward or reverse, for the Jacobian
    loss: str
    n_rows: int  # available rows
    key: str  # of the program in the cache of the process

    @classmethod
    def build(cls, sample: NormalizedSample) -> SuccessiveHalving:
        """Prepare successive halving for a sample, whose rows must be in random order."""
        model, n_padded = sample.model, len(sample.rows)
        arrays = sample.arrays()
        arrays["inverse_sigma"] = np.broadcast_to(arrays["inverse_sigma"], n_padded)
        problem = to_device(Problem(**arrays, penalty=sample.penalty.jacobian(model.n_params, 1)))
        with x64():
            mode = choose_mode(model, model.jaxpr())
        loss, groups = sample.loss.name, sample.penalty.groups
        key = f"successive halving {sample.fingerprint} {n_padded} rows {loss} {groups} {mode}"
        return cls(model, problem, mode, loss, sample.n_rows, key)

    def rounds(
        self,
        candidates: NDArray[np.float64],
        settings: MultistartSettings,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[Round]:
        """Run the rounds and yield the result of each.

        Parameters
        ----------
        candidates : ndarray, shape (n, p)
            Starting points, as normalized parameters inside the bounds.
        settings : MultistartSettings
        check : callable
            Called before some candidates are improved; an exception that it raises ends the round.
        """
        params = candidates.copy()
        damping = np.full(len(params), FIRST_DAMPING)
        survivors = np.arange(len(params))
        for number in range(settings.n_rounds):
            n_rows = min(settings.rows_of_round(number), self.n_rows)
            improved = self._improve(params[survivors], damping[survivors], n_rows, check)
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
        n_rows: int,
        check: Callable[[], None],
    ) -> Candidate:
        """Return candidates after a few Levenberg-Marquardt steps on the first ``n_rows`` rows.

        ``damping`` is the Levenberg-Marquardt parameter of each candidate.
        """
        groups = []
        for start in range(0, len(params), _GROUP_SIZE):
            check()
            index = np.arange(start, min(start + _GROUP_SIZE, len(params)))
            groups.append(self._improve_group(params[index], damping[index], n_rows))
        return Candidate(*map(np.concatenate, zip(*groups, strict=True)))

    def _improve_group(
        self, params: NDArray[np.float64], damping: NDArray[np.float64], n_rows: int
    ) -> Candidate:
        # Padded by repetition, so that one program is compiled.
        index = np.resize(np.arange(len(params)), _GROUP_SIZE)
        group = Candidate(params[index], damping[index], np.zeros(_GROUP_SIZE))
        improve = partial(improve_group, self.model, self.mode, self.loss)
        with x64():
            args = group, np.int64(n_rows)
            program = compiled_once(
                self.key, lambda: jax.jit(improve).lower(self.problem, *args).compile()
            )
            improved = program(self.problem, *args)
            return Candidate(*(np.asarray(array)[: len(params)] for array in improved))


def draw_box(
    start: Vector, low: Vector, high: Vector, settings: MultistartSettings
) -> tuple[Vector, Vector]:
    """Return the box, within the bounds, from which candidates are drawn.

    Parameters
    ----------
    start, low, high : ndarray, each of shape (p,)
        Start and bounds; bounds may be infinite.
    settings : MultistartSettings
        ``scale_factor`` and ``center_on_p0`` define the box, see ``HybridStreamingConfig``.
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
    """Return the candidates, shape (n_starts, p), the first of which is ``start``.

    Parameters
    ----------
    start, low, high : ndarray, each of shape (p,)
    settings : MultistartSettings
    """
    from scipy.stats import qmc  # takes a third of a second to import

    n_drawn, n_params = settings.n_starts - 1, len(start)
    rng = np.random.default_rng(settings.seed)
    match settings.sampler:
        case "sobol":
            # Balanced for powers of two; the first ``n_drawn`` of them are still well spread.
            unit = qmc.Sobol(n_params, rng=rng).random_base2(n_drawn.bit_length())[:n_drawn]
        case "halton":
            unit = qmc.Halton(n_params, rng=rng).random(n_drawn)
        case _:
            unit = qmc.LatinHypercube(n_params, rng=rng).random(n_drawn)
    box_low, box_high = draw_box(start, low, high, settings)
    return np.concatenate([start[None], box_low + unit * (box_high - box_low)])
