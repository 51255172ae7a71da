"""Forecast of the minimum of the cost over all rows, from one pass and a sample of the rows.

A Gauss-Newton step uses cost c, gradient g and H = J^T J over all rows at the current parameters
p_0, which describe the cost to second order. A forecast adds higher orders, taken from a sample. It
minimizes

    S(p) = w F(p) + (c - w c_s) + (g - w g_s)^T d + 1/2 d^T (H - w H_s) d,    d = p - p_0

where F is the cost of the sample, c_s, g_s and H_s are its cost, gradient and J^T J at p_0, and w
is the number of all rows per row of the sample. At p_0, S has the gradient and J^T J of all rows.
No data are read. A forecast is a trial point like any other, accepted or rejected by the sums over
all rows, so a sample that is not representative costs passes but no accuracy; after two forecasts
with little progress, no more are made.

Secant updates correct the curvature of S with the gradients over all rows at earlier points.

References
----------
J. E. Dennis, D. M. Gay and R. E. Welsch, "An adaptive nonlinear least-squares algorithm", ACM
Transactions on Mathematical Software 7, 348-368 (1981), for the secant updates.
M. I. Jordan, J. D. Lee and Y. Yang, "Communication-efficient distributed statistical inference",
Journal of the American Statistical Association 114, 668-681 (2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.kernels.sums import NormalEquations
from nlsq_dask.solvers import gauss_newton as gn
from nlsq_dask.solvers.iterate import Iterate
from nlsq_dask.solvers.trust_region import Vector

Reduce = Callable[[Vector], NormalEquations]

_MAX_ITERATIONS = 60  # evaluations of the sample; large residuals converge linearly
_TOL_SHARE = 0.01  # of the fit's tolerance
_MIN_CURVATURE = 0.1  # relative to diag(J^T J) of all rows; below it, the correction is ignored
_MAX_SECANT = 0.5  # maximum secant correction, relative to J^T J
# Maximum condition number, times sqrt(1 / epsilon), for differences of two J^T J to be accurate.
_MAX_CONDITION = 0.1
_MAX_REJECTED = 2  # rejected forecasts after which no more are made


@dataclass(frozen=True)
class Surrogate:
    """Approximation S(p) of the cost over all rows near p_0, made from a sample of the rows.

    The formula is that of the module. Called with parameters p, it returns S(p) with its gradient
    and curvature, in the form of sums over all rows. ``secant`` is added to the curvature.
    """

    iterate: Iterate  # at p_0
    at_iterate: NormalEquations  # sums of the sample at p_0
    reduce: Reduce  # returns the sums of the sample
    secant: NDArray[np.float64]  # correction of the curvature

    def __call__(self, params: Vector) -> NormalEquations:
        """Return the predicted sums over all rows at ``params``."""
        exact, old, new = self.iterate.sums, self.at_iterate, self.reduce(params)
        weight = exact.n_used / old.n_used
        step = params - self.iterate.params
        curvature = exact.jtj - weight * old.jtj + self.secant
        slope = exact.jtr - weight * old.jtr
        jtj = weight * new.jtj + curvature
        if (np.diag(jtj) < _MIN_CURVATURE * np.diag(exact.jtj)).any():
            jtj = exact.jtj
        cost = weight * (new.cost - old.cost) + exact.cost
        cost += float((slope + 0.5 * curvature @ step) @ step)
        if cost < 0.0:  # rounding for a perfect fit, otherwise outside the domain of S
            cost = 0.0 if cost >= -self.iterate.cost_noise else np.inf
        return replace(
            exact,
            triangle=None,
            jtj=jtj,
            jtr=weight * new.jtr + slope + curvature @ step,
            cost=cost,
            n_nonfinite=new.n_nonfinite,
            candidate_costs=np.zeros(0),
        )

    def with_secant_update(self, earlier: Iterate) -> Surrogate:
        """Return a surrogate whose curvature matches the gradient over all rows at ``earlier``."""
        scale = self.iterate.scale
        hessian = self.iterate.sums.jtj / np.outer(scale, scale)
        step = (earlier.params - self.iterate.params) * scale
        gradient_error = (earlier.sums.jtr - self(earlier.params).jtr) / scale
        image = hessian @ step
        curvature = float(image @ step)
        size = float(gradient_error @ np.linalg.lstsq(hessian, gradient_error)[0])
        # A large update means that the point is too far away.
        if not 0.0 < size <= _MAX_SECANT**2 * curvature:
            return self
        cross = np.outer(gradient_error, image) / curvature
        update = (
            cross + cross.T - float(gradient_error @ step) * np.outer(image, image) / curvature**2
        )
        return replace(self, secant=self.secant + update * np.outer(scale, scale))

    def proposal(self) -> gn.Proposal | None:
        """Propose the minimizer of S within the bounds; None if S does not decrease."""
        iterate = self.iterate
        settings = replace(
            iterate.settings, tol=_TOL_SHARE * iterate.settings.tol, max_iterations=_MAX_ITERATIONS
        )
        sums = replace(iterate.sums, triangle=None)
        inner = gn.init_state(iterate.params, sums, settings)
        while inner.stop is None:
            proposal = gn.propose(inner)
            inner = gn.update(inner, proposal, self(proposal.params))
        assert inner.solution is not None
        optimum = self(inner.solution)
        reduction = iterate.sums.cost - optimum.cost
        step = (inner.solution - iterate.params) * iterate.scale
        if reduction <= iterate.cost_noise:  # below the rounding error of the costs
            reduction = iterate.quadratic.reduction(step)
        if not (optimum.is_finite and reduction > 0.0):
            return None
        # Secant updates approximate second derivatives of the residuals, which J^T J excludes.
        jtj = optimum.jtj
        if self.secant.any():
            jtj = replace(self, secant=np.zeros_like(jtj))(inner.solution).jtj
        change = gn.covariance_change(sums, replace(sums, jtj=jtj), iterate)
        return gn.Proposal(inner.solution, step, reduction, inner.stop.is_success, change, jtj)


def is_well_conditioned(iterate: Iterate) -> bool:
    """Whether differences of the sums of the sample and of all rows are accurate."""
    return iterate.svd.condition <= _MAX_CONDITION / float(np.sqrt(iterate.settings.epsilon))


def is_of_use(iterate: Iterate, sample: NormalEquations) -> bool:
    """Whether a sample, given its sums at the iterate, is finite, large enough and not complete."""
    return sample.is_finite and len(iterate.params) < sample.n_used < iterate.sums.n_used


def forecast(state: gn.State, reduce: Reduce) -> gn.Proposal | None:
    """Propose the minimizer of a ``Surrogate`` within the bounds; None if the sample is of no use.

    Parameters
    ----------
    state : State
        State of the solve over all rows.
    reduce : callable
        Returns the sums of the sample.
    """
    if state.rejected or state.forecasts_rejected >= _MAX_REJECTED:
        return None
    iterate = state.iterate
    if not is_well_conditioned(iterate):
        return None
    at_iterate = reduce(iterate.params)
    if not is_of_use(iterate, at_iterate):
        return None
    surrogate = Surrogate(iterate, at_iterate, reduce, np.zeros_like(iterate.sums.jtj))
    for earlier in reversed(state.earlier):
        surrogate = surrogate.with_secant_update(earlier)
    return surrogate.proposal()
