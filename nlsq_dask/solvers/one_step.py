"""Error of a Gauss-Newton step that no further pass verifies, estimated with a sample of the rows.

At a point p_0 within a few standard errors of the solution, one step from the sums over all rows
leads so close to the solution that a pass there would only confirm it (the one-step estimator of
Le Cam). A step d has two errors of second order:

- ``H^-1 sum_i r_i (J_i(p_0 + d) - J_i(p_0))`` with the residuals r at the solution: J^T J leaves
  out the second derivatives, which the residuals multiply. If the residuals are noise, this is
  noise as well. If the model does not describe the data, it has a mean. The sample yields both.
- the change of J^T J along the step. The sample predicts it, up to the noise of the sample.

To tell them apart, the sample is evaluated twice: with its residuals at ``p_0 + d``, and with the
same residuals of opposite sign (``Mirror``). The first error changes its sign, the second does not.
Their variances follow from batches of the sample, whose rows are far apart. Over all rows, the
residuals may vary more: neighbors are correlated, or the sample lacks rare outliers. Both show in
sums over all rows, and increase the estimate (``_excess_variance``).

References
----------
L. Le Cam, "On the asymptotic theory of estimation and testing hypotheses", Proceedings of the Third
Berkeley Symposium on Mathematical Statistics and Probability 1, 129-156 (1956).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers.gauss_newton import Proposal, State
from nlsq_dask.solvers.iterate import Iterate
from nlsq_dask.solvers.surrogate import Reduce, Surrogate, is_of_use, is_well_conditioned
from nlsq_dask.solvers.trust_region import Vector

Matrix = NDArray[np.float64]

# Standard deviations of its sampling error above which a mean of the first error is not chance.
# They are estimated from a few batches, so the distribution has long tails.
_SIGNIFICANT = 3.0
_MIN_DOF = 8  # degrees of freedom of the regression over the batches
_SIMILAR = 2.0  # maximum ratio of J^T J of all rows and of the sample, along any direction
MAX_PARAMS = 200  # more would take too much memory and time
_NEARLY_LINEAR = 0.1  # maximum change of the step by second order, relative to the step


@dataclass(frozen=True)
class Mirror:
    """Sums over a sample of rows, with the residuals at some parameters, and with their negatives.

    A sum over all rows of the sample is the sum over the batches.
    """

    whole: tuple[Reduce, Reduce]  # with the residuals, and with their negatives
    batches: Iterable[tuple[Reduce, Reduce]]  # used once, so that none needs to be kept

    def mean(self, params: Vector) -> NormalEquations:
        """Return the mean of the sums with both signs: those of a model that fits the rows."""
        return _mean(self.whole, params)


def _mean(pair: tuple[Reduce, Reduce], params: Vector) -> NormalEquations:
    one, other = (reduce(params) for reduce in pair)
    return replace(
        one,
        jtj=0.5 * (one.jtj + other.jtj),
        jtr=0.5 * (one.jtr + other.jtr),
        cost=0.5 * (one.cost + other.cost),
        n_nonfinite=one.n_nonfinite + other.n_nonfinite,
    )


@dataclass(frozen=True)
class _Changes:
    """Changes along a step in each batch, as errors of the parameters in standard errors."""

    noise: Matrix  # from the residuals, shape (n_batches, p)
    curvature: Matrix  # from the change of J^T J, shape (n_batches, p)
    # Largest sampling error of an element of the covariance, relative to the variances.
    covariance_error: float
    weight: float  # number of all rows per row of the sample
    unit: Vector  # standard errors of the parameters, shape (p,)

    def total(self, of_batches: Matrix) -> Vector:
        """Return the estimate for all rows."""
        return np.asarray(self.weight * of_batches.sum(axis=0))

    def sampling_error(self, of_batches: Matrix) -> Vector:
        """Return the standard deviation of ``total``."""
        deviation = of_batches.std(axis=0, ddof=1)
        return np.asarray(self.weight * np.sqrt(len(of_batches)) * deviation)


class _Spread:
    """Standard deviation of a sum of p-by-p matrices, of which none is kept.

    Parameters
    ----------
    unit : ndarray, shape (p, p)
        What the elements are divided by.
    """

    def __init__(self, unit: Matrix) -> None:
        self._unit, self._count = unit, 0
        self._mean, self._squares = np.zeros_like(unit), np.zeros_like(unit)

    def add(self, matrix: Matrix) -> None:
        """Add a matrix."""
        self._count += 1
        deviation = matrix / self._unit - self._mean
        self._mean += deviation / self._count
        self._squares += deviation**2 * (1.0 - 1.0 / self._count)

    def of_total(self) -> float:
        """Return the largest standard deviation of an element of the sum."""
        return float(np.sqrt(self._squares.max() * self._count / (self._count - 1)))


def one_step(state: State, mirror: Mirror, n_fitted: int) -> Proposal | None:
    """Return a proposal with an estimate of its error, or None if it cannot be estimated.

    Parameters
    ----------
    state : State
        State after the first pass over all rows.
    mirror : Mirror
        The sample, mirrored near the solution.
    n_fitted : int
        Number of rows for which the iterate of ``state`` is about the solution.

    Returns
    -------
    Proposal or None
        A forecast that uses the curvature of the model alone or, if the residuals of the sample
        are systematic, the second derivatives that they multiply as well.
    """
    iterate = state.iterate
    if iterate.sums.triangle is not None or not is_well_conditioned(iterate):
        return None
    at_iterate = mirror.mean(iterate.params)
    if not (is_of_use(iterate, at_iterate) and _is_similar(iterate, at_iterate)):
        return None
    surrogate = Surrogate(iterate, at_iterate, mirror.mean, np.zeros_like(iterate.sums.jtj))
    proposal = surrogate.proposal()
    if proposal is None or not proposal.full or _touches_bounds(iterate, proposal):
        return None
    if not _is_nearly_linear(iterate, proposal):
        return None
    changes = _changes(iterate, proposal.params, mirror)
    if changes is None:
        return None
    mean, sampling_error = changes.total(changes.noise), changes.sampling_error(changes.noise)
    # Of the sum over all rows itself:
    noise = sampling_error * np.sqrt(
        _excess_variance(iterate, proposal, at_iterate, n_fitted) / changes.weight
    )
    if (np.abs(mean) > _SIGNIFICANT * sampling_error).any():
        proposal = _moved(iterate, proposal, -mean * changes.unit)
    # A mean below its sampling error is possible in any case.
    first = np.maximum(noise, sampling_error)
    error = np.hypot(first, changes.sampling_error(changes.curvature))
    return replace(
        proposal,
        jtj=_predicted_jtj(iterate, proposal.params, mirror),
        error=float(error.max()),
        covariance_error=changes.covariance_error,
    )


def _moved(iterate: Iterate, proposal: Proposal, step: Vector) -> Proposal:
    """Return a proposal after a further, short step, within the bounds."""
    s = iterate.settings
    params = np.clip(proposal.params + step, s.low, s.high)
    return replace(proposal, params=params, step=(params - iterate.params) * iterate.scale)


def _predicted_jtj(iterate: Iterate, params: Vector, mirror: Mirror) -> Matrix:
    """Return J^T J over all rows at ``params``; it depends on the residuals of a robust loss.

    The change over the sample is transformed as J^T J of the sample is to that of all rows (a ratio
    estimate), which corrects a part of its sampling error.
    """
    old, new = (mirror.whole[0](at) for at in (iterate.params, params))
    of_all, of_sample = (np.linalg.cholesky(jtj) for jtj in (iterate.sums.jtj, old.jtj))
    root = np.linalg.solve(of_sample.T, of_all.T).T
    return np.asarray(iterate.sums.jtj + root @ (new.jtj - old.jtj) @ root.T)


def _touches_bounds(iterate: Iterate, proposal: Proposal) -> bool:
    """Whether a parameter is at a bound, where the error of a step is another one."""
    s, points = iterate.settings, np.array([iterate.params, proposal.params])
    return bool(((points <= s.low) | (points >= s.high)).any())


def _is_similar(iterate: Iterate, sample: NormalEquations) -> bool:
    """Whether the sample constrains the parameters about as all rows do.

    It does not if it misses the only rows that depend on a parameter.
    """
    root = _inverse_root(iterate)
    if not np.isfinite(root).all():
        return False
    share = sample.n_used / iterate.sums.n_used
    ratios = np.linalg.eigvalsh(root.T @ sample.jtj @ root) / share
    return bool(ratios[0] >= 1.0 / _SIMILAR and ratios[-1] <= _SIMILAR)


def _inverse_root(iterate: Iterate) -> Matrix:
    """Return a matrix R such that ``R R^T`` inverts J^T J; infinite if that is singular."""
    return np.asarray(iterate.svd.inverse_root / iterate.scale[:, None])


def _is_nearly_linear(iterate: Iterate, proposal: Proposal) -> bool:
    """Whether a step differs little from the step without second order."""
    linear = iterate.moved(iterate.full_step)
    steps = proposal.params - linear, proposal.params - iterate.params
    change, whole = (float(step @ iterate.sums.jtj @ step) for step in steps)
    return change <= _NEARLY_LINEAR**2 * whole


def _excess_variance(
    iterate: Iterate, proposal: Proposal, sample: NormalEquations, n_fitted: int
) -> float:
    """Return the variance of sums over all rows, relative to that of independent rows like these.

    It is at least 1. The first factor compares mean squares of the residuals. The second compares
    the length of the step, in standard errors, with that between the solutions on two sets of
    independent rows. It is larger if neighbors are correlated, or if blocks differ.
    """
    sums, step = iterate.sums, proposal.params - iterate.params
    of_all, of_sample = sums.variance(0), sample.variance(0)
    if not of_sample > 0.0:
        return np.inf
    expected = max(sums.n_used / n_fitted - 1.0, 0.0) * len(step) * of_all
    length = float(step @ sums.jtj @ step)
    return max(of_all / of_sample, 1.0) * max(length / expected if expected else 1.0, 1.0)


def _changes(iterate: Iterate, params: Vector, mirror: Mirror) -> _Changes | None:
    """Return what changes in each batch of the sample on the way to ``params``.

    None if the model is not finite there.
    """
    root, step = _inverse_root(iterate), params - iterate.params
    inverse = root @ root.T
    dof = max(iterate.sums.n_used - len(params), 1)
    deviation = np.sqrt(np.diag(inverse))
    error = deviation * np.sqrt(2.0 * iterate.sums.cost / dof)
    if not (error > 0.0).all():
        return None
    slopes, gradients, n_used = [], [], 0
    jtj_change, relative = np.zeros_like(inverse), _Spread(np.outer(deviation, deviation))
    for batch in mirror.batches:
        before, after = (_mean(batch, at) for at in (iterate.params, params))
        if not (before.is_finite and after.is_finite):
            return None
        own = [batch[0](at).jtj for at in (iterate.params, params)]
        others = [batch[1](at).jtr for at in (iterate.params, params)]
        # The step was computed with J^T J for these residuals, not with the mean for both signs,
        # which differs if the loss is robust.
        mirrored = (own[0] - before.jtj) @ step
        slopes.append([before.jtr - others[0] + mirrored, after.jtr - others[1]])
        gradients.append(after.jtr - before.jtr - before.jtj @ step)
        jtj_change += own[1] - own[0]
        relative.add(inverse @ (own[1] - own[0]) @ inverse)
        n_used += before.n_used
    weight = iterate.sums.n_used / n_used
    old, new = np.array(slopes).transpose(1, 0, 2)
    # Over all rows, J^T r is zero at the solution. So what is in proportion to J adds nothing to
    # the sum over all rows, but much to the variance between batches. A half of the change of J^T J
    # is the larger part of it, a regression over the batches yields the rest.
    noise = new - old - 0.5 * weight * new @ inverse @ jtj_change
    noise = noise @ inverse / error
    n_regressors = 0
    if len(noise) >= _MIN_DOF + len(params):
        noise = noise - new @ np.linalg.lstsq(new, noise)[0]
        n_regressors = len(params)
    return _Changes(
        noise * np.sqrt(len(noise) / (len(noise) - n_regressors)),
        np.array(gradients) @ inverse / error,
        weight * relative.of_total(),
        weight,
        error,
    )
