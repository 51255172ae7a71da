"""Conversion of pandas columns to NumPy arrays, with NaN for missing values.

pandas is not imported here: a caller who passes its objects has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from nlsq_dask.errors import DataError


def pandas_to_numpy(given: Sequence[tuple[str, Any]]) -> list[Any]:
    """Return the values of all arguments, with pandas objects converted to NumPy arrays.

    Parameters
    ----------
    given : sequence of (name, value)
        Name in messages, and array, of each argument.

    Raises
    ------
    DataError
        If the indexes of two arguments differ, if a DataFrame is given where one column is
        expected, or if an argument is a Dask dataframe, whose length is unknown.
    """
    for name, value in given:
        if hasattr(value, "to_dask_array"):
            raise DataError(
                f"{name} is a Dask {type(value).__name__}. Pass its values as an array with known "
                f"chunks: {name}.to_dask_array(lengths=True)."
            )
    pd: Any = sys.modules.get("pandas")
    if pd is None:
        return [value for _, value in given]
    labelled = [(n, v) for n, v in given if isinstance(v, pd.Series | pd.DataFrame)]
    for name, value in labelled[1:]:
        first_name, first = labelled[0]
        if not value.index.equals(first.index):
            raise DataError(
                f"The index of {name} ({len(value)} labels) differs from the index of {first_name} "
                f"({len(first)} labels). Select the common rows of both with "
                f".loc[a.index.intersection(b.index)], or pass .to_numpy() of both to match rows "
                f"by position."
            )
    return [_values(pd, value, name) for name, value in given]


def _values(pd: Any, value: Any, name: str) -> Any:
    if isinstance(value, pd.DataFrame):
        return _table(pd, value, name)
    is_column = isinstance(value, pd.Series | pd.Index | pd.api.extensions.ExtensionArray)
    return _column(pd, value) if is_column else value


def _table(pd: Any, frame: Any, name: str) -> Any:
    columns = list(map(str, frame.columns))
    if name in ("y_data", "sigma"):
        raise DataError(
            f"{name} is a DataFrame with the columns {', '.join(columns)}; pass one of them, such "
            f"as frame[{columns[0] if columns else 'name'!r}]."
        )
    if not columns:
        raise DataError(f"{name} is a DataFrame without columns.")
    arrays = [_column(pd, frame.iloc[:, i]) for i in range(len(columns))]
    kinds = {array.dtype.kind for array in arrays}
    if kinds & set("mMO") and len(kinds) > 1:
        raise DataError(
            f"{name} is a DataFrame with columns of the dtypes "
            f"{', '.join(f'{c}: {a.dtype}' for c, a in zip(columns, arrays, strict=True))}, which "
            f"have no common dtype. Pass the columns as a dict: {{c: frame[c] for c in frame}}."
        )
    return np.stack(arrays, axis=1)


def _column(pd: Any, values: Any) -> Any:
    dtype = values.dtype
    if isinstance(dtype, pd.DatetimeTZDtype):
        return pd.Index(values).tz_convert("UTC").tz_localize(None).to_numpy()
    if isinstance(dtype, np.dtype) or getattr(dtype, "kind", "O") not in "biuf":
        return values.to_numpy()
    # A nullable dtype: missing values become NaN; integers stay integers if none is missing.
    if values.isna().any():
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    return values.to_numpy(dtype=getattr(dtype, "numpy_dtype", np.float64))
