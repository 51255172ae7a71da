"""On a cluster of processes: any model, one compile a worker, nothing left behind."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import sys
import time
from typing import Any

import dask
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, LocalCluster, worker_client

import nlsq_dask as nd
from nlsq_dask.model.program import compile_count
from tests import problems
from tests.problems import NO_WARMUP, decay_data, exponential, line

N = 60_000
X, Y = decay_data(N)
START = [1.0, 1.0, 0.1]


class Callable:
    """A model with a state."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Any, a: Any, b: Any, c: Any) -> Any:
        return a * jnp.exp(-self.factor * b * x) + c


def fit(client: Client, model: Any, **options: Any) -> nd.FitResult:
    x, y = da.from_array(X, chunks=9_999), da.from_array(Y, chunks=9_999)
    with client.as_current():
        return problems.fit(model, x, y, START, sample_rows=5_000, **NO_WARMUP, **options)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return problems.fit(exponential, X, Y, START, **NO_WARMUP).popt


def closure(table: np.ndarray) -> Any:
    def model(x: Any, a: Any, b: Any, c: Any) -> Any:
        return a * jnp.exp(-b * x) + c + jnp.interp(x, table, 0.0 * table)

    return model


MODELS = {
    "named": exponential,
    "lambda": lambda x, a, b, c: a * jnp.exp(-b * x) + c,
    "closure": closure(np.linspace(0, 4, 1000)),
    "partial": functools.partial(lambda k, x, a, b, c: a * jnp.exp(-b * x) + c * k, 1.0),
    "jitted": jax.jit(exponential),
    "object": Callable(1.0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_function(kind: str, process_client: Client, expected: np.ndarray) -> None:
    model = MODELS[kind]
    options = {"param_names": ["a", "b", "c"]}
    result = fit(process_client, model, **options)
    assert result.success
    np.testing.assert_allclose(result.popt, expected, rtol=1e-9)


def test_a_local_module_that_the_workers_do_not_have(
    tmp_path: Any, process_client: Client, expected: np.ndarray
) -> None:
    (tmp_path / "my_helpers.py").write_text(
        "import jax.numpy as jnp\n\ndef decay(x, b):\n    return jnp.exp(-b * x)\n"
    )
    (tmp_path / "my_models.py").write_text(
        "import my_helpers\n\ndef model(x, a, b, c):\n    return a * my_helpers.decay(x, b) + c\n"
    )
    modules = {}
    try:
        for name in ("my_helpers", "my_models"):
            spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        result = fit(process_client, modules["my_models"].model)
    finally:
        for name in modules:
            del sys.modules[name]
    np.testing.assert_allclose(result.popt, expected, rtol=1e-9)


def test_a_function_of_main(process_client: Client, expected: np.ndarray) -> None:
    """What a notebook or a script defines lives in ``__main__``, which workers do not share."""
    namespace: dict[str, Any] = {"__name__": "__main__", "jnp": jnp}
    exec("def model(x, a, b, c):\n    return a * jnp.exp(-b * x) + c\n", namespace)
    assert namespace["model"].__module__ == "__main__"
    result = fit(process_client, namespace["model"])
    np.testing.assert_allclose(result.popt, expected, rtol=1e-9)


def test_one_compile_a_worker_and_none_in_a_second_fit(process_client: Client) -> None:
    def counts() -> list[int]:
        return sorted(process_client.run(compile_count).values())

    rows = (200_001, 7_000, 250_000, 2_048, 255_555, 100_000, 190_000, 262_144, 1, 199_999)
    n = sum(rows)
    x = da.linspace(0, 4, n, chunks=(rows,))
    y = 2.0 * da.exp2(-0.7 * x) + 0.3 + 0.01 * da.sin(1e6 * x)

    def run() -> nd.FitResult:
        # Every time a new function object, as when a notebook cell runs again.
        with process_client.as_current():
            return problems.fit(
                lambda x, a, b, c: a * jnp.exp2(-b * x) + c, x, y, START, enable_one_pass=False
            )

    before, here = counts(), compile_count()
    first = run()
    after_one, here_one = counts(), compile_count()
    assert [b - a for a, b in zip(before, after_one, strict=True)] == [1, 1]
    assert first.n_passes > 1
    assert here_one > here
    second = run()
    assert counts() == after_one
    assert compile_count() == here_one
    np.testing.assert_array_equal(first.popt, second.popt)


@pytest.mark.parametrize("in_memory", [False, True])
def test_nothing_is_left_behind(process_client: Client, in_memory: bool) -> None:
    if in_memory:
        with process_client.as_current():
            problems.fit(exponential, X, Y, START, **NO_WARMUP)
    else:
        fit(process_client, exponential)

    def held() -> int:
        on_scheduler = process_client.run_on_scheduler(
            lambda dask_scheduler: len(dask_scheduler.tasks)
        )
        return len(process_client.futures) + int(on_scheduler)

    deadline = time.monotonic() + 20  # distributed releases in the background
    while held() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held() == 0


def test_persisted_and_derived_arrays(process_client: Client, expected: np.ndarray) -> None:
    with process_client.as_current():
        x = da.from_array(X, chunks=9_999).persist()
        y = da.from_array(Y, chunks=7_777)
        y = (y - y.mean()).persist() + y.mean()
        result = problems.fit(exponential, x, y, START, **NO_WARMUP)
        np.testing.assert_allclose(result.popt, expected, rtol=1e-8)
        assert len(x.__dask_graph__()) == 7
        assert float(x.sum().compute()) == pytest.approx(X.sum())


def test_blocks_that_compute_dask_arrays_themselves(
    process_client: Client, expected: np.ndarray
) -> None:
    # Workers have one thread; it must be free for the arrays that the read of a block computes.
    def read(block: np.ndarray) -> np.ndarray:
        return np.asarray(da.from_array(block, chunks=5_000) + 0.0)

    y = da.from_array(Y, chunks=9_999).map_blocks(read, dtype=float, meta=np.empty(0))
    with process_client.as_current():
        options = NO_WARMUP | {"max_walltime": 60.0}
        result = problems.fit(exponential, da.from_array(X, chunks=9_999), y, START, **options)
    assert result.success
    np.testing.assert_allclose(result.popt, expected, rtol=1e-9)


def test_large_arrays_in_memory_are_sent_once(process_client: Client) -> None:
    # distributed warns of a large graph, and warnings are errors here.
    n = 1_000_000
    x = np.random.default_rng(0).uniform(0, 4, n)
    y = 2.0 * np.exp(-0.7 * x) + 0.3
    with process_client.as_current(), dask.config.set(scheduler="dask.distributed"):
        result = problems.fit(exponential, x, y, START, **NO_WARMUP)
    np.testing.assert_allclose(result.popt, [2, 0.7, 0.3], rtol=1e-9)


def test_task_names(process_client: Client) -> None:
    process_client.run_on_scheduler(_clear_transitions)
    fit(process_client, exponential)
    names = process_client.run_on_scheduler(_seen_prefixes)
    assert {"nlsq-sample", "nlsq-sum-rows"} <= names


def _clear_transitions(dask_scheduler: Any) -> None:
    dask_scheduler.transition_log.clear()


def _seen_prefixes(dask_scheduler: Any) -> set[str]:
    from dask.utils import key_split

    return {key_split(entry[0]) for entry in dask_scheduler.transition_log}


def test_model_errors_arrive_as_they_are(process_client: Client) -> None:
    with pytest.raises(nd.ModelError, match="callbacks"):
        fit(
            process_client,
            lambda x, a, b, c: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
        )


@pytest.mark.parametrize("way", ["default client", "its get"])
def test_an_asynchronous_client_is_named(way: str) -> None:
    async def run() -> None:
        async with (
            LocalCluster(
                n_workers=1, processes=False, dashboard_address=":0", asynchronous=True
            ) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            x = np.linspace(0.0, 4.0, 2_000)

            def fit() -> nd.FitResult:
                return problems.fit(line, x, 2.0 + x, [1.0, 1.0], **NO_WARMUP)

            scheduler = client.get if way == "its get" else None
            with (
                dask.config.set(scheduler=scheduler),
                pytest.raises(
                    RuntimeError, match=r"the active Dask client is asynchronous; a fit nee"
                ),
            ):
                fit()
            # It is so in its own event loop alone.
            assert (await asyncio.to_thread(fit)).success

    asyncio.run(run())


def test_a_fit_in_a_task_that_has_seceded(process_client: Client) -> None:
    def inside() -> bool:
        with worker_client() as client, client.as_current():
            x = np.linspace(0.0, 4.0, 2_000)
            options = {"dashboard": False, **NO_WARMUP}
            return problems.fit(line, x, 2.0 + x, [1.0, 1.0], **options).success

    assert process_client.submit(inside, pure=False).result(timeout=120)
