"""Values that are used for options set to "auto"."""

from __future__ import annotations

CHUNK_SIZE = 2**20

_MIN_ROWS, _MAX_ROWS = 2**16, 2**17  # of the sample
_SHARE = 1 / 16  # of all rows
_ROWS_PER_PARAM = 32
_MAX_BYTES = 64 * 2**20


def sample_rows(n_rows: int, row_bytes: int, n_params: int) -> int:
    """Return the number of rows of the sample if the option ``sample_rows`` is "auto"."""
    n_sample = min(max(int(_SHARE * n_rows), _MIN_ROWS), _MAX_ROWS)
    n_sample = max(n_sample, _ROWS_PER_PARAM * n_params)
    return min(n_sample, max(_MAX_BYTES // row_bytes, 1))
