"""How the plugin gets to a scheduler that may lack this package: its code goes with it."""

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
    """Return the bytes of a new plugin with its code.

    So a scheduler needs neither this package nor JAX, which would take it a second or two to
    import. Classes that cloudpickle sends by value are whole modules of functions, no more.
    """
    with _LOCK:  # the registry of cloudpickle is that of the process
        cloudpickle.register_pickle_by_value(on_scheduler)
        try:
            data: bytes = cloudpickle.dumps(FitPages())
        finally:
            cloudpickle.unregister_pickle_by_value(on_scheduler)
    return data


def why_not_to_ship(python: str) -> str:
    """Return why the plugin cannot go to a scheduler of some version of Python, nothing if it can.

    Its code travels as bytecode, which differs between minor versions of Python. The process of
    the scheduler can crash where it runs that of another.

    Parameters
    ----------
    python : str
        The scheduler's version: numbers between dots, as ``Client.get_versions`` returns it.
    """
    theirs = ".".join(python.split(".")[:2])
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if theirs == ours:
        return ""
    return f"the scheduler runs Python {theirs} and this process {ours}; use the same version"


class ShippedPlugin(SchedulerPlugin):
    """Registered in place of ``FitPages``, it arrives as one."""

    name = PLUGIN
    idempotent = True

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (_pickled_plugin(),)
