"""``History``: the observer that records the iterations of a fit for ``FitResult.history``."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask.events import Event, IterationFinished, PassFinished, without_many_params

# Fields of ``IterationFinished`` that become variables of the Dataset, and their dtypes.
_VARIABLES: dict[str, type] = {
    **dict.fromkeys(("loss", "gradient_norm", "step_norm", "trust_radius", "time"), float),
    "accepted": bool,
    "n_iterations": np.int64,
}


class History:
    """Observer that records the iterations of a fit."""

    def __init__(self) -> None:
        self._iterations: list[IterationFinished] = []
        self._passes: list[int] = []  # number of complete passes at each iteration
        self._n_passes = 0

    def __call__(self, event: Event) -> None:
        """Record an event that is an iteration, count a pass, and ignore other events."""
        if isinstance(event, IterationFinished):
            kept = without_many_params(event)
            assert isinstance(kept, IterationFinished)
            self._iterations.append(kept)
            self._passes.append(self._n_passes)
        elif isinstance(event, PassFinished):
            self._n_passes += 1

    def dataset(self, param_names: tuple[str, ...]) -> xr.Dataset:
        """Return the iterations as a Dataset, the one that becomes ``FitResult.history``."""
        events = self._iterations

        def column(name: str, dtype: type) -> tuple[str, NDArray[Any]]:
            return "iteration", np.array([getattr(event, name) for event in events], dtype)

        values: dict[str, Any] = {name: column(name, dtype) for name, dtype in _VARIABLES.items()}
        values["n_passes"] = "iteration", np.array(self._passes, np.int64)
        coords: dict[str, Any] = {
            "iteration": column("iteration", np.int64),
            "stage": column("stage", str),
        }
        n_params = len(param_names)
        # Events with very many parameters were recorded without them.
        if all(event.params.size == n_params for event in events):
            params = np.array([event.params for event in events]).reshape(-1, n_params)
            values["params"] = ("iteration", "param"), params
            coords["param"] = list(param_names)
        return xr.Dataset(values, coords)
