"""The accessor ``.nlsq`` of xarray objects: fits whose dependent variable is the object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

import xarray as xr

from nlsq_dask import _html as html
from nlsq_dask._text import join_first
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.curvefit import curvefit
from nlsq_dask.maps.problem.plan import MapPlan
from nlsq_dask.maps.results import plotting, predict, statuses
from nlsq_dask.maps.results.summary import Summary, is_result
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer
from nlsq_dask.plan import Plan
from nlsq_dask.results.result import FitResult

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure, SubFigure

Method = TypeVar("Method", bound=Callable[..., Any])
Accessor = TypeVar("Accessor", bound=type)


def _documented(source: Callable[..., Any], omitted: str = "") -> Callable[[Method], Method]:
    """Return a decorator that gives a method the signature of a function, and its own config."""

    def decorate(method: Method) -> Method:
        own = inspect.signature(method)
        arguments = dict(inspect.signature(source).parameters)
        arguments.pop(omitted, None)
        arguments |= {name: each for name, each in own.parameters.items() if name == "config"}
        method.__signature__ = own.replace(parameters=[*arguments.values()])  # type: ignore[attr-defined]
        return method

    return decorate


def _registered(kind: type) -> Callable[[Accessor], Accessor]:
    """Return a decorator that registers an accessor, instead of one of an earlier import."""

    def decorate(accessor: Accessor) -> Accessor:
        if getattr(getattr(kind, "nlsq", None), "__module__", None) == __name__:
            delattr(kind, "nlsq")
        is_array = kind is xr.DataArray
        register = xr.register_dataarray_accessor if is_array else xr.register_dataset_accessor
        return register("nlsq")(accessor)  # type: ignore[no-any-return, no-untyped-call]

    return decorate


class _Accessor:
    """Methods that both accessors have."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj

    @_documented(curvefit)
    def curvefit(self, *args: Any, **kwargs: Any) -> xr.Dataset:
        """Fit a function along dimensions, for every position in the others, as xarray's method.

        Parameters
        ----------
        coords, func, reduce_dims, skipna, p0, bounds, param_names, errors, kwargs, **options
            As in ``nlsq_dask.curvefit``.

        Returns
        -------
        Dataset

        See Also
        --------
        nlsq_dask.curvefit : The same as a function, with the description of all arguments.
        """
        return curvefit(self._obj, *args, **kwargs)


@_registered(xr.DataArray)
class DataArrayAccessor(_Accessor):
    """Fits with a DataArray as the dependent variable: ``da.nlsq.fit(model, "time")``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import xarray as xr
    >>> time = np.linspace(0, 4, 50)
    >>> da = xr.DataArray([2 * np.exp(-0.7 * time)], dims=("x", "time"), coords={"time": time})
    >>> def decay(t, height, rate):
    ...     return height * jnp.exp(-rate * t)
    >>> da.nlsq.fit_each(decay, "time", dims="time", verbose=0).popt.values.round(6)
    array([[2. , 0.7]])
    """

    @_documented(AdaptiveHybridStreamingOptimizer.fit, omitted="y_data")
    def fit(
        self,
        model: Any,
        x_data: Any,
        p0: Any = None,
        bounds: Any = None,
        *,
        config: HybridStreamingConfig | None = None,
        **kwargs: Any,
    ) -> FitResult:
        """Fit a model to all elements.

        Parameters
        ----------
        model, x_data, p0, bounds, **kwargs
            As in ``AdaptiveHybridStreamingOptimizer.fit``.
        config : HybridStreamingConfig, optional
            Options of the fit.

        Returns
        -------
        FitResult
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.fit(model, x_data, self._obj, p0, bounds, **kwargs)

    @_documented(AdaptiveHybridStreamingOptimizer.fit_each, omitted="y_data")
    def fit_each(
        self,
        model: Any,
        x_data: Any,
        p0: Any = None,
        bounds: Any = None,
        *,
        config: HybridStreamingConfig | None = None,
        **kwargs: Any,
    ) -> xr.Dataset:
        """Fit a model along some dimensions, for every position in the others.

        Parameters
        ----------
        model, x_data, p0, bounds, **kwargs
            As in ``AdaptiveHybridStreamingOptimizer.fit_each``.
        config : HybridStreamingConfig, optional
            Options of the fits.

        Returns
        -------
        Dataset
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.fit_each(model, x_data, self._obj, p0, bounds, **kwargs)

    @_documented(AdaptiveHybridStreamingOptimizer.plan, omitted="y_data")
    def plan(
        self,
        model: Any,
        x_data: Any,
        p0: Any = None,
        bounds: Any = None,
        *,
        config: HybridStreamingConfig | None = None,
        **kwargs: Any,
    ) -> Plan | MapPlan:
        """Return size, tasks and memory of a fit, without reading data.

        Parameters
        ----------
        model, x_data, p0, bounds, **kwargs
            As in ``AdaptiveHybridStreamingOptimizer.plan``.
        config : HybridStreamingConfig, optional
            Options of the fit.

        Returns
        -------
        Plan or MapPlan
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.plan(model, x_data, self._obj, p0, bounds, **kwargs)


@_registered(xr.Dataset)
class DatasetAccessor(_Accessor):
    """Fits of a variable of a Dataset: ``ds.nlsq.fit(model, "time", "signal", sigma="error")``.

    Names of variables stand for these in ``x_data``, ``y_data`` and ``sigma``. A Dataset that
    ``fit_each`` has returned is shown with the number of pixels by status and the range of each
    parameter, and has the methods ``predict_each``, ``status_table`` and ``plot_map``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import xarray as xr
    >>> time = np.linspace(0, 4, 50)
    >>> variables = {"signal": (("x", "time"), [2 * np.exp(-0.7 * time)]), "error": 0.1}
    >>> ds = xr.Dataset(variables, coords={"time": time})
    >>> def decay(t, height, rate):
    ...     return height * jnp.exp(-rate * t)
    >>> arguments = {"sigma": "error", "dims": "time", "verbose": 0}
    >>> fits = ds.nlsq.fit_each(decay, "time", "signal", **arguments)
    >>> fits.popt.values.round(6)
    array([[2. , 0.7]])
    """

    @_documented(AdaptiveHybridStreamingOptimizer.fit)
    def fit(
        self,
        model: Any,
        x_data: Any,
        y_data: str,
        p0: Any = None,
        bounds: Any = None,
        *,
        config: HybridStreamingConfig | None = None,
        **kwargs: Any,
    ) -> FitResult:
        """Fit a model to all elements of a variable.

        Parameters
        ----------
        model, x_data, p0, bounds, **kwargs
            As in ``AdaptiveHybridStreamingOptimizer.fit``.
        y_data : str
            Name of the variable.
        config : HybridStreamingConfig, optional
            Options of the fit.

        Returns
        -------
        FitResult
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.fit(model, *self._arrays(x_data, y_data, kwargs), p0, bounds, **kwargs)

    @_documented(AdaptiveHybridStreamingOptimizer.fit_each)
    def fit_each(
        self,
        model: Any,
        x_data: Any,
        y_data: str,
        p0: Any = None,
        bounds: Any = None,
        *,
        config: HybridStreamingConfig | None = None,
        **kwargs: Any,
    ) -> xr.Dataset:
        """Fit a model to a variable along some dimensions, for every position in the others.

        Parameters
        ----------
        model, x_data, p0, bounds, **kwargs
            As in ``AdaptiveHybridStreamingOptimizer.fit_each``.
        y_data : str
            Name of the variable.
        config : HybridStreamingConfig, optional
            Options of the fits.

        Returns
        -------
        Dataset
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        arrays = self._arrays(x_data, y_data, kwargs)
        return optimizer.fit_each(model, *arrays, p0, bounds, **kwargs)

    @_documented(AdaptiveHybridStreamingOptimizer.plan)
    def plan(
        self,
        model: Any,
        x_data: Any,
        y_data: str,
        p0: Any = None,
        bounds: Any = None,
        *,
        config: HybridStreamingConfig | None = None,
        **kwargs: Any,
    ) -> Plan | MapPlan:
        """Return size, tasks and memory of a fit of a variable, without reading data.

        Parameters
        ----------
        model, x_data, p0, bounds, **kwargs
            As in ``AdaptiveHybridStreamingOptimizer.plan``.
        y_data : str
            Name of the variable.
        config : HybridStreamingConfig, optional
            Options of the fit.

        Returns
        -------
        Plan or MapPlan
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.plan(model, *self._arrays(x_data, y_data, kwargs), p0, bounds, **kwargs)

    def predict_each(
        self, model: Callable[..., Any], x_data: Any, *, param_names: Sequence[str] | None = None
    ) -> xr.DataArray:
        """Evaluate the model at every position of a map, with the parameters of each.

        Parameters
        ----------
        model, x_data, param_names
            As in ``nlsq_dask.predict_each``.

        Returns
        -------
        DataArray

        See Also
        --------
        nlsq_dask.predict_each : The same as a function, with the description of all arguments.
        """
        return predict.predict_each(model, self._obj, x_data, param_names=param_names)

    def status_table(self) -> pd.DataFrame:
        """Count the pixels of a map by status, as ``nlsq_dask.status_table``.

        Returns
        -------
        pandas.DataFrame
        """
        return statuses.status_table(self._obj)

    def plot_map(self, name: str, *, figure: Figure | SubFigure | None = None) -> Any:
        """Plot a parameter of a map, its standard error and the status, side by side.

        Parameters
        ----------
        name, figure
            As in ``nlsq_dask.plot_map``.

        Returns
        -------
        matplotlib Figure or SubFigure
        """
        return plotting.plot_map(self._obj, name, figure=figure)

    def __repr__(self) -> str:
        if is_result(self._obj):
            return str(Summary.of(self._obj))
        names = join_first([repr(str(name)) for name in self._obj.data_vars], noun="variables")
        return (
            f"Accessor of a Dataset with {names or 'no variables'}: .nlsq.fit, .nlsq.fit_each, "
            f".nlsq.curvefit, .nlsq.plan"
        )

    def _repr_html_(self) -> str:
        if is_result(self._obj):
            return Summary.of(self._obj).html()
        return html.page(html.paragraph(escape(repr(self))))

    def _arrays(self, x_data: Any, y_data: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return x and y, and replace the name of sigma in the other arguments by its array."""
        if isinstance(kwargs.get("sigma"), str):
            kwargs["sigma"] = self._variable("sigma", kwargs["sigma"])
        if isinstance(x_data, dict):
            x_data = {key: self._named("x_data", each) for key, each in x_data.items()}
        elif isinstance(x_data, tuple | list) and any(isinstance(each, str) for each in x_data):
            x_data = tuple(self._named("x_data", each) for each in x_data)
        else:
            x_data = self._named("x_data", x_data)
        return x_data, self._variable("y_data", y_data)

    def _named(self, argument: str, value: Any) -> Any:
        return self._variable(argument, value) if isinstance(value, str) else value

    def _variable(self, argument: str, name: Any) -> xr.DataArray:
        if isinstance(name, xr.DataArray):
            return name
        if name not in self._obj.variables:
            known = ", ".join(map(repr, [*self._obj.data_vars, *self._obj.coords]))
            raise ValueError(
                f"{argument}={name!r} is not a variable of the Dataset, which has {known}."
            )
        array: xr.DataArray = self._obj[name]
        return array
