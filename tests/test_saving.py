"""A result that was saved and loaded, here or in another process, is equal in every field."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask.array as da
import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import nlsq_dask as nd
from nlsq_dask.storage.codec import encode
from nlsq_dask.storage.envelope import seal
from tests import problems
from tests.problems import NO_WARMUP, exponential, fading

N = 4_000
RNG = np.random.default_rng(0)
X = np.linspace(0.0, 4.0, N)
Y = 2.0 * np.exp(-0.7 * X) + 0.3 + 0.02 * RNG.standard_normal(N)


def other(x: Any, a: Any, b: Any, c: Any) -> Any:
    return a * jnp.exp(-b * x) - c


def polynomial(x: Any, *p: Any) -> Any:
    return sum(value * x**i for i, value in enumerate(p))


fit = functools.partial(
    problems.fit,
    model=exponential,
    x=da.from_array(X, chunks=999),
    y=Y,
    p0=[1.0, 1.0, 0.1],
    sample_rows=500,
)


def stop(params: Any, loss: float, iteration: int) -> None:
    raise StopIteration


def a_grid() -> xr.DataArray:
    t, z = np.linspace(0, 4, 40), np.linspace(-1, 1, 30)
    y = 2.0 * np.exp(-0.7 * t[:, None]) + 0.5 * z + 0.1 * RNG.standard_normal((40, 30))
    return xr.DataArray(y, {"time": t, "depth": z}, name="heat").chunk(time=20, depth=15)


KINDS: dict[str, Any] = {
    "plain": dict,
    "multistart": lambda: {"enable_multistart": True, "n_starts": 3},
    "sandwich with a loss and bounds": lambda: {
        "cov_type": "HC1",
        "loss": "huber",
        "bounds": ([0, 0, 0], [9, 9, 0.2]),
    },
    "grid": lambda: {"model": fading, "x": ("time", "depth"), "y": a_grid(), **NO_WARMUP},
    "stopped": lambda: {"callback": stop, "callback_frequency": 1},
    "without matrices": lambda: {"model": polynomial, "p0": [0.0] * 4, "cg_param_threshold": 4},
}


def assert_equal(one: Any, two: Any, where: str = "result") -> None:
    """Compare values of any kind, their types included."""
    assert type(one) is type(two) or isinstance(one, np.generic), where
    if isinstance(one, np.ndarray):
        assert one.dtype == two.dtype, where
        np.testing.assert_array_equal(one, two, where)
    elif isinstance(one, xr.Dataset):
        xr.testing.assert_identical(one, two)
        for name in one.variables:
            assert_equal(one[name].values, two[name].values, f"{where}.{name}")
    elif isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert one == two or (one != one and two != two), where


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_comes_back(kind: str, tmp_path: Path) -> None:
    result = fit(**KINDS[kind]())
    path = tmp_path / "result.nlsq"
    result.save(path)
    loaded = nd.FitResult.load(path)
    for field in fields(nd.FitResult):
        if field.name != "_model":
            assert_equal(getattr(result, field.name), getattr(loaded, field.name), field.name)
    assert loaded.fit_report() == result.fit_report()
    assert loaded._repr_html_() == result._repr_html_()
    with pytest.raises(ValueError, match=r"loaded without its model.*load\(path, model="):
        loaded.predict(X)
    assert list(tmp_path.iterdir()) == [path]


IN_ANOTHER_PROCESS = """
import sys
import numpy as np
import nlsq_dask as nd
from tests.problems import exponential
path, again, values = sys.argv[1:]
nd.FitResult.load(path).save(again)
result = nd.FitResult.load(again, model=exponential)
np.save(values, result.predict(np.linspace(0.0, 1.0, 7), return_std=True))
"""


def test_in_another_process(tmp_path: Path) -> None:
    result = fit()
    path, again, values = (tmp_path / name for name in ("one", "two.nlsq", "values.npy"))
    result.save(str(path))
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, path, again, values],
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert again.read_bytes() == path.read_bytes()
    expected = result.predict(np.linspace(0.0, 1.0, 7), return_std=True)
    np.testing.assert_array_equal(np.load(values), expected)


def test_another_model_is_refused(tmp_path: Path) -> None:
    fit().save(tmp_path / "result")
    with pytest.raises(ValueError, match="model=other differs from 'exponential'"):
        nd.FitResult.load(tmp_path / "result", model=other)
    # The same model under another name, and defined anew.
    again = nd.FitResult.load(tmp_path / "result", lambda x, a, b, c: a * jnp.exp(-b * x) + c)
    assert np.isfinite(again.predict(X)).all()


def test_what_stands_at_the_path(tmp_path: Path) -> None:
    result = fit()
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    result.save(target)
    link.symlink_to(target)
    target.write_bytes(b"")
    result.save(link)
    assert link.is_symlink()
    assert nd.FitResult.load(target).success
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is not a regular file and is not replaced"):
        result.save(pipe)
    for folder in (tmp_path, ""):
        with pytest.raises(IsADirectoryError, match=r"is a folder\. Add the name of a file"):
            result.save(folder)
    result.save(tmp_path / ("n" * 200 + "-" + "m" * 40))


def test_with_other_versions_values_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result"
    with monkeypatch.context() as patch:
        patch.setattr("nlsq_dask.results.saving.version_of", lambda package: "0.0")
        fit(**KINDS["grid"]()).save(path)
    assert nd.FitResult.load(path, fading).has_model
    with pytest.raises(ValueError, match="differs from 'fading'"):
        nd.FitResult.load(path, lambda x, a, b, c: a * jnp.exp(-b * x[0]) - c * x[1])
    for wrong in (exponential, lambda x, a: a, 5):
        with pytest.raises(ValueError, match="cannot be the model of this result, 'fading'"):
            nd.FitResult.load(path, wrong)


def test_at_a_url() -> None:
    result = fit()
    result.save("memory://results/one.nlsq")
    assert_equal(nd.FitResult.load("memory://results/one.nlsq").popt, result.popt)
    fsspec.filesystem("memory").rm("/results", recursive=True)


class Fires:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    path, trap = tmp_path / "result", tmp_path / "trap"
    fit().save(path)
    data, random = path.read_bytes(), np.random.default_rng(0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nd.FitResult.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        nd.FitResult.load(path).save(tmp_path / "no" / "result")
    wrong = [b"", data[:-3], pickle.dumps(Fires(trap)), data.replace(b"version 1", b"version 7", 1)]
    wrong += [seal("checkpoint", encode({}))]
    wrong += [seal("result", encode(value)) for value in (None, 3, "text", {}, [], ["dict", 1])]
    wrong += [seal("result", encode(["dict", ["values", ["dict"]], ["model", ["dict"]]]))]
    wrong += [seal("result", encode(["Dataset", 5, ["list"], ["dict"]]))]
    wrong += [seal("result", encode(["text", ["list", "x" * 60_000, *["y"] * 60_000]]))]
    for _ in range(100):
        changed = bytearray(data)
        changed[random.integers(len(data))] ^= 1 << random.integers(8)
        wrong.append(bytes(changed))
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(nd.ResultFileError, match=r"result' cannot be used: (it|the file)"):
            nd.FitResult.load(path)
    assert not trap.exists()
