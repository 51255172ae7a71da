"""``make demo`` runs, says what it should and writes its pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_demo_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.demo", "--output", tmp_path],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    pictures = {"overview.png", "continent.png", "cells.png", "film.png"}
    assert pictures <= {path.name for path in tmp_path.iterdir()}
    _, *parts = done.stdout.split("\n-----")
    assert len(parts) == 4
    for text in ("/nlsq", "+/-", "converged", *pictures):
        assert text in done.stdout
