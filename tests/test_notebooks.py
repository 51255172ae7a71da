"""Every notebook runs from a clean kernel, and is kept without outputs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
FAST = {"quick_start"}


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_picture_opens_it(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0]
    (picture,) = re.findall(r"!\[[^]]+\]\((.+)\)", first.source)
    assert (path.parent / picture).is_file()


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.stem in FAST else pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
@pytest.mark.timeout(600)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    """In a process of its own; the notebooks assert what they say."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook"),
            # A file: what a process started by the notebook prints goes to standard output.
            *("--output-dir", tmp_path, path),
        ],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(path.parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3_000:]
    cells = nbformat.read(tmp_path / path.name, as_version=4).cells
    assert any(cell.get("outputs") for cell in cells)
