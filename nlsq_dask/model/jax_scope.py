"""The scope in which JAX is used, 64-bit on this thread alone, and the devices of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

CPU, CUDA = "cpu", "cuda"  # as jax.export names them


@contextmanager
def x64(device: jax.Device | None = None) -> Iterator[None]:
    """Enter a scope of 64-bit JAX values on a device, local to the calling thread.

    The settings of the caller's own program are left as they are. Every task has to
    enter the scope itself, because it does not pass from thread to thread.
    """
    device = device or jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(device):
        yield


def platform_of(device: jax.Device) -> str:
    """Return the platform of a device, as ``jax.export`` names it."""
    return CUDA if device.platform == "gpu" else device.platform


def usable_devices(platforms: tuple[str, ...], several: bool) -> list[jax.Device]:
    """Return the devices of this process that pieces of rows are given to.

    Parameters
    ----------
    platforms : tuple of str
        Those that there is a program for; a GPU goes before the CPU.
    several : bool
        All devices of that platform, or the first alone.
    """
    devices = []
    if CUDA in platforms and jax.default_backend() == "gpu":
        devices = jax.local_devices()
    if not devices or platform_of(devices[0]) not in platforms:
        devices = jax.local_devices(backend=CPU)
    return devices if several else devices[:1]


def local_platforms() -> tuple[str, ...]:
    """Return the platforms of this process for which a program is worth tracing."""
    return (CPU, CUDA) if jax.default_backend() == "gpu" else (CPU,)
