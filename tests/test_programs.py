"""Traced programs: how they are compiled, and what identifies them."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlsq_dask.model import program
from nlsq_dask.model.program import Program

VECTOR = jax.ShapeDtypeStruct((8,), np.dtype(np.float64))
X = np.linspace(0.0, 1.0, 8)


def wave(x: Any) -> Any:
    return jnp.sin(x) + 1


def test_a_program_that_compiles_fast_is_another_program() -> None:
    plain, fast = (Program.trace(wave, VECTOR, fast_compile=is_fast) for is_fast in (False, True))
    assert plain.fingerprint != fast.fingerprint
    for one in (plain, fast):
        np.testing.assert_allclose(one(X), np.sin(X) + 1, rtol=1e-15)
        copy = pickle.loads(pickle.dumps(one))
        assert copy.fingerprint == one.fingerprint
        assert copy.fast_compile == one.fast_compile


def test_an_xla_without_the_option_compiles_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_FAST_COMPILE", {"xla_cpu_no_such_option": True})
    fast = Program.trace(lambda x: wave(x) * 3, VECTOR, fast_compile=True)
    np.testing.assert_allclose(fast(X), 3 * np.sin(X) + 3, rtol=1e-15)
