"""``Program``: a traced function that travels as bytes and is compiled once a process.

The model is traced on the caller's side, once, and sent to the workers as a portable StableHLO
program (``jax.export``). So a worker needs neither the caller's module nor his closures, and two
definitions of one model are the same program: the fingerprint is made of what the program
computes, its constants by value, not of the identity of a Python function.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax import export

from nlsq_dask.errors import ModelError
from nlsq_dask.model.jax_scope import CPU, x64

T = TypeVar("T")

# Packages without whose same versions one model may be traced to another text.
TRACED_BY = ("nlsq-dask", "jax", "jaxlib")

_CACHE_SIZE = 64
_compiled: OrderedDict[str, Callable[..., Any]] = OrderedDict()
_n_compiled = 0
_lock = threading.RLock()

# Where a line of the caller's file stands must not count: source locations are left out.
_LOCATION_LINES = re.compile(r"^#loc.*\n?", re.MULTILINE)
_LOCATIONS = re.compile(r' loc\((?:#loc\d*|"[^"]*"(?:\(#loc\d*\))?|unknown)\)')

# What a printed jaxpr contains where it does not say all: addresses of functions, cut arrays.
_INEXACT = re.compile(r"0x[0-9a-f]|\.\.\.")
_TRACE_CACHE_SIZE = 32
_traced: OrderedDict[Any, Any] = OrderedDict()


class Program:
    """A function of arrays of fixed shapes, independent of the Python code that it came from.

    Parameters
    ----------
    fingerprint : str
        Identifies what the program computes.
    serialized : bytes
        The program as ``jax.export`` writes it.
    """

    __slots__ = ("fingerprint", "serialized")

    def __init__(self, fingerprint: str, serialized: bytes) -> None:
        self.fingerprint = fingerprint
        self.serialized = serialized

    @classmethod
    def trace(cls, function: Callable[..., Any], *specs: Any, platform: str = CPU) -> Self:
        """Trace ``function`` for arguments of these shapes and dtypes."""

        def program(*args: Any) -> Any:  # a fixed name: it is part of the text
            return function(*args)

        with x64():
            try:
                exported = export.export(jax.jit(program), platforms=[platform])(*specs)
                serialized = bytes(exported.serialize())
            except NotImplementedError as error:
                raise ModelError(
                    f"The model cannot be sent to workers, because it uses something that JAX "
                    f"cannot export ({error}). Use jax.numpy operations only; callbacks into "
                    f"Python, jax.debug.print included, are not possible."
                ) from error
        text = _LOCATIONS.sub("", _LOCATION_LINES.sub("", exported.mlir_module()))
        # The module leaves out arguments that it does not use; which ones they are counts, too.
        text += f"{exported.in_tree} {exported.in_avals} {exported.module_kept_var_idx}"
        return cls(hashlib.sha256(text.encode()).hexdigest(), serialized)

    def __call__(self, *args: Any, device: jax.Device | None = None) -> Any:
        """Run the program; the arguments must have the shapes and dtypes it was traced for.

        It runs on the given device, else on the CPU.
        """
        key = self.fingerprint if device is None else f"{self.fingerprint}-{device.id}"
        with x64(device):
            return compiled_once(key, self._compile)(*args)

    def _compile(self) -> Callable[..., Any]:
        exported = export.deserialize(bytearray(self.serialized))
        specs = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        args, kwargs = specs
        compiled: Callable[..., Any] = jax.jit(exported.call).lower(*args, **kwargs).compile()
        return compiled

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fingerprint, self.serialized)


def compiled_once(key: str, compile_: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Return what ``compile_()`` gave for this key, calling it at most once a process.

    The least recently used program leaves when there are too many.
    """
    global _n_compiled
    with _lock:
        if key not in _compiled:
            _compiled[key] = compile_()
            _n_compiled += 1
            if len(_compiled) > _CACHE_SIZE:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        return _compiled[key]


def traced_once(signature: Any, jaxpr: Any, trace: Callable[[], T]) -> T:
    """Return what ``trace()`` gave for the same ``signature`` and an equal jaxpr, if that is known.

    Lowering takes longer than tracing, and a person who fits again has mostly changed the data.
    A jaxpr counts as equal if it prints the same and all its constants have the same bytes.
    """
    text = str(jaxpr)
    constants = _constants(jaxpr)
    if _INEXACT.search(text) or constants is None:
        return trace()
    digest = hashlib.sha256(text.encode())
    for constant in constants:
        digest.update(f"{constant.dtype}{constant.shape}".encode())
        digest.update(np.ascontiguousarray(constant).tobytes())
    key = (signature, digest.digest())
    with _lock:
        if key not in _traced:
            _traced[key] = trace()
            if len(_traced) > _TRACE_CACHE_SIZE:
                _traced.popitem(last=False)
        _traced.move_to_end(key)
        traced: T = _traced[key]
        return traced


def _constants(closed: Any) -> list[Any] | None:
    """Return the constants of a jaxpr and of those inside it, which its text leaves out.

    None if there is something inside that is known by its name only: a rule of differentiation,
    or an array among the parameters of an operation.
    """
    constants = [np.asarray(constant) for constant in getattr(closed, "consts", ())]
    for equation in getattr(closed, "jaxpr", closed).eqns:
        if equation.primitive.name.startswith("custom_"):
            return None
        constants += [np.asarray(v.val) for v in equation.invars if hasattr(v, "val")]
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, np.ndarray | jax.Array):
                    return None
                if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                    inner = _constants(item)
                    if inner is None:
                        return None
                    constants += inner
    return constants


def compile_count() -> int:
    """Return how many programs this process has compiled so far."""
    with _lock:
        return _n_compiled
