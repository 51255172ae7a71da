"""Every code block of README and documentation runs, in order, and prints what is said there."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GALLERY = sorted(DOCS.glob("gallery/*.md"))
FAST = {"tides"}  # all pages of the gallery take a minute
PAGES = [
    *(ROOT / "README.md", *sorted(DOCS.glob("*.md"))),
    *(pytest.param(p, marks=[] if p.stem in FAST else pytest.mark.slow) for p in GALLERY),
]
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)
WITHOUT_CODE = {
    "api",
    "design",
    "gallery",
    "howto",
    "howto_gpu",
    "learn",
    "mathematics",
    "reference",
    "when_to_use",
}


def masked(text: str) -> list[str]:
    """Return lines without what depends on the machine."""
    text = re.sub(r"file://\S*/fading.zarr", "file:///data/fading.zarr", text)
    return [
        re.sub(r"^(Workers|Peak memory|Cache per worker|Problems  ).*", r"\1", x)
        for x in text.splitlines()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = BLOCK.findall(page.read_text())
    assert bool(blocks) != (page.stem in WITHOUT_CODE)
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for i, (block, output) in enumerate(blocks):
        exec(compile(block, f"{page.name} block {i}", "exec"), namespace)
        printed = capsys.readouterr().out
        assert masked(printed) == masked(output), f"{page.name} block {i}"
