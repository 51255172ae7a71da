"""A fit that was cut goes on with the same bits; what is not its checkpoint is refused."""

from __future__ import annotations

import dataclasses
import functools
import io
import pickle
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

import nlsq_dask as nd
from nlsq_dask.checkpoints.checkpoint import Checkpoint
from nlsq_dask.checkpoints.folder import CheckpointFolder, load
from nlsq_dask.checkpoints.journal import CheckpointJournal
from nlsq_dask.events import BlocksFinished, Event
from nlsq_dask.storage.codec import encode
from tests import problems, surviving_fit
from tests.problems import exponential

N = 60_000
X = np.random.default_rng(0).uniform(0, 4, N)
Y = 2.0 * np.exp(-0.7 * X) + 0.3 + 0.02 * np.random.default_rng(1).standard_normal(N)
START = [1.0, 1.0, 0.1]
OPTIONS: dict[str, Any] = {
    "sample_rows": 300,
    "warmup_iterations": 5,
    "max_warmup_iterations": 20,
    "gauss_newton_tol": 1e-12,
    "callback_frequency": 1,
    "checkpoint_frequency": 5,
    "checkpoint_interval": 0.0,
}


fit = functools.partial(
    problems.fit,
    model=exponential,
    x=da.from_array(X, chunks=9_999),
    y=da.from_array(Y, chunks=9_999),
    p0=START,
    **OPTIONS,
)


def of_dict(x: Any, a: Any, b: Any, c: Any) -> Any:
    return exponential(x["t"], a, b, c)


def twice_as_fast(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-2 * b * x) + c


def local(x: Any, *params: Any) -> Any:
    p, group = jnp.stack(params), x[:, 0].astype(int)
    return p[group] * jnp.exp(-p[-1] * x[:, 1]) + p[9 + group]


class CutError(Exception):
    pass


class Clock:
    """Replacement for the module ``time``, whose clock advances in ``sleep`` alone."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._seconds += seconds

    def monotonic(self) -> float:
        return self._seconds

    time = perf_counter = monotonic


def cut_at(iteration: int) -> Any:
    def callback(params: Any, loss: float, i: int) -> None:
        if i == iteration:
            raise CutError

    return callback


def assert_same(result: nd.FitResult, expected: nd.FitResult) -> None:
    for name in ("popt", "pcov", "perr", "grad"):
        np.testing.assert_array_equal(result[name], expected[name])
    for name in ("cost", "n_passes", "rows_read", "bytes_read", "nit", "message", "n_points"):
        assert result[name] == expected[name], name
    assert result.diagnostics["defense"] == expected.diagnostics["defense"]
    for record, other in zip(result.phase_history, expected.phase_history, strict=True):
        assert record.keys() == other.keys()


GROUPS = np.random.default_rng(2).integers(0, 9, 20_000)
TIMES = np.random.default_rng(3).random(20_000)
MANY = {
    "model": local,
    "x": da.from_array(np.column_stack([GROUPS, TIMES]), chunks=(3_000, 2)),
    "y": da.from_array(
        (1.0 + GROUPS) * np.exp(-1.5 * TIMES)
        + GROUPS
        + 0.1 * np.random.default_rng(4).standard_normal(20_000),
        chunks=3_000,
    ),
    "p0": np.ones(19),
    "cg_param_threshold": 10,
    "cg_error_probes": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qr and a sandwich": {"gauss_newton_solver": "qr", "cov_type": "HC0"},
    "multistart": {"enable_multistart": True, "n_starts": 4, "elimination_rounds": 2},
    "float32": {"precision": "float32", "gauss_newton_tol": 1e-6},
    "penalty": {
        "enable_group_variance_regularization": True,
        "group_variance_indices": [(0, 2)],
        "loss": "soft_l1",
        "f_scale": 0.1,
        "bounds": ([0, 0, 0], [9, 9, 9]),
    },
    "conjugate gradients": MANY,
}


SLOW = {"qr and a sandwich", "float32", "penalty", "conjugate gradients"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def test_a_fit_that_was_cut_ends_as_if_it_had_not_been(kind: str, tmp_path: Path) -> None:
    options = KINDS[kind]
    iterations: list[int] = []
    expected = fit(**options, callback=lambda params, loss, i: iterations.append(i))
    moments = sorted({*iterations[:: max(len(iterations) // 6, 1)], *iterations[-2:]})
    for i in moments:
        folder = tmp_path / str(i)
        with pytest.raises(CutError):
            fit(**options, callback=cut_at(i), checkpoint_dir=folder)
        resumed = fit(**options, resume_from_checkpoint=folder if any_in(folder) else None)
        assert_same(resumed, expected)


def any_in(folder: Path) -> bool:
    return any(folder.glob("*.nlsq"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a fit that was cut between two passes."""
    folder = tmp_path_factory.mktemp("saved")
    iterations: list[int] = []
    fit(callback=lambda params, loss, i: iterations.append(i))
    with pytest.raises(CutError):
        fit(callback=cut_at(iterations[-1]), checkpoint_dir=folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> nd.FitResult:
    return fit()


def test_a_finished_fit_is_remembered(tmp_path: Path, expected: nd.FitResult) -> None:
    assert_same(fit(checkpoint_dir=tmp_path), expected)
    assert 1 <= len(list(tmp_path.iterdir())) <= 3
    reads: list[int] = []

    def counted(block: np.ndarray) -> np.ndarray:
        reads.append(len(block))
        return block

    y = da.from_array(Y, chunks=9_999).map_blocks(counted, meta=np.empty(0))
    with dask.config.set(scheduler="synchronous"):
        assert_same(fit(y=y, resume_from_checkpoint=tmp_path), expected)
    assert len(reads) == 7  # those of the sample, to see whether the data are the same


def test_nothing_is_written_unless_asked_for(tmp_path: Path, saved: Path) -> None:
    fit(enable_checkpoints=False, checkpoint_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    before = sorted(saved.iterdir())
    fit(resume_from_checkpoint=saved)
    assert sorted(saved.iterdir()) == before


def test_a_file_of_any_name(tmp_path: Path, saved: Path, expected: nd.FitResult) -> None:
    shutil.copy(max(saved.iterdir()), tmp_path / "a file.bin")
    assert_same(fit(resume_from_checkpoint=tmp_path / "a file.bin"), expected)


def test_a_url(saved: Path, expected: nd.FitResult) -> None:
    url = "memory://test_a_url/checkpoints"
    assert_same(fit(checkpoint_dir=url), expected)
    assert_same(fit(resume_from_checkpoint=url), expected)


def test_how_often_is_saved(tmp_path: Path) -> None:
    def n_saved(**options: Any) -> int:
        folder = tmp_path / str(options)
        fit(checkpoint_dir=folder, **options)
        return max(int(path.stem.rpartition("-")[2]) for path in folder.iterdir())

    usual = n_saved(checkpoint_interval=1e9, checkpoint_frequency=100)
    assert n_saved(checkpoint_interval=1e9, checkpoint_frequency=5) > usual
    assert n_saved(checkpoint_interval=0.0, checkpoint_frequency=100) > usual


def test_where_the_state_is_collected_slowly_it_is_saved_less_often(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("nlsq_dask.checkpoints.journal.time", clock)
    folder = CheckpointFolder(str(tmp_path))
    start = Checkpoint.of_new_fit(load(saved)[0].fingerprint)
    journal = CheckpointJournal(start, folder, 0.01, lambda event: None)
    with journal.loop("all"):
        journal.save_state(1)
    began = clock.monotonic()
    clock.sleep(0.02)
    journal.save(began)
    journal.finish()
    clock.sleep(0.39)
    assert not journal.is_due
    clock.sleep(0.02)
    assert journal.is_due


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": twice_as_fast}, "model computes a different function"),
        ({"p0": [1.0, 1.0, 0.2]}, r"argument p0 was \[1.0, 1.0, 0.1\] and is \[1.0, 1.0, 0.2\]"),
        ({"bounds": ([0, 0, 0], [9, 9, 9])}, "argument lower bounds"),
        ({"loss": "huber"}, "argument loss was 'linear' and is 'huber'"),
        ({"nan_policy": "omit"}, "argument nan_policy"),
        ({"gauss_newton_tol": 1e-6}, "option gauss_newton_tol was 1e-12 and is 1e-06"),
        ({"random_seed": 1}, "option random_seed"),
        ({"y": da.from_array(Y, chunks=10_000)}, "data y_data was float64 .* in chunks"),
        ({"y": da.from_array(Y.astype("f4"), chunks=9_999)}, "data y_data was float64"),
        ({"sigma": 0.1 + X}, "data sigma was not given"),
        ({"y": da.from_array(Y + 1e-9, chunks=9_999)}, "data y_data was .* values"),
        ({"y": np.where(X < 3.9, Y, Y + 1.0)}, "data y_data was .* values"),
    ],
)
def test_another_fit_is_refused(changed: dict[str, Any], sentence: str, saved: Path) -> None:
    with pytest.raises(nd.CheckpointError, match=sentence):
        fit(**changed, resume_from_checkpoint=saved)


def test_other_values_behind_the_same_metadata(tmp_path: Path) -> None:
    lazy = [da.from_array(v, chunks=9_999).map_blocks(np.copy) for v in (Y, Y + 1e-9)]
    options = [zarr.create_array(tmp_path / str(i), data=v.compute()) for i, v in enumerate(lazy)]
    fit(y=options[0], checkpoint_dir=tmp_path / "checkpoints")
    with pytest.raises(nd.CheckpointError, match="belongs to other data: some rows"):
        fit(y=options[1], resume_from_checkpoint=tmp_path / "checkpoints")


def test_forms_of_one_value_are_one_value(tmp_path: Path) -> None:
    options: dict[str, Any] = {"enable_group_variance_regularization": True}
    fit(**options, group_variance_indices=[(0, 2)], checkpoint_dir=tmp_path)
    tol = np.float64(OPTIONS["gauss_newton_tol"])
    again = {"group_variance_indices": ((0, 2),), "gauss_newton_tol": tol}
    assert fit(**options, **again, resume_from_checkpoint=tmp_path).success


def test_several_arrays_in_memory_are_known_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"enable_residual_weighting": True, "residual_weights": [1.0, 2.0]}
    x = np.column_stack([np.arange(N) % 2, X])
    for resume in (None, tmp_path, tmp_path, tmp_path):  # the names of arrays are new in each fit
        result = fit(
            model=lambda x, a, b, c: exponential(x[:, 1], a, b, c),
            x=x,
            y=Y,
            sigma=1.0 + X,
            **options,
            checkpoint_dir=tmp_path,
            resume_from_checkpoint=resume,
        )
        assert result.success


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen: list[int] = []
    with pytest.raises(nd.CheckpointError, match=r"checkpoint_dir=.* is not writable"):
        fit(checkpoint_dir=tmp_path / "file", callback=lambda *args: seen.append(1))
    assert not seen


def test_a_full_disk_does_not_end_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: nd.FitResult
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        named = f"Could not write a checkpoint to checkpoint_dir={str(tmp_path)!r}: .*No space left"
        with pytest.warns(UserWarning, match=named):
            assert_same(fit(checkpoint_dir=tmp_path), expected)
    assert not list(tmp_path.iterdir())


def test_stopped_by_the_callback_and_gone_on_with(tmp_path: Path) -> None:
    whole: list[int] = []
    robust = fit(cov_type="HC1", callback=lambda params, loss, i: whole.append(i))

    def stop(params: Any, loss: float, i: int) -> None:
        if i == whole[-1]:
            raise StopIteration

    stopped = fit(cov_type="HC1", checkpoint_dir=tmp_path, callback=stop)
    assert stopped.status == -4
    resumed = fit(cov_type="HC1", resume_from_checkpoint=tmp_path)
    assert resumed.success
    np.testing.assert_allclose(resumed.popt, robust.popt, rtol=1e-9)
    np.testing.assert_allclose(resumed.pcov, robust.pcov, rtol=1e-9)


def test_zarr_metadata_are_part_of_the_data(tmp_path: Path) -> None:
    for name, level in (("one", 1), ("other", 3)):
        codec = zarr.codecs.ZstdCodec(level=level)
        array = zarr.create_array(
            tmp_path / name, shape=N, chunks=9_999, dtype="f8", compressors=codec
        )
        array[...] = Y
    one, other = (zarr.open_array(tmp_path / name, mode="r") for name in ("one", "other"))
    fit(y=one, checkpoint_dir=tmp_path / "checkpoints")
    with pytest.raises(nd.CheckpointError, match=r"data y_data was .* Zarr \w+ and is .* Zarr"):
        fit(y=other, resume_from_checkpoint=tmp_path / "checkpoints")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    moved = zarr.open_array(tmp_path / "moved", mode="r")
    assert fit(y=moved, resume_from_checkpoint=tmp_path / "checkpoints").success


@pytest.mark.parametrize("kind", ["M8[ms]", "m8[ms]"])
def test_dates_in_memory_are_part_of_the_data(kind: str, tmp_path: Path) -> None:
    """One of them differs, which is in no sample."""
    dates = np.sort((X * 86_400_000).astype(int)).astype(kind)
    y = 2.0 * np.exp(-0.7 * np.sort(X)) + 0.3
    fit(x={"t": dates}, y=y, model=of_dict, checkpoint_dir=tmp_path)
    others = dates.copy()
    others[N // 2] += 1
    with pytest.raises(nd.CheckpointError, match=r"data x_data\['t'\] was .*values .* and is .*"):
        fit(x={"t": others}, y=y, model=of_dict, resume_from_checkpoint=tmp_path)
    assert fit(x={"t": dates}, y=y, model=of_dict, resume_from_checkpoint=tmp_path).success


def test_what_does_not_change_the_fit_may_differ(saved: Path, expected: nd.FitResult) -> None:
    options = {"cache": 0, "chunk_size": 4_000, "log_frequency": 7, "max_retries_per_batch": 5}
    result = fit(**options, resume_from_checkpoint=saved)
    np.testing.assert_array_equal(result.popt, expected.popt)


def test_another_version_or_processor_is_a_note(
    tmp_path: Path, saved: Path, expected: nd.FitResult
) -> None:
    checkpoint, _ = load(saved)
    fingerprint = dataclasses.replace(
        checkpoint.fingerprint,
        model="traced to another text",
        versions={**checkpoint.fingerprint.versions, "jax": "0.0.1", "processor": "another"},
    )
    changed = dataclasses.replace(checkpoint, fingerprint=fingerprint)
    (tmp_path / "c.nlsq").write_bytes(changed.to_bytes())
    with pytest.warns(UserWarning, match="version jax was 0.0.1") as caught:
        assert_same(fit(resume_from_checkpoint=tmp_path), expected)
    assert "version processor was another" in str(caught[0].message)
    with (
        pytest.raises(nd.CheckpointError, match="belongs to another model: near p0, the costs"),
        pytest.warns(UserWarning, match="version jax"),
    ):
        fit(model=twice_as_fast, resume_from_checkpoint=tmp_path)


def test_more_iterations_than_before(tmp_path: Path) -> None:
    whole = fit(sample_rows=1, max_warmup_iterations=0)
    short = fit(
        sample_rows=1,
        max_warmup_iterations=0,
        gauss_newton_max_iterations=2,
        checkpoint_dir=tmp_path,
    )
    assert not short.success
    result = fit(sample_rows=1, max_warmup_iterations=0, resume_from_checkpoint=tmp_path)
    np.testing.assert_array_equal(result.popt, whole.popt)
    assert result.nit == whole.nit


def test_what_a_checkpoint_does_not_know_counts_as_its_default(
    saved: Path, expected: nd.FitResult, tmp_path: Path
) -> None:
    checkpoint, _ = load(saved)
    for name, field in (("random_seed", "options"), ("f_scale", "arguments")):
        del getattr(checkpoint.fingerprint, field)[name]
    older = tmp_path / "older"
    older.write_bytes(checkpoint.to_bytes())
    with pytest.raises(nd.CheckpointError, match="argument f_scale was None and is"):
        fit(resume_from_checkpoint=older)
    checkpoint.fingerprint.arguments["f_scale"] = "1.0"
    older.write_bytes(checkpoint.to_bytes())
    assert_same(fit(resume_from_checkpoint=older), expected)
    with pytest.raises(nd.CheckpointError, match="option random_seed was 0 and is 1"):
        fit(resume_from_checkpoint=older, random_seed=1)


def test_a_checkpoint_of_another_format_is_refused_by_its_version(
    saved: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    older.write_bytes(load(saved)[0].to_bytes().replace(b"version 2", b"version 1", 1))
    with pytest.raises(nd.CheckpointError, match="the file has format version 1; this version"):
        fit(resume_from_checkpoint=older)


def test_missing_paths_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; pass the path"):
        fit(resume_from_checkpoint=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fit(resume_from_checkpoint="memory://test_missing_paths/nowhere")
    with pytest.raises(nd.CheckpointError, match="no valid checkpoint in"):
        fit(resume_from_checkpoint=tmp_path)


def test_a_damaged_newest_falls_back_and_says_so(
    tmp_path: Path, saved: Path, expected: nd.FitResult
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=rf"{newest.name} is invalid: the file is damaged"):
        assert_same(fit(resume_from_checkpoint=folder), expected)
    with pytest.raises(nd.CheckpointError, match=r"damaged.*Pass its directory"):
        fit(resume_from_checkpoint=newest)


class Fires:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def damaged(data: bytes, random: np.random.Generator, trap: Path) -> bytes:
    """Return one of many things that are no checkpoint."""
    kind = random.integers(8)
    changed = bytearray(data)
    if kind == 0:
        return data[: random.integers(len(data))]
    if kind == 1:
        changed[random.integers(len(data))] ^= 1 << random.integers(8)
    elif kind == 2:
        for at in random.integers(0, len(data), 50):
            changed[at] = random.integers(256)
    elif kind == 3:
        return data.replace(b"version 1\n", b"version %d\n" % random.integers(2, 99), 1)
    elif kind == 4:
        return pickle.dumps(Fires(trap))
    elif kind == 5:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(f"../../{trap.name}", data)
        return archive.getvalue()
    elif kind == 6:
        start, end = sorted(random.integers(0, len(data), 2))
        return data[:start] + data[end + 1 :]
    else:
        return random.bytes(int(random.integers(1, 5_000)))
    return bytes(changed)


def test_fuzzed_checkpoints_are_refused(tmp_path: Path, saved: Path) -> None:
    data, random = max(saved.iterdir()).read_bytes(), np.random.default_rng(0)
    good = min(saved.iterdir())
    folder, trap = tmp_path / "folder", tmp_path / "trap"
    folder.mkdir()
    older = folder / good.name
    shutil.copy(good, older)
    newest = folder / "99999999T000000-00000000-00000001.nlsq"
    for _ in range(600):
        content = damaged(data, random, trap)
        if content == data:
            continue
        newest.write_bytes(content)
        with pytest.raises(nd.CheckpointError, match=r"damaged|not a checkpoint|version"):
            load(newest)
        found, notes = load(folder)
        assert found == Checkpoint.from_bytes(good.read_bytes())
        assert newest.name in notes[0]
    assert sorted(tmp_path.rglob("*")) == [folder, older, newest]


FORGED = [b"", encode(None), encode(-1), encode("text"), encode([[]]), encode({}), b"\xc1" * 9]


def test_forged_checkpoints_with_a_right_checksum(tmp_path: Path, saved: Path) -> None:
    checkpoint, _ = load(saved)
    path = tmp_path / "forged.nlsq"
    refused = 0
    for name in checkpoint.entries:
        others = [data for other, data in checkpoint.entries.items() if other != name]
        for data in [*FORGED, others[0], others[-1]]:
            entries = {**checkpoint.entries, name: data}
            path.write_bytes(dataclasses.replace(checkpoint, entries=entries).to_bytes())
            try:
                fit(resume_from_checkpoint=path)
            except nd.CheckpointError:
                refused += 1
    assert refused >= 5 * len(checkpoint.entries)
    for hostile in ("../../x", "/etc/x", ""):
        path.write_bytes(dataclasses.replace(checkpoint, fit=hostile).to_bytes())
        with pytest.raises(nd.CheckpointError, match="invalid name"):
            fit(resume_from_checkpoint=path, checkpoint_dir=tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == [path]


def test_max_walltime_in_the_middle_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a clock on which only reading takes time."""
    clock = Clock()
    monkeypatch.setattr(surviving_fit, "time", clock)
    monkeypatch.setattr("nlsq_dask.fit.interruption.time", clock)
    with dask.config.set(scheduler="threads", num_workers=2):
        expected = surviving_fit.fit()
        log = tmp_path / "reads.txt"
        walltime, n_resumes, resume = 0.8, 0, None
        while True:
            result = surviving_fit.fit(
                str(log),
                0.03,
                checkpoint_dir=tmp_path / "checkpoints",
                max_walltime=walltime,
                resume_from_checkpoint=resume,
            )
            if result.success:
                break
            assert result.status < 0
            assert "`max_walltime` was reached" in result.message
            assert "resume_from_checkpoint=" in result.message
            n_resumes += 1
            resume = tmp_path / "checkpoints"
            assert n_resumes < 100
    assert n_resumes >= 2
    np.testing.assert_array_equal(result.popt, expected.popt)
    np.testing.assert_array_equal(result.pcov, expected.pcov)
    assert result.rows_read == expected.rows_read
    n_reads = len(log.read_text().splitlines())
    wanted = expected.rows_read / surviving_fit.BLOCK_ROWS
    # Four blocks to compare; and of each of two threads what it computed, and had read ahead.
    assert n_reads <= wanted + (4 + 2 * 3) * n_resumes


def test_ctrl_c_says_how_to_go_on_and_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(event: Event) -> None:
        if isinstance(event, BlocksFinished) and event.blocks >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as plain:
        surviving_fit.fit(observers=[cut])
    assert not hasattr(plain.value, "__notes__")
    with pytest.raises(KeyboardInterrupt) as caught:
        surviving_fit.fit(checkpoint_dir=tmp_path, observers=[cut])
    (saved,) = tmp_path.iterdir()
    assert caught.value.__notes__ == [
        f"To resume: HybridStreamingConfig(resume_from_checkpoint={str(saved)!r})."
    ]
    assert surviving_fit.fit(resume_from_checkpoint=saved, verbose=1).success
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Resuming from {saved} (0 passes complete, pass 1 in progress) " in printed


def test_true_goes_on_if_there_is_something(tmp_path: Path) -> None:
    expected = fit()
    options = {"checkpoint_dir": tmp_path / "new", "resume_from_checkpoint": True}
    with pytest.raises(CutError):
        fit(callback=cut_at(8), **options)
    resumed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlsq_dask.checkpoints.journal.load", lambda p: resumed.append(p) or load(p))
        assert_same(fit(**options), expected)
    assert resumed
    with pytest.raises(ValueError, match=r"=True resumes from checkpoint_dir, which is None"):
        fit(resume_from_checkpoint=True)
    assert_same(fit(resume_from_checkpoint=False), expected)


def test_tries_before_a_cut_are_counted(tmp_path: Path) -> None:
    rows = surviving_fit.BLOCK_ROWS  # so that each block is a part by itself
    state = {"is solved on the sample": False, "is broken": True, "reads": 0}

    def read(x: np.ndarray) -> np.ndarray:
        if state["is solved on the sample"]:
            state["reads"] += 1
            if state["reads"] == 1:
                raise OSError("for a moment")
            if state["reads"] > 3 and state["is broken"]:
                raise OSError("broken")
        return 2.0 * np.exp(-0.7 * x) + 0.3

    def started(*_: Any) -> None:
        state["is solved on the sample"] = True

    x = da.linspace(0.0, 4.0, 4 * rows, chunks=rows)
    y = da.map_blocks(read, x, dtype=float)
    with dask.config.set(scheduler="sync"):
        options = {"x": x, "y": y, "callback": started, "checkpoint_dir": tmp_path}
        with pytest.raises(nd.BlockReadError, match="broken"):
            fit(**options, max_retries_per_batch=1)
        state["is broken"] = False
        result = fit(**options, resume_from_checkpoint=tmp_path)
    assert result.success
    assert result.diagnostics["retries"] == 1


@pytest.mark.filterwarnings("ignore::nlsq_dask.DataWarning")
def test_a_block_that_was_left_out_stays_left_out(tmp_path: Path) -> None:
    rows, n_blocks = surviving_fit.BLOCK_ROWS, 4
    x = da.linspace(0.0, 10.0, rows * n_blocks, chunks=rows)
    reads: list[int] = []

    def fit_some(dies_at: int, cut: bool = False, **options: Any) -> nd.FitResult:
        """Fit, block 3 dying at one of its reads; cut at the first iteration after that."""
        reads.clear()

        def read(x: np.ndarray, block_info: Any = None) -> np.ndarray:
            index = block_info[None]["chunk-location"][0] if block_info else 0
            reads.append(index)
            if index == 3 and reads.count(3) >= dies_at:
                raise OSError("gone")
            return surviving_fit.read_slowly(x, "", 0.0, block_info)

        def callback(params: Any, loss: float, i: int) -> None:
            if cut and reads.count(3) >= dies_at:
                raise CutError

        return fit(
            model=surviving_fit.model,
            x=x,
            y=da.map_blocks(read, x, dtype=float, meta=np.empty(0)),
            p0=surviving_fit.START,
            callback=callback,
            min_success_rate=0.5,
            max_retries_per_batch=0,
            cache=0,
            **options,
        )

    with dask.config.set(scheduler="synchronous"):
        expected = fit_some(4)
        with pytest.raises(CutError):
            fit_some(4, cut=True, checkpoint_dir=tmp_path)
        resumed = fit_some(10**9, resume_from_checkpoint=tmp_path)
    assert resumed.diagnostics["left_out"] == expected.diagnostics["left_out"] != []
    for name in ("popt", "pcov", "cost", "r_squared", "n_points", "n_passes", "message"):
        np.testing.assert_array_equal(resumed[name], expected[name])
