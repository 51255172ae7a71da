"""Run the whole suite and print its tables: ``make bench``.

    python -m benchmarks.run [--quick] [SUITE ...]

Every suite is a process of its own, one after another, with a limit on its time. It writes its
JSON to ``benchmarks/results/`` and prints its table; at the end the headlines of all are printed,
and everything is kept in ``results/tables.md``. ``make figures`` writes the table of the README
from the JSON. The status is 1 if a suite failed or was stopped at its limit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import common

# Seconds after which a suite is stopped: about twice what it takes on two cores.
LIMITS = {
    "kernel": 400,
    "passes": 900,
    "out_of_core": 300,
    "beyond_memory": 1800,
    "latency": 400,
    "in_memory": 300,
    "small_chunks": 400,
    "memory": 180,
    "scaling": 120,
    "scheduler": 240,
    "client": 60,
    "many_parameters": 400,
    "checkpoints": 200,
    "watching": 300,
    "maps": 900,
    "lanes": 120,
    "gpu": 300,
}


def run(suite: str, results: Path, quick: bool) -> str:
    """Run one suite, and return why it has no result, or nothing."""
    command = [sys.executable, "-m", f"benchmarks.{suite}", "--results", str(results)]
    # A process group of its own, so that its workers are stopped with it.
    process = subprocess.Popen(command + ["--quick"] * quick, start_new_session=True)
    try:
        status = process.wait(LIMITS[suite])
        return f"failed with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {LIMITS[suite]} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def summary(records: list[dict[str, Any]]) -> str:
    """Return where it was measured and the headlines of all suites, in Markdown."""
    found = records[0]["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    headlines = [line for record in records for line in record["headlines"]]
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['system']}, Python {found['python']}, "
        f"{versions}; {found['date'][:10]}. Medians of the second and later calls in a process."
        f"\n\n{common.markdown(['what', 'measured'], headlines)}\n"
    )


def details(records: list[dict[str, Any]]) -> str:
    """Return the table of each suite, in Markdown."""
    return "".join(
        f"\n## {record['title']}\n\n{common.markdown(record['header'], record['rows'])}\n"
        for record in records
    )


def main() -> int:
    """Run the suites that were named, or all."""
    parser = common.arguments(__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(LIMITS))
    args = parser.parse_args()
    unknown = set(args.suites) - set(LIMITS)
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    results = common.folder_of(args)
    began, problems, records = time.perf_counter(), [], []
    for suite in args.suites or LIMITS:
        print(f"--- {suite}", flush=True)
        file = results / f"{suite}.json"
        file.unlink(missing_ok=True)  # an old result must not pass for a new one
        took = time.perf_counter()
        if problem := run(suite, args.results, args.quick):
            problems.append(f"{suite} {problem}.")
        elif file.exists():
            records.append(json.loads(file.read_text()))
        print(f"({time.perf_counter() - took:.0f} s)\n", flush=True)
    if records:
        text = summary(records)
        (results / "tables.md").write_text(text + details(records))
        print(f"{text}\n{time.perf_counter() - began:.0f} s in all.")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
