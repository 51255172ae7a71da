"""What saving costs: fits with checkpoints at their default settings against fits without.

    python -m benchmarks.checkpoints

On two processes, from a store on the disk, in turns. The seconds that writing takes, in a thread
while the fit continues, are those that the fit reports; the cost is at most their share. The time
of the fit as a whole is compared as well, which is less exact. Also with a checkpoint four times a
second.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common

_OFTEN = 0.25  # seconds between checkpoints


def _saving(log: Path) -> tuple[list[float], float]:
    """Return the seconds of each checkpoint, and of all passes, that a record of a fit tells."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    saved = [e["seconds"] for e in events if e["event"] == "CheckpointWritten"]
    return saved, sum(e["seconds"] for e in events if e["event"] == "PassFinished")


def measure(folder: Path, later: int) -> dict[str, Any]:
    """Fit in turns; return medians of the seconds of a fit and of a checkpoint, and shares."""
    kinds: dict[str, dict[str, Any]] = {
        "without": {},
        "default": {"checkpoint_dir": folder / "default"},
        "often": {"checkpoint_dir": folder / "often", "checkpoint_interval": _OFTEN},
    }
    fits: dict[str, list[float]] = {name: [] for name in kinds}
    shares: dict[str, list[float]] = {name: [] for name in kinds}
    checkpoints: list[float] = []
    passes: list[float] = []
    with common.on_processes():
        x, y = common.open_store(folder / "store")
        for repeat in range(1 + later):
            for name, options in kinds.items():
                log = folder / f"{name}-{repeat}.jsonl"
                began = time.perf_counter()
                _, seconds = common.fit(
                    common.exponential, x, y, common.START, cache=0, log_file=log, **options
                )
                took = time.perf_counter() - began
                if not repeat:
                    continue
                fits[name].append(took)
                passes += seconds
                saved, reading = _saving(log)
                shares[name].append(sum(saved) / reading)
                checkpoints += saved
    return {
        "seconds": {name: median(took) for name, took in fits.items()},
        "shares": {name: median(share) for name, share in shares.items()},
        "seconds of a checkpoint": median(checkpoints),
        "seconds of a pass": median(passes),
        "bytes": max(path.stat().st_size for path in (folder / "often").iterdir()),
    }


def main() -> None:
    """Measure, print and save."""
    args = common.arguments(__doc__).parse_args()
    n_rows, later = (2_000_000, 2) if args.quick else (50_000_000, 7)
    with tempfile.TemporaryDirectory() as folder:
        common.write_store(Path(folder) / "store", n_rows, 1_000_000)
        found = measure(Path(folder), later)
    shares, seconds = found["shares"], found["seconds"]
    one, reading = found["seconds of a checkpoint"], found["seconds of a pass"]
    common.Report(
        "checkpoints",
        "What saving costs",
        settings={"rows": n_rows, "later": later},
        figures=found,
        headlines=[
            (
                f"saving, of the time of a pass of {reading:.1f} s, 2 processes",
                f"{shares['default']:.1%} ({1e3 * one:.0f} ms a checkpoint)",
            )
        ],
        header=["checkpoints", "share of saving in the passes", "seconds a fit"],
        rows=[
            ["none", "0", f"{seconds['without']:.2f}"],
            [
                "at the end of a pass and every 30 s",
                f"{shares['default']:.2%}",
                f"{seconds['default']:.2f}",
            ],
            [f"every {_OFTEN:g} s", f"{shares['often']:.2%}", f"{seconds['often']:.2f}"],
        ],
    ).save(args)


if __name__ == "__main__":
    main()
