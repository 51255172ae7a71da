"""``FitResult``: what a fit returns."""

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
from nlsq_dask.results.plotting import blocks as block_plot
from nlsq_dask.results.plotting import fit as fit_plot
from nlsq_dask.results.plotting import history as history_plot
from nlsq_dask.results.predict import predict
from nlsq_dask.results.saving import MissingModel, load, save

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure, SubFigure

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """Result of a fit; every value by attribute and by item, ``result.pcov`` or ``result["pcov"]``.

    With residuals ``r = (model - y) / sigma`` and their Jacobian ``J``, p parameters, n points.

    Attributes
    ----------
    x, popt : ndarray, shape (p,)
        The parameters.
    success : bool
        Whether they are a solution.
    status : int
        Positive for success: 2 and 3 where the reduction of the cost or the step that is left is
        below ``gauss_newton_tol``, 4 where the last step was taken without another pass, 1 where
        floating point resolves no more. 0 at the limit of iterations. Negative where it ended
        otherwise: -1 no step reduces the cost, -2 the model is not finite at the start, -3 or at
        any trial from here, -4 the callback, -5 the model does not react to a parameter, -6 a
        valley too flat for float64, -7 steps that bring hardly anything, -8 ``max_walltime``, -9
        SIGTERM.
    message : str
        Why the fit ended, and what to try if it is not a solution.
    cost : float
        ``1/2 sum C^2 rho((r / C)^2)`` over all rows, with the scale C of the loss; ``1/2 sum r^2``
        with the linear loss. A penalty on the variance of groups is part of it.
    grad : ndarray, shape (p,)
        Gradient of the cost; ``J^T r`` with the linear loss.
    optimality : float
        Largest component of the gradient, without those that push against an active bound.
    active_mask : ndarray of int, shape (p,)
        -1 at a lower bound, 1 at an upper bound, else 0.
    nfev, njev : int
        Evaluations over all rows; every one brings the Jacobian with it.
    nit : int
        Gauss-Newton iterations over all rows.
    pcov : ndarray, shape (p, p), or None
        Covariance; infinite where the data do not determine the parameters. None from
        ``cg_param_threshold`` parameters on.
    perr : ndarray, shape (p,)
        Standard errors. Without pcov they are NaN, or estimates if ``cg_error_probes`` asks for
        them.
    absolute_sigma : bool
        Whether sigma was meant in absolute terms.
    loss : str
    f_scale : float
    cov_type : str
        What was asked for; see ``fit`` and ``HybridStreamingConfig``.
    sigma_sq : float
        ``2 cost / dof``, without a penalty, by which pcov is scaled unless sigma is absolute.
    chi2, reduced_chi2 : float
        ``sum r^2`` and ``chi2 / dof``; with the linear loss, ``2 cost`` and ``sigma_sq``.
    dof : int
        ``n_points - p``.
    n_points, n_omitted : int
        Rows used; rows left out because they are masked or not finite.
    r_squared : float
        ``1 - chi2 / (weighted sum of squares of y about its mean)``.
    condition_number : float
        Of the Jacobian with its columns scaled to unit length.
    block_statistics : xarray.Dataset or None
        ``chi2``, ``n_points``, ``reduced_chi2`` and ``largest_residual`` (a weighted residual) of
        every block of the data, at the point where ``cost`` stands; along the dimensions of y, with
        the position of each block's first entry as coordinates, whose attribute ``size`` is the
        number of entries along the dimension. Of a block ``reduced_chi2`` is ``chi2 / n_points``,
        NaN without points: the parameters are fitted to all blocks together, so that no block has
        degrees of freedom of its own. None if there was no pass.
    param_names : tuple of str
    p0 : ndarray, shape (p,)
        The start.
    bounds : tuple of ndarray, each of shape (p,)
    n_passes : int
        Reductions over all rows.
    rows_read, bytes_read, rows_cached : int
        From the source, sampling included; rows that did not have to be read again.
    phase_history : list of dict
        Each with phase, name, start_time (s since the epoch), duration (s) and what it did.
    history : xarray.Dataset
        Along ``iteration``, those that are reported: all, but of the warm-up one in
        ``callback_frequency``. Each with its ``stage`` ("warm-up", "sample" or "all rows"),
        ``n_iterations`` (since the one before), ``loss``
        (the mean squared weighted residual over the rows of the stage), ``gradient_norm`` (of the
        relative loss, in normalized parameters), ``step_norm`` (of the trial, in normalized
        parameters), ``trust_radius`` (in parameters each of which changes the residuals' norm by
        one a unit; NaN where there is none), ``accepted``, ``n_passes`` (so far), ``time`` (s
        since the epoch) and, up to 1,000 of them, ``params`` (along ``param``).
        A callback is told of those at which the count passes a multiple of
        ``callback_frequency``.
    diagnostics : dict
        ``parameters_at`` and ``sums_at`` (the points at which x, and cost, grad and pcov stand),
        ``active_bounds`` and ``undetermined`` (names), ``warm_up``, ``sample`` and ``defense``;
        ``retries``, how often reading was tried again, and ``left_out``, a dict for each block that
        could not be read: ``block`` (its position in the grid), ``rows`` (how many), ``array``
        (which of them could not be read), ``chunk`` (of a Zarr store, or None) and ``error``.
        With multistart also ``multistart``: ``candidates``, shape (n_starts, p), ``rounds`` (rows,
        losses of all candidates, survivors), ``winner``, ``start`` (where the winner got to) and
        ``warm_up_of_p0`` if another one won.
    x_units : dict of str to str
        What dates in x were measured in, by the names that messages give to those arrays, such as
        ``{"x_data['time']": "days since 1970-01-01"}``; for cftime with the calendar, as in
        "days since 1970-01-01, calendar noleap"; "days" for durations. Empty without dates.
    sample : xarray.Dataset or None
        Up to 2,000 rows of those that were used, drawn at random, along ``row``: ``y_data``,
        ``fitted`` (the model at ``x``), ``sigma`` if there is one, and the arrays of x under their
        keys or names ("x" or "x_0", "x_1", ... without), an array of shape (n, k) along
        ``feature``; a "/" in a name is a "_". With ``enable_residual_weighting``, ``sigma`` is what
        the fit divides by: the given one, or 1, divided by the square root of the weight of the
        row's group. It is what ``plot`` draws. None if there is no row.
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
        """The parameters, under SciPy's other name."""
        return self.x

    @property
    def perr(self) -> Vector:
        """Standard errors, shape (p,); NaN where they are not known."""
        if self.pcov is not None:
            return np.sqrt(np.diag(self.pcov))
        return np.full(len(self.x), np.nan) if self._errors is None else self._errors

    @property
    def reduced_chi2(self) -> float:
        """``chi2 / dof``; infinite without degrees of freedom."""
        return self.chi2 / self.dof if self.dof > 0 else float("inf")

    @property
    def has_model(self) -> bool:
        """Whether the model is there for ``predict``; a loaded result may be without."""
        return not isinstance(self._model.function, MissingModel)

    def keys(self) -> list[str]:
        """Return the names of all values."""
        names = [f.name for f in fields(self) if not f.name.startswith("_")]
        return [*names, "popt", "perr", "reduced_chi2"]

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str):
            self._refuse_unpacking()
        if name not in self.keys():
            raise KeyError(f"{name!r}; a FitResult has {', '.join(self.keys())}")
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> NoReturn:
        self._refuse_unpacking()

    def _refuse_unpacking(self) -> NoReturn:
        raise TypeError(
            "a FitResult cannot be unpacked; use result.popt and result.pcov, or call "
            "nlsq_dask.curve_fit, which returns (popt, pcov)."
        )

    def fit_report(self, min_correlation: float = 0.1) -> str:
        """Return a report in the layout of lmfit's.

        Parameters
        ----------
        min_correlation : float
            Smallest absolute correlation that is listed.

        Returns
        -------
        str
        """
        return report.fit_report(self, min_correlation)

    def __repr__(self) -> str:
        return self.fit_report()

    def _repr_html_(self) -> str:
        return report.html(self)

    def to_xarray(self) -> xr.Dataset:
        """Return parameters, errors (along ``param``) and covariance as a Dataset.

        The names are xarray's own for ``curvefit``; the scalars are attributes.

        Returns
        -------
        xarray.Dataset
            ``curvefit_coefficients``, ``curvefit_errors`` and, if there is a covariance,
            ``curvefit_covariance`` along ``cov_i`` and ``cov_j``.
        """
        return report.dataset(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the model's function to a file.

        On a disk it appears as a whole or not at all.

        Parameters
        ----------
        path : str or os.PathLike
            File, in a folder that exists, or fsspec URL; any name will do.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Callable[..., Any] | None = None
    ) -> FitResult:
        """Read what ``save`` has written, in any process; no code in it is run.

        Parameters
        ----------
        path : str or os.PathLike
        model : callable, optional
            The model that was fitted, without which ``predict`` does not work.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ResultFileError
            If it is no result, damaged, or written by a version of another format.
        ValueError
            If ``model`` computes something else than the one that was fitted.
        """
        return load(cls, path, model)

    def conf_interval(self, level: float = 0.95) -> NDArray[np.float64]:
        """Return an interval for each parameter that covers the truth with probability ``level``.

        It is symmetric, from standard errors: of Student's t distribution with ``dof`` degrees of
        freedom, or of the normal distribution where sigma is absolute.

        Parameters
        ----------
        level : float
            Between 0 and 1.

        Returns
        -------
        ndarray, shape (p, 2)
            Lower and upper ends; infinite where the data do not determine a parameter.

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
            As in ``fit``, dates included; arrays of several dimensions broadcast against each
            other. Where x is masked, values are NaN.
        return_std : bool
            Whether to return standard errors of the values as well, ``sqrt(J pcov J^T)``: of the
            curve that was fitted, not of a new measurement. NaN where pcov is infinite.

        Returns
        -------
        ndarray, dask.array.Array or xarray.DataArray, or a pair of them
            Lazy for lazy x, and for named coordinates whose product is large; on a cluster, the
            scheduler's process needs this package to pass them on, unlike that of a fit. All else
            is computed at once, by threads of this process.

        Raises
        ------
        DataError
            If x is not made as that of the fit was, or has no rows.
        ValueError
            If there is no model, in a result that was loaded without it; or no covariance for
            ``return_std``.
        """
        if not self.has_model:
            self._model.function()  # says how it can be had
        if return_std and self.pcov is None:
            raise ValueError(
                f"there is no covariance of {len(self.x)} parameters, so there are no standard "
                f"errors of values. Call predict(x) without return_std."
            )
        return predict(self._model, x, self.x, self._root if return_std else None, self.x_units)

    def plot(self, x: str | None = None, *, figure: Figure | SubFigure | None = None) -> Any:
        """Draw the data, the fit and the residuals, at the rows of ``sample``.

        Over the only quantity of x: the data (with error bars, if there are few and they have
        sigma), the curve with a band of two of its standard errors, and, where it is the same for
        all, two standard deviations of a measurement. Below, residuals ``(y - model) / sigma`` with
        lines at zero and at plus and minus one standard deviation, and a histogram beside the
        normal density.

        Of residuals a standard deviation is 1 with ``absolute_sigma`` and a sigma; else it is what
        the fit estimates, ``sqrt(sigma_sq)``, or the median of their sizes if some are far out. Of
        a measurement it is that times its sigma: the error bars and the band.

        Where x is several quantities, arrays or columns, no curve over one of them exists. Then the
        data are drawn against the fit, and residuals against each quantity, at most six; with ``x``
        the means of data and fit over neighbouring values of that quantity.

        Means of residuals over neighbouring x are shown with their standard errors. Residuals that
        are far out are marked at the edge of their panel, and counted.

        Parameters
        ----------
        x : str, optional
            Which quantity: the name of an array in ``sample``, or of a column, such as "x[1]".
        figure : matplotlib Figure or SubFigure, optional
            To draw into; a new one of pyplot's without it.

        Returns
        -------
        matplotlib Figure or SubFigure
            What was drawn into.

        Raises
        ------
        ValueError
            If there is nothing to plot, or no such quantity.
        ImportError
            Without matplotlib.
        """
        return fit_plot.plot(self, x, figure)

    def plot_history(self, *, figure: Figure | SubFigure | None = None) -> Any:
        """Draw loss, gradient norm, steps and passes of every iteration, from ``history``.

        Each stage (warm-up, sample, all rows) has a colour and a line of its own, because its loss
        is over other rows; trials that were rejected are crosses.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, optional
            To draw into; a new one of pyplot's without it.

        Returns
        -------
        matplotlib Figure or SubFigure
            What was drawn into.

        Raises
        ------
        ValueError
            If there was no iteration.
        ImportError
            Without matplotlib.
        """
        return history_plot.plot_history(self, figure)

    def plot_blocks(
        self,
        quantity: str = "reduced_chi2",
        *,
        dims: str | tuple[str, ...] | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Any:
        """Draw ``block_statistics``, as a profile along one dimension or a map of two.

        The title says which block is the extreme one, and a mark where it is.

        Parameters
        ----------
        quantity : {"reduced_chi2", "largest_residual", "chi2", "n_points"}
            The first is ``chi2 / n_points`` of each block.
        dims : str or tuple of str, optional
            One or two dimensions of y, as ``block_statistics`` names them. By default those with
            most blocks. Over further ones the first two quantities are maxima, the others sums.
        figure : matplotlib Figure or SubFigure, optional
            To draw into; a new one of pyplot's without it.

        Returns
        -------
        matplotlib Figure or SubFigure
            What was drawn into.

        Raises
        ------
        ValueError
            If there was no pass over all rows, or for another quantity or dimension.
        ImportError
            Without matplotlib.
        """
        return block_plot.plot_blocks(self, quantity, dims, figure)
