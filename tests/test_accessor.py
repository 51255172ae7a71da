"""The accessor ``.nlsq``, and where lazy and eager results can be computed."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import numpy as np
import pytest
import xarray as xr
from distributed import Client

import nlsq_dask as nd
import nlsq_dask.accessor
from tests.test_curvefit import CUBE, JAX, TIGHT

START = [3.0, 2.0]
QUICK = nd.HybridStreamingConfig(verbose=0, max_warmup_iterations=0)
DS = CUBE.to_dataset().assign(error=0.02 + 0.0 * CUBE)


# The methods


def test_methods_are_those_of_the_optimizer() -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    expected = optimizer.fit_each(JAX, "t", CUBE, START, dims="t")
    xr.testing.assert_identical(CUBE.nlsq.fit_each(JAX, "t", START, dims="t"), expected)
    by_keyword = CUBE.nlsq.fit_each(model=JAX, x_data="t", p0=START, bounds=None, dims="t")
    xr.testing.assert_identical(by_keyword, expected)
    xr.testing.assert_identical(DS.nlsq.fit_each(JAX, "t", "signal", START, dims="t"), expected)
    fits = nd.curvefit(CUBE, "t", JAX)
    xr.testing.assert_identical(CUBE.nlsq.curvefit("t", JAX), fits)
    for dims in ({}, {"dims": "t"}):
        expected_plan = optimizer.plan(JAX, "t", CUBE, **dims)
        assert f"{CUBE.nlsq.plan(JAX, 't', **dims)}" == f"{expected_plan}"
        assert f"{DS.nlsq.plan(JAX, 't', 'signal', **dims)}" == f"{expected_plan}"


def test_fit_and_config() -> None:
    expected = nd.AdaptiveHybridStreamingOptimizer(QUICK).fit(JAX, "t", CUBE, START)
    for actual in (
        CUBE.nlsq.fit(JAX, "t", START, config=QUICK),
        DS.nlsq.fit(model=JAX, x_data="t", y_data="signal", p0=START, config=QUICK),
    ):
        np.testing.assert_array_equal(actual.popt, expected.popt)
    narrow = CUBE.nlsq.fit_each(
        JAX, "t", dims="t", config=nd.HybridStreamingConfig(precision="float32")
    )
    assert narrow.popt.dtype == np.float32
    limited = nd.HybridStreamingConfig(gauss_newton_max_iterations=1)
    with pytest.raises(nd.PixelFitError, match="4 iteration_limit"):
        CUBE.nlsq.curvefit("t", JAX, config=limited)


def test_names_of_variables() -> None:
    expected = CUBE.nlsq.fit_each(JAX, CUBE.age, dims="t", sigma=DS.error)
    actual = DS.nlsq.fit_each(JAX, "age", "signal", dims="t", sigma="error")
    xr.testing.assert_identical(actual, expected)
    second = lambda x, a, b: JAX(x[1], a, b)  # noqa: E731
    expected = CUBE.nlsq.fit_each(second, ["x", "t"], START, dims="t")
    for x in (("x", "t"), [DS.x, "t"]):
        actual = DS.nlsq.fit_each(second, x, "signal", START, dims="t")
        xr.testing.assert_identical(actual, expected)


def test_a_dict_of_lazy_arrays_gives_a_lazy_result() -> None:
    line = lambda x, a, b: a * x["u"] + b * x["v"]  # noqa: E731
    arrays = {"u": CUBE.t, "v": CUBE.age.chunk(t=5)}
    assert CUBE.nlsq.fit_each(line, arrays, dims="t").popt.chunks is not None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"y_data": "signals"}, "y_data='signals' is not a variable of the Dataset, which has"),
        ({"x_data": "time"}, "x_data='time' is not a variable"),
        ({"x_data": ("t", "time")}, "x_data='time' is not a variable"),
        ({"sigma": "errors"}, "sigma='errors' is not a variable"),
    ],
)
def test_unknown_names(given: dict[str, Any], text: str) -> None:
    arguments = {"model": JAX, "x_data": "t", "y_data": "signal", "dims": "t", **given}
    with pytest.raises(ValueError, match=text):
        DS.nlsq.fit_each(**arguments)


def test_unknown_keywords_get_suggestions() -> None:
    with pytest.raises(TypeError, match=r"Did you mean fit_each\(\.\.\., sigma=\.\.\.\)"):
        CUBE.nlsq.fit_each(JAX, "t", dims="t", sigam=1)
    with pytest.raises(TypeError, match=r"Did you mean fit\(\.\.\., nan_policy=\.\.\.\)"):
        CUBE.nlsq.fit(JAX, "t", nanpolicy="omit")
    with pytest.raises(TypeError, match=r"Did you mean curvefit\(\.\.\., skipna=\.\.\.\)"):
        CUBE.nlsq.curvefit("t", JAX, skip_na=True)
    with pytest.raises(TypeError, match="multiple values for argument 'y_data'"):
        CUBE.nlsq.fit_each(JAX, "t", dims="t", y_data=CUBE)
    with pytest.raises(TypeError, match=r"missing a required .*argument: 'dims'"):
        CUBE.nlsq.fit_each(JAX, "t")


@pytest.mark.parametrize("name", ["fit", "fit_each", "plan"])
def test_signatures(name: str) -> None:
    source = inspect.signature(getattr(nd.AdaptiveHybridStreamingOptimizer(), name))
    expected = [*source.parameters, "config"]
    assert [*inspect.signature(getattr(DS.nlsq, name)).parameters] == expected
    expected.remove("y_data")
    assert [*inspect.signature(getattr(CUBE.nlsq, name)).parameters] == expected
    assert getattr(CUBE.nlsq, name).__doc__


def test_signature_of_curvefit_begins_as_that_of_xarray() -> None:
    theirs = inspect.signature(CUBE.curvefit).parameters
    for obj in (CUBE, DS):
        ours = inspect.signature(obj.nlsq.curvefit).parameters
        assert [*ours] == [*theirs, "options"]
        assert all(ours[name].default == theirs[name].default for name in theirs)


def test_a_second_import_replaces_the_accessor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(nd)
        importlib.reload(nlsq_dask.accessor)
    assert CUBE.copy().nlsq.curvefit("t", JAX).sizes["x"] == 4


def test_the_accessor_of_another_package_is_replaced_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind in (xr.DataArray, xr.Dataset):
        monkeypatch.setattr(kind, "nlsq", property(lambda self: None))
    with pytest.warns(xr.core.extensions.AccessorRegistrationWarning, match="nlsq"):
        importlib.reload(nlsq_dask.accessor)


# Where results are computed

CHUNKS = {"x": 2, "t": 7}


@pytest.fixture(scope="module")
def expected() -> xr.Dataset:
    return CUBE.nlsq.curvefit("t", JAX, kwargs=TIGHT)


@pytest.fixture
def lazy() -> xr.Dataset:
    return CUBE.chunk(CHUNKS).nlsq.curvefit("t", JAX, kwargs=TIGHT)


def fit_block(block: Any) -> xr.Dataset:
    return block.nlsq.curvefit("t", JAX, kwargs=TIGHT)


def test_computed_persisted_pickled(lazy: xr.Dataset, expected: xr.Dataset, scheduler: str) -> None:
    other = CUBE.chunk(CHUNKS).nlsq.curvefit("t", JAX, bounds={"tau": (0, 9)}, kwargs=TIGHT)
    first, _ = dask.compute(lazy, other)
    persisted = lazy.persist()
    assert all(variable.chunks is not None for variable in persisted.data_vars.values())
    for each in (first, persisted, pickle.loads(pickle.dumps(lazy)), lazy):
        xr.testing.assert_identical(each.compute(), expected)


def test_written(lazy: xr.Dataset, expected: xr.Dataset, tmp_path: Path) -> None:
    lazy.to_zarr(tmp_path / "fits.zarr", zarr_format=2)
    with xr.open_zarr(tmp_path / "fits.zarr") as stored:
        xr.testing.assert_identical(stored.load(), expected)
    lazy.to_netcdf(tmp_path / "fits.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "fits.nc", engine="scipy") as stored:
        xr.testing.assert_equal(stored.load(), expected)


def test_inside_tasks(expected: xr.Dataset, scheduler: str) -> None:
    inside = dask.delayed(fit_block)(CUBE)
    xr.testing.assert_identical(inside.compute(), expected)
    blocks = CUBE.chunk(x=2)
    for template in (None, expected.chunk(x=2)):
        mapped = xr.map_blocks(fit_block, blocks, template=template)
        assert mapped.chunksizes["x"] == (2, 2)
        # Not the same bits: each block is a tile of its own.
        xr.testing.assert_allclose(mapped.compute(), expected, rtol=1e-7)
        assert mapped.curvefit_status.attrs.keys() == expected.curvefit_status.attrs.keys()


def test_data_in_the_memory_of_workers(expected: xr.Dataset, process_client: Client) -> None:
    with process_client.as_current():
        kept = CUBE.chunk(CHUNKS).persist()
        fits = kept.nlsq.curvefit("t", JAX, kwargs=TIGHT)
        xr.testing.assert_identical(process_client.compute(fits).result(), expected)
        xr.testing.assert_identical(CUBE.nlsq.curvefit("t", JAX, kwargs=TIGHT), expected)


_WITHOUT_PACKAGE = """
import pickle, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nlsq_dask", "jax", "jaxlib", "tests"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
print(len(pickle.load(sys.stdin.buffer)))
"""


def test_a_scheduler_needs_neither_the_package_nor_jax(lazy: xr.Dataset) -> None:
    graph = dict(lazy.__dask_graph__())
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PACKAGE],
        input=cloudpickle.dumps(graph),
        capture_output=True,
        check=False,
    )
    assert result.stdout.decode().strip() == str(len(graph)), result.stderr.decode()
