"""``Program``: a traced function that is sent as bytes and compiled once per process.

The client traces the model once and sends it to the workers as a portable StableHLO program
(``jax.export``), so workers do not need the Python function of the model. A program is identified
by a fingerprint of its operations and constants: a model that is defined again, for instance in a
notebook, gives an equal program.
"""

from __future__ import annotations

import hashlib
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax import export

from nlsq_dask.errors import ModelError
from nlsq_dask.model.jax_scope import CPU, CUDA, x64

T = TypeVar("T")

# Packages whose versions affect the traced text of a model.
TRACED_BY = ("nlsq-dask", "jax", "jaxlib")

# Source locations, which are removed so that the fingerprint does not depend on line numbers.
_LOCATION_LINES = re.compile(r"^#loc.*\n?", re.MULTILINE)
_LOCATIONS = re.compile(r' loc\((?:#loc\d*|"[^"]*"(?:\(#loc\d*\))?|unknown)\)')

# XLA would time many ways to multiply matrices, which took up to 20 s on a GPU; the product of the
# library that it calls otherwise is as fast.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {CUDA: {"xla_gpu_enable_triton_gemm": False}}

# With the older code generator of XLA, a program compiles in 20 to 45 % less time. Its loops over
# many elements are up to 40 % slower.
_FAST_COMPILE = {"xla_cpu_use_fusion_emitters": False}

# What makes the text of a jaxpr incomplete: addresses of functions, abbreviated arrays.
_INEXACT = re.compile(r"0x[0-9a-f]|\.\.\.")


class _Cache:
    """Results by key; a full cache drops the result that was not used for the longest time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.RLock()
        self.n_computed = 0

    def get(self, key: Any, compute: Callable[[], T]) -> T:
        """Return the result for this key; compute it if it is not cached."""
        with self._lock:
            if key not in self._results:
                self._results[key] = compute()
                self.n_computed += 1
                if len(self._results) > self._size:
                    self._results.popitem(last=False)
            self._results.move_to_end(key)
            result: T = self._results[key]
            return result


_compiled = _Cache(64)
_traced = _Cache(48)
_digests: weakref.WeakKeyDictionary[Any, bytes | None] = weakref.WeakKeyDictionary()


class Program:
    """A traced function of arrays with fixed shapes; its Python code is no longer needed.

    Parameters
    ----------
    fingerprint : str
        Digest of the operations and constants; programs with equal fingerprints are equal.
    serialized : bytes
        The program, serialized by ``jax.export``.
    fast_compile : bool
        Whether to compile it for a CPU in less time, for slower loops.
    """

    __slots__ = ("fast_compile", "fingerprint", "serialized")

    def __init__(self, fingerprint: str, serialized: bytes, fast_compile: bool = False) -> None:
        self.fingerprint = fingerprint
        self.serialized = serialized
        self.fast_compile = fast_compile

    @classmethod
    def trace(
        cls,
        function: Callable[..., Any],
        *specs: Any,
        platform: str = CPU,
        fast_compile: bool = False,
    ) -> Self:
        """Trace ``function`` for arguments with the shapes and dtypes of ``specs``."""

        def program(*args: Any) -> Any:  # a fixed name: it is part of the text
            return function(*args)

        with x64():
            try:
                exported = export.export(jax.jit(program), platforms=[platform])(*specs)
                serialized = bytes(exported.serialize())
            except NotImplementedError as error:
                raise ModelError(
                    f"The model cannot be sent to workers: JAX cannot export it ({error}). Use "
                    f"jax.numpy operations only; callbacks into Python, including "
                    f"jax.debug.print, are not supported."
                ) from error
        text = _LOCATIONS.sub("", _LOCATION_LINES.sub("", exported.mlir_module()))
        # The text lacks unused arguments, but the fingerprint must depend on them too.
        text += f"{exported.in_tree} {exported.in_avals} {exported.module_kept_var_idx}"
        text += " fast_compile" * fast_compile
        return cls(hashlib.sha256(text.encode()).hexdigest(), serialized, fast_compile)

    def __call__(self, *args: Any, device: jax.Device | None = None) -> Any:
        """Run the program on ``device``, by default the CPU.

        The arguments must have the shapes and dtypes for which the program was traced.
        """
        key = self.fingerprint if device is None else f"{self.fingerprint}-{device.id}"
        with x64(device):
            return compiled_once(key, self._compile)(*args)

    def _compile(self) -> Callable[..., Any]:
        exported = export.deserialize(bytearray(self.serialized))
        specs = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        args, kwargs = specs
        lowered = jax.jit(exported.call).lower(*args, **kwargs)
        if self.fast_compile and exported.platforms[0] == CPU:
            return compile_fast(lowered)
        options = _COMPILER_OPTIONS.get(exported.platforms[0])
        compiled: Callable[..., Any] = lowered.compile(compiler_options=options)
        return compiled

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fingerprint, self.serialized, self.fast_compile)


def compiled_once(key: str, compile_: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Return the compiled program for this key; ``compile_`` is called only if none is cached."""
    return _compiled.get(key, compile_)


def compile_fast(lowered: Any) -> Callable[..., Any]:
    """Compile a lowered function in less time, for slower loops, if XLA has the option."""
    compiled: Callable[..., Any]
    try:
        compiled = lowered.compile(compiler_options=_FAST_COMPILE)
    except jax.errors.JaxRuntimeError:  # it has not, or there is another error, which comes again
        compiled = lowered.compile()
    return compiled


def traced_once(signature: Any, jaxpr: Any, trace: Callable[[], T]) -> T:
    """Return the result of ``trace()``, cached for an equal ``signature`` and an equal ``jaxpr``.

    ``trace`` also lowers the model, which takes longer than making a jaxpr, and repeated fits
    mostly change only the data. Two jaxprs are equal if their texts and constants are equal.
    """
    if jaxpr not in _digests:
        _digests[jaxpr] = _digest(jaxpr)
    digest = _digests[jaxpr]
    return trace() if digest is None else _traced.get((signature, digest), trace)


def _digest(jaxpr: Any) -> bytes | None:
    """Return a digest of the text and constants of a jaxpr, or None if they do not identify it."""
    text = str(jaxpr)
    constants = _constants(jaxpr)
    if _INEXACT.search(text) or constants is None:
        return None
    digest = hashlib.sha256(text.encode())
    for constant in constants:
        digest.update(f"{constant.dtype}{constant.shape}".encode())
        digest.update(np.ascontiguousarray(constant).tobytes())
    return digest.digest()


def has_custom_rules(jaxpr: Any) -> bool:
    """Return whether an operation of a jaxpr has its own rules of differentiation."""
    text = str(jaxpr)
    return "custom_jvp_call" in text or "custom_vjp_call" in text


def _constants(closed: Any) -> list[Any] | None:
    """Return the constants of a jaxpr and of the jaxprs inside it; the text of a jaxpr omits them.

    None is returned if text and constants do not identify the computation: if an operation has
    custom differentiation rules, or an array among its settings.
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
    """Return the number of programs that were compiled in this process."""
    return _compiled.n_computed
