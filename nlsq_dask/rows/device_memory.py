"""Free memory of a GPU, and recognition of errors that report a lack of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import jax

_UNLIMITED = 2**63 - 1


def free_device_bytes(devices: Sequence[jax.Device]) -> int:
    """Return the bytes that JAX can still take on devices that get equal parts of the rows.

    A device that does not say how much memory it has, such as a CPU, counts as unlimited.
    """
    return len(devices) * min(map(_free_bytes, devices))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of JAX says that a device has too little free memory."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    text = str(error)
    # The libraries that XLA calls take memory beside JAX's own.
    return any(sign in text for sign in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory"))


def _free_bytes(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return _UNLIMITED
    free = int(stats["bytes_limit"] - stats["bytes_in_use"])
    # JAX does not know of other programs, but the driver does. What JAX has taken and does not use
    # at the moment is not free for the driver.
    unused = int(stats.get("pool_bytes", stats["bytes_in_use"]) - stats["bytes_in_use"])
    return min(free, _free_by_driver(device) + unused)


def _free_by_driver(device: jax.Device) -> int:
    """Return the bytes of a GPU that no program uses, as the CUDA driver reports them."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _UNLIMITED
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    # JAX's own context of the device, which is made current in this thread for the question.
    failed = cuda.cuDeviceGet(ctypes.byref(handle), device.local_hardware_id)
    failed = failed or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    if failed:
        return _UNLIMITED
    cuda.cuCtxPushCurrent_v2(context)
    failed = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    cuda.cuDevicePrimaryCtxRelease_v2(handle)
    return _UNLIMITED if failed else free.value
