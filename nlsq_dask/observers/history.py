"""``History``: the iterations of a fit, as a Dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nlsq_dask.events import Event, IterationFinished, PassFinished, without_many_params

_NUMBERS = ("loss", "gradient_norm", "step_norm", "trust_radius", "time")


class History:
    """Records the iterations of a fit."""

    def __init__(self) -> None:
        self._iterations: list[IterationFinished] = []
        self._passes: list[int] = []
        self._n_passes = 0

    def __call__(self, event: Event) -> None:
        """Record an iteration, or count a pass."""
        if isinstance(event, IterationFinished):
            kept = without_many_params(event)
            assert isinstance(kept, IterationFinished)
            self._iterations.append(kept)
            self._passes.append(self._n_passes)
        elif isinstance(event, PassFinished):
            self._n_passes += 1

    def dataset(self, param_names: tuple[str, ...]) -> xr.Dataset:
        """Return the iterations as a Dataset; see ``FitResult.history``."""
        events = self._iterations
        stages = np.array([event.stage for event in events], dtype=str)
        values: dict[str, Any] = {
            name: ("iteration", np.array([getattr(event, name) for event in events], float))
            for name in _NUMBERS
        }
        values["accepted"] = "iteration", np.array([event.accepted for event in events], bool)
        values["n_iterations"] = (
            "iteration",
            np.array([event.n_iterations for event in events], np.int64),
        )
        values["n_passes"] = "iteration", np.array(self._passes, np.int64)
        coords: dict[str, Any] = {
            "iteration": np.array([event.iteration for event in events], np.int64),
            "stage": ("iteration", stages),
        }
        n_params = len(param_names)
        # Omitted from events if very many.
        if all(event.params.size == n_params for event in events):
            params = np.array([event.params for event in events]).reshape(-1, n_params)
            values["params"] = ("iteration", "param"), params
            coords["param"] = list(param_names)
        return xr.Dataset(values, coords)
