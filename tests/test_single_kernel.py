"""Programs that are compiled into one kernel, and those that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlsq_dask.model.jax_scope import x64
from nlsq_dask.model.program import Program
from nlsq_dask.model.single_kernel import (
    can_be_single_kernel,
    compile_small,
    single_kernel,
    without_single_kernels,
)

MATRIX = jax.ShapeDtypeStruct((32, 32), np.dtype(np.float64))


def wave(x):
    return jnp.sin(x).sum(axis=0), lax_loop(x)


def lax_loop(x):
    return jax.lax.fori_loop(0, 3, lambda i, y: y * 0.5 + x[i], x)


def sort(x):
    return jnp.sort(x, axis=0), x


def solve(x):
    return jnp.linalg.solve(x + 40 * jnp.eye(32), x), x


def product(x):
    return x @ x, x


def sum_of_many(x):
    many = jnp.outer(x.ravel(), x[0])
    return (many**2).sum(), x


@pytest.mark.parametrize("function", [wave, sort, solve, product, sum_of_many])
def test_a_small_program_computes_what_jax_computes(function):
    x = np.linspace(0.1, 2.0, 1024).reshape(32, 32)
    program = Program.trace(function, MATRIX, is_small=True)
    with x64():
        expected = jax.jit(function)(x)
        compiled = compile_small(function, x)(x)
    for result in (program(x), compiled):
        for got, wanted in zip(result, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-13)


@pytest.mark.parametrize(
    ("function", "can_be"), [(wave, True), (sort, False), (solve, False), (product, False)]
)
def test_what_is_left_to_a_library_is_no_single_kernel(function, can_be):
    with x64():
        assert can_be_single_kernel(jax.jit(function).lower(MATRIX).as_text()) is can_be
    program = Program.trace(function, MATRIX, is_small=True)
    assert (without_single_kernels(program.serialized) is not None) is can_be


def test_a_sum_over_many_elements_needs_several_kernels():
    # The test fails if XLA comes to compile such a sum: then a limit of the warm-up can go.
    with x64(), pytest.raises(jax.errors.JaxRuntimeError, match="Fusion kind not implemented"):
        jax.jit(single_kernel(sum_of_many)).lower(np.ones((32, 32))).compile()
    program = Program.trace(sum_of_many, MATRIX, is_small=True)
    assert float(program(np.ones((32, 32)))[0]) == 2**15


def test_one_kernel_is_one_kernel():
    with x64():
        compiled = compile_small(wave, np.ones((32, 32)))
    (line,) = [
        line
        for line in compiled.as_text().splitlines()
        if "xla_cpu_small_call" in line and " call(" in line
    ]
    assert 'inlineable="false"' in line


def test_other_programs_are_compiled_as_usual():
    assert without_single_kernels(Program.trace(wave, MATRIX).serialized) is None
