"""Sends the plugin with its code to a scheduler that may lack this package."""

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
    """Pickle a new plugin with its code.

    The scheduler needs neither this package nor JAX, whose import takes a second or two.
    """
    with _LOCK:  # cloudpickle has one registry per process
        cloudpickle.register_pickle_by_value(on_scheduler)
        try:
            data: bytes = cloudpickle.dumps(FitPages())
        finally:
            cloudpickle.unregister_pickle_by_value(on_scheduler)
    return data


def why_not_to_ship(python: str) -> str:
    """Return why the plugin cannot run on a version of Python, or an empty string.

    Its code is sent as bytecode, which can crash a process of another minor version.

    Parameters
    ----------
    python : str
        Version of the scheduler, such as "3.12.1".
    """
    theirs = ".".join(python.split(".")[:2])
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if theirs == ours:
        return ""
    return f"the scheduler runs Python {theirs} and this process {ours}; use the same version"


class ShippedPlugin(SchedulerPlugin):
    """A plugin that unpickles as ``FitPages``."""

    name = PLUGIN
    idempotent = True

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (_pickled_plugin(),)
