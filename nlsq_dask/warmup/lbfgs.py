"""``Warmup``: L-BFGS on a sample of rows, in normalized parameters (phase 1).

The loss is relative: the mean squared weighted residual over the weighted variance of y, so that
thresholds do not depend on the units of y. One compiled program runs some iterations and returns
its state, so that the caller can report and save it before it continues.

The minimizer is optax's L-BFGS with its line searches. Bounds are enforced by projection: the loss
is evaluated at the nearest point inside, and parameters on a bound do not move outward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpy.typing import NDArray

from nlsq_dask.errors import ModelError
from nlsq_dask.kernels.losses import LINEAR, rho
from nlsq_dask.kernels.penalty import total_variance
from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.model.program import compile_fast, compiled_once
from nlsq_dask.warmup.defense_layers import clip_step, cost_increased
from nlsq_dask.warmup.normalized_sample import NormalizedSample, to_device

_LINE_SEARCH_STEPS = 20
_ROUNDING = 4 * float(np.finfo(np.float64).eps)  # relative change of the loss that counts as none


class WarmupEnd(IntEnum):
    """Why the warm-up ended.

    PLATEAU, GRADIENT and MAX_ITER are criteria of
    ``HybridStreamingConfig.active_switching_criteria``.
    """

    RUNNING = 0
    PLATEAU = 1
    GRADIENT = 2
    MAX_ITER = 3
    CONVERGED = 4
    LINE_SEARCH = 5
    COST_GUARD = 6
    NON_FINITE = 7


class Problem(NamedTuple):
    """Arguments of the compiled iterations of L-BFGS.

    Rows, normalization and bounds are as in ``NormalizedSample``, ``variance`` and ``first_step``
    as in ``Warmup.build``, and the thresholds as in ``WarmupSettings``.
    """

    y: Any
    x: Any
    inverse_sigma: Any
    n_rows: Any
    f_scale: Any
    penalty: Any
    scales: Any
    offsets: Any
    low: Any
    high: Any
    variance: Any
    first_step: Any
    max_step: Any
    max_gradient: Any
    cost_tolerance: Any
    plateau: Any
    gradient: Any
    min_iterations: Any
    max_iterations: Any


class WarmupState(NamedTuple):
    """State of L-BFGS after some iterations.

    ``params`` and ``best_params`` (normalized) and ``gradient`` have shape (p,); losses are
    relative. ``optimizer`` is the state of optax, and ``end`` is a ``WarmupEnd``.
    """

    params: Any
    loss: Any
    gradient: Any
    optimizer: Any
    initial_loss: Any
    best_params: Any
    best_loss: Any
    iteration: Any
    line_search_failures: Any
    end: Any


@dataclass(frozen=True)
class WarmupSettings:
    """Settings of L-BFGS; a threshold of zero is never met, which disables it."""

    history_size: int
    line_search: str  # "wolfe", "strong_wolfe" or "backtracking"
    min_iterations: int  # before the thresholds are checked
    max_iterations: int
    plateau: float  # threshold of the relative change of the loss
    gradient: float  # threshold of the norm of the gradient
    max_gradient: float | None  # norm to which the gradient is clipped
    cost_tolerance: float | None  # relative increase of the loss that ends the loop (layer 3)
    max_step: float | None  # norm to which updates are clipped (layer 4)


@dataclass(frozen=True)
class Options:
    """Static options of L-BFGS, which is compiled for each combination of their values."""

    history_size: int
    line_search: str
    has_bounds: bool
    clips_gradient: bool
    guards_cost: bool
    clips_step: bool
    loss: str
    groups: tuple[tuple[int, int], ...]  # (start, end) of the parameters of each penalized group


class _FirstStepState(NamedTuple):
    count: Any


def _scale_first_step(size: Any) -> optax.GradientTransformationExtraArgs:
    """Return an optax transformation that multiplies the first update by ``size``.

    L-BFGS computes the first update without curvature information.
    """

    def init(params: Any) -> _FirstStepState:
        return _FirstStepState(jnp.zeros((), jnp.int64))

    def update(
        updates: Any, state: _FirstStepState, params: Any = None, **extra: Any
    ) -> tuple[Any, _FirstStepState]:
        factor = jnp.where(state.count == 0, size, 1.0)
        return updates * factor, _FirstStepState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _hold_at_bounds(low: Any, high: Any) -> optax.GradientTransformationExtraArgs:
    """Return an optax transformation that keeps parameters at a bound from crossing it."""

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        is_outward = ((params <= low) & (updates < 0)) | ((params >= high) & (updates > 0))
        return jnp.where(is_outward, 0.0, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _optimizer(problem: Problem, options: Options) -> optax.GradientTransformationExtraArgs:
    """Build the optax optimizer: L-BFGS, first step size, bounds, step clipping, line search."""
    transforms = [
        optax.scale_by_lbfgs(options.history_size),
        optax.scale(-1.0),
        _scale_first_step(problem.first_step),
    ]
    if options.clips_gradient:
        transforms.insert(0, optax.clip_by_global_norm(problem.max_gradient))
    if options.has_bounds:
        transforms.append(_hold_at_bounds(problem.low, problem.high))
    if options.clips_step:
        transforms.append(clip_step(problem.max_step))
    if options.line_search == "backtracking":
        search = optax.scale_by_backtracking_linesearch(_LINE_SEARCH_STEPS)
    else:
        search = optax.scale_by_zoom_linesearch(
            _LINE_SEARCH_STEPS,
            max_learning_rate=1.0 if options.clips_step else None,
            approx_dec_rtol=None if options.line_search == "strong_wolfe" else 1e-6,
            initial_guess_strategy="one",
        )
    return optax.chain(*transforms, search)


def _loss(model: Model, options: Options, problem: Problem) -> Callable[[Any], Any]:
    """Return the relative loss as a function of normalized parameters."""
    counts = jnp.arange(problem.y.shape[0]) < problem.n_rows

    def loss(q: Any) -> Any:
        projected = jnp.where(
            q < problem.low, problem.low, jnp.where(q > problem.high, problem.high, q)
        )
        params = (projected * problem.scales + problem.offsets).astype(model.dtype)
        residual = model(problem.x, params).astype(jnp.float64) - problem.y
        weighted = jnp.where(counts, residual * problem.inverse_sigma, 0.0)
        if options.loss == LINEAR:
            twice_cost = weighted @ weighted
        else:
            twice_cost = (
                problem.f_scale**2 * rho(options.loss, (weighted / problem.f_scale) ** 2).sum()
            )
        mean_square = twice_cost / problem.n_rows
        if options.groups:
            mean_square += problem.penalty * total_variance(params, options.groups)
        return mean_square / problem.variance

    return _with_forward_gradient(loss) if model.mode is Mode.FORWARD else loss


def _with_forward_gradient(loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the function with a gradient that is computed by forward-mode differentiation."""

    def value_and_gradient(q: Any) -> tuple[Any, Any]:
        value, push = jax.linearize(loss, q)
        return value, jax.vmap(push)(jnp.eye(len(q), dtype=q.dtype))

    function: Any = jax.custom_vjp(loss)
    function.defvjp(value_and_gradient, lambda gradient, change: (change * gradient,))
    wrapped: Callable[[Any], Any] = function
    return wrapped


def _step(model: Model, options: Options, problem: Problem, state: WarmupState) -> WarmupState:
    """Run one iteration of L-BFGS."""
    loss = _loss(model, options, problem)
    optimizer = _optimizer(problem, options)
    updates, optimizer_state = optimizer.update(
        state.gradient,
        state.optimizer,
        state.params,
        value=state.loss,
        grad=state.gradient,
        value_fn=loss,
    )
    params = jnp.clip(state.params + updates, problem.low, problem.high)
    value, gradient = jax.value_and_grad(loss)(params)
    has_failed = optimizer_state[-1].info.decrease_error > 0.0
    is_finite = jnp.isfinite(value) & jnp.isfinite(gradient).all()
    is_better = is_finite & (value < state.best_loss)
    iteration = state.iteration + 1
    is_blocked = ((params <= problem.low) & (gradient > 0)) | (
        (params >= problem.high) & (gradient < 0)
    )
    gradient_norm = jnp.linalg.norm(jnp.where(is_blocked, 0.0, gradient))
    change = jnp.abs(value - state.loss) / (jnp.abs(state.loss) + np.finfo(np.float64).tiny)
    may_switch = iteration >= problem.min_iterations
    criteria = [  # in order of precedence
        (~is_finite, WarmupEnd.NON_FINITE),
        (
            cost_increased(value, state.initial_loss, problem.cost_tolerance) & options.guards_cost,
            WarmupEnd.COST_GUARD,
        ),
        ((change <= _ROUNDING) | (gradient_norm == 0.0), WarmupEnd.CONVERGED),
        (has_failed, WarmupEnd.LINE_SEARCH),
        (may_switch & (change < problem.plateau), WarmupEnd.PLATEAU),
        (may_switch & (gradient_norm < problem.gradient), WarmupEnd.GRADIENT),
        (iteration >= problem.max_iterations, WarmupEnd.MAX_ITER),
    ]
    end = jnp.select([condition for condition, _ in criteria], [int(e) for _, e in criteria], 0)
    return WarmupState(
        params=params,
        loss=value,
        gradient=gradient,
        optimizer=optimizer_state,
        initial_loss=state.initial_loss,
        best_params=jnp.where(is_better, params, state.best_params),
        best_loss=jnp.where(is_better, value, state.best_loss),
        iteration=iteration,
        line_search_failures=state.line_search_failures + has_failed,
        end=end.astype(jnp.int64),
    )


@dataclass(frozen=True)
class Warmup:
    """L-BFGS for one sample; ``key`` is that of its compiled functions in the cache."""

    model: Model
    problem: Problem
    options: Options
    key: str  # of the program in the cache of the process

    @classmethod
    def build(
        cls,
        sample: NormalizedSample,
        variance: float,
        first_step: float,
        settings: WarmupSettings,
    ) -> Warmup:
        """Prepare L-BFGS for a sample.

        Parameters
        ----------
        sample : NormalizedSample
        variance : float
            Weighted variance of y, the denominator of the loss.
        first_step : float
            Size of the first step, see ``defense_layers.first_step_size``.
        settings : WarmupSettings
        """
        arrays = sample.arrays()
        options = Options(
            history_size=settings.history_size,
            line_search=settings.line_search,
            has_bounds=bool(np.isfinite([arrays["low"], arrays["high"]]).any()),
            clips_gradient=settings.max_gradient is not None,
            guards_cost=settings.cost_tolerance is not None,
            clips_step=settings.max_step is not None,
            loss=sample.loss.name,
            groups=sample.penalty.groups,
        )
        problem = Problem(
            **arrays,
            n_rows=np.int64(sample.n_rows),
            penalty=np.float64(sample.penalty.strength),
            variance=np.float64(variance),
            first_step=np.float64(first_step),
            max_step=np.float64(settings.max_step or np.inf),
            max_gradient=np.float64(settings.max_gradient or np.inf),
            cost_tolerance=np.float64(settings.cost_tolerance or 0.0),
            plateau=np.float64(settings.plateau),
            gradient=np.float64(settings.gradient),
            min_iterations=np.int64(settings.min_iterations),
            max_iterations=np.int64(settings.max_iterations),
        )
        rows = sample.rows
        shapes = f"{len(rows)} rows, sigma {rows.sigma is not None}"
        key = f"warm-up {sample.fingerprint} {sample.model.mode} {shapes} {options}"
        return cls(sample.model, to_device(problem), options, key)

    def init(self, q0: NDArray[np.float64]) -> WarmupState:
        """Return the state at normalized parameters ``q0``, before the first iteration."""
        with x64():
            try:
                program = self._program("start", self._start, q0)
            except ValueError as error:
                raise ModelError(
                    f"The model {self.model.name!r} has no reverse-mode derivative, which the "
                    f"warm-up needs ({error}). Use lax.scan or a lax.fori_loop with fixed limits "
                    f"instead of lax.while_loop, or max_warmup_iterations=0."
                ) from error
            state: WarmupState = program(self.problem, q0)
            return state

    def run(self, state: WarmupState, until: int) -> WarmupState:
        """Run iterations until a criterion is met or iteration ``until`` is reached."""
        with x64():
            limit = np.int64(until)
            result: WarmupState = self._program("run", self._burst, state, limit)(
                self.problem, state, limit
            )
            return result

    def with_smaller_steps(self, factor: float, n_done: int) -> Warmup:
        """Return a warm-up with step sizes multiplied by ``factor``.

        The maximum number of iterations is reduced by the ``n_done`` that were run already.
        """
        problem = self.problem
        problem = problem._replace(
            first_step=np.float64(problem.first_step) * factor,
            max_step=np.float64(problem.max_step) * factor,
            max_iterations=np.int64(problem.max_iterations) - n_done,
        )
        return replace(self, problem=problem)

    def _program(self, name: str, function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        return compiled_once(
            f"{self.key} {name}",
            lambda: compile_fast(jax.jit(function).lower(self.problem, *args)),
        )

    def _start(self, problem: Problem, params: Any) -> WarmupState:
        loss, gradient = jax.value_and_grad(_loss(self.model, self.options, problem))(params)
        zero = jnp.zeros((), jnp.int64)
        return WarmupState(
            params=params,
            loss=loss,
            gradient=gradient,
            optimizer=_optimizer(problem, self.options).init(params),
            initial_loss=loss,
            best_params=params,
            best_loss=loss,
            iteration=zero,
            line_search_failures=zero,
            end=zero,
        )

    def _burst(self, problem: Problem, state: WarmupState, until: Any) -> WarmupState:
        result: WarmupState = lax.while_loop(
            lambda s: (s.end == WarmupEnd.RUNNING) & (s.iteration < until),
            lambda s: _step(self.model, self.options, problem, s),
            state,
        )
        return result


def clip_count(state: WarmupState, options: Options) -> int:
    """Return how many updates ``clip_step`` has shortened; 0 if ``options.clips_step`` is False."""
    return int(state.optimizer[-2].count) if options.clips_step else 0


def pack(state: WarmupState) -> list[NDArray[Any]]:
    """Return the arrays of a state as a list, for a checkpoint."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def unpack(like: WarmupState, leaves: list[NDArray[Any]]) -> WarmupState:
    """Return the state whose arrays ``pack`` has listed; ``like`` is any state of the warm-up."""
    with x64():
        state: WarmupState = jax.tree.unflatten(jax.tree.structure(like), jax.device_put(leaves))
    return state
