"""The table of rooms and imports in CONTRIBUTING, kept true by reading the imports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nlsq_dask"

# What a room may import of the package, and of the libraries that are not for every room.
ALLOWED: dict[str, set[str]] = {
    "keywords": set(),
    "config": {"keywords"},
    "errors": set(),
    "stopping": set(),
    "events": {"core"},
    "parameters": set(),
    "core": {"config", "core", "errors", "stopping", "jax", "optax"},
    "data": {"core", "data", "errors", "dask", "xarray", "zarr"},
    "engine": {"core", "data", "engine", "errors", "dask", "distributed", "zarr"},
    "observers": {"config", "errors", "events", "observers", "xarray"},
    "dashboard": {"core", "dashboard", "engine", "events", "observers", "distributed"},
    "interruption": {"stopping"},
    "storage": {"errors", "storage"},
    "checkpoints": {
        "checkpoints",
        "config",
        "core",
        "data",
        "errors",
        "events",
        "storage",
        "dask",
        "zarr",
    },
    "row_checks": {"core", "engine", "errors"},
    "passes": {
        "checkpoints",
        "core",
        "engine",
        "errors",
        "events",
        "interruption",
        "row_checks",
        "storage",
    },
    "sample_problem": {"config", "core", "errors"},
    "solve": {"config", "core", "errors", "stopping"},
    "outcome": {"core", "stopping"},
    "iterations": {"events", "interruption"},
    "find_starts": {
        "checkpoints",
        "config",
        "core",
        "events",
        "iterations",
        "parameters",
        "sample_problem",
    },
    "fit_context": {
        "checkpoints",
        "config",
        "core",
        "events",
        "find_starts",
        "iterations",
        "parameters",
        "passes",
        "stopping",
    },
    "dense_fit": {
        "core",
        "events",
        "fit_context",
        "iterations",
        "passes",
        "sample_problem",
        "solve",
        "stopping",
    },
    "gradient_fit": {
        "core",
        "errors",
        "events",
        "fit_context",
        "iterations",
        "passes",
        "sample_problem",
        "solve",
        "stopping",
    },
    "call": {"config", "core", "data", "errors", "iterations", "parameters"},
    "driver": {
        "call",
        "checkpoints",
        "core",
        "dense_fit",
        "engine",
        "errors",
        "events",
        "find_starts",
        "fit_context",
        "gradient_fit",
        "interruption",
        "iterations",
        "outcome",
        "passes",
        "sample_problem",
        "stopping",
    },
    "html": set(),
    "report": {"html", "result", "xarray"},
    "plotting": {"plotting", "result", "xarray"},
    "predict": {"core", "data", "errors", "dask", "xarray"},
    "plan": {"config", "core", "data", "engine", "html", "dask"},
    "saving": {"core", "errors", "result", "storage", "xarray"},
    "result": {"core", "plotting", "predict", "report", "saving", "xarray"},
    "block_statistics": {"core", "data", "xarray"},
    "row_sample": {"core", "data", "xarray"},
    "verdict": {
        "block_statistics",
        "core",
        "data",
        "errors",
        "outcome",
        "parameters",
        "result",
        "row_sample",
        "stopping",
        "xarray",
    },
    "optimizer": {
        "call",
        "checkpoints",
        "config",
        "core",
        "dashboard",
        "driver",
        "engine",
        "errors",
        "events",
        "html",
        "interruption",
        "iterations",
        "keywords",
        "observers",
        "verdict",
        "plan",
        "report",
        "result",
    },
    "curve_fit": {"config", "data", "errors", "keywords", "optimizer", "stopping", "jax"},
}
WATCHED = {"jax", "optax", "dask", "distributed", "xarray", "zarr"}
NOT_IN_CORE = {"time", "logging", "os", "pathlib", "dask", "distributed"}


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)}


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def rooms() -> list[tuple[str, Path]]:
    files = [
        path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem[0] != "_"
    ]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda v: getattr(v, "stem", v))
def test_imports_follow_the_arrows(room: str, path: Path) -> None:
    used = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "nlsq_dask":
            used.add(parts[1])
        elif parts[0] in WATCHED:
            used.add(parts[0])
    assert used <= ALLOWED[room], used - ALLOWED[room]


def test_the_core_knows_no_dask_files_or_clocks() -> None:
    for path in (PACKAGE / "core").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & NOT_IN_CORE, path


def test_optional_libraries_are_imported_where_they_are_needed() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            found = {name.split(".")[0] for name in imported(node)}
            assert not found & {"pandas", "cftime", "h5py", "matplotlib", "tqdm"}, path
            assert not found & {"bokeh", "prometheus_client"}, path


def test_what_is_sent_to_a_scheduler_needs_nothing_that_it_may_lack() -> None:
    known = {*sys.stdlib_module_names, "distributed", "tornado", "bokeh", "prometheus_client"}
    for path in (PACKAGE / "dashboard" / "on_scheduler").glob("*.py"):
        for name in imports(path):
            if name.startswith("nlsq_dask."):
                assert name.startswith("nlsq_dask.dashboard.on_scheduler."), path
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
