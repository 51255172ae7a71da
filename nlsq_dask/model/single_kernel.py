"""Compile many operations on few elements into one kernel, on a CPU.

XLA compiles each group of operations that it fuses into a kernel of its own. Where the arrays are
small, compiling and calling a hundred kernels takes longer than the operations themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

T = TypeVar("T")

# XLA compiles a call with this attribute as one function; where it knows no such attribute, the
# call runs as any other.
_ATTRIBUTE, _NO_ATTRIBUTE = "xla_cpu_small_call", "xla_cpu_plain_call"

_OPERATION = re.compile(r"(?:stablehlo|chlo|mhlo)\.([a-z_0-9]+)[( \"]")
_PRODUCT = re.compile(r"stablehlo\.dot_general .* : \((.*)\) -> ")
_SHAPE = re.compile(r"tensor<((?:\d+x)*)")
# What XLA may leave to a library, which a single kernel cannot call.
_LIBRARY_CALLS = {
    "cholesky",
    "convolution",
    "custom_call",
    "fft",
    "reduce_window",
    "rng",
    "rng_bit_generator",
    "select_and_scatter",
    "sort",
    "top_k",
    "triangular_solve",
}
_MAX_PRODUCT = 256  # elements of a matrix; the products of larger ones are left to a library


def single_kernel(function: Callable[..., T]) -> Callable[..., T]:
    """Return the function, to be called while a program is traced, as a single kernel.

    Its loops are not vectorized as well as others. See ``can_be_single_kernel``; XLA also raises an
    error where it would leave the sum over thousands of elements to a library.

    Parameters
    ----------
    function : callable
        Function of pytrees of arrays, in JAX.
    """

    def call(*args: Any) -> T:
        attributes = {_ATTRIBUTE: "true", "inlineable": "false"}
        result: T = set_xla_metadata(jax.jit(function)(*args), **attributes)
        return result

    return call


def can_be_single_kernel(text: str) -> bool:
    """Return whether a program, as StableHLO text, has only operations that one kernel can have."""
    if not _LIBRARY_CALLS.isdisjoint(_OPERATION.findall(text)):
        return False
    for line in re.findall(r".*dot_general.*", text):
        product = _PRODUCT.search(line)
        if product is None or any(_is_large(dims) for dims in _SHAPE.findall(product[1])):
            return False
    return True


def _is_large(dims: str) -> bool:
    """Return whether an operand of a product, with its dims as in ``"4x128x"``, is large."""
    sizes = [int(size) for size in dims.split("x")[:-1]]
    return len(sizes) > 1 and math.prod(sizes) > _MAX_PRODUCT


def without_single_kernels(serialized: bytes) -> bytes | None:
    """Return a serialized program in which no call is a single kernel, or None if none is."""
    name = _ATTRIBUTE.encode()
    if name not in serialized:
        return None
    return serialized.replace(name, _NO_ATTRIBUTE.encode())  # of the same length


def compile_small(function: Callable[..., T], *args: Any) -> Callable[..., T]:
    """Compile a function of small arrays, as a single kernel if it can be one."""
    lowered = jax.jit(single_kernel(function)).lower(*args)
    if can_be_single_kernel(lowered.as_text()):
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError:  # an operation that XLA leaves to a library here
            pass
    return jax.jit(function).lower(*args).compile()
