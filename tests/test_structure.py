"""The layers of docs/design.md, checked by reading the imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nlsq_dask

PACKAGE = Path(__file__).parents[1] / "nlsq_dask"

# The rooms of the package, floor by floor: imports go down, never up and never sideways.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "events", "status", "_keywords", "_figures", "_html", "_text", "_version"),
    ("config", "rows", "storage"),
    ("data", "model"),
    ("kernels",),
    ("engine", "solvers"),
    ("warmup", "checkpoints"),
    ("fit", "observers"),
    ("results", "plan", "maps"),
    ("optimizer", "scipy_call"),
    ("curve_fit", "curvefit"),
    ("accessor",),
)
# The rooms that import a library which is not for every room.
USERS = {
    "jax": {"kernels", "model", "rows", "scipy_call", "solvers", "warmup"},
    "optax": {"warmup"},
    "dask": {"data", "engine", "maps", "plan", "results"},
    "distributed": {"engine", "observers"},
    "zarr": {"data", "engine", "maps"},
    "xarray": {"accessor", "curvefit", "data", "maps", "observers", "optimizer", "results"},
}
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
PURE = ("rows", "model", "kernels", "solvers", "warmup")
IMPURE = {"time", "logging", "os", "pathlib", "dask", "distributed", "config"}


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)}


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def rooms() -> list[tuple[str, Path]]:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda v: getattr(v, "stem", v))
def test_imports_go_down(room: str, path: Path) -> None:
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "nlsq_dask":
            other = rest.split(".")[0]
            assert other == room or FLOOR_OF[other] < FLOOR_OF[room], name
        else:
            assert room in USERS.get(top, {room}), name


def test_the_mathematics_knows_no_dask_files_or_clocks() -> None:
    for path in [path for room in PURE for path in (PACKAGE / room).rglob("*.py")]:
        found = {name.removeprefix("nlsq_dask.").split(".")[0] for name in imports(path)}
        assert not found & IMPURE, path


def test_optional_libraries_are_imported_where_they_are_needed() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            found = {name.split(".")[0] for name in imported(node)}
            assert not found & {"pandas", "cftime", "h5py", "matplotlib", "tqdm"}, path
            assert not found & {"bokeh", "prometheus_client"}, path


def test_what_is_sent_to_a_scheduler_needs_nothing_that_it_may_lack() -> None:
    known = {*sys.stdlib_module_names, "distributed", "tornado", "bokeh", "prometheus_client"}
    for path in (PACKAGE / "observers" / "dashboard" / "on_scheduler").glob("*.py"):
        for name in imports(path):
            if name.startswith("nlsq_dask."):
                assert name.startswith("nlsq_dask.observers.dashboard.on_scheduler."), path
            else:
                # Bokeh needs NumPy; a scheduler without Bokeh never gets to that.
                assert name.split(".")[0] in known | {"numpy"}, path


def test_print_is_for_the_progress_observer() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
        assert not calls or path.stem == "progress", path


NOT_INSTALLED = """
import importlib.metadata as metadata

installed = metadata.version

def version(name):
    if name == "nlsq-dask":
        raise metadata.PackageNotFoundError(name)
    return installed(name)

metadata.version = version

import jax.numpy as jnp
import numpy as np
import nlsq_dask as nd

print(nd.__version__)
config = nd.HybridStreamingConfig(verbose=0, checkpoint_dir="checkpoints")
x = np.linspace(0, 1, 100)
result = nd.AdaptiveHybridStreamingOptimizer(config).fit(lambda x, a: a * x, x, 2 * x)
result.save("result.nlsq")
print(nd.FitResult.load("result.nlsq").success)
"""


def test_a_source_tree_that_is_not_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [nlsq_dask.__version__, "True"], done.stderr
