"""Every benchmark runs: what it measures is not looked at, and nothing here is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.run import LIMITS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("suite", LIMITS)
def test_a_benchmark_runs(suite: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{suite}", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|" in done.stdout or suite == "gpu"
