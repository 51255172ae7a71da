"""``PlotMethods``: the plot methods of ``FitResult``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from nlsq_dask.results.plotting import blocks as block_plot
from nlsq_dask.results.plotting import fit as fit_plot
from nlsq_dask.results.plotting import history as history_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from nlsq_dask.results.result import FitResult


class PlotMethods:
    """Base class of ``FitResult`` with its plot methods."""

    @property
    def _result(self) -> FitResult:
        return cast("FitResult", self)

    def plot(self, x: str | None = None, *, figure: Figure | SubFigure | None = None) -> Any:
        """Plot data, fit and residuals at the rows of ``sample``.

        With one quantity in x, the upper panel shows the data (with error bars for few rows with
        sigma), the fitted curve with a band of two standard errors and, if sigma is the same for
        all rows, a band of two standard deviations of a measurement. The lower panels show the
        residuals ``(y - model) / sigma``, with lines at zero and at one standard deviation, and
        their histogram with the normal density.

        With several quantities (arrays or columns of x), data are plotted against fitted values,
        and residuals against each quantity, at most six. If ``x`` names a quantity, data and fit
        are plotted against it, averaged over groups of rows with neighboring values.

        Means of residuals over neighboring x are drawn with their standard errors. Outliers are
        marked at the edge of the panel and counted.

        Parameters
        ----------
        x : str, optional
            Name of an array in ``sample``, or of a column, such as "x[1]".
        figure : matplotlib Figure or SubFigure, optional
            Figure to draw into; by default a new one of pyplot.

        Returns
        -------
        matplotlib Figure or SubFigure

        Raises
        ------
        ValueError
            If the result holds no rows, or there is no quantity named ``x``.
        ImportError
            If matplotlib is not installed.

        See Also
        --------
        plot_history, plot_blocks

        Notes
        -----
        The standard deviation of the residuals is 1 if sigma was given with ``absolute_sigma``.
        Otherwise it is estimated as ``sqrt(sigma_sq)``, or from the median absolute residual if
        there are outliers. The standard deviation of a measurement is this value times its sigma.
        """
        return fit_plot.plot(self._result, x, figure)

    def plot_history(self, *, figure: Figure | SubFigure | None = None) -> Any:
        """Plot loss, gradient norm, step norm and passes of each iteration in ``history``.

        Each stage (warm-up, sample, all rows) has its own color and line, because the stages
        compute the loss over different rows. Crosses mark rejected trial points.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, optional
            Figure to draw into; by default a new one of pyplot.

        Returns
        -------
        matplotlib Figure or SubFigure

        Raises
        ------
        ValueError
            If the fit ended before the first iteration.
        ImportError
            If matplotlib is not installed.

        See Also
        --------
        plot, plot_blocks
        """
        return history_plot.plot_history(self._result, figure)

    def plot_blocks(
        self,
        quantity: str = "reduced_chi2",
        *,
        dims: str | tuple[str, ...] | None = None,
        figure: Figure | SubFigure | None = None,
    ) -> Any:
        """Plot ``block_statistics`` as a profile along one dimension or a map of two.

        The worst block is marked and named in the title: the one with the largest value, or with
        the fewest rows for "n_points".

        Parameters
        ----------
        quantity : {"reduced_chi2", "largest_residual", "chi2", "n_points"}
            Variable of ``block_statistics``.
        dims : str or tuple of str, optional
            One or two dimensions of ``block_statistics``; by default the two with most blocks, or
            one if only one has several. Over the other dimensions, "reduced_chi2" and
            "largest_residual" are reduced to their maximum, "chi2" and "n_points" to their sum.
        figure : matplotlib Figure or SubFigure, optional
            Figure to draw into; by default a new one of pyplot.

        Returns
        -------
        matplotlib Figure or SubFigure

        Raises
        ------
        ValueError
            If the fit completed no pass over all rows, or if ``quantity`` or ``dims`` is unknown.
        ImportError
            If matplotlib is not installed.

        See Also
        --------
        plot, plot_history
        """
        return block_plot.plot_blocks(self._result, quantity, dims, figure)
