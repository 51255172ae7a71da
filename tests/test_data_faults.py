"""Data that cannot be read, at once or at all: what is tried again, said, and left out."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client
from zarr.codecs import Crc32cCodec, GzipCodec, ZstdCodec

import nlsq_dask as nd
from nlsq_dask.engine.error_kinds import ErrorKind
from nlsq_dask.engine.retries import ReadPolicy, SkippedBlock, call_with_retries
from tests import problems
from tests.clocks import Clock, patch_retries
from tests.problems import NO_WARMUP, PROBLEMS, scipy_fit

Config = nd.HybridStreamingConfig
PROBLEM = PROBLEMS[0]  # a exp(-b x) + c
N, CHUNK = 12_000, 1_000
X, Y = PROBLEM.x[:N], PROBLEM.y[:N]
BAD = 3  # the block in which something is wrong


def fit(x: Any, y: Any, start: Any = PROBLEM.start, **options: Any) -> nd.FitResult:
    options = {"cache": 0, "max_retries_per_batch": 0, **NO_WARMUP, **options}
    return problems.fit(PROBLEM.model, x, y, start, **options)


def store(path: Path, values: np.ndarray, **options: Any) -> zarr.Array[Any]:
    settings = {"shape": values.shape, "chunks": (CHUNK,), "dtype": values.dtype, **options}
    array = zarr.create_array(str(path), **settings)
    array[:] = values
    return array


def remaining(*blocks: int) -> np.ndarray:
    """Return the indices of the rows that are in none of these blocks."""
    return np.flatnonzero(~np.isin(np.arange(N) // CHUNK, blocks))


def check_over(result: nd.FitResult, rows: np.ndarray, tol: float = 1e-8) -> None:
    """Compare with SciPy's fit of these rows."""
    popt, pcov = scipy_fit(PROBLEM.model, X[rows], Y[rows], PROBLEM.truth)
    for _ in range(2):  # SciPy ends where the cost no longer changes, at about this tolerance
        decay = np.exp(-popt[1] * X[rows])
        jacobian = np.column_stack([decay, -popt[0] * X[rows] * decay, np.ones(len(rows))])
        popt = popt - np.linalg.lstsq(jacobian, popt[0] * decay + popt[2] - Y[rows])[0]
    assert result.success
    assert result.n_points == len(rows)
    np.testing.assert_allclose(result.x, popt, rtol=tol)
    if result.pcov is not None and result.phase_history[3].get("cov_type") == "nonrobust":
        np.testing.assert_allclose(result.pcov, pcov, rtol=2e-6)


# --- chunks of a Zarr store


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def point_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


DAMAGE: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "truncated": ({}, truncate, "RuntimeError: Zstd decompression error"),
    "truncated, not compressed": ({"compressors": None}, truncate, "ValueError: cannot reshape"),
    "truncated, gzip": ({"compressors": GzipCodec()}, truncate, "EOFError"),
    "truncated shard": ({"shards": (CHUNK,), "chunks": (100,)}, truncate, r"chunk c/3 of .*Error"),
    "truncated, format 2": ({"zarr_format": 2}, truncate, "chunk 3 of .*RuntimeError"),
    "emptied": ({}, empty, "RuntimeError"),
    "not to be opened": ({"fill_value": np.nan}, point_to_itself, "OSError: .*symbolic links"),
    "a bit, crc32c": (
        {"compressors": [ZstdCodec(), Crc32cCodec()]},
        flip_a_bit,
        "ValueError: Stored and computed checksum do not match",
    ),
    "a bit, zstd with checksum": (
        {"compressors": ZstdCodec(checksum=True)},
        flip_a_bit,
        "RuntimeError: Zstd decompression error",
    ),
    "a bit, gzip": ({"compressors": GzipCodec()}, flip_a_bit, "BadGzipFile|Error"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("array", ["x_data", "y_data"])
def test_a_damaged_chunk_is_named(case: str, array: str, tmp_path: Path) -> None:
    options, damage, text = DAMAGE[case]
    stores = {n: store(tmp_path / n, v, **options) for n, v in (("x_data", X), ("y_data", Y))}
    key = str(BAD) if options.get("zarr_format") == 2 else f"c/{BAD}"
    damage(tmp_path / array / key)
    with pytest.raises(nd.BlockReadError, match=f"(?s){text}") as caught:
        fit(*stores.values())
    error = caught.value
    assert isinstance(error, nd.DataError)
    assert (error.array, error.block) == (array, (BAD,))
    assert error.chunk == f"chunk {key} of {stores[array].store_path}"
    assert isinstance(error.__cause__, Exception)
    assert type(error.__cause__).__name__ in str(error)
    for part in (array, "block (3,) of the grid (12,)", "y_data[3000:4000]", error.chunk):
        assert part in str(error)
    assert "min_success_rate" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.array, again.block, again.chunk) == (
        str(error),
        error.array,
        error.block,
        error.chunk,
    )


def test_damaged_chunks_are_left_out_by_permission(tmp_path: Path) -> None:
    x, y = store(tmp_path / "x", X), store(tmp_path / "y", Y)
    truncate(tmp_path / "y/c/3")
    truncate(tmp_path / "x/c/7")
    with pytest.warns(nd.DataWarning, match=r"2,000 of 12,000 rows, in 2 of 12 .*\(3,\), \(7,\)"):
        result = fit(x, y, min_success_rate=0.8)
    check_over(result, remaining(3, 7))
    assert "2,000 of 12,000 rows" in result.message
    assert "2,000 of 12,000 rows" in result.fit_report()
    first, second = result.diagnostics["left_out"]
    assert (first["block"], first["rows"], first["array"]) == ((3,), 1000, "y_data")
    assert (second["block"], second["rows"], second["array"]) == ((7,), 1000, "x_data")
    assert first["chunk"] == f"chunk c/3 of {y.store_path}"
    assert "Zstd" in second["error"]
    assert result.block_statistics is not None
    counts = result.block_statistics.n_points.values
    np.testing.assert_array_equal(counts, [1000 * (i not in (3, 7)) for i in range(12)])
    # A second chunk too many, and both are named.
    with pytest.raises(nd.BlockReadError, match=r"10,000 of 12,000.*=0\.9.*c/3 of.*c/7 of"):
        fit(x, y, min_success_rate=0.9)


def test_a_missing_chunk_is_said_to_be_read_as_the_fill_value(tmp_path: Path) -> None:
    x, y = store(tmp_path / "x", X), store(tmp_path / "y", Y, fill_value=-7.0)
    (tmp_path / "y/c/3").unlink()
    with pytest.warns(nd.MissingChunksWarning, match=r"/y lacks 1 chunk .*\(c/3\).*, -7\.0\."):
        result = fit(x, y)
    assert result.n_points == N
    filled = Y.copy()
    filled[3000:4000] = -7.0
    np.testing.assert_allclose(result.x, fit(X, filled).x, rtol=1e-8)


@pytest.mark.parametrize(
    "listing", [[], ["other.txt"], PermissionError("403")], ids=["none", "others", "forbidden"]
)
def test_stores_that_do_not_list_what_they_hold_are_read(
    listing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plain web server, whose store says of itself that it lists."""
    x, y = store(tmp_path / "x", X), store(tmp_path / "y", Y)

    async def list_prefix(self: Any, prefix: str) -> Any:
        if isinstance(listing, Exception):
            raise listing
        for key in listing:
            yield key

    monkeypatch.setattr(zarr.storage.LocalStore, "list_prefix", list_prefix)
    assert fit(x, y).success


def test_a_missing_chunk_of_nan(tmp_path: Path) -> None:
    x, y = store(tmp_path / "x", X), store(tmp_path / "y", Y, fill_value=np.nan)
    (tmp_path / "y/c/3").unlink()
    with pytest.raises(nd.NonFiniteDataError, match="1,000 of 12,000 rows") as caught:
        fit(x, y)
    assert caught.value.first_block == (3,)


def test_missing_chunks_that_are_not_read_are_nobodys_business(tmp_path: Path) -> None:
    """Of a store that is not full yet, by Dask's and by xarray's selections."""
    half = N // 2
    frame = xr.Dataset({"y": ("t", Y)}, coords={"t": ("t", X)})
    encoding = {"y": {"chunks": (CHUNK,), "_FillValue": None, "fill_value": 0.5}}
    frame.to_zarr(tmp_path / "s", encoding=encoding, consolidated=False)
    (tmp_path / "s/y/c/9").unlink()
    y = da.from_zarr(str(tmp_path / "s/y"))
    whole = xr.open_zarr(tmp_path / "s", chunks=None, consolidated=False)
    part = whole.isel(t=slice(500, half)).chunk(t=2 * CHUNK)
    expected = fit(X[500:half], Y[500:half])
    for result in (fit(X[500:half], y[500:half]), fit("t", part.y)):
        np.testing.assert_allclose(result.x, expected.x, rtol=1e-9)
    later = whole.isel(t=slice(half, None)).chunk(t=2 * CHUNK)
    with pytest.warns(nd.MissingChunksWarning, match=r"lacks 1 chunk .*\(c/9\)"):
        fit("t", later.y)


def test_one_chunk_of_several_in_a_block(tmp_path: Path) -> None:
    """Blocks of xarray hold several chunks; the bad one is found among them, fused or not."""
    frame = xr.Dataset({"y": ("t", Y)}, coords={"t": ("t", X)})
    frame.to_zarr(tmp_path / "s", encoding={"y": {"chunks": (250,)}}, consolidated=False)
    truncate(tmp_path / "s/y/c/13")
    y = xr.open_zarr(tmp_path / "s", chunks={"t": 1000}, consolidated=False).y
    for given in (y, abs(y), y.isel(t=slice(500, None)).chunk(t=1000)):
        with pytest.raises(nd.BlockReadError, match=r"chunk c/13 of file.*/s/y: RuntimeError"):
            fit("t", given)


def test_a_sigma_that_cannot_be_read(tmp_path: Path) -> None:
    sigma = store(tmp_path / "sigma", np.full(N, 0.05))
    truncate(tmp_path / "sigma/c/3")
    with pytest.raises(nd.BlockReadError, match=r"^sigma could not be read after 1 attempt in"):
        fit(X, Y, sigma=sigma)


def test_other_files(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "x.bin", "f8", "w+", shape=(2**19,))
    mapped[:] = 1.0
    mapped.flush()
    mapped = np.memmap(tmp_path / "x.bin", "f8", "r")
    os.truncate(tmp_path / "x.bin", 2**21)
    with pytest.raises(nd.BlockReadError, match=r"x_data .*x\.bin"):
        fit(mapped, np.ones(2**19))
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.create_dataset("y", data=Y, chunks=(CHUNK,), fletcher32=True)
        where = file["y"].id.get_chunk_info(BAD).byte_offset
    content = bytearray((tmp_path / "y.h5").read_bytes())
    content[where + 80] ^= 1
    (tmp_path / "y.h5").write_bytes(content)
    with (
        h5py.File(tmp_path / "y.h5") as file,
        pytest.raises(nd.BlockReadError, match=r"y_data .*OSError"),
    ):
        fit(X, file["y"])


# --- faults that come and go


class Flaky:
    """A function for ``map_blocks`` that fails in one block, at some of its calls.

    It counts them in a file, which all processes see.
    """

    def __init__(
        self,
        folder: Path,
        first: int = 0,
        last: int = 10**9,
        error: Any = OSError,
        block: int = BAD,
    ) -> None:
        self.file = folder / f"calls of {block}"
        self.file.write_bytes(b"")
        self._fails = first, last
        self._error = error
        self._block = block

    @property
    def calls(self) -> int:
        return self.file.stat().st_size

    def __call__(self, values: np.ndarray, block_id: Any = None) -> np.ndarray:
        if block_id == (self._block,):
            number = self.calls
            with self.file.open("ab") as file:
                file.write(b"x")
            if self._fails[0] <= number < self._fails[1]:
                raise self._error(f"call {number} failed")
        return values

    def data(self, x: Any = X, y: Any = Y) -> tuple[da.Array, da.Array]:
        x, y = (da.from_array(values, chunks=CHUNK) for values in (x, y))
        return x, y.map_blocks(self, dtype="f8", meta=np.empty(0))


@pytest.mark.parametrize("seed", [None, 2])
def test_a_fault_that_passes(
    tmp_path: Path, scheduler: str, seed: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the sample, which comes first, or in the first pass over all rows."""
    flaky = Flaky(tmp_path, 0 if seed is None else 1, 2 if seed is None else 3)
    result = fit(*flaky.data(), max_retries_per_batch=2, verbose=1)
    assert result.diagnostics["retries"] == 2
    assert result.diagnostics["left_out"] == []
    assert ("2 reads retried" in capsys.readouterr().out) == (seed is not None)
    exact = fit(*(da.from_array(values, chunks=CHUNK) for values in (X, Y)))
    np.testing.assert_array_equal(result.x, exact.x)
    np.testing.assert_array_equal(result.pcov, exact.pcov)
    assert result.rows_read == exact.rows_read


@pytest.mark.parametrize(
    ("options", "tries"),
    [
        ({"max_retries_per_batch": 0}, 1),
        ({"max_retries_per_batch": 1}, 2),
        ({"max_retries_per_batch": 2}, 3),
        ({"max_retries_per_batch": 2, "enable_fault_tolerance": False}, 1),
    ],
    ids=str,
)
def test_how_often_reading_is_tried(options: dict[str, Any], tries: int, tmp_path: Path) -> None:
    flaky = Flaky(tmp_path)
    said = "1 attempt" if tries == 1 else f"{tries} attempts"
    with pytest.raises(nd.BlockReadError, match=f"y_data could not be read after {said} .*OSError"):
        fit(*flaky.data(), **options)
    assert flaky.calls == tries


def test_what_is_no_fault_of_reading_is_not_tried_again(tmp_path: Path) -> None:
    options = {"max_retries_per_batch": 2, "min_success_rate": 0.5}
    for error in (TypeError, AttributeError, NotImplementedError):
        flaky = Flaky(tmp_path, error=error)
        with pytest.raises(nd.BlockReadError, match=f"after 1 attempt in .*{error.__name__}"):
            fit(*flaky.data(), **options)
        assert flaky.calls == 1
    flaky = Flaky(tmp_path, error=MemoryError)
    with pytest.raises(MemoryError):
        fit(*flaky.data(), **options)
    assert flaky.calls == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return patch_retries(monkeypatch)


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_an_outage_is_waited_out(
    error: Any, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Of more attempts than other errors have."""
    flaky = Flaky(tmp_path, 1, 11, error)
    with pytest.warns(UserWarning, match=rf"not answer \({error.__name__}\).*_seconds=120\.$"):
        result = fit(*flaky.data())
    assert result.diagnostics["retries"] == 10
    assert 10 < clock.now < 120
    exact = fit(*(da.from_array(values, chunks=CHUNK) for values in (X, Y)))
    np.testing.assert_array_equal(result.x, exact.x)
    np.testing.assert_array_equal(result.pcov, exact.pcov)
    assert f"s: {error.__name__}: call 6 failed" in caplog.text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"retry_seconds": 5.0}, r"after 5 attempts in 5 s, in block"),
        ({"retry_seconds": 0.0, "max_retries_per_batch": 2}, "after 1 attempt in block"),
        ({"enable_fault_tolerance": False}, "after 1 attempt in block"),
        ({"retry_seconds": 5.0, "min_success_rate": 0.95}, "after 5 attempts in 5 s, in block"),
    ],
    ids=str,
)
def test_how_long_an_outage_is_waited_out(
    options: dict[str, Any], text: str, tmp_path: Path, clock: Clock
) -> None:
    flaky = Flaky(tmp_path, error=ConnectionError)
    with pytest.raises(nd.BlockReadError, match=rf"{text} .*ConnectionError") as caught:
        fit(*flaky.data(), **options)
    assert clock.now == pytest.approx(options.get("retry_seconds", 0.0))
    assert "Fit again when the store answers, increase retry_seconds, or" in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, KeyError])
def test_what_no_retry_can_change_is_tried_once(error: Any, tmp_path: Path, clock: Clock) -> None:
    flaky = Flaky(tmp_path, error=error)
    with pytest.raises(nd.BlockReadError, match=f"after 1 attempt in .*{error.__name__}") as caught:
        fit(*flaky.data(), max_retries_per_batch=2)
    assert ("environment of the workers" in str(caught.value)) == (error is PermissionError)
    assert flaky.calls == 1
    with pytest.warns(nd.DataWarning, match=r"1,000 of 12,000 rows, in 1 of 12 blocks"):
        fit(*flaky.data(), max_retries_per_batch=2, min_success_rate=0.9)
    assert clock.pauses == []


def test_outages_and_other_errors_are_counted_apart(clock: Clock) -> None:
    errors = [OSError(), *[ConnectionError()] * 6, OSError(), *[ConnectionError()] * 2]
    pending = iter(errors)

    def read() -> str:
        error = next(pending, None)
        if error is not None:
            raise error
        return "read"

    assert call_with_retries(read, ReadPolicy(2, 60.0)) == "read"
    growing = [0.1, 0.1, 0.4, 1.6, 6.4, 10.0, 10.0, 0.4, 10.0, 10.0]
    assert all(
        0.8 * most <= pause <= most for pause, most in zip(clock.pauses, growing, strict=True)
    )
    pending = iter(errors)
    with pytest.raises(ConnectionError):
        call_with_retries(read, ReadPolicy(2, 10.0))
    pending = iter(errors)
    with pytest.raises(OSError, match=r"^$"):
        call_with_retries(read, ReadPolicy(1, 60.0))
    assert next(pending) is errors[-1]


@pytest.mark.parametrize(
    ("chunk", "error", "remedy"),
    [
        ("chunk c/0 of s3://b/y", "PermissionError: 403", "AWS_ACCESS_KEY_ID"),
        ("chunk c/0 of gs://b/y", "HttpError: 403", "environment of the workers, or"),
        ("chunk c/0 of file:///data/y", "PermissionError: [Errno 13]", "^Permit all processes"),
    ],
)
def test_denied_access_has_a_remedy(chunk: str, error: str, remedy: str) -> None:
    block = SkippedBlock((0,), (1,), 1, ((0, 1),), "y_data", chunk, error, 1, ErrorKind.DENIED)
    assert re.search(remedy, block.remedy("skip it"))


def test_tolerance_and_permission_go_together() -> None:
    with pytest.raises(ValueError, match=r"=0\.5 allows .*requires enable_fault_tolerance"):
        Config(enable_fault_tolerance=False, min_success_rate=0.5)


class TwoArgumentsError(Exception):
    """As many of libraries are: it cannot be unpickled."""

    def __init__(self, status: int, reason: str = "gone") -> None:
        super().__init__(f"{status} {reason}")
        self._handle = open
        self._lambda = lambda: None


def test_errors_that_cannot_be_sent(tmp_path: Path, process_client: Client) -> None:
    flaky = Flaky(tmp_path, error=TwoArgumentsError)
    with (
        process_client.as_current(),
        dask.config.set(scheduler="dask.distributed"),
        pytest.raises(nd.BlockReadError, match="TwoArgumentsError: call 0 failed gone") as caught,
    ):
        fit(*flaky.data())
    assert caught.value.block == (BAD,)


@pytest.mark.slow
def test_processes_without_a_cluster(tmp_path: Path) -> None:
    flaky = Flaky(tmp_path)
    with dask.config.set(scheduler="processes"):
        with pytest.raises(nd.BlockReadError, match=r"y_data.*OSError") as caught:
            fit(*flaky.data())
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.warns(nd.DataWarning):
            result = fit(*flaky.data(), min_success_rate=0.9)
    check_over(result, remaining(BAD))


# --- blocks that stay bad


def test_how_many_rows_may_be_missing(tmp_path: Path) -> None:
    """The share is of rows; the last of three blocks in a row is one too many."""
    sizes = (1000, 1000, 4000, 6000)

    def data(*bad: int) -> tuple[np.ndarray, da.Array]:
        y = da.from_array(Y, chunks=(sizes,))
        for block in bad:
            y = y.map_blocks(Flaky(tmp_path, block=block), dtype="f8", meta=np.empty(0))
        return X, y

    for bad, lost, least in (((0,), 1000, 11 / 12), ((0, 1), 2000, 10 / 12), ((2,), 4000, 0.6)):
        with pytest.warns(nd.DataWarning, match=f"{lost:,} of 12,000 rows, in {len(bad)} of 4"):
            result = fit(*data(*bad), min_success_rate=least)
        assert result.n_points == N - lost
        too_much = (N - lost) / N + 1e-3
        with pytest.raises(nd.BlockReadError, match="less than min_success_rate"):
            fit(*data(*bad), min_success_rate=too_much)
    with pytest.raises(nd.BlockReadError, match=r"^0 of 12,000 rows can be read"):
        fit(*data(0, 1, 2, 3), min_success_rate=1e-9)


WAYS: dict[str, dict[str, Any]] = {
    "matrices": {"sample_rows": 3},
    "QR": {"sample_rows": 3, "gauss_newton_solver": "qr"},
    "sandwich": {"sample_rows": 3, "cov_type": "HC1"},
    "sample": {"sample_rows": 2_000, "cov_type": "HC1"},
    "gradients": {"sample_rows": 200, "cg_param_threshold": 3, "cg_error_probes": 3},
}


@pytest.mark.parametrize(
    ("way", "readings"),
    [("matrices", 0), ("matrices", 1), ("matrices", 3), ("sandwich", -1)]
    + [
        pytest.param(way, readings, marks=pytest.mark.slow)
        for way in WAYS
        for readings in range(-3, 5)
    ],
)
def test_a_block_that_is_lost_on_the_way(way: str, readings: int, tmp_path: Path) -> None:
    """Whenever it happens, the result is that of the other rows.

    The block can be read so many times; a negative number counts from the last reading.
    """
    start, options = [4.0, 2.0, 1.0], {"min_success_rate": 0.9, **WAYS[way]}
    if readings < 0:
        healthy = Flaky(tmp_path, 10**9)
        fit(*healthy.data(), start, **options)
        readings += healthy.calls
    flaky = Flaky(tmp_path, max(readings, 0))
    with pytest.warns(nd.DataWarning, match=r"1,000 of 12,000 rows, in 1 of 12 blocks"):
        result = fit(*flaky.data(), start, **options)
    assert flaky.calls == max(readings, 0) + 1
    assert [bad["block"] for bad in result.diagnostics["left_out"]] == [(BAD,)]
    rows = remaining(BAD)
    check_over(result, rows)
    direct = fit(X[rows], Y[rows], start, **options)
    np.testing.assert_allclose(
        result.perr, direct.perr, rtol=2e-3 if "cg" in str(options) else 1e-6
    )


def test_a_block_that_is_lost_in_the_probes_stays_skipped(tmp_path: Path) -> None:
    """The journal must not keep what a pass over fewer rows made of them."""
    start, options = [4.0, 2.0, 1.0], {"min_success_rate": 0.9, **WAYS["gradients"]}
    healthy = Flaky(tmp_path, 10**9)
    fit(*healthy.data(), start, **options)
    flaky, folder = Flaky(tmp_path, healthy.calls - 1), tmp_path / "checkpoints"
    with pytest.warns(nd.DataWarning, match=r"1,000 of 12,000 rows, in 1 of 12 blocks"):
        result = fit(*flaky.data(), start, checkpoint_dir=folder, **options)
    assert np.isfinite(result.perr).all()
    for checkpoint in folder.iterdir():
        with pytest.warns(nd.DataWarning, match=r"1,000 of 12,000 rows, in 1 of 12 blocks"):
            resumed = fit(*flaky.data(), start, resume_from_checkpoint=checkpoint, **options)
        np.testing.assert_array_equal(resumed.perr, result.perr)


def test_bad_rows_are_counted_of_those_that_could_be_read(tmp_path: Path) -> None:
    y = Y.copy()
    y[5] = np.nan
    data = Flaky(tmp_path, 1).data(y=y)
    with pytest.raises(nd.NonFiniteDataError, match=r"1 of 11,000 rows hold NaN"):
        # One row of each block, so that the sample has read the one that fails at the next reading.
        fit(*data, min_success_rate=0.5, sample_rows=12)


def test_blocks_that_are_lost_one_after_the_other(tmp_path: Path) -> None:
    x, y = Flaky(tmp_path, 0).data()
    for block, readings in ((5, 1), (6, 2), (9, 2), (11, 4)):
        y = y.map_blocks(Flaky(tmp_path, readings, block=block), dtype="f8", meta=np.empty(0))
    with pytest.warns(nd.DataWarning, match="5,000 of 12,000 rows"):
        result = fit(x, y, [4.0, 2.0, 1.0], min_success_rate=0.5, sample_rows=3)
    check_over(result, remaining(BAD, 5, 6, 9, 11))


def test_a_lost_block_on_a_cluster_and_beside_a_cache(
    tmp_path: Path, process_client: Client
) -> None:
    flaky = Flaky(tmp_path, 1)
    stores = store(tmp_path / "x", X), store(tmp_path / "y", Y)
    with (
        process_client.as_current(),
        dask.config.set(scheduler="dask.distributed"),
        pytest.warns(nd.DataWarning, match="1,000 of 12,000 rows"),
    ):
        result = fit(*flaky.data(*stores), [4.0, 2.0, 1.0], min_success_rate=0.9, cache="auto")
    check_over(result, remaining(BAD))
    assert result.rows_cached > 0
    assert flaky.calls == 2


def wide(tmp_path: Path, **fails: Any) -> tuple[da.Array, da.Array, Flaky]:
    """Return data of two groups, which share a chunk of x that fails."""
    n = 2**19
    flaky = Flaky(tmp_path, block=0, **fails)
    x = da.from_array(np.resize(X, n), chunks=n)
    y = da.from_array(np.resize(Y, n), chunks=n // 4)
    return x.map_blocks(flaky, dtype="f8", meta=np.empty(0)), y, flaky


def test_what_several_groups_wait_for(tmp_path: Path) -> None:
    x, y, flaky = wide(tmp_path, first=1, last=2)
    result = fit(x, y, max_retries_per_batch=1, sample_rows=1000)
    assert result.diagnostics["retries"] == 1
    x, y, flaky = wide(tmp_path)
    with pytest.raises(nd.BlockReadError, match=r"x_data .* after 2 attempts in block \(0,"):
        fit(x, y, max_retries_per_batch=1)
    assert flaky.calls == 2
    x, y, flaky = wide(tmp_path)
    with pytest.raises(nd.BlockReadError, match=r"^0 of 524,288 rows"):
        fit(x, y, min_success_rate=0.1)


def test_a_store_that_is_gone(tmp_path: Path) -> None:
    x, y = store(tmp_path / "x", X, fill_value=np.nan), store(tmp_path / "y", Y)
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(nd.NonFiniteDataError, match="12,000 of 12,000 rows"):
        fit(x, y)
