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
    """Base class of ``FitResult``."""

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

        With several quantities (arrays or columns), data are plotted against the fit, and residuals
        against each quantity, at most six. With ``x``, the means of data and fit over neighboring
        values of that quantity are plotted.

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
            If there are no rows, or no quantity ``x``.
        ImportError
            If matplotlib is not installed.

        See Also
        --------
        plot_history, plot_blocks

        Notes
        -----
        The standard deviation of residuals is 1 with ``absolute_sigma`` and sigma, otherwise the
        estimate ``sqrt(sigma_sq)``, or one from their median size if there are outliers. That of a
        measurement is this value times its sigma.
        """
        return fit_plot.plot(self._result, x, figure)

    def plot_history(self, *, figure: Figure | SubFigure | None = None) -> Any:
        """Plot loss, gradient norm, step norm and passes of each iteration in ``history``.

        Each stage (warm-up, sample, all rows) has its own color and line, because its loss is over
        different rows. Rejected trials are crosses.

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
            If there was no iteration.
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

        The extreme block is marked, and named in the title.

        Parameters
        ----------
        quantity : {"reduced_chi2", "largest_residual", "chi2", "n_points"}
            Variable of ``block_statistics``.
        dims : str or tuple of str, optional
            One or two dimensions of ``block_statistics``, by default those with most blocks. Over
            the other dimensions, the maximum of the first two quantities is plotted, and the sum
            of the others.
        figure : matplotlib Figure or SubFigure, optional
            Figure to draw into; by default a new one of pyplot.

        Returns
        -------
        matplotlib Figure or SubFigure

        Raises
        ------
        ValueError
            If there was no pass over all rows, or for an unknown quantity or dimension.
        ImportError
            If matplotlib is not installed.

        See Also
        --------
        plot, plot_history
        """
        return block_plot.plot_blocks(self._result, quantity, dims, figure)
