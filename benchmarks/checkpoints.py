"""What saving costs: fits with checkpoints at their default settings against fits without.

    python -m benchmarks.checkpoints

On two processes, from a store on the disk, in turns. Also with a checkpoint four times a second,
which shows what a single one takes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common

_OFTEN = 0.25  # seconds between checkpoints


def measure(folder: Path, later: int) -> dict[str, Any]:
    """Fit in turns; return the median seconds of a pass, and what single checkpoints took."""
    kinds: dict[str, dict[str, Any]] = {
        "without": {},
        "default": {"checkpoint_dir": folder / "default"},
        "often": {"checkpoint_dir": folder / "often", "checkpoint_interval": _OFTEN},
    }
    passes: dict[str, list[float]] = {name: [] for name in kinds}
    n_files = 0
    with common.on_processes():
        x, y = common.open_store(folder / "store")
        for repeat in range(1 + later):
            for name, options in kinds.items():
                _, seconds = common.fit(common.exponential, x, y, common.START, cache=0, **options)
                if repeat:
                    passes[name] += seconds
    for path in (folder / "often").iterdir():
        n_files = max(n_files, path.stat().st_size)
    return {name: median(seconds) for name, seconds in passes.items()} | {"bytes": n_files}


def main() -> None:
    """Measure, print and save."""
    args = common.arguments(__doc__).parse_args()
    n_rows, later = (2_000_000, 2) if args.quick else (20_000_000, 7)
    with tempfile.TemporaryDirectory() as folder:
        common.write_store(Path(folder) / "store", n_rows, 1_000_000)
        found = measure(Path(folder), later)
    default, often = (found[name] / found["without"] for name in ("default", "often"))
    common.Report(
        "checkpoints",
        "What saving costs",
        settings={"rows": n_rows, "later": later},
        figures=found,
        headlines=[("pass with checkpoints / without, 2 processes", f"{default:.3f}")],
        header=["checkpoints", "seconds a pass", "relative"],
        rows=[
            ["none", f"{found['without']:.2f}", "1"],
            ["at the end of a pass and every 30 s", f"{found['default']:.2f}", f"{default:.3f}"],
            [f"every {_OFTEN:g} s", f"{found['often']:.2f}", f"{often:.3f}"],
        ],
    ).save(args)


if __name__ == "__main__":
    main()
