"""``Event``, the base class of what observers receive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Event:
    """Base class of all events; arrays in an event are read-only.

    Attributes
    ----------
    is_transient : bool
        True if the event is not saved in checkpoints, because it matters only while a fit runs.
    """

    is_transient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                read_only = value.view()
                read_only.flags.writeable = False
                object.__setattr__(self, name, read_only)


Observer = Callable[[Event], None]
