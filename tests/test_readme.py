"""Every code block of the README runs, in order, and prints what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)


def masked(text: str) -> list[str]:
    """Return lines without what depends on the machine."""
    text = re.sub(r"file://\S*/fading.zarr", "file:///data/fading.zarr", text)
    return [re.sub(r"^(workers|peak memory|cache a worker).*", r"\1", x) for x in text.splitlines()]


def test_code_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) > 10
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for i, (block, output) in enumerate(blocks):
        exec(compile(block, f"README block {i}", "exec"), namespace)
        printed = capsys.readouterr().out
        assert masked(printed) == masked(output), f"README block {i}"
