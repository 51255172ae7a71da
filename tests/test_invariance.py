"""Chunks, scheduler and number of workers change nothing."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nlsq_dask as nd
from nlsq_dask.data.alignment import align
from nlsq_dask.data.sampling import plan_sample
from nlsq_dask.engine.reduction_tree import group_blocks
from nlsq_dask.kernels.sums import GradientSums, NormalEquations, Sums
from nlsq_dask.rows.rows import Layout, Rows
from tests import problems
from tests.problems import decay_data, exponential

N = 3_000
X, Y = decay_data(N)
fit = functools.partial(problems.fit, exponential, p0=[1.0, 1.0, 0.1])


@pytest.fixture(scope="module")
def expected() -> nd.FitResult:
    """The fit of arrays in memory, in one block."""
    return fit(X, Y)


def cuts(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Chunk sizes that add up to n, empty ones among them."""
    points = st.lists(st.integers(0, n), max_size=12).map(sorted)
    return points.map(lambda p: tuple(np.diff([0, *p, n]).tolist()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(x_chunks=cuts(N), y_chunks=cuts(N))
def test_any_chunking(
    x_chunks: tuple[int, ...], y_chunks: tuple[int, ...], expected: nd.FitResult
) -> None:
    result = fit(
        da.from_array(X, chunks=(x_chunks,), name=False),
        da.from_array(Y, chunks=(y_chunks,), name=False),
    )
    assert result.success
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)
    np.testing.assert_allclose(result.pcov, expected.pcov, rtol=1e-6)
    assert result.n_points == N


@pytest.mark.parametrize("chunk_size", [1, 100, 1024, 5000, "auto"])
def test_any_chunk_size(chunk_size: Any, expected: nd.FitResult) -> None:
    if chunk_size == 1:
        x, y = X[:200], Y[:200]
        result, expected = fit(x, y, chunk_size=1), fit(x, y)
    else:
        result = fit(X, Y, chunk_size=chunk_size)
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)


@pytest.mark.parametrize(
    ("n", "chunk", "options"),
    [
        (N, 97, {}),  # many blocks, one group of them
        # several groups; without QR tests/test_engine.py has that on a cluster, too
        pytest.param(600_000, 50_000, {}, marks=pytest.mark.slow),
        (600_000, 50_000, {"gauss_newton_solver": "qr", "sample_rows": 2_000}),
    ],
)
def test_same_bits_whoever_computes(
    process_client: Client, n: int, chunk: int, options: dict[str, Any]
) -> None:
    x, y = (da.from_array(np.resize(v, n), chunks=chunk) for v in (X, Y))
    results = []
    for scheduler in ("sync", "threads"):
        with dask.config.set(scheduler=scheduler):
            results.append(fit(x, y, **options))
    with dask.config.set(scheduler="threads", num_workers=7):
        results.append(fit(x, y, **options))
    with process_client.as_current():
        results.append(fit(x, y, **options))
    for result in results[1:]:
        np.testing.assert_array_equal(result.popt, results[0].popt)
        np.testing.assert_array_equal(result.pcov, results[0].pcov)
        assert result.cost == results[0].cost


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.permutations(range(12)), solver=st.sampled_from(["normal", "qr"]))
def test_any_order_of_blocks(order: list[int], solver: str, expected: nd.FitResult) -> None:
    x, y = (da.concatenate([da.from_array(v, chunks=250).blocks[i] for i in order]) for v in (X, Y))
    result = fit(x, y, gauss_newton_solver=solver)
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)
    np.testing.assert_allclose(result.pcov, expected.pcov, rtol=1e-6)


@pytest.mark.slow
def test_multiprocessing_scheduler(expected: nd.FitResult) -> None:
    with dask.config.set(scheduler="processes", num_workers=2):
        result = fit(da.from_array(X, chunks=1500), da.from_array(Y, chunks=1500))
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_seed_of_the_sample_changes_the_way_not_the_answer(seed: int) -> None:
    x, y = da.from_array(X, chunks=100), da.from_array(Y, chunks=100)
    results = [fit(x, y, sample_rows=200, random_seed=s) for s in (seed, seed, seed + 1)]
    np.testing.assert_array_equal(results[0].popt, results[1].popt)
    np.testing.assert_allclose(results[0].popt, results[2].popt, rtol=1e-8)
    assert results[0].diagnostics["sample"]["rows"] == 200


# --- the pieces that make it so


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    data=st.data(),
)
def test_a_range_of_rows_is_a_slice_of_broadcast_arrays(shape: tuple[int, ...], data: Any) -> None:
    own = tuple(n if data.draw(st.booleans()) else 1 for n in shape)
    features = data.draw(st.sampled_from([(), (2,)]))
    array = np.arange(np.prod(own + features)).reshape(own + features)
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    expected = np.broadcast_to(array, shape + features).reshape(-1, *features)[start:stop]
    layout = Layout(None, (features,), (str(array.dtype),), "float64", None, False)
    rows = Rows.of_block([np.zeros(shape), array], layout, [shape, array.shape])
    np.testing.assert_array_equal(rows.range(start, stop).x[0], expected)
    np.testing.assert_array_equal(rows.take(np.arange(start, stop)).x[0], expected)


@pytest.mark.parametrize("rows", [1_000, 250_000, 1_000_000])
def test_groups_grow_with_the_data(rows: int) -> None:
    groups = group_blocks(np.full(50_000, rows))
    assert len(groups) <= 8192
    assert max(map(len, groups)) - min(map(len, groups[:-1])) <= 1


@given(
    sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=300),
)
def test_groups_hold_every_block_once_in_order(sizes: list[int]) -> None:
    groups = group_blocks(np.array(sizes))
    flat = [index[0] for group in groups for index in group]
    assert flat == [i for i, size in enumerate(sizes) if size]
    for group in groups:
        assert sum(sizes[i] for (i,) in group[:-1]) < 2**18


@given(
    grid=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 5),
)
def test_the_sample_is_bounded_and_seeded(grid: tuple[int, ...], seed: int) -> None:
    rows = np.full(grid, 1000)
    plan = plan_sample(rows, 5_000, seed, False)
    assert plan == plan_sample(rows, 5_000, seed, False)
    assert len(set(plan.blocks)) == len(plan.blocks)
    if rows.sum() <= 5_000:
        assert sum(plan.counts) == rows.sum()
    else:
        assert len(plan.blocks) <= 16
        assert sum(plan.counts) == 5_000
    long = plan_sample(rows * 10**6, 5_000, seed, False)
    assert len(long.blocks) <= max(1, min(16, 0.3 * rows.size))
    positions = plan.rows_of(0, 1000)
    assert (np.diff(positions) > 0).all()
    assert positions[0] >= 0
    assert positions[-1] < 1000


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("sample_rows", [1, 3, 15, 17])
def test_no_block_is_read_for_no_row(sample_rows: int, in_memory: bool) -> None:
    plan = plan_sample(np.full(400, 1000), sample_rows, 0, in_memory)
    assert len(plan.blocks) == min(sample_rows, 16)
    assert min(plan.counts) >= 1
    assert sum(plan.counts) == sample_rows


def test_combining_sums_is_summing() -> None:
    parts = [
        NormalEquations(
            jtj=np.full((2, 2), i),
            jtr=np.full(2, i),
            cost=i,
            n_used=i,
            n_bad=i % 2,
            largest=float(i % 3),
        )
        for i in range(4)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total.combine(part)
    assert (total.cost, total.n_used, total.n_bad, total.largest) == (6, 6, 2, 2.0)
    np.testing.assert_array_equal(total.jtj, np.full((2, 2), 6))


@pytest.mark.parametrize("kind", [NormalEquations, GradientSums])
def test_each_field_of_sums_says_how_it_combines(kind: type[Sums]) -> None:
    assert all(callable(field.metadata["combine"]) for field in fields(kind))


def test_padding_costs_no_copy_where_none_is_needed() -> None:
    rows = Rows(np.arange(6.0), (np.ones((6, 2)),))
    ((batch, count),) = rows.batches(6)
    assert count == 6
    assert np.shares_memory(batch.y, rows.y)
    (_, first), (padded, second) = rows.batches(4)
    assert (first, second, padded.x[0].shape) == (4, 2, (4, 2))


def test_coordinates_are_sliced_never_expanded() -> None:
    y = da.zeros((1000, 800, 600), chunks=(100, 400, 600))
    blocks = align((np.arange(1000.0)[:, None, None], np.arange(600.0)), y)
    assert [array.shape for array in blocks.x] == [(1000, 1, 1), (1, 1, 600)]
    assert blocks.grid == (10, 2, 1)
