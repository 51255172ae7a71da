"""The accessor ``.nlsq`` of xarray objects: fits whose dependent variable is the object."""

from __future__ import annotations

from typing import Any

import xarray as xr

from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.curvefit import curvefit
from nlsq_dask.maps.plan import MapPlan
from nlsq_dask.optimizer import AdaptiveHybridStreamingOptimizer
from nlsq_dask.plan import Plan
from nlsq_dask.results.result import FitResult


class _Accessor:
    """Methods that both accessors have."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj

    def curvefit(self, *args: Any, **kwargs: Any) -> xr.Dataset:
        """Fit a function along dimensions, for every position in the others.

        Parameters
        ----------
        *args, **kwargs
            As in ``nlsq_dask.curvefit``, without ``obj``.

        Returns
        -------
        Dataset
        """
        return curvefit(self._obj, *args, **kwargs)


@xr.register_dataarray_accessor("nlsq")  # type: ignore[no-untyped-call]
class DataArrayAccessor(_Accessor):
    """Fits with a DataArray as the dependent variable: ``da.nlsq.fit(model, "time")``."""

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

        Returns
        -------
        FitResult
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.fit(model, x_data, self._obj, p0, bounds, **kwargs)

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

        Returns
        -------
        Dataset
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.fit_each(model, x_data, self._obj, p0, bounds, **kwargs)

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

        Returns
        -------
        Plan or MapPlan
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.plan(model, x_data, self._obj, p0, bounds, **kwargs)


@xr.register_dataset_accessor("nlsq")  # type: ignore[no-untyped-call]
class DatasetAccessor(_Accessor):
    """Fits of a variable of a Dataset: ``ds.nlsq.fit(model, "time", "signal", sigma="error")``.

    Names of variables stand for these in ``x_data``, ``y_data`` and ``sigma``.
    """

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

        Returns
        -------
        FitResult
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.fit(model, *self._arrays(x_data, y_data, kwargs), p0, bounds, **kwargs)

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

        Returns
        -------
        Dataset
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        arrays = self._arrays(x_data, y_data, kwargs)
        return optimizer.fit_each(model, *arrays, p0, bounds, **kwargs)

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

        Returns
        -------
        Plan or MapPlan
        """
        optimizer = AdaptiveHybridStreamingOptimizer(config)
        return optimizer.plan(model, *self._arrays(x_data, y_data, kwargs), p0, bounds, **kwargs)

    def _arrays(self, x_data: Any, y_data: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return x and y, and replace the name of sigma in the other arguments by its array."""
        if isinstance(kwargs.get("sigma"), str):
            kwargs["sigma"] = self._variable("sigma", kwargs["sigma"])
        if isinstance(x_data, dict):
            x_data = {key: self._named("x_data", each) for key, each in x_data.items()}
        elif isinstance(x_data, tuple | list):
            x_data = type(x_data)(self._named("x_data", each) for each in x_data)
        else:
            x_data = self._named("x_data", x_data)
        return x_data, self._variable("y_data", y_data)

    def _named(self, argument: str, value: Any) -> Any:
        return self._variable(argument, value) if isinstance(value, str) else value

    def _variable(self, argument: str, name: Any) -> xr.DataArray:
        if isinstance(name, xr.DataArray):
            return name
        if name not in self._obj.variables:
            known = ", ".join(map(repr, self._obj.variables))
            raise ValueError(f"{argument}={name!r} is no variable of the Dataset; it has {known}.")
        array: xr.DataArray = self._obj[name]
        return array
