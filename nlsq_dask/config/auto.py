"""Values that are used for options set to "auto"."""

from __future__ import annotations

CHUNK_SIZE = 2**20

_MIN_ROWS, _MAX_ROWS = 2**16, 2**17  # of the sample
_SHARE = 1 / 16  # of all rows
_ROWS_PER_PARAM = 32
_MAX_BYTES = 64 * 2**20
# Of the rows that the first pass returns:
_FORECAST_SHARE, _MAX_FORECAST_ROWS = 1 / 64, 2**20


def sample_rows(n_rows: int, row_bytes: int, n_params: int) -> int:
    """Return the number of rows of the sample if the option ``sample_rows`` is "auto"."""
    n_sample = min(max(int(_SHARE * n_rows), _MIN_ROWS), _MAX_ROWS)
    n_sample = max(n_sample, _ROWS_PER_PARAM * n_params)
    return min(n_sample, max(_MAX_BYTES // row_bytes, 1))


def forecast_rows(n_rows: int, row_bytes: int, n_params: int) -> int:
    """Return how many rows the first pass returns, if the option ``sample_rows`` is "auto".

    They predict the step after it. More rows than in the sample that the fit begins with make the
    prediction of large data more accurate, in little time compared with the pass.
    """
    n_sample = sample_rows(n_rows, row_bytes, n_params)
    n_forecast = min(int(_FORECAST_SHARE * n_rows), _MAX_FORECAST_ROWS, _MAX_BYTES // row_bytes)
    return max(n_sample, n_forecast)
