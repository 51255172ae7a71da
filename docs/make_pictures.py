"""Draw the pictures of the gallery, the notebooks and the README: ``make pictures``.

    python -m docs.make_pictures [NAME ...]

Each page of ``docs/gallery`` ends with a picture that its own code saves. This script runs the code
of the pages, prints what it prints, and writes the pictures beside the pages, as small PNG files.
Notebooks open with the picture of their cell with the tag "picture", in ``notebooks/pictures``. The
README shows pictures of ``docs/demo.py`` and ``docs/live_page.py``; the latter needs Chromium.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from PIL import Image, ImageOps

DOCS = Path(__file__).parent
GALLERY = DOCS / "gallery"
NOTEBOOKS = DOCS.parent / "notebooks"
OVERVIEW, LIVE_PAGE = "overview", "live_page"  # pictures of the README
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
# A page is 700 pixels wide, so a figure of 7 inches has its fonts in their size.
STYLE = {
    "figure.figsize": (7, 3),
    "font.size": 9,
    "axes.titlesize": "medium",
    "image.cmap": "viridis",
    "savefig.dpi": 200,
}
MAX_BYTES = 150_000


def run_page(page: Path, folder: Path) -> None:
    """Run the code blocks of a page in a folder, in order."""
    namespace = {"__name__": page.stem}
    with contextlib.chdir(folder), mpl.rc_context(STYLE):
        for i, block in enumerate(BLOCK.findall(page.read_text())):
            exec(compile(block, f"{page.name} block {i}", "exec"), namespace)
    plt.close("all")


def run_script(arguments: Sequence[str | Path]) -> None:
    """Run Python with these arguments at the root of the project."""
    command = [sys.executable, *arguments]
    subprocess.run(command, cwd=DOCS.parent, check=True, stdout=subprocess.DEVNULL)


def tagged_cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook with the tag "picture"."""
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if "picture" in cell["metadata"].get("tags", ())]


def run_notebook(path: Path, folder: Path) -> None:
    """Run a notebook, and write the picture of its tagged cell into a folder."""
    command = ["-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", folder, path]
    run_script(command)
    (cell,) = tagged_cells(folder / path.name)
    (data,) = (out["data"] for out in cell["outputs"] if "image/png" in out.get("data", {}))
    (folder / f"{path.stem}.png").write_bytes(base64.b64decode(data["image/png"]))


def target_of(name: str) -> Path:
    """Return the path of a picture."""
    if name in (OVERVIEW, LIVE_PAGE):
        return DOCS / f"{name}.png"
    is_notebook = (NOTEBOOKS / f"{name}.ipynb").exists()
    return (NOTEBOOKS / "pictures" if is_notebook else GALLERY) / f"{name}.png"


def draw(name: str, folder: Path) -> None:
    """Draw a picture into a folder."""
    if (NOTEBOOKS / f"{name}.ipynb").exists():
        run_notebook(NOTEBOOKS / f"{name}.ipynb", folder)
    elif name == OVERVIEW:
        run_script(["-m", "docs.demo", "--output", folder])
    elif name == LIVE_PAGE:
        run_script(["-m", "docs.live_page", folder / f"{LIVE_PAGE}.png"])
    else:
        run_page(GALLERY / f"{name}.md", folder)


def write_small(source: Path, target: Path, width: int = 1400) -> None:
    """Write a picture in 256 colors, at most ``width`` pixels wide."""
    with Image.open(source) as picture:
        image = picture.convert("RGB")
        if image.width > width:
            height = round(image.height * width / image.width)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        framed = ImageOps.expand(image, border=2, fill="#cccccc")
        framed.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    if target.stat().st_size > MAX_BYTES:
        raise ValueError(f"{target} has {target.stat().st_size:,} bytes; draw less into it")


def main() -> None:
    """Draw the pictures that were named, or all."""
    notebooks = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")) if tagged_cells(path)]
    pages = sorted(page.stem for page in GALLERY.glob("*.md"))
    names = [*pages, *notebooks, OVERVIEW, LIVE_PAGE]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    mpl.use("Agg")
    for name in parser.parse_args().names or names:
        began = time.perf_counter()
        target = target_of(name)
        with tempfile.TemporaryDirectory() as folder:
            draw(name, Path(folder))
            write_small(Path(folder) / target.name, target)
        seconds = time.perf_counter() - began
        print(f"{target.name}: {target.stat().st_size:,} bytes, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
