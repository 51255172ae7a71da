"""``x64``, the context in which JAX has 64-bit values, and the JAX devices of a process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_DISABLED = {"jax_transfer_guard": "allow"}  # value that disables an option, if not False

CPU, CUDA = "cpu", "cuda"  # as jax.export names them


@contextmanager
def x64(device: jax.Device | None = None) -> Iterator[None]:
    """Enable 64-bit values in JAX, and make ``device`` the default, within a ``with`` statement.

    Only the calling thread is affected, so the settings of the caller's program do not change, and
    each task of a worker enters the context itself. The default device is the CPU.

    Raises
    ------
    RuntimeError
        In the place of an error that a debugging option of JAX causes; the message names the
        option.
    """
    device = device or jax.local_devices(backend="cpu")[0]
    try:
        with jax.enable_x64(True), jax.default_device(device):
            yield
    except Exception as error:
        option = _option_behind(error)
        if not option:
            raise
        raise RuntimeError(
            f"The option {option} of JAX is set, which fits and predictions do not support. Leave "
            f"the context that sets it, or call "
            f"jax.config.update({option!r}, {_DISABLED.get(option, False)!r})."
        ) from error


def _option_behind(error: Exception) -> str:
    """Return the option of JAX that causes this error; empty if there is none."""
    text, kind = str(error), type(error).__name__
    if kind in ("FloatingPointError", "InternalFloatingPointError"):
        names = {"nan": "jax_debug_nans", "inf": "jax_debug_infs"}
        found = re.search(r"\((nan|inf)\)|'(nan|inf)'", text)
        return names[found[1] or found[2]] if found else ""
    if "Disable jit is not supported" in text:
        return "jax_disable_jit"
    return "jax_transfer_guard" if "Disallowed" in text and "transfer" in text else ""


def platform_of(device: jax.Device) -> str:
    """Return the platform of a device as ``jax.export`` names it, "cuda" for a GPU."""
    return CUDA if device.platform == "gpu" else device.platform


def usable_devices(platforms: tuple[str, ...], several: bool) -> list[jax.Device]:
    """Return the GPUs of this process, or the CPU if it has no GPU or no program for one.

    Parameters
    ----------
    platforms : tuple of str
        Platforms for which there is a program, such as ``("cpu", "cuda")``.
    several : bool
        True to return all of these devices, False to return only the first.
    """
    devices = []
    if CUDA in platforms and jax.default_backend() == "gpu":
        devices = jax.local_devices()
    if not devices or platform_of(devices[0]) not in platforms:
        devices = jax.local_devices(backend=CPU)
    return devices if several else devices[:1]


def local_platforms() -> tuple[str, ...]:
    """Return the platforms for which this process needs programs: the CPU, and CUDA with a GPU."""
    return (CPU, CUDA) if jax.default_backend() == "gpu" else (CPU,)
