"""``FitResult``: the result of a fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from nlsq_dask.model.model import Model
from nlsq_dask.results import report
from nlsq_dask.results.plotting.methods import PlotMethods
from nlsq_dask.results.predict import predict
from nlsq_dask.results.saving import MissingModel, load, save

if TYPE_CHECKING:
    import xarray as xr

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class FitResult(PlotMethods):
    """Result of a fit; values are attributes and items, ``result.pcov`` or ``result["pcov"]``.

    Notation: residuals ``r = (model - y) / sigma``, their Jacobian ``J``, p parameters, n points.

    Attributes
    ----------
    x, popt : ndarray, shape (p,)
        Best-fit parameters.
    success : bool
        True if the fit converged.
    status : int
        Reason for which the fit ended, positive for success:

        - 1: predicted reduction and step are below the floating-point resolution
        - 2, 3: predicted reduction of the cost, or step, below ``gauss_newton_tol``
        - 4: estimated error after a last step without a pass below ``gauss_newton_tol``
        - 0: maximum number of iterations
        - -1: no step reduces the cost
        - -2, -3: the model is not finite at the start, or at any trial point
        - -4: stopped by the callback
        - -5: the model is insensitive to a parameter
        - -6: ill-conditioned
        - -7: slow progress
        - -8, -9: ``max_walltime``, SIGTERM
    message : str
        Reason for which the fit ended, and advice if it did not converge.
    cost : float
        ``1/2 sum C^2 rho((r / C)^2)`` over all rows, with the scale C of the loss; ``1/2 sum r^2``
        with the linear loss. It includes the penalty on the variance of groups.
    grad : ndarray, shape (p,)
        Gradient of the cost; ``J^T r`` with the linear loss.
    optimality : float
        Largest absolute component of the gradient, ignoring those directed at an active bound.
    active_mask : ndarray of int, shape (p,)
        -1 at a lower bound, 1 at an upper bound, else 0.
    nfev, njev : int
        Number of evaluations of model and Jacobian over all rows.
    nit : int
        Number of Gauss-Newton iterations over all rows.
    pcov : ndarray, shape (p, p), or None
        Covariance matrix; infinite if the data do not constrain the parameters. None from
        ``cg_param_threshold`` parameters on.
    perr : ndarray, shape (p,)
        Standard errors. Without pcov they are NaN, or estimates with ``cg_error_probes``.
    absolute_sigma : bool
    loss : str
    f_scale : float
    cov_type : str
        Arguments and options of the fit; see ``fit`` and ``HybridStreamingConfig``.
    sigma_sq : float
        ``2 cost / dof``, without a penalty; pcov is scaled by it unless sigma is absolute.
    chi2, reduced_chi2 : float
        ``sum r^2`` and ``chi2 / dof``; with the linear loss, ``2 cost`` and ``sigma_sq``.
    dof : int
        ``n_points - p``.
    n_points, n_omitted : int
        Number of rows used, and of rows omitted because they are masked or not finite.
    r_squared : float
        ``1 - chi2 / (weighted sum of squares of y about its mean)``.
    condition_number : float
        Condition number of the Jacobian with columns scaled to unit length.
    block_statistics : xarray.Dataset or None
        ``chi2``, ``n_points``, ``reduced_chi2`` and ``largest_residual`` (weighted) of each block,
        at the point of ``cost``, along the dimensions of y. Coordinates are the positions of each
        block's first element; their attribute ``size`` is the length of the dimension.
        ``reduced_chi2`` is ``chi2 / n_points``, NaN without points, as a block has no degrees of
        freedom of its own. None if there was no pass.
    param_names : tuple of str
        Names of the parameters.
    p0 : ndarray, shape (p,)
        Initial values.
    bounds : tuple of ndarray, each of shape (p,)
        Lower and upper bounds.
    n_passes : int
        Number of passes over all rows.
    rows_read, bytes_read, rows_cached : int
        Rows and bytes read, including the sample, and rows taken from the cache instead.
    phase_history : list of dict
        Phases, with phase, name, start_time (s since the epoch), duration (s) and details.
    history : xarray.Dataset
        Reported iterations along ``iteration``: all, except that the warm-up reports one in
        ``callback_frequency``. Variables: ``stage`` ("warm-up", "sample" or "all rows"),
        ``n_iterations`` (since the previous one), ``loss`` (mean squared weighted residual over
        the rows of the stage), ``gradient_norm`` (of the relative loss, in normalized parameters),
        ``step_norm`` (of the trial, in normalized parameters), ``trust_radius`` (in parameters
        scaled to unit columns of the Jacobian, or NaN), ``accepted``, ``n_passes`` (so far),
        ``time`` (s since the epoch) and, up to 1,000 parameters, ``params`` (along ``param``).
        The callback is called at the iterations that reach a multiple of ``callback_frequency``.
    diagnostics : dict
        ``parameters_at`` and ``sums_at`` (points of x, and of cost, grad and pcov),
        ``active_bounds`` and ``undetermined`` (names of parameters at a bound, and non-identifiable
        ones), ``warm_up``, ``sample`` and ``defense``; ``retries`` (number of retried reads) and
        ``left_out``, a dict for each skipped block: ``block`` (position in the grid), ``rows``
        (number), ``array`` (name of the unreadable array), ``chunk`` (of a Zarr store, or None)
        and ``error``. With multistart also ``multistart``: ``candidates``, shape (n_starts, p),
        ``rounds`` (rows, losses of all candidates, survivors), ``winner``, ``start`` (final point
        of the winner) and ``warm_up_of_p0`` if p0 did not win.
    x_units : dict of str to str
        Units of dates by name of the x array, such as
        ``{"x_data['time']": "days since 1970-01-01"}``; for cftime with the calendar, as in
        "days since 1970-01-01, calendar noleap"; "days" for durations. Empty without dates.
    sample : xarray.Dataset or None
        Up to 2,000 random rows that were used, along ``row``: ``y_data``, ``fitted`` (the model at
        ``x``), ``sigma`` if there is one, and the x arrays under their keys or names ("x" or
        "x_0", "x_1", ... if unnamed), those of shape (n, k) also along ``feature``; a "/" in a name
        becomes "_". With ``enable_residual_weighting``, ``sigma`` is divided by the square root of
        the weight of the row's group. ``plot`` draws these rows. None if there are none.
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
    _model: Model = field(kw_only=True)

    @property
    def popt(self) -> Vector:
        """Best-fit parameters, an alias of ``x``."""
        return self.x

    @property
    def perr(self) -> Vector:
        """Standard errors, shape (p,); NaN if unknown."""
        if self.pcov is not None:
            return np.sqrt(np.diag(self.pcov))
        return np.full(len(self.x), np.nan) if self._errors is None else self._errors

    @property
    def reduced_chi2(self) -> float:
        """``chi2 / dof``; infinite without degrees of freedom."""
        return self.chi2 / self.dof if self.dof > 0 else float("inf")

    @property
    def has_model(self) -> bool:
        """Whether ``predict`` has the model; False if the result was loaded without it."""
        return not isinstance(self._model.function, MissingModel)

    def keys(self) -> list[str]:
        """Return the names of all values."""
        names = [f.name for f in fields(self) if not f.name.startswith("_")]
        return [*names, "popt", "perr", "reduced_chi2"]

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
        """Return a text report in the layout of lmfit.

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
        to_xarray : The same values as a Dataset.
        """
        return report.fit_report(self, min_correlation)

    def __repr__(self) -> str:
        return self.fit_report()

    def _repr_html_(self) -> str:
        return report.html(self)

    def to_xarray(self) -> xr.Dataset:
        """Return parameters, standard errors and covariance as a Dataset.

        Names are those of ``xarray.Dataset.curvefit``; scalars are attributes.

        Returns
        -------
        xarray.Dataset
            ``curvefit_coefficients`` and ``curvefit_errors`` along ``param`` and, if there is a
            covariance, ``curvefit_covariance`` along ``cov_i`` and ``cov_j``.
        """
        return report.dataset(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the result without the model's function to a file.

        On a disk the file is written atomically.

        Parameters
        ----------
        path : str or os.PathLike
            File in an existing folder, or fsspec URL. The name is arbitrary.

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
            Fitted model, required by ``predict``.

        Returns
        -------
        FitResult

        Raises
        ------
        FileNotFoundError
            If the file does not exist.
        ResultFileError
            If the file is not a result, is damaged, or has another format version.
        ValueError
            If ``model`` differs from the fitted model.

        See Also
        --------
        save : Save a result.
        """
        return load(cls, path, model)

    def conf_interval(self, level: float = 0.95) -> NDArray[np.float64]:
        """Return confidence intervals of the parameters.

        They are symmetric: standard errors times quantiles of Student's t distribution with ``dof``
        degrees of freedom, or of the normal distribution if sigma is absolute.

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
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be between 0 and 1; got {level!r}.")
        tail = 0.5 * (1.0 + level)
        is_normal = self.absolute_sigma or self.dof <= 0
        quantile = stats.norm.ppf(tail) if is_normal else stats.t.ppf(tail, self.dof)
        half = quantile * self.perr
        return np.stack([self.x - half, self.x + half], axis=1)

    def predict(self, x: Any, return_std: bool = False) -> Any:
        """Evaluate the model at the solution.

        Parameters
        ----------
        x : array, tuple or dict of arrays
            As in ``fit``, including dates; arrays of several dimensions are broadcast. Values are
            NaN where x is masked.
        return_std : bool
            Whether to also return the standard errors ``sqrt(J pcov J^T)`` of the fitted curve
            (not of a new measurement). NaN if pcov is infinite.

        Returns
        -------
        ndarray, dask.array.Array or xarray.DataArray, or a pair of them
            Lazy for lazy x and for large outer products of named coordinates; otherwise computed
            by threads of this process. Computing a lazy result on a cluster requires this package
            in the scheduler's process.

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
        return predict(self._model, x, self.x, self._root if return_std else None, self.x_units)
