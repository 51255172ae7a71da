"""Thread-local scope of 64-bit JAX, and the devices of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

CPU, CUDA = "cpu", "cuda"  # as jax.export names them


@contextmanager
def x64(device: jax.Device | None = None) -> Iterator[None]:
    """Enable 64-bit JAX values on a device for the calling thread.

    The settings of the caller's program are unchanged. Each task enters the scope itself, because
    it is not inherited by other threads.
    """
    device = device or jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(device):
        yield


def platform_of(device: jax.Device) -> str:
    """Return the platform of a device, as ``jax.export`` names it."""
    return CUDA if device.platform == "gpu" else device.platform


def usable_devices(platforms: tuple[str, ...], several: bool) -> list[jax.Device]:
    """Return the devices of this process on which rows are computed.

    Parameters
    ----------
    platforms : tuple of str
        Platforms with a program; GPUs are preferred.
    several : bool
        Whether to return all devices of the platform, or only the first.
    """
    devices = []
    if CUDA in platforms and jax.default_backend() == "gpu":
        devices = jax.local_devices()
    if not devices or platform_of(devices[0]) not in platforms:
        devices = jax.local_devices(backend=CPU)
    return devices if several else devices[:1]


def local_platforms() -> tuple[str, ...]:
    """Return the platforms of this process for which programs are traced."""
    return (CPU, CUDA) if jax.default_backend() == "gpu" else (CPU,)
