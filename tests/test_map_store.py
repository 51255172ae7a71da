"""The Zarr store of a map: what is written comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import fsspec
import jax.numpy as jnp
import msgspec
import numpy as np
import pandas as pd
import psutil
import pytest
import xarray as xr
import zarr

from nlsq_dask import CheckpointError, DataError, HybridStreamingConfig
from nlsq_dask.checkpoints.identity import FitFingerprint
from nlsq_dask.maps.problem.arguments import validate_map_arguments
from nlsq_dask.maps.stores import lease, store
from nlsq_dask.maps.stores.identity import map_fingerprint, summary
from nlsq_dask.maps.stores.lease import Holder, Lease
from nlsq_dask.maps.stores.store import MapStore, store_chunks
from nlsq_dask.maps.tasks.outputs import Outputs
from nlsq_dask.solvers.lanes.records import LaneStatus
from nlsq_dask.storage import backends
from nlsq_dask.storage.backends import open_parent

SHAPE = (5, 7)
TILES = ((2, 2, 1), (3, 3, 1))
FINGERPRINT = FitFingerprint(
    "digest", {"y_data": "float64"}, {"p0": "[1]"}, {"cov_type": "'HC0'"}, {"numpy": "2"}
)


@pytest.fixture(scope="module")
def result() -> xr.Dataset:
    """A Dataset like that of a fit, with coordinates of all kinds."""
    random = np.random.default_rng(0)
    outputs = Outputs(("a", "b"), (1, 2), "float64", "full")
    variables = {}
    for name, variable in outputs.variables.items():
        shape = (*SHAPE, *(2 for _ in variable.dims))
        values = random.integers(1, 4, shape) + random.random(shape)
        variables[name] = (
            ("lat", "time", *variable.dims),
            values.astype(variable.dtype),
            outputs.attrs_of(name),
        )
    dates = np.datetime64("2020-01-01", "ns") + np.arange(7) * np.timedelta64(36, "h")
    coordinates: dict[str, Any] = {
        **dict.fromkeys(["param", "cov_i", "cov_j"], np.array(["a", "b"], object)),
        "lat": ("lat", np.arange(5.0), {"units": "degrees_north"}),
        "time": dates,
        "site": ("lat", ["Ry", "Å", "Ø-stad", "", "x"]),
        "delay": ("time", np.arange(7).astype("m8[s]")),
        "is_land": ("lat", np.arange(5) % 2 == 0),
        "height": (("lat", "time"), random.random(SHAPE)),
        "depth": (("lat", "time"), da.from_array(random.random(SHAPE), chunks=((4, 1), (5, 2)))),
        "orbit": 17,
        "satellite": "S5",
    }
    dataset = xr.Dataset(variables, coordinates, {"model": "decay"})
    # As of a file whose numbers are packed: what comes back must not be rounded.
    dataset["height"].encoding = {"dtype": "int8", "scale_factor": 0.5, "chunks": (1, 1)}
    return dataset


@pytest.fixture(params=["disk", "url"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"disk": f"{tmp_path}/new/map.zarr", "url": f"memory://{tmp_path}/map.zarr"}[
        request.param
    ]


@pytest.fixture(scope="module")
def small(result: xr.Dataset) -> xr.Dataset:
    """The result with fewer variables, which take time to create."""
    return result[["popt", "n_points", "status"]].drop_vars(
        ["site", "delay", "is_land", "height", "depth", "orbit", "satellite"]
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that do not wait long for others."""
    monkeypatch.setattr(lease, "_SETTLING", 0.05)
    monkeypatch.setattr(lease, "_POLL", 0.05)


def files(path: str) -> tuple[Any, str]:
    file_system, root = fsspec.core.url_to_fs(path)
    return file_system, root


def create(path: Any, result: xr.Dataset, fingerprint: FitFingerprint = FINGERPRINT) -> MapStore:
    return MapStore.create_or_open(path, TILES, result, fingerprint)


def tile_of(result: xr.Dataset, index: tuple[int, ...]) -> dict[str, np.ndarray]:
    start = [sum(sizes[:i]) for sizes, i in zip(TILES, index, strict=True)]
    where = tuple(slice(s, s + own[i]) for s, own, i in zip(start, TILES, index, strict=True))
    return {name: variable.values[where] for name, variable in result.data_vars.items()}


def write_all(own: MapStore, result: xr.Dataset) -> None:
    for index in np.ndindex(3, 3):
        own.write(index, tile_of(result, index))


# --- what is written, and read


def test_a_store_has_the_result_and_is_opened_by_xarray(path: str, result: xr.Dataset) -> None:
    write_all(pickle.loads(pickle.dumps(create(path, result))), result)
    own = create(path, result)
    assert own.finished() == set(np.ndindex(3, 3))
    xr.testing.assert_identical(own.open().load(), result.compute())
    opened = xr.open_zarr(path)
    assert "FitFingerprint" not in opened.attrs.pop("nlsq_dask")
    xr.testing.assert_identical(opened.load(), result.compute())
    assert {name: v.dtype for name, v in opened.data_vars.items()} == {
        name: v.dtype for name, v in result.data_vars.items()
    }
    assert opened.popt.encoding["chunks"] == (2, 3, 2)


def test_tiles_that_are_not_written(path: str, small: xr.Dataset) -> None:
    own = create(path, small)
    assert own.finished() == set()
    assert own.read((1, 0)) is None
    own.write((1, 0), tile_of(small, (1, 0)))
    own.write((2, 2), tile_of(small, (2, 2)))
    assert own.finished() == {(1, 0), (2, 2)}
    opened = own.open().load()
    is_there = np.zeros(SHAPE, bool)
    is_there[2:4, :3] = is_there[4:, 6:] = True
    assert opened.status.dtype == np.int8
    assert (opened.status.values[~is_there] == LaneStatus.NOT_FITTED).all()
    assert np.isnan(opened.popt.values[~is_there]).all()
    assert (opened.n_points.values[~is_there] == 0).all()
    np.testing.assert_array_equal(opened.popt.values[is_there], small.popt.values[is_there])
    flags = zip(opened.status.flag_values, opened.status.flag_meanings.split(), strict=True)
    assert dict(flags)[-7] == "not_fitted"


def test_chunks_of_fill_values_are_written(path: str, small: xr.Dataset) -> None:
    own = create(path, small)
    shape = (2, 3)
    arrays = {
        "popt": np.full((*shape, 2), np.nan),
        "n_points": np.zeros(shape, np.int32),
        "status": np.full(shape, LaneStatus.NOT_FITTED, np.int8),
    }
    own.write((0, 0), arrays)
    read = own.read((0, 0))
    assert read is not None
    assert set(read) == set(arrays)
    assert np.isnan(read["popt"]).all()


def test_a_damaged_tile_is_not_read_and_can_be_written_again(
    tmp_path: Path, small: xr.Dataset
) -> None:
    own = create(tmp_path, small)
    tiles = {index: tile_of(small, index) for index in [(0, 1), (2, 2)]}  # the last at the edges
    for index, name in product(tiles, ["popt", "status"]):
        own.write(index, tiles[index])
        file = tmp_path / name / "c" / "/".join(map(str, index + (0,) * (name == "popt")))
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        for damaged in (data[:-3], b"", flipped):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="checksum"):
                own.open()[name].load()
            assert own.read(index) is None
        own.write(index, tiles[index])
        read = own.read(index)
        assert read is not None
        np.testing.assert_array_equal(read[name], tiles[index][name])
        file.unlink()
        assert own.read(index) is None


def test_the_status_is_written_last(tmp_path: Path, small: xr.Dataset) -> None:
    own = create(tmp_path, small)
    arrays = tile_of(small, (0, 0))
    del arrays["n_points"]
    with pytest.raises(KeyError):
        own.write((0, 0), {"status": arrays.pop("status"), **arrays})
    assert own.finished() == set()


def test_a_file_of_a_killed_write_is_ignored_and_removed(tmp_path: Path, small: xr.Dataset) -> None:
    own = create(tmp_path, small)
    left = tmp_path / "status" / "c" / "1" / "0.0123abcd.partial"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    assert own.finished() == set()
    create(tmp_path, small)
    assert not left.exists()


# --- tiles and chunks


@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [((30, 30, 20), 30), ((30, 50, 20), 10), ((30, 50, 21), 10), ((5, 60), 5), ((9,), 9)],
)
def test_no_two_tiles_share_a_chunk(sizes: tuple[int, ...], chunk: int) -> None:
    assert store_chunks((sizes, (4, 4, 1))) == (chunk, 4)
    assert not (np.cumsum(sizes)[:-1] % chunk).any()


def test_tiles_of_several_chunks_are_finished_with_their_last(
    tmp_path: Path, small: xr.Dataset
) -> None:
    own = MapStore.create_or_open(tmp_path, ((3, 2), (2, 4, 1)), small, FINGERPRINT)
    arrays = {name: v.values[:3, 2:6] for name, v in small.data_vars.items()}
    own.write((0, 1), arrays)
    assert own.finished() == {(0, 1)}
    np.testing.assert_array_equal(own.read((0, 1))["popt"], arrays["popt"])  # type: ignore[index]
    (tmp_path / "status" / "c" / "0" / "2").unlink()
    assert own.finished() == set()


def test_tiles_of_too_different_sizes_are_refused(tmp_path: Path, small: xr.Dataset) -> None:
    with pytest.raises(DataError, match=r"from 1 to 900 along 'time'.*chunk\(\{'time': 900\}\)"):
        store_chunks(((4,), (7, 1, 900)), ("lat", "time"))


def test_a_coordinate_that_zarr_cannot_store(tmp_path: Path, small: xr.Dataset) -> None:
    pairs = pd.MultiIndex.from_product([[1], range(5)], names=["i", "j"])
    stacked = small.drop_vars("lat").assign_coords(
        xr.Coordinates.from_pandas_multiindex(pairs, "lat")
    )
    with pytest.raises(DataError, match="reset_index"):
        create(tmp_path / "map.zarr", stacked)
    create(tmp_path / "map.zarr", small)


# --- what else may be at the path


@pytest.mark.parametrize("killed", ["at first", "in the middle", "at the end"])
def test_a_half_made_store_is_made_again(
    path: str, small: xr.Dataset, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    with monkeypatch.context() as patch:
        # That after the mark is written, and that before it is removed.
        function = "_file_system" if killed == "at first" else "_with_record"
        original: Callable[..., Any] = getattr(store, function)
        calls: list[Any] = []

        def kill(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 1:
                return original(*args)
            raise KeyboardInterrupt

        patch.setattr(store, function, kill)
        with pytest.raises(KeyboardInterrupt):
            create(path, small.assign(other=small.n_points))
    file_system, root = files(path)
    if killed == "in the middle":
        file_system.rm(f"{root}/popt", recursive=True)
        file_system.pipe_file(f"{root}/time/zarr.json", b"{")
    assert r"\"fingerprint\": null" in file_system.cat_file(f"{root}/zarr.json").decode()
    write_all(create(path, small), small)
    xr.testing.assert_identical(create(path, small).open().load(), small.compute())


def as_nothing(path: Path) -> None:
    path.mkdir()


def as_killed_at_once(path: Path) -> None:
    path.mkdir()
    (path / ".-0123abcd.unfinished").write_bytes(b"x")


@pytest.mark.parametrize("make", [as_nothing, as_killed_at_once])
def test_an_empty_folder_is_used(
    tmp_path: Path, small: xr.Dataset, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "map.zarr")
    assert create(tmp_path / "map.zarr", small).finished() == set()
    assert not list(tmp_path.rglob("*.unfinished"))


def as_file(path: Path) -> None:
    path.write_text("mine")


def as_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def as_zarr(path: Path) -> None:
    xr.Dataset({"mine": ("x", [1.0])}).to_zarr(path, consolidated=False)


def as_zarr_2(path: Path) -> None:
    zarr.create_group(path, zarr_format=2)


def as_zarr_with_our_word(path: Path) -> None:
    zarr.create_group(path, attributes={"nlsq_dask": "a note"})


def as_damaged(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (as_file, "is a file"),
        (as_folder, r"a folder with other files \(notes.txt\)"),
        (as_zarr, "a Zarr store that nlsq_dask has not written"),
        (as_zarr_2, "a Zarr store that nlsq_dask has not written"),
        (as_zarr_with_our_word, "a Zarr store that nlsq_dask has not written"),
        (as_damaged, "a Zarr store that nlsq_dask has not written"),
    ],
)
def test_nothing_of_others_is_overwritten(
    tmp_path: Path, small: xr.Dataset, make: Callable[[Path], None], what: str
) -> None:
    path = tmp_path / "map.zarr"
    make(path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=f"{what}.*Pass the path of a new store"):
        create(path, small)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_store_of_another_fit_is_refused(tmp_path: Path, small: xr.Dataset) -> None:
    create(tmp_path, small)
    other = replace(FINGERPRINT, arguments={"p0": "[2]"})
    with pytest.raises(CheckpointError, match=r"p0 was \[1\] and is \[2\].* another path as store"):
        create(tmp_path, small, other)
    with pytest.warns(UserWarning, match="version numpy was 2 and is 3"):
        create(tmp_path, small, replace(FINGERPRINT, versions={"numpy": "3"}))


def test_a_store_of_a_later_format_is_refused(tmp_path: Path, small: xr.Dataset) -> None:
    create(tmp_path, small)
    root = json.loads((tmp_path / "zarr.json").read_text())
    record = {**json.loads(root["attributes"]["nlsq_dask"]), "format": 2}
    root["attributes"]["nlsq_dask"] = json.dumps(record)
    (tmp_path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CheckpointError, match=r"format 2.*reads format 1"):
        create(tmp_path, small)


def test_a_store_that_was_replaced_in_the_same_process(tmp_path: Path, small: xr.Dataset) -> None:
    first = create(tmp_path / "map.zarr", small)
    first.write((0, 0), tile_of(small, (0, 0)))
    (tmp_path / "map.zarr").rename(tmp_path / "before.zarr")
    single = small.assign(popt=small.popt.astype("float32"))
    second = create(tmp_path / "map.zarr", single)
    second.write((0, 0), tile_of(single, (0, 0)))
    read = second.read((0, 0))
    assert read is not None
    assert read["popt"].dtype == np.float32


# --- fingerprints


def decay(t: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-b * t)


def faster(t: Any, a: Any, b: Any) -> Any:
    return a * jnp.exp(-2 * b * t)


def start(t: Any, y: Any) -> Any:
    return {"a": jnp.nanmax(y)}


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> xr.DataArray:
    """A cube on disk, most of whose blocks have no data."""
    values = np.full((6, 8, 10), np.nan)
    values[:, 2:4, 4:8] = np.random.default_rng(0).random((6, 2, 4))
    y = xr.DataArray(values, dims=("t", "lat", "lon"), coords={"t": np.arange(6.0)}, name="y")
    path = tmp_path_factory.mktemp("cube")
    y.chunk(t=3, lat=2, lon=5).to_zarr(path, consolidated=False)
    return xr.open_zarr(path, consolidated=False).y


def fingerprint(y: Any, model: Any = decay, config: Any = None, **arguments: Any) -> FitFingerprint:
    arguments = {"dims": "t", **arguments}
    config = HybridStreamingConfig(**(config or {}))
    problem = validate_map_arguments(config, model, "t", y, **arguments)
    return map_fingerprint(problem, {"lat": xr.DataArray(np.arange(8.0), dims="lat")})


@pytest.fixture(scope="module")
def known(cube: xr.DataArray) -> FitFingerprint:
    return fingerprint(cube)


def test_the_same_call_has_the_same_fingerprint(cube: xr.DataArray, known: FitFingerprint) -> None:
    again = fingerprint(cube, config={"verbose": 2, "max_retries_per_batch": 5, "chunk_size": 64})
    assert known.check(again) == []
    assert msgspec.json.decode(msgspec.json.encode(known), type=FitFingerprint) == known
    with dask.config.set(scheduler="sync"):
        assert fingerprint(cube).values == known.values


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda y: {"y": y + 1}, "values of y_data in block"),
        (lambda y: {"y": y.isel(lat=slice(None, None, -1))}, "values of y_data in block"),
        (lambda y: {"y": y.chunk(lat=4)}, "data y_data was"),
        (lambda y: {"model": faster}, "the model computes a different function"),
        (lambda y: {"guess": start}, "argument guess was None"),
        (lambda y: {"p0": [1, 2]}, "argument p0 was"),
        (lambda y: {"p0": {"a": y.isel(t=0, drop=True)}}, r"data p0\['a'\] was not given"),
        (lambda y: {"bounds": {"a": (0, 1)}}, "argument upper bounds was"),
        (lambda y: {"fixed": {"b": 1}}, "argument fixed was"),
        (lambda y: {"dims": ["t", "lat"]}, "argument dims was"),
        (lambda y: {"sigma": 0.1}, "data sigma was not given"),
        (lambda y: {"loss": "huber"}, "argument loss was"),
        (lambda y: {"min_points": 4}, "argument min_points was"),
        (lambda y: {"covariance": "full"}, "argument covariance was"),
        (lambda y: {"config": {"gauss_newton_max_iterations": 5}}, "max_iterations was 100"),
        (lambda y: {"config": {"precision": "float32"}}, "option precision was"),
    ],
)
def test_another_fit_has_another_fingerprint(
    cube: xr.DataArray, known: FitFingerprint, change: Callable[[Any], Any], what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        known.check(fingerprint(**{"y": cube, **change(cube)}))


def test_two_guesses(cube: xr.DataArray) -> None:
    one = fingerprint(cube, guess=start)
    assert one.check(fingerprint(cube, guess=start)) == []
    other = fingerprint(cube, guess=lambda t, y: {"a": 2.0})
    with pytest.raises(CheckpointError, match="guess computes a different function"):
        one.check(other)


def test_other_coordinates(known: FitFingerprint) -> None:
    with pytest.raises(CheckpointError, match="data coordinate lat was"):
        known.check(replace(known, data={**known.data, "coordinate lat": "other"}))


def test_blocks_that_cannot_be_read_are_not_compared(
    cube: xr.DataArray, known: FitFingerprint
) -> None:
    def broken(block: np.ndarray) -> np.ndarray:
        if block.size:
            raise OSError("no connection")
        return block

    y = cube.copy(data=cube.data.map_blocks(broken, dtype=cube.dtype, meta=np.empty((0, 0, 0))))
    now = fingerprint(y, config={"max_retries_per_batch": 0})
    assert now.values == {}
    assert known.check(replace(now, data=known.data)) == []
    assert now.check(replace(known, data=now.data)) == []


def test_arrays_in_memory_are_not_read_again(cube: xr.DataArray) -> None:
    one, other = fingerprint(cube.load().copy()), fingerprint(cube.load() + 1)
    assert one.values == {}
    with pytest.raises(CheckpointError, match="data y_data was"):
        one.check(other)


def test_summaries_allow_for_rounding_but_for_nothing_else() -> None:
    values = np.random.default_rng(0).normal(size=(300, 400))
    text = summary(values)
    assert text.startswith("120,000 finite of 120,000 values, with mean ")
    assert summary(values * (1 + 1e-15)) == text
    assert summary(np.nextafter(values, np.inf)) == text
    for other in (values + 1, -values, values[::-1], values.T, values.round(4)):
        assert summary(other) != text
    one = values.copy()
    one[7, 9] = np.nan
    assert summary(one).startswith("119,999 finite of 120,000 values")
    assert summary(np.full(5, np.nan)) == "no finite value"
    assert summary(np.zeros(5)) == "5 zeros of 5 values"
    assert summary(np.ones(5, bool)).startswith("5 finite of 5 values, with mean 1, ")


# --- leases


@pytest.mark.usefixtures("quick")
def test_two_writers_are_refused(path: str) -> None:
    with Lease(path) as own:
        with pytest.raises(CheckpointError, match=r"another fit \(process \d+ on .*, since 20"):
            Lease(path).__enter__()
        own.check()
    with Lease(path), Lease(f"{path}2"):  # after an end, and of another store
        pass
    file_system, root = files(path)
    assert not [name for name in file_system.ls(root.rpartition("/")[0]) if "lock" in str(name)]


@pytest.mark.usefixtures("quick")
def test_a_lease_ends_with_an_error(path: str) -> None:
    with pytest.raises(KeyboardInterrupt), Lease(path):
        raise KeyboardInterrupt
    with Lease(path):
        pass


def hold(path: Path, **changes: Any) -> Holder:
    """Write the lease of another process."""
    holder = replace(Holder.of_this_process(10.0), **changes)
    path.with_name(f"{path.name}.lock").write_bytes(msgspec.json.encode(holder))
    return holder


@pytest.mark.usefixtures("quick")
def test_the_lease_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "map.zarr"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).create_time()
        hold(path, pid=process.pid, started=started)
        with pytest.raises(CheckpointError, match=f"process {process.pid} on "):
            Lease(path).__enter__()
        hold(path, pid=process.pid, started=started - 100)  # an earlier process with this number
        with Lease(path):
            pass
        hold(path, pid=process.pid, started=started)
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        begun = time.monotonic()
        with Lease(path):
            assert time.monotonic() - begun < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_a_lease_on_another_machine_ends_without_renewal(tmp_path: Path) -> None:
    path = tmp_path / "map.zarr"
    holder = hold(path, machine="elsewhere", host="node7", period=0.2)

    def renew() -> None:
        time.sleep(0.1)
        hold(path, **{**vars(holder), "n_renewals": 1})

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(CheckpointError, match="node7"):
        Lease(path).__enter__()
    thread.join()
    begun = time.monotonic()
    with Lease(path):
        assert time.monotonic() - begun >= 0.6


@pytest.mark.usefixtures("quick")
def test_a_lease_that_was_being_written_when_its_process_was_killed(tmp_path: Path) -> None:
    (tmp_path / "map.zarr.lock").write_bytes(b'{"token"')
    with Lease(tmp_path / "map.zarr"):
        pass


def test_one_of_several_processes_gets_the_lease_of_a_killed_one(
    tmp_path: Path,
) -> None:
    hold(tmp_path / "map.zarr", pid=2**22 + 1)
    refused, held = [], []
    everyone = threading.Barrier(4, timeout=10)

    def compete() -> None:
        try:
            with Lease(tmp_path / "map.zarr"):
                held.append(1)
                everyone.wait()
        except CheckpointError as error:
            refused.append(error)
            everyone.wait()

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)


def test_a_lease_is_renewed_and_a_lost_one_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "map.zarr"
    lock = tmp_path / "map.zarr.lock"

    def eventually(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def is_lost() -> bool:
        try:
            own.check()
        except CheckpointError as error:
            return "node7" in str(error)
        return False

    with Lease(path, period=0.02) as own:
        eventually(lambda: json.loads(lock.read_bytes())["n_renewals"] > 2)
        lock.unlink()
        lock.mkdir()  # as of a file system that does not answer
        time.sleep(0.1)
        own.check()
        lock.rmdir()
        eventually(lock.exists)
        other = hold(path, token="other", host="node7")
        eventually(lambda: is_lost() or hold(path, **vars(other)) is None)
    assert json.loads(lock.read_bytes())["token"] == "other"


@pytest.mark.usefixtures("quick")
def test_a_bucket_that_exists_is_not_created(monkeypatch: pytest.MonkeyPatch) -> None:
    file_system = fsspec.filesystem("memory")
    file_system.makedirs("/bucket", exist_ok=True)

    def makedirs(self: Any, path: str, exist_ok: bool = False) -> None:
        raise PermissionError("this user must not create buckets")

    monkeypatch.setattr(type(file_system), "makedirs", makedirs)
    with Lease("memory://bucket/map.zarr"):
        assert file_system.exists("/bucket/map.zarr.lock")


@pytest.mark.usefixtures("quick")
def test_a_file_system_without_exclusive_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    file_system = fsspec.filesystem("memory")
    original = type(file_system).pipe_file

    def pipe_file(self: Any, path: str, value: bytes) -> None:  # as of fsspec before 2024.10
        original(self, path, value)

    monkeypatch.setattr(type(file_system), "pipe_file", pipe_file)
    with Lease("memory://bare/map.zarr"), pytest.raises(CheckpointError):
        Lease("memory://bare/map.zarr").__enter__()
    assert not file_system.exists("/bare/map.zarr.lock")
    assert not lease._active


def test_a_worker_that_does_not_see_the_store(tmp_path: Path, small: xr.Dataset) -> None:
    own = MapStore.create_or_open(tmp_path / "maps.zarr", TILES, small, FINGERPRINT)
    elsewhere = replace(own, path=str(tmp_path / "unmounted" / "maps.zarr"))
    with pytest.raises(CheckpointError, match=r"does not exist on .*, where a task writes"):
        elsewhere.write((0, 0), {})
    assert not (tmp_path / "unmounted").exists()


def test_a_task_of_an_earlier_call_cannot_write_to_the_next_store(
    tmp_path: Path, small: xr.Dataset
) -> None:
    path = tmp_path / "maps.zarr"
    earlier = MapStore.create_or_open(path, TILES, small, FINGERPRINT)
    arrays = {name: variable.values[:2, :3] for name, variable in small.data_vars.items()}
    earlier.write((0, 0), arrays)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        earlier.write((0, 1), arrays)
    assert not path.exists()
    later = MapStore.create_or_open(path, TILES, small, FINGERPRINT)
    with pytest.raises(CheckpointError, match="was replaced while it was written to"):
        earlier.write((0, 1), arrays)
    assert not later.finished()


@pytest.mark.parametrize("url", ["s3://bucket", "memory://", "memory:///"])
def test_a_bucket_is_no_store(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "url_to_fs", lambda path: (None, path.partition("://")[2]))
    with pytest.raises(ValueError, match=r"is a bucket\. Pass a path in it"):
        open_parent(url)


@pytest.mark.usefixtures("quick")
def test_the_lock_of_a_store_at_the_root_of_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Lease("memory://root.zarr"):
        assert fsspec.filesystem("memory").exists("/root.zarr.lock")
        with pytest.raises(CheckpointError, match="is being written by another fit"):
            Lease("memory://root.zarr").__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("scale_factor", 2.0), ("units", "days since 2000-01-01"), ("_FillValue", 3.0)],
)
def test_attributes_that_xarray_would_decode(
    attribute: str, value: Any, tmp_path: Path, small: xr.Dataset
) -> None:
    small = small.assign_coords(q=("lat", np.arange(float(small.sizes["lat"]))))
    small.q.attrs[attribute] = value
    with pytest.raises(DataError, match=f"The coordinate 'q' .* attribute '{attribute}', by which"):
        MapStore.create_or_open(tmp_path / "maps.zarr", TILES, small, FINGERPRINT)
    assert not (tmp_path / "maps.zarr").exists()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_summaries_notice_an_offset_to_large_values(dtype: str) -> None:
    y = (1e6 if dtype == "float32" else 1e10) + np.random.default_rng(0).random(1000)
    assert summary(y.astype(dtype)) != summary((y + 1).astype(dtype))
