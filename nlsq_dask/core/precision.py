"""The scope in which the library uses JAX: 64-bit, on one device, on this thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def x64(device: jax.Device | None = None) -> Iterator[None]:
    """Enter a scope of 64-bit JAX values on a device, local to the calling thread.

    The settings of the caller's own program are left as they are. Every task has to
    enter the scope itself, because it does not pass from thread to thread.
    """
    device = device or jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(device):
        yield
