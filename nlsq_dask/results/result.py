"""``FitResult``: the result of a fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from nlsq_dask.model.model import Model
from nlsq_dask.results import derived, report
from nlsq_dask.results.plotting.methods import PlotMethods
from nlsq_dask.results.predict import predict
from nlsq_dask.results.saving import MissingModel, load, save

if TYPE_CHECKING:
    import xarray as xr

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class FitResult(PlotMethods):
    """Result of a fit; each value is an attribute and an item: ``result.pcov``, ``result["pcov"]``.

    Below, ``r = (model - y) / sigma`` are the residuals of n rows, J is their Jacobian, and p is
    the number of parameters. A pass reads all rows once.

    Attributes
    ----------
    x, popt : ndarray, shape (p,)
        Best-fit parameters.
    success : bool
        True if the fit converged.
    status : int
        Reason why the fit ended, positive for success:

        - 1: predicted reduction and step are below the floating-point resolution
        - 2, 3: predicted reduction of the cost (2) or step (3) is below ``gauss_newton_tol``
        - 4: a last step was taken without a pass; the estimated relative error of the parameters
          after it is below ``gauss_newton_tol``
        - 0: maximum number of iterations
        - -1: no step reduces the cost
        - -2, -3: the model is not finite at the start, or at any trial point
        - -4: stopped by the callback
        - -5: the model is insensitive to a parameter
        - -6: ill-conditioned
        - -7, -10: slow progress (-7), or none (-10), along a curved or flat valley
        - -8, -9: stopped by ``max_walltime`` (-8) or SIGTERM (-9)
        - -11: stopped by ``max_walltime`` before the fit could write anything to
          ``checkpoint_dir``
    message : str
        Reason why the fit ended, and advice if it did not converge.
    cost : float
        ``1/2 sum C^2 rho((r / C)^2)`` over all rows, with the loss rho and C = ``f_scale``; with
        the linear loss ``1/2 sum r^2``. The penalty of the option
        ``enable_group_variance_regularization`` is included.
    grad : ndarray, shape (p,)
        Gradient of the cost; ``J^T r`` with the linear loss.
    optimality : float
        Largest absolute component of the gradient. Components of parameters at a bound that could
        reduce the cost only beyond the bound are ignored.
    active_mask : ndarray of int, shape (p,)
        -1 for parameters at the lower bound, 1 at the upper bound, otherwise 0.
    nfev, njev : int
        Number of evaluations of model and Jacobian over all rows.
    nit : int
        Number of Gauss-Newton iterations over all rows.
    pcov : ndarray, shape (p, p), or None
        Covariance matrix of the parameters; infinite if the data do not constrain all of them.
        None for ``cg_param_threshold`` or more parameters.
    perr : ndarray, shape (p,)
        Standard errors of the parameters. If pcov is None, they are NaN, or estimates if the option
        ``cg_error_probes`` is set.
    absolute_sigma : bool
    loss : str
    f_scale : float
    cov_type : str
        Arguments and options of the fit; see ``AdaptiveHybridStreamingOptimizer.fit`` and
        ``HybridStreamingConfig``.
    sigma_sq : float
        Variance of the residuals, ``2 cost / dof`` without a penalty; pcov is scaled by it unless
        ``absolute_sigma`` is True.
    chi2, reduced_chi2 : float
        ``sum r^2`` and ``chi2 / dof``; equal to ``2 cost`` and ``sigma_sq`` with the linear loss
        and without a penalty.
    dof : int
        Degrees of freedom, ``n_points`` minus the number of free parameters.
    n_points, n_omitted : int
        Number of rows used, and of rows omitted because they are masked or not finite.
    r_squared : float
        ``1 - chi2 / (weighted sum of squares of y about its mean)``.
    condition_number : float
        Condition number of the Jacobian with columns scaled to unit length.
    block_statistics : xarray.Dataset or None
        Statistics of the residuals of each block (chunk of y), along the dimensions of y: ``chi2``,
        ``n_points``, ``reduced_chi2`` (here ``chi2 / n_points``, NaN without points) and
        ``largest_residual`` (largest ``|r|``). They belong to ``diagnostics["sums_at"]``.
        Coordinates are the positions of the first element of each block in y, and have the length
        of the dimension as their attribute ``size``. None if there was no pass.
    param_names : tuple of str
        Names of the parameters.
    free : ndarray of bool, shape (p,)
        True for fitted parameters, False for parameters that are fixed or tied. Fixed ones have
        zeros in perr and pcov; those of tied ones follow from the errors of the parameters on
        which they depend (delta method). Both have zeros in grad and active_mask.
    p0 : ndarray, shape (p,)
        Initial values.
    bounds : tuple of ndarray, each of shape (p,)
        Lower and upper bounds.
    n_passes : int
        Number of passes over all rows.
    rows_read, bytes_read, rows_cached : int
        Number of rows and bytes read, including the sample and subsets of the blocks, and of rows
        taken from the cache.
    phase_history : list of dict
        One dict per phase: phase (its number), name, start_time (s since 1970), duration (s) and
        further entries that depend on the phase.
    history : xarray.Dataset
        Iterations, along ``iteration``. All are recorded, except that the warm-up records one in
        ``callback_frequency``. Variables: ``stage`` ("warm-up", "sample" or "all rows"),
        ``n_iterations`` (since the previous record), ``loss`` (mean squared weighted residual over
        the rows of the stage), ``gradient_norm`` (of the loss relative to the variance of y, in
        normalized parameters), ``step_norm`` (of the step since the previous record, in normalized
        parameters), ``trust_radius`` (in parameters scaled so that the columns of the Jacobian have
        unit length, NaN in the warm-up), ``accepted``, ``n_passes`` (so far), ``time`` (s since
        1970) and, for at most 1,000 parameters, ``params`` (along ``param``).
    diagnostics : dict
        - ``parameters_at``: equal to x; ``sums_at``: parameters at which cost, grad, pcov and
          block_statistics were computed, which differ from x after a last step that took no pass.
        - ``last_step_without_pass``: whether there was such a step. ``last_step_error``: if it
          followed the first pass over all rows, the estimated distance of x from the minimum, in
          standard errors, without rounding errors of float32; otherwise None. In this case
          ``sums_at`` is up to a few standard errors from x, so cost, chi2 and pcov are predicted
          for x; grad and block_statistics are not.
        - ``active_bounds`` and ``undetermined``: names of the parameters at a bound, and of those
          that the data do not constrain. ``confounded``: a list of names for each group of
          parameters that the data cannot tell apart, such as the factors of a product; their
          standard errors are infinite or exceed ten times their values.
        - ``warm_up``, ``sample`` and ``defense``: facts about the L-BFGS warm-up, the sample of
          rows, and the defense layers of the warm-up.
        - ``retries``: number of retried reads; ``left_out``: a dict per skipped block with
          ``block`` (index in the grid of blocks), ``rows`` (number), ``array`` (name of the
          unreadable array), ``chunk`` (of a Zarr store, or None) and ``error``.
        - ``multistart``, if it was used: ``candidates`` (starting points, shape (n_starts, p)),
          ``rounds`` (for each: number of rows, losses of all candidates, indices of the remaining
          candidates), ``winner`` (index of the best candidate), ``start`` (the winner, improved in
          the rounds) and, if p0 did not win, ``warm_up_of_p0`` (facts about the warm-up from p0,
          as in ``warm_up``).
    x_units : dict of str to str
        Units of dates and durations, by x array: "x_data", "x_data[0]" for the first one of a tuple
        or of several names, or "x_data['time']" in a dict. An example is
        ``{"x_data[0]": "days since 1970-01-01"}``; for cftime with the calendar, as in
        "days since 1970-01-01, calendar noleap"; "days" for durations. Empty without dates.
    sample : xarray.Dataset or None
        At most 2,000 random rows of the data, along ``row``: ``y_data``, ``fitted`` (the model at
        the best-fit parameters), ``sigma`` if it was given, and the x arrays under their keys or
        names ("x" or "x_0", "x_1", ... if unnamed). Arrays of shape (n, k) also have a dimension
        ``feature``; a "/" in a name becomes "_". With ``enable_residual_weighting``, ``sigma`` is
        divided by the square root of the weight of the row. ``plot`` draws these rows. None if the
        fit ended before it read usable rows.
    """

    x: Vector
    success: bool
    status: int
    message: str
    cost: float
    chi2: float
    grad: Vector
    optimality: float
    active_mask: NDArray[np.int64]
    nfev: int
    njev: int
    nit: int
    pcov: NDArray[np.float64] | None
    absolute_sigma: bool
    loss: str
    f_scale: float
    cov_type: str
    sigma_sq: float
    dof: int
    n_points: int
    n_omitted: int
    r_squared: float
    condition_number: float
    block_statistics: xr.Dataset | None
    param_names: tuple[str, ...]
    p0: Vector
    bounds: tuple[Vector, Vector]
    n_passes: int
    rows_read: int
    bytes_read: int
    rows_cached: int
    phase_history: list[dict[str, Any]]
    history: xr.Dataset
    diagnostics: dict[str, Any]
    x_units: dict[str, str] = field(default_factory=dict)
    sample: xr.Dataset | None = None
    _root: NDArray[np.float64] | None = field(default=None)
    _errors: Vector | None = field(default=None)
    _fixed: tuple[str, ...] = ()  # names
    _tied: tuple[str, ...] = ()
    _model: Model = field(kw_only=True)

    @property
    def popt(self) -> Vector:
        """Best-fit parameters, an alias of ``x``."""
        return self.x

    @property
    def perr(self) -> Vector:
        """Standard errors of the parameters, shape (p,); NaN if they are not known."""
        if self.pcov is not None:
            return np.sqrt(np.diag(self.pcov))
        return np.where(self.free, np.nan, 0.0) if self._errors is None else self._errors

    @property
    def free(self) -> NDArray[np.bool_]:
        """Whether each parameter is fitted, neither fixed nor tied; shape (p,)."""
        return self._is_outside((*self._fixed, *self._tied))

    def _is_outside(self, names: tuple[str, ...]) -> NDArray[np.bool_]:
        others = set(names)
        return np.array([name not in others for name in self.param_names], bool)

    @property
    def reduced_chi2(self) -> float:
        """``chi2 / dof``; infinite if there are no degrees of freedom."""
        return self.chi2 / self.dof if self.dof > 0 else float("inf")

    @property
    def has_model(self) -> bool:
        """Whether ``predict`` can be called; False if the result was loaded without its model."""
        return not isinstance(self._model.function, MissingModel)

    def keys(self) -> list[str]:
        """Return the names of all values, each valid as ``result[name]``."""
        names = [f.name for f in fields(self) if not f.name.startswith("_")]
        return [*names, "popt", "perr", "free", "reduced_chi2"]

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str):
            self._refuse_unpacking()
        if name not in self.keys():
            raise KeyError(f"FitResult has no value {name!r}; it has {', '.join(self.keys())}")
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> NoReturn:
        self._refuse_unpacking()

    def _refuse_unpacking(self) -> NoReturn:
        raise TypeError(
            "a FitResult cannot be unpacked. Use result.popt and result.pcov, or call "
            "nlsq_dask.curve_fit, which returns (popt, pcov)."
        )

    def fit_report(self, min_correlation: float = 0.1) -> str:
        """Return a text report in the layout of the package lmfit.

        Parameters
        ----------
        min_correlation : float
            Smallest absolute correlation to list.

        Returns
        -------
        str
            Statistics, parameters with standard errors, correlations and message.

        See Also
        --------
        to_xarray : Parameters, standard errors and covariance as a Dataset.
        """
        return report.fit_report(self, min_correlation)

    def __repr__(self) -> str:
        return self.fit_report()

    def _repr_html_(self) -> str:
        return report.html(self)

    def to_xarray(self) -> xr.Dataset:
        """Return parameters, standard errors and covariance as a Dataset.

        The variables have the names that ``xarray.Dataset.curvefit`` uses. Scalar values of the
        result, such as ``chi2``, are attributes.

        Returns
        -------
        xarray.Dataset
            ``curvefit_coefficients`` and ``curvefit_errors`` along ``param`` and, if there is a
            covariance, ``curvefit_covariance`` along ``cov_i`` and ``cov_j``.
        """
        return report.dataset(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the result to a file, without the model function.

        On a local disk, an existing file is replaced only when the new file is complete.

        Parameters
        ----------
        path : str or os.PathLike
            File in an existing folder, with any name, or fsspec URL.

        Raises
        ------
        OSError
            If the file cannot be written.

        See Also
        --------
        load : Load a saved result.
        """
        save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Callable[..., Any] | None = None
    ) -> FitResult:
        """Load a result saved by ``save``; no code in the file is run.

        Parameters
        ----------
        path : str or os.PathLike
            File or fsspec URL.
        model : callable, optional
            The model that was fitted; without it, ``predict`` raises an error.

        Returns
        -------
        FitResult

        Raises
        ------
        FileNotFoundError
            If the file does not exist.
        ResultFileError
            If the file does not hold a result, is damaged, or has another format version.
        ValueError
            If ``model`` differs from the fitted model.

        See Also
        --------
        save : Save a result.
        """
        return load(cls, path, model)

    def conf_interval(self, level: float = 0.95) -> NDArray[np.float64]:
        """Return confidence intervals of the parameters.

        The half-width of an interval is the standard error times a quantile of Student's t
        distribution with ``dof`` degrees of freedom, or of the normal distribution if
        ``absolute_sigma`` is True.

        Parameters
        ----------
        level : float
            Confidence level, between 0 and 1.

        Returns
        -------
        ndarray, shape (p, 2)
            Lower and upper limits; infinite if the data do not constrain a parameter.

        Raises
        ------
        ValueError
            If ``level`` is not between 0 and 1.
        """
        return derived.conf_interval(self, level)

    def derive(
        self, function: Callable[[Mapping[str, Any]], Any], *, covariance: bool = False
    ) -> tuple[Any, Any]:
        """Return the value of a function of the parameters, and its standard error.

        The error follows from pcov by the delta method, with derivatives by JAX.

        Parameters
        ----------
        function : callable
            ``function(p)``, written with jax.numpy, where p has all parameters by name. It returns
            a number, an array, or a dict of them: ``lambda p: jnp.log(2) / p["rate"]``.
        covariance : bool
            If True, return the covariance matrix of all numbers in the value, in order, in place
            of their standard errors.

        Returns
        -------
        value, error : number, ndarray or dict of them
            The error has the shape of the value, for a dict also its keys. It is infinite if the
            value depends on a parameter with infinite error.

        Raises
        ------
        ValueError
            If the function fails, or if there is no covariance.
        """
        return derived.derive(self, function, covariance)

    def predict(self, x: Any, return_std: bool = False) -> Any:
        """Evaluate the model at the best-fit parameters.

        Parameters
        ----------
        x : array, tuple or dict of arrays
            Independent variables, in the structure (array, tuple or dict) of the fit; dates where
            the fit had dates. N-d arrays are broadcast against each other. Values are NaN where x
            is masked.
        return_std : bool
            If True, also return the standard errors ``sqrt(J pcov J^T)`` of the fitted curve (not
            of a new measurement). They are NaN if pcov is infinite.

        Returns
        -------
        ndarray, dask.array.Array or xarray.DataArray, or a pair of them
            Values of the model, or values and standard errors. The arrays are lazy (Dask) if x is
            lazy, or if x are named coordinates with a large common grid; otherwise they are
            computed at once, by threads of this process. To compute a lazy result on a cluster,
            this package must be installed where the scheduler runs.

        Raises
        ------
        DataError
            If the structure of x differs from that of the fit, or if x has no rows.
        ValueError
            If the result was loaded without its model, or has no covariance for ``return_std``.
        """
        if not self.has_model:
            self._model.function()  # raises the error
        if return_std and self.pcov is None:
            raise ValueError(
                f"return_std requires a covariance, but there is no covariance of {len(self.x)} "
                f"parameters. Call predict(x) without return_std."
            )
        varies = self._is_outside(self._fixed)  # the parameters of the model
        root = None
        if return_std and self._root is not None:
            root = self._root[varies][:, : np.count_nonzero(varies)]
        return predict(self._model, x, self.x[varies], root, self.x_units)
