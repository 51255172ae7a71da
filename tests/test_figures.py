"""The table of figures in the README is that of the results of the benchmarks."""

from __future__ import annotations

from benchmarks import readme


def test_the_table_shows_the_results() -> None:
    _, shown, _ = readme.parts(readme.README.read_text())
    assert shown == readme.table(), "run `make figures`"
