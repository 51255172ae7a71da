"""The benchmark suite: ``make bench`` runs all of it, ``python -m benchmarks.NAME`` one part."""
