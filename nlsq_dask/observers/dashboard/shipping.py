"""Send the scheduler plugin together with its code, as the scheduler may lack this package."""

from __future__ import annotations

import pickle
import sys
import threading
from functools import cache
from typing import Any

import cloudpickle
from distributed.diagnostics.plugin import SchedulerPlugin

from nlsq_dask.observers.dashboard import on_scheduler
from nlsq_dask.observers.dashboard.on_scheduler.plugin import PLUGIN, FitPages

_LOCK = threading.Lock()


@cache
def _pickled_plugin() -> bytes:
    """Pickle a new plugin together with its code.

    The scheduler then needs no installation of this package, and does not import JAX, which would
    take a second or two.
    """
    with _LOCK:  # cloudpickle has one registry of modules per process
        cloudpickle.register_pickle_by_value(on_scheduler)
        try:
            data: bytes = cloudpickle.dumps(FitPages())
        finally:
            cloudpickle.unregister_pickle_by_value(on_scheduler)
    return data


def why_not_to_ship(python: str) -> str:
    """Return why the plugin cannot be sent to a scheduler; an empty string if it can.

    The plugin's code is sent as bytecode, which can crash Python of another minor version.

    Parameters
    ----------
    python : str
        Version of Python on the scheduler, such as "3.12.1".
    """
    theirs = ".".join(python.split(".")[:2])
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if theirs == ours:
        return ""
    return f"the scheduler runs Python {theirs}, this process {ours}; use one version for both"


class ShippedPlugin(SchedulerPlugin):
    """Plugin that the client registers; on the scheduler it is unpickled as ``FitPages``."""

    name = PLUGIN
    idempotent = True

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (_pickled_plugin(),)
