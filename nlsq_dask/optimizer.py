"""``AdaptiveHybridStreamingOptimizer``: the public interface of a fit."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask import _html as html
from nlsq_dask._keywords import arguments_of, explain_keywords
from nlsq_dask._text import join_first
from nlsq_dask.checkpoints.identity import FitFingerprint
from nlsq_dask.checkpoints.journal import open_journal
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.engine.dataset import DataSet
from nlsq_dask.engine.retries import ReadPolicy
from nlsq_dask.errors import (
    ClusterLostError,
    FitInProgressError,
    MissingChunksWarning,
    warn_caller,
)
from nlsq_dask.events import (
    PHASES,
    BlocksSkipped,
    Event,
    FitEnded,
    IterationFinished,
    Observer,
    PassFinished,
    PhaseEnded,
    PhaseStarted,
)
from nlsq_dask.fit.driver import Driver
from nlsq_dask.fit.interruption import Interruption
from nlsq_dask.fit.problem import FitProblem, validate_arguments
from nlsq_dask.maps.fit_map import fit_map
from nlsq_dask.maps.problem.arguments import validate_map_arguments
from nlsq_dask.maps.problem.plan import MapPlan, build_map_plan
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.observers.build import open_observers, report_abort, send, validate_observers
from nlsq_dask.observers.history import History
from nlsq_dask.observers.telemetry import DefenseLayerTelemetry, get_defense_telemetry
from nlsq_dask.plan import Plan, build_plan
from nlsq_dask.results import report
from nlsq_dask.results.build import build_result, resume_hint
from nlsq_dask.results.result import FitResult
from nlsq_dask.rows.rows import STRIP_ROWS
from nlsq_dask.warmup.normalize import NormalizedModelWrapper, ParameterNormalizer


class AdaptiveHybridStreamingOptimizer:
    """Weighted nonlinear least squares over data larger than memory.

    Parameters
    ----------
    config : HybridStreamingConfig, optional
    observers : sequence of callable
        Functions that are called with every event of a fit, an object of a class in
        ``nlsq_dask.events``, in the thread that called ``fit`` or ``fit_each``. They cannot change
        the fit: an observer that raises an exception is disabled with a warning. A resumed fit
        begins with the event ``FitResumed``; earlier events are not repeated.

    Attributes
    ----------
    current_phase : int
        Number of the current or last phase; 0 before a fit.
    phase_history : list of dict
        One dict per phase: phase (its number), name, start_time (s since 1970), duration (s) and
        further entries that depend on the phase.
    phase_status : dict of int to str
        Status of each phase: "pending", "running", "done" or "failed". A phase that the callback,
        ``max_walltime`` or SIGTERM ends is "done".
    normalizer : ParameterNormalizer or None
        Conversion to normalized parameters, which are of similar size; None before a fit.
    normalized_model : NormalizedModelWrapper or None
        Model as a function of normalized parameters; None before a fit.
    normalized_bounds : tuple of ndarray, or None
        Lower and upper bounds of the normalized parameters; None before a fit.
    normalization_jacobian : ndarray, shape (p, p), or None
        Derivatives of the parameters with respect to the normalized parameters; None before a fit.
    best_params_global : ndarray, shape (p,), or None
        Best parameters so far; None before the first iteration.
    best_cost_global : float
        Cost of ``best_params_global`` over all rows; infinite before the first pass.

    Examples
    --------
    >>> import dask.array as da
    >>> import jax.numpy as jnp
    >>> def decay(t, height, rate):
    ...     return height * jnp.exp(-rate * t)
    >>> t = da.linspace(0, 4, 100_000, chunks=10_000)
    >>> y = 2 * da.exp(-0.7 * t) + 0.1 * da.cos(50 * t)
    >>> optimizer = AdaptiveHybridStreamingOptimizer()
    >>> result = optimizer.fit(decay, t, y, p0=[1, 1], verbose=0)
    >>> result.success, result.popt.round(2)
    (True, array([2. , 0.7]))
    """

    @explain_keywords("AdaptiveHybridStreamingOptimizer")
    def __init__(
        self,
        config: HybridStreamingConfig | None = None,
        *,
        observers: Iterable[Observer] = (),
    ) -> None:
        if config is not None and not isinstance(config, HybridStreamingConfig):
            raise TypeError(f"config must be a HybridStreamingConfig; got {config!r}.")
        self.config = HybridStreamingConfig() if config is None else config
        self.observers = validate_observers(observers)
        self._running = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.current_phase = 0
        self.phase_history: list[dict[str, Any]] = []
        self.phase_status = dict.fromkeys(range(len(PHASES)), "pending")
        self.normalizer: ParameterNormalizer | None = None
        self.normalized_model: NormalizedModelWrapper | None = None
        self.normalized_bounds: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        self.normalization_jacobian: NDArray[np.float64] | None = None
        self.best_params_global: NDArray[np.float64] | None = None
        self.best_cost_global = float("inf")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    def _repr_html_(self) -> str:
        changed = self.config.changed().items()
        options = [(name, repr(value)) for name, value in changed] or [("", "defaults only")]
        status = "; ".join(
            f"{PHASES[phase]}: {status}" for phase, status in self.phase_status.items()
        )
        state = [("phases", status)]
        if np.isfinite(self.best_cost_global):
            state.append(("best cost over all rows", f"{self.best_cost_global:.8g}"))
        if self.best_params_global is not None:
            best = [f"{value:.6g}" for value in self.best_params_global]
            state.append(("best parameters so far", join_first(best)))
        history = list(self.phase_history)
        return html.page(
            html.paragraph(f"<b>{type(self).__name__}</b>"),
            html.collapsed("Options that differ from the defaults", html.facts(options), True),
            html.facts(state),
            html.collapsed("Phases of the last fit", report.phases(history)) if history else "",
        )

    @explain_keywords("fit")
    @arguments_of(validate_arguments)
    def fit(self, *args: Any, **kwargs: Any) -> FitResult:
        """Fit a model to all rows.

        Runs on the active ``distributed.Client``, on the scheduler of the Dask configuration, or on
        threads.

        Parameters
        ----------
        model : callable
            Model ``model(x, *params)``, written with jax.numpy. It is called with batches of b
            rows: x has shape (b,) or (b, k), or is a tuple or dict of arrays of shape (b,). It
            returns an array of shape (b,), whose elements depend on their own row only. An
            argument whose default is not a number, such as ``kind=None``, is an option: it keeps
            its default and is not fitted.
        x_data : array, tuple or dict of arrays, or names of coordinates of ``y_data``
            Independent variables: NumPy (in memory or memory-mapped), JAX, pandas, HDF5, Dask, Zarr
            or xarray. The shape is (n,) or (n, k), or broadcasts against an N-d ``y_data``. Dates
            become float64 days since 1970-01-01, cftime dates in their own calendar, and durations
            become days; see ``FitResult.x_units``.
        y_data : array
            Dependent variable, real, 1-d or N-d; each element is one row. Rows masked in any of x,
            y and sigma are omitted.
        p0 : sequence or dict by name, optional
            Initial values of the parameters. A parameter without one starts at its default in the
            signature of the model, or at 1.0. A sequence has a value for each parameter, also for
            fixed and tied ones; that of a tied one is not used and may be NaN.
        bounds : (low, high), dict by name of (low, high), or sequence of (low, high), optional
            Lower and upper bounds of the parameters. Each of low and high is a number, a sequence
            or a dict by name. By default there are no bounds. Trial points always lie within the
            bounds. Equal bounds fix a parameter.
        sigma : array or scalar, optional
            Standard deviations of y, all positive; broadcast to the shape of y.
        absolute_sigma : bool
            If True, sigma holds the actual standard deviations. If False, only their ratios matter,
            and pcov is scaled by the variance of the residuals.
        loss : {"linear", "soft_l1", "huber", "cauchy", "arctan"}
            Loss function rho, as in SciPy: the fit minimizes
            ``1/2 sum f_scale^2 rho((r / f_scale)^2)`` with the residuals
            ``r = (model - y) / sigma``. Every loss except "linear" reduces the weight of outliers.
        f_scale : float
            Absolute residual ``|r|`` above which a row counts as an outlier; not used by "linear".
        nan_policy : {"raise", "omit"}
            With "raise", NaN or infinity in y, x or sigma is an error; with "omit", the row is
            omitted.
        fixed : dict by name, or collection of names, optional
            Parameters that are not fitted. A number is the value of the parameter; True, or a name
            in a collection, fixes it at its initial value. False leaves it free.
        ties : dict of callable by name, optional
            Parameters that are functions of the others: ``{"width2": lambda p: 2 * p["width"]}``,
            where p has the other parameters, but no tied ones, by name. The functions are written
            with jax.numpy and return one number.
        param_names : sequence of str, optional
            Names of all parameters, instead of those in the signature of the model.
        callback : callable, optional
            Called as ``callback(params, loss, iteration)`` every ``callback_frequency`` iterations,
            with the parameters, shape (p,), and the mean squared weighted residual. It can stop the
            fit by raising StopIteration.
        verbose : int, optional
            Overrides ``verbose`` of the configuration.

        Returns
        -------
        FitResult

        Raises
        ------
        DataError, ModelError, ValueError, TypeError
            For invalid arguments.
        BlockReadError
            If a block could not be read; a subclass of DataError.
        FitInProgressError
            If this optimizer is already running a fit.
        CheckpointError, FileNotFoundError
            If the fit cannot be resumed from the option ``resume_from_checkpoint``.
        ClusterLostError
            If the cluster is lost during a pass.

        See Also
        --------
        curve_fit : The interface of ``scipy.optimize.curve_fit``.
        """
        if not self._running.acquire(blocking=False):
            raise FitInProgressError(
                "this optimizer is already running a fit; use another optimizer for the second fit."
            )
        try:
            self._forget()
            return self._fit(validate_arguments(self.config, *args, **kwargs))
        finally:
            self._running.release()

    def _fit(self, problem: FitProblem) -> FitResult:
        """Run all phases of a fit, with observers and checkpoints, and build the result."""
        config = problem.config
        interruption = Interruption(config.max_walltime)
        own, history = DefenseLayerTelemetry(), History()
        remembering: list[Observer] = [self._observe, own, history]
        observers: list[Observer] = [*remembering, get_defense_telemetry()]
        emit, remember = partial(send, observers), partial(send, remembering)

        def describe() -> FitFingerprint:
            kernel = PredictionKernel.trace(replace(problem.model, dtype="float64"), STRIP_ROWS)
            model = kernel.program.fingerprint
            return FitFingerprint.of(model, problem.blocks, problem.arguments, config)

        with ExitStack() as stack:
            opened, page = open_observers(stack, config, self.observers)
            observers += opened
            if page is not None:
                remembering.append(page.remember)
            stack.enter_context(report_abort(emit))
            journal = open_journal(config, describe, emit, remember)
            observers.append(journal.observe)
            if config.stop_on_sigterm:
                stack.enter_context(interruption.heeding_sigterm())
            policy = ReadPolicy.of(config)
            data = stack.enter_context(closing(DataSet(problem.blocks, config.cache, policy)))
            for sentence in data.missing_chunks():
                warn_caller(sentence, MissingChunksWarning)
            self._publish(problem)
            driver = Driver(problem, data, emit, journal, interruption)
            try:
                outcome = driver.run()
            except ClusterLostError as error:
                raise ClusterLostError(f"{error}{resume_hint(journal.last_path)}") from error
            except KeyboardInterrupt as error:  # whose notes come last in a traceback
                if journal.last_path is not None:
                    error.add_note(resume_hint(journal.last_path).strip())
                raise
            outcome.diagnostics["defense"] = own.get_summary()
            iterations = history.dataset(problem.all_parameters.names)
            result = build_result(outcome, problem, self.phase_history, iterations)
            emit(FitEnded(result.success, result.message))
        return result

    @explain_keywords("plan", hinted=False)
    @arguments_of(validate_arguments, also=validate_map_arguments)
    def plan(self, *args: Any, **kwargs: Any) -> Plan | MapPlan:
        """Return size, tasks and memory of a fit with these arguments, without reading data.

        Parameters
        ----------
        model, x_data, y_data, p0, bounds
            As in ``fit``.
        sigma, absolute_sigma, loss, f_scale, nan_policy, fixed, ties
            As in ``fit``.
        param_names, callback, verbose
            As in ``fit``.
        dims, guess, min_points, covariance, errors, store
            As in ``fit_each``. With ``dims``, the plan is that of ``fit_each``.

        Returns
        -------
        Plan, or with ``dims`` MapPlan

        Raises
        ------
        DataError, ModelError, ValueError, TypeError
            As in ``fit``, except for errors in values of the data or the model, or in a checkpoint.
            Blocks too large for a worker are no error here; they are listed in ``Plan.problems``.
        """
        is_map = kwargs.get("dims") is not None
        source = validate_map_arguments if is_map else validate_arguments
        for name in kwargs.keys() - inspect.signature(source).parameters.keys():
            if kwargs[name] is not None:
                without = "of fit_each" if is_map else "of fit, which has no dims,"
                raise TypeError(f"the plan {without} has no argument {name!r}.")
            del kwargs[name]
        if is_map:
            return build_map_plan(validate_map_arguments(self.config, *args, **kwargs))
        return build_plan(validate_arguments(self.config, *args, **kwargs))

    @explain_keywords("fit_each", hinted=False)
    @arguments_of(validate_map_arguments)
    def fit_each(self, *args: Any, **kwargs: Any) -> xr.Dataset:
        """Fit a model along some dimensions, for every position in the others.

        Each position is a pixel with an independent fit. Many pixels are fitted at once, a pixel
        per SIMD lane, in Dask tasks that read each chunk of the data once.

        Parameters
        ----------
        model, x_data, param_names
            As in ``fit``. An x array varies along ``dims``, and may also vary along the other
            dimensions. Without dimension names, an x of the shape of the fitted axes, in the order
            of y_data, is matched to these.
        y_data : array
            Dependent variable, N-d. Its chunks define the tiles: all chunks of a tile along
            ``dims`` are read by one task.
        p0 : sequence, or dict by name, optional
            Initial values. In a dict, a value may be a map, an array over the dimensions of the
            map; ``popt`` of another map is accepted, too. Where all free parameters have a value,
            pixels start there. Otherwise, and if a fit fails, the start is a fit of the median of
            random pixels of the tile.
        bounds : (low, high), or dict by name of (low, high), optional
            Lower and upper bounds; in a dict, each may be a map. Starts are moved inside. Where
            the bounds of a pixel are equal, the parameter is fixed.
        dims : str, int, or sequence of them
            Dimensions of ``y_data`` along which to fit; axes if it has no dimension names.
        sigma : array or scalar, optional
            Standard deviations of y; broadcast to the shape of y. A pixel with a value that is not
            positive gets the status "non_finite".
        absolute_sigma, loss, f_scale, ties
            As in ``fit``.
        nan_policy : {"omit", "raise"}
            With "omit", points with NaN or infinity in y, x or sigma are omitted; with "raise",
            they are an error. Masked points are omitted.
        fixed : dict by name, or collection of names, optional
            As in ``fit``. A map of numbers fixes the parameter at the value of the pixel, a map of
            booleans tells where it is fixed at its initial value.
        guess : callable, optional
            Function ``guess(x, y)`` of the points of one pixel, written with jax.numpy, which
            returns initial values: one per parameter, or a dict by name; p0 has the others.
            Omitted points of y are NaN. A pixel whose guess is not finite starts as without p0.
        min_points : int, optional
            Minimum number of points of a fit; by default the number of free parameters.
        covariance : {"errors", "full", None}
            "errors" returns standard errors, "full" the covariance matrices as well, and None
            neither.
        errors : {"flag", "raise"}
            With "raise", a fit that fails is an error, except for pixels without data and singular
            fits. With "flag", only ``status`` tells.
        store : path or URL, optional
            Zarr store to which each tile is written when it is done. The fits run at once, and the
            same call continues them after an interruption of any kind: tiles in the store are
            verified, and not fitted again.
        verbose : int, optional
            Overrides ``verbose`` of the configuration. With 1, progress and the number of pixels
            by status are printed while fits run in this call, not for a lazy result; with 2, also
            a line every ``log_frequency`` tiles; with 0, nothing.

        Returns
        -------
        xarray.Dataset
            Computed if all arrays are in memory, the opened store with ``store``, else lazy. Its
            variables have the dimensions of the map:

            - popt, perr (param): parameters and their standard errors.
            - pcov (cov_i, cov_j): covariance matrix.
            - chi2, reduced_chi2: sum of squared weighted residuals, and per degree of freedom.
            - n_points, n_iterations: number of points and of iterations.
            - status: 1 converged, 2 at_bound (converged with a parameter at a bound), 3 singular
              (converged, but the data do not constrain all parameters; perr is infinite),
              0 iteration_limit, -1 no_data, -2 too_few_points, -3 non_finite, -4 stalled,
              -5 bad_start, -6 not_read, -7 not_fitted (after an early end).

            Parameters and errors are NaN for the status -1, -2 and -5 to -7. Pixels with the other
            negative ones, and 0, have the best parameters that were found.

        Raises
        ------
        DataError, ModelError, ValueError, TypeError
            For invalid arguments, and for an option of the configuration, or observers, without
            effect on the result.
        CheckpointError
            If ``store`` is something else, the result of another fit, or in use by another process.
        BlockReadError
            If data could not be read, or fewer pixels than ``min_success_rate`` requires.
        ClusterLostError
            If the cluster is lost.
        PixelFitError
            If a fit failed and ``errors`` is "raise"; a lazy Dataset raises it when it is computed.

        See Also
        --------
        fit : Fit one model to all rows.
        curvefit : The interface of ``xarray.DataArray.curvefit``.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import xarray as xr
        >>> def decay(t, height, rate):
        ...     return height * jnp.exp(-rate * t)
        >>> t = np.linspace(0, 4, 50)
        >>> heights = np.array([[1.0, 2.0], [3.0, 4.0]])
        >>> cube = xr.DataArray(
        ...     heights * np.exp(-0.7 * t)[:, None, None],
        ...     dims=("t", "lat", "lon"),
        ...     coords={"t": t},
        ... )
        >>> optimizer = AdaptiveHybridStreamingOptimizer()
        >>> maps = optimizer.fit_each(decay, "t", cube, dims="t", verbose=0)
        >>> maps.popt.sel(param="height").values.round(6)
        array([[1., 2.],
               [3., 4.]])
        """
        return fit_map(validate_map_arguments(self.config, *args, **kwargs), self.observers)

    def _publish(self, problem: FitProblem) -> None:
        self.normalizer = problem.normalizer
        function = problem.model.free_function
        self.normalized_model = NormalizedModelWrapper(function, problem.normalizer)
        self.normalized_bounds = problem.normalizer.transform_bounds()
        self.normalization_jacobian = problem.normalizer.normalization_jacobian

    def _observe(self, event: Event) -> None:
        """Update the public attributes of the optimizer, which can be read during a fit."""
        match event:
            case PhaseStarted():
                self.current_phase = event.phase
                self.phase_status[event.phase] = "running"
                self.phase_history.append({**vars(event), "duration": 0.0})
            case PhaseEnded():
                self.phase_status[event.phase] = "failed" if event.failed else "done"
                self.phase_history[-1].update(duration=event.duration, **event.details)
            case BlocksSkipped():  # costs over fewer rows are not comparable
                self.best_cost_global = float("inf")
            case PassFinished() | IterationFinished() if not event.params.size:
                pass  # more than 1,000 parameters are not in the events of a checkpoint
            case PassFinished():
                if self.best_params_global is None or event.cost < self.best_cost_global:
                    self.best_params_global, self.best_cost_global = event.params, event.cost
            case IterationFinished() if not np.isfinite(self.best_cost_global):
                self.best_params_global = event.params
