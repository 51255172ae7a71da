"""What is counted, as Prometheus reads it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import nlsq_dask as nd
from nlsq_dask.observers.dashboard.on_scheduler.collector import registered

X = np.random.default_rng(0).uniform(0, 4, 30_000)
Y = 2.0 * np.exp(-0.7 * X) + 0.3 + 0.02 * np.random.default_rng(1).standard_normal(len(X))


def decay(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) + c


def fit(**options: Any) -> nd.FitResult:
    x, y = (da.from_array(array, chunks=6_000) for array in (X, Y))
    config = nd.HybridStreamingConfig(verbose=0, cache=0, **options)
    return nd.AdaptiveHybridStreamingOptimizer(config).fit(decay, x, y, [1.0, 1.0, 0.1])


def numbers(text: str) -> dict[str, float]:
    """Return what the fits have counted; no name comes twice."""
    samples = [
        (sample.name, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("nlsq_")
    ]
    assert len(dict(samples)) == len(samples)
    return dict(samples)


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    nd.reset_defense_telemetry()


def test_two_lines_for_people_without_a_cluster() -> None:
    registry = CollectorRegistry()
    registry.register(nd.metrics_collector())
    assert numbers(generate_latest(registry).decode())["nlsq_fits_total"] == 0
    results = [fit(), fit()]
    found = numbers(generate_latest(registry).decode())
    assert found == nd.get_defense_telemetry().export_metrics()
    assert found["nlsq_fits_total"] == 2
    assert found["nlsq_passes_total"] == sum(result.n_passes for result in results)
    assert found["nlsq_rows_read_total"] == sum(result.rows_read for result in results)
    assert found["nlsq_bytes_read_total"] == sum(result.bytes_read for result in results)
    iterations = sum(int(result.history.iteration[-1]) for result in results)
    assert found["nlsq_iterations_total"] == iterations
    assert found["nlsq_last_loss"] == float(results[1].history.loss[-1])
    calls = sum(result.diagnostics["defense"]["total_warmup_calls"] for result in results)
    assert found["nlsq_defense_warmup_calls_total"] == calls


def test_nothing_is_registered_unasked() -> None:
    from prometheus_client import REGISTRY

    before = registered(REGISTRY)  # of schedulers in this process, that other tests use
    fit()
    assert registered(REGISTRY) == before


def test_a_resumed_fit_counts_nothing_twice(tmp_path: Path) -> None:
    whole = fit(checkpoint_dir=tmp_path)
    before = nd.get_defense_telemetry().export_metrics()
    resumed = fit(resume_from_checkpoint=tmp_path)
    assert resumed.n_passes == whole.n_passes
    after = nd.get_defense_telemetry().export_metrics()
    assert after["nlsq_passes_total"] == before["nlsq_passes_total"]
    assert after["nlsq_iterations_total"] == before["nlsq_iterations_total"]
    assert after["nlsq_fits_total"] == before["nlsq_fits_total"] + 1


def test_a_failed_fit_has_ended_too() -> None:
    with pytest.raises(nd.NonFiniteDataError):
        nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0)).fit(
            decay, X, np.where(X > 3.9, np.nan, Y), [1.0, 1.0, 0.1]
        )
    assert nd.get_defense_telemetry().export_metrics()["nlsq_fits_total"] == 1
    nd.reset_defense_telemetry()
    assert math.isnan(nd.get_defense_telemetry().export_metrics()["nlsq_last_loss"])
