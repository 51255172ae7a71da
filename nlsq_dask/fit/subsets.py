"""``SubsetFit``: approach the solution on growing subsets of the blocks, before all rows are read.

The solution on a subset is as far from that of all rows as chance explains: a few standard errors,
if the subset is an eighth of the blocks. From there, one pass over all rows is enough, and the step
after it needs no further pass (see ``solvers.one_step``).

References
----------
L. Bottou, F. E. Curtis and J. Nocedal, "Optimization methods for large-scale machine learning",
SIAM Review 60, 223-311 (2018), section 5.2, for methods with growing samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.fit.full_fit import FitContext
from nlsq_dask.fit.passes import Subset
from nlsq_dask.fit.sample import SampleProblem
from nlsq_dask.kernels.in_memory import DenseObjective
from nlsq_dask.kernels.kernel import Kernel
from nlsq_dask.kernels.request import Request
from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.gauss_newton import init_state
from nlsq_dask.solvers.iterate import Settings
from nlsq_dask.solvers.surrogate import forecast

Vector = NDArray[np.float64]
Sample = SampleProblem[DenseObjective]

_MIN_BLOCKS = 8  # of a subset, if the blocks differ
_MAX_RATIO = 1.1  # of mean squares of similar blocks: of residuals, and of columns of J
_CHANCE = 6.0  # standard deviations of the score statistic of a block that are attributed to chance


@dataclass(frozen=True)
class SubsetFit:
    """Steps on subsets of the blocks, each followed by a step on the next larger one."""

    context: FitContext
    kernel: Callable[[Request], Kernel[NormalEquations]]
    settings: Settings
    # Returns a better start, or None, if the sample, whose rows are new, was not representative
    # before. Its arguments are the sample, the start, the sums there, and the factor by which costs
    # differ by chance.
    find_start: Callable[[Sample, Vector, NormalEquations, float], Vector | None]

    def approach(self, sample: Sample, start: Vector) -> tuple[Vector, int]:
        """Return a point close to the solution, and the number of rows that determine it.

        The point is ``start`` if subsets would not help.

        Parameters
        ----------
        sample : SampleProblem
            Its rows are replaced by rows from the blocks of each subset.
        start : ndarray, shape (p,)
            Solution on the sample.
        """
        problem = self.context.problem
        n_fitted = sample.n_used
        subsets = self.context.passes.plan_subsets(problem.sample_rows, problem.config.random_seed)
        if not subsets or not self._is_representative(subsets[-1], sample, start):
            return start, n_fitted
        for subset in subsets:
            reached = self._step(subset, sample, start)
            if reached is None:
                break
            start, n_fitted = reached
            self.context.iterations.latest = start
        return start, n_fitted

    def _is_representative(self, subset: Subset, sample: Sample, params: Vector) -> bool:
        """Whether a subset tells enough of all rows: it has many blocks, or blocks are alike."""
        return len(subset.blocks) >= _MIN_BLOCKS or are_alike(
            [objective(params) for objective in sample.by_block()]
        )

    def _step(self, subset: Subset, sample: Sample, start: Vector) -> tuple[Vector, int] | None:
        """Return the point after a step on a subset, and the number of rows that determine it.

        None if no step can be computed.
        """
        problem, passes = self.context.problem, self.context.passes
        max_variance, chance = sample.max_expected(start), sample.chance
        request = Request(start, is_fresh=True)
        reduced = passes.run_on(
            subset,
            self.kernel(request),
            request,
            sample_rows=problem.sample_rows,
            seed=problem.config.random_seed,
        )
        sums = reduced.sums
        if sums is None or reduced.rows is None or not sums.is_finite:
            return None
        sample.replace_rows(reduced.rows)
        if sums.variance(0) > max_variance:
            other = self.find_start(sample, start, sums, chance)
            if other is not None:
                return (other, sample.n_used) if sample.objective(other).is_finite else None
        state = init_state(start, sums, self.settings)
        if state.stop is not None:
            return (start, sums.n_used) if state.stop.is_success else None
        proposal = forecast(state, sample.objective)
        return None if proposal is None else (proposal.params, sums.n_used)


def are_alike(sums: Sequence[NormalEquations]) -> bool:
    """Whether some blocks, or samples of them, are alike: each has about the same solution.

    Parameters
    ----------
    sums : sequence of NormalEquations
        The sums of each block at the solution of all of them.
    """
    if len(sums) < 2 or not all(one.is_finite and one.n_used for one in sums):
        return False
    squares = np.array([[*np.diag(one.jtj), 2.0 * one.cost] for one in sums])
    means = squares / np.array([one.n_used for one in sums])[:, None]
    if (means.max(axis=0) > _MAX_RATIO * means.min(axis=0)).any():
        return False
    p = len(sums[0].jtr)
    variance = sum(2.0 * one.cost for one in sums) / sum(one.n_used for one in sums)
    # The score statistic of a block has a chi-square distribution with p degrees of freedom.
    limit = p + _CHANCE * np.sqrt(2.0 * p) + _CHANCE
    steps = [np.linalg.lstsq(one.jtj, one.jtr)[0] for one in sums]
    return all(one.jtr @ step <= limit * variance for one, step in zip(sums, steps, strict=True))
