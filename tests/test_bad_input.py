"""What a fit says of bad arguments and bad data: a table of all of it, word for word.

Each sentence names what was given, what is allowed and what to do. What a store cannot give, and
what only some kinds of arrays can get wrong, is in ``test_data_faults`` and ``test_input_kinds``.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

import nlsq_dask as nd
from tests import problems
from tests.problems import decay_data, exponential

N = 4_000
X, Y = decay_data(N, seed=3)
LAZY_X, LAZY_Y = (da.from_array(values, chunks=500) for values in (X, Y))
NAMED_Y = xr.DataArray(Y, coords={"t": X}, dims="t")


fit = functools.partial(problems.fit, model=exponential, x=X, y=Y)


def plan(model: Any = exponential, x: Any = X, y: Any = Y, **arguments: Any) -> nd.Plan:
    return nd.AdaptiveHybridStreamingOptimizer().plan(model, x, y, **arguments)


def changed(values: np.ndarray, positions: Any, value: float) -> np.ndarray:
    """Return a copy with other values at some positions."""
    values = values.copy()
    values[positions] = value
    return values


def lying(function: Any, dtype: str) -> da.Array:
    """Return y in chunks of which one is not what Dask is told."""

    def read(block: Any, block_id: Any = None) -> Any:
        return function(block) if block_id == (3,) else block.astype(dtype)

    return LAZY_Y.map_blocks(read, dtype=dtype, meta=np.empty(0, dtype))


def zarr_group() -> zarr.Group:
    group = zarr.create_group({})
    group.create_array("t", shape=(3,), dtype="f8")
    return group


def stored(values: np.ndarray) -> zarr.Array[Any]:
    array = zarr.create_array({}, name="here", shape=(N,), chunks=(500,), dtype="f8")
    array[:] = values
    return array


Case = tuple[dict[str, Any], type[Exception], str]
TABLE: dict[str, Case] = {
    # --- the start
    "the start: outside of the bounds": (
        dict(p0=[9, 1, 1], bounds=(0, 5)),
        ValueError,
        "p0 of parameter 'a' is 9, outside its bounds [0, 5]. Move p0 inside or widen the bounds.",
    ),
    "the start: too few values": (
        dict(p0=[1, 1]),
        ValueError,
        "p0 has 2 values, but the model takes 3 parameters (a, b, c).",
    ),
    "the start: an unknown name": (
        dict(p0={"z": 1}),
        ValueError,
        "unknown parameter names in p0: 'z'. The parameters are a, b, c.",
    ),
    "the start: NaN": (
        dict(p0=[1, np.nan, 1]),
        ValueError,
        "p0 of parameter 'b' is nan; expected a finite number.",
    ),
    "the start: complex": (
        dict(p0=[1j, 1, 1]),
        ValueError,
        "p0 must be a sequence of real numbers; got shape (3,) and dtype complex128.",
    ),
    "the start: lists in a list": (
        dict(p0=[1, [2], 3]),
        ValueError,
        "p0 must be a sequence of real numbers; got [1, [2], 3].",
    ),
    "the start: a list by name": (
        dict(p0={"a": [1, [2]]}),
        ValueError,
        "p0['a'] must be a real number; got [1, [2]].",
    ),
    "the start: None": (
        dict(p0=[1, None, 1]),
        ValueError,
        "p0 must be real numbers; got None as entry 1.",
    ),
    "the start: no number of parameters": (
        dict(model=lambda x, *p: x * p[0]),
        ValueError,
        "the model takes *params, so the number of parameters is unknown. Pass p0 as a sequence, "
        "or param_names.",
    ),
    "the start: names twice": (
        dict(param_names=["a", "a", "b"]),
        ValueError,
        "the parameter names ('a', 'a', 'b') are not all different.",
    ),
    "the start: too few names": (
        dict(param_names=["a"]),
        ValueError,
        "param_names must have 3 names, one per parameter; got 1.",
    ),
    # --- the bounds
    "the bounds: crossed": (
        dict(bounds=(1, 0)),
        ValueError,
        "the lower bound 1 of parameter 'a' must be less than its upper bound 0.",
    ),
    "the bounds: too many values": (
        dict(bounds=([0] * 4, [1] * 4)),
        ValueError,
        "the lower bounds have 4 values for 3 parameters. Pass one value for all parameters, or "
        "one per parameter.",
    ),
    "the bounds: not a pair": (
        dict(bounds=(0, 1, 2)),
        ValueError,
        "bounds must be (low, high), a pair for each of the 3 parameters, or a dict of pairs by "
        "name; got 3 entries, not all of them pairs.",
    ),
    "the bounds: an unknown name": (
        dict(bounds={"z": (0, 1)}),
        ValueError,
        "unknown parameter names in bounds: 'z'. The parameters are a, b, c.",
    ),
    "the bounds: None": (
        dict(bounds=(0, [1, None, 2])),
        ValueError,
        "upper bounds must be real numbers; got None for parameter 'b'. Write np.inf where there "
        "is no bound.",
    ),
    "the bounds: None by name": (
        dict(bounds={"c": (None, 1)}),
        ValueError,
        "lower bounds must be real numbers; got None for parameter 'c'. Write -np.inf where there "
        "is no bound.",
    ),
    "the bounds: None for all": (
        dict(bounds=(None, 1)),
        ValueError,
        "lower bounds must be real numbers; got None. Write -np.inf where there is no bound.",
    ),
    "the bounds: lists in a list": (
        dict(bounds=([0, [0], 0], 1)),
        ValueError,
        "lower bounds must be a sequence of real numbers; got [0, [0], 0].",
    ),
    # --- the model
    "the model: not callable": (
        dict(model=3),
        TypeError,
        "model must be a callable model(x, *params); got 3.",
    ),
    "the model: no parameters": (
        dict(model=lambda x: x),
        ValueError,
        "the model has no parameters to fit: expected model(x, a, b, ...).",
    ),
    "the model: NumPy": (
        dict(model=lambda x, a, b: a * np.exp(np.asarray(-b * x))),
        nd.ModelError,
        "The model '<lambda>' cannot be traced by JAX. Write it with jax.numpy instead of "
        "numpy or math (jnp.exp for np.exp and math.exp), with jax.scipy instead of scipy "
        "(jax.scipy.special for scipy.special), and without float(), int() and .item() on x or "
        "the parameters.",
    ),
    "the model: a branch": (
        dict(model=lambda x, a, b: a * x if b > 0 else x),
        nd.ModelError,
        "The model '<lambda>' cannot be traced by JAX. It uses values of x or of the "
        "parameters as conditions, as 'if', 'and', 'or', 'not', min() and max() do. Write "
        "jnp.where(x > 3, this, that) instead of 'if', & and | instead of 'and' and 'or', "
        "jnp.minimum and jnp.maximum instead of min() and max().",
    ),
    "the model: nothing returned": (
        dict(model=lambda x, a: None),
        nd.ModelError,
        "The model '<lambda>' must return an array of one value per row; it returned NoneType.",
    ),
    "the model: another shape": (
        dict(model=lambda x, a, b: jnp.stack([a * x, b * x])),
        nd.ModelError,
        "The model '<lambda>' must return one value per row: for x of shape (7,) it returned "
        "shape (2, 7), expected (7,).",
    ),
    "the model: one number": (
        dict(model=lambda x, a: a),
        nd.ModelError,
        "The model '<lambda>' must return one value per row: for x of shape (7,) it returned "
        "shape (), expected (7,).",
    ),
    "the model: complex": (
        dict(model=lambda x, a: a * x * 1j),
        nd.ModelError,
        "The model '<lambda>' must return real floating-point values; it returned complex128, "
        "which has no derivative with respect to the parameters.",
    ),
    "the model: running sum": (
        dict(model=lambda x, a: a * jnp.cumsum(x)),
        nd.ModelError,
        "The model '<lambda>' is not row-wise: its value at a row depends on other rows of "
        "the block, or on the row's position in it. Blocks have any size and order, so "
        "operations across rows (mean, max, cumsum, sort, indexing by position) are not "
        "possible. Compute such quantities beforehand and pass them as another x or as "
        "constants.",
    ),
    "the model: mean of the rows": (
        dict(model=lambda x, a, b: a * (x - x.mean()) + b),
        nd.ModelError,
        "The model '<lambda>' is not row-wise: its value at a row depends on other rows of "
        "the block, or on the row's position in it. Blocks have any size and order, so "
        "operations across rows (mean, max, cumsum, sort, indexing by position) are not "
        "possible. Compute such quantities beforehand and pass them as another x or as "
        "constants.",
    ),
    # --- further arguments
    "further arguments: nan_policy": (
        dict(nan_policy="ignore"),
        ValueError,
        "nan_policy must be 'raise' or 'omit'; got 'ignore'.",
    ),
    "further arguments: loss": (
        dict(loss="l7"),
        ValueError,
        "loss must be one of 'linear', 'soft_l1', 'huber', 'cauchy', 'arctan'; got 'l7'.",
    ),
    "further arguments: f_scale": (
        dict(loss="huber", f_scale=0),
        ValueError,
        "f_scale must be a number between 1e-140 and 1e+140; got 0.",
    ),
    "further arguments: absolute_sigma": (
        dict(absolute_sigma="yes"),
        TypeError,
        "absolute_sigma must be True or False; got 'yes'.",
    ),
    "further arguments: callback": (
        dict(callback=1),
        TypeError,
        "callback must be callable(params, loss, iteration); got 1.",
    ),
    "further arguments: verbose": (
        dict(verbose=-1),
        ValueError,
        "verbose must be an integer >= 0; got -1.",
    ),
    # --- what arrays are
    "what arrays are: lengths differ": (
        dict(x=X[:-1]),
        nd.DataError,
        "x_data has shape (3999,) and y_data has shape (4000,): they do not match. For a 1-d "
        "y_data pass x of shape (n,) or (n, k), or a tuple of arrays of shape (n,).",
    ),
    "what arrays are: chunks differ as well": (
        dict(x=LAZY_X[:-1], y=LAZY_Y),
        nd.DataError,
        "x_data has shape (3999,) and y_data has shape (4000,): they do not match (chunks "
        "((500, 500, 500, 500, 500, 500, 500, 499),) and ((500, 500, 500, 500, 500, 500, 500,"
        " 500),)). For a 1-d y_data pass x of shape (n,) or (n, k), or a tuple of "
        "arrays of shape (n,).",
    ),
    "what arrays are: features in rows": (
        dict(x=np.stack([X, X])),
        nd.DataError,
        "x_data has shape (2, 4000) and y_data has shape (4000,): they do not match. "
        "Observations are rows of x: pass a tuple of the arrays, or np.transpose(x_data).",
    ),
    "what arrays are: one number": (
        dict(y=3.0),
        nd.DataError,
        "y_data must have at least one dimension; got a single number.",
    ),
    "what arrays are: no rows": (
        dict(x=X[:0], y=Y[:0]),
        nd.DataError,
        "y_data has no rows (shape (0,)).",
    ),
    "what arrays are: no columns": (
        dict(model=lambda x, a: a * x.sum(axis=1), x=np.empty((N, 0))),
        nd.DataError,
        "x_data has no columns (shape (4000, 0)).",
    ),
    "what arrays are: no arrays": (
        dict(x=()),
        nd.DataError,
        "x_data is an empty tuple; expected at least one array.",
    ),
    "what arrays are: nothing": (
        dict(y=None),
        nd.DataError,
        "y_data is None; expected an array.",
    ),
    "what arrays are: lists of different lengths": (
        dict(x=[[1, 2], [3]], y=[1, 2]),
        nd.DataError,
        "x_data cannot be converted to an array; nested lists, for example, must have equal "
        "lengths:",
    ),
    "what arrays are: complex": (
        dict(y=Y * 1j),
        nd.DataError,
        "y_data has dtype complex128; expected real numbers. Fit real and imaginary parts as "
        "separate observations, or the absolute value.",
    ),
    "what arrays are: dates as y": (
        dict(y=np.datetime64("2000-01-01") + np.arange(N)),
        nd.DataError,
        "y_data has dtype datetime64[D]; expected real numbers. Only x may hold dates. Convert "
        "them to numbers first, such as `(y_data - y_data[0]) / np.timedelta64(1, 'D')`.",
    ),
    "what arrays are: a path": (
        dict(y="store.zarr"),
        nd.DataError,
        "y_data must be an array; got the string 'store.zarr'. Pass the array itself, such as "
        "dataset['store.zarr']. If the string is a path, open it with "
        "xarray.open_zarr(path)['name'] or zarr.open_array(path).",
    ),
    "what arrays are: a path of x": (
        dict(x="store.zarr"),
        nd.DataError,
        "x_data names the coordinate 'store.zarr', but y_data is of type ndarray. Pass an "
        "xarray.DataArray as y_data, such as xarray.open_zarr(path)['name'], or arrays as x_data.",
    ),
    "what arrays are: unknown chunks": (
        dict(x=LAZY_X[LAZY_X > 1]),
        nd.DataError,
        "x_data has unknown chunk sizes (shape (nan,), chunks ((nan, nan, nan, nan, nan, nan,"
        " nan, nan),)). Call x_data.compute_chunk_sizes() first.",
    ),
    "what arrays are: a group": (
        dict(x=zarr_group()),
        nd.DataError,
        "x_data is a Zarr group. Pass one of its arrays, such as group['t'].",
    ),
    "what arrays are: a Dataset": (
        dict(x=xr.Dataset({"t": ("row", X)})),
        nd.DataError,
        "Expected arrays; got an xarray.Dataset with the variables ['t']. Pass DataArrays, such as "
        "dataset['name'].",
    ),
    "what arrays are: no such coordinate": (
        dict(x="u", y=NAMED_Y),
        nd.DataError,
        "x_data names the coordinate 'u', but the coordinates of y_data are ['t']. Pass another "
        "variable of a Dataset as an array: dataset['u'].",
    ),
    "what arrays are: no coordinates": (
        dict(x="t", y=xr.DataArray(Y, dims="t")),
        nd.DataError,
        "x_data names 't', a dimension of y_data without a coordinate. Assign one, such as its "
        "positions: y_data.assign_coords(t=numpy.arange(4000)).",
    ),
    "what arrays are: other labels": (
        dict(x=xr.DataArray(X, coords={"t": X + 1}, dims="t"), y=NAMED_Y),
        nd.DataError,
        "The labels of x_data along 't' differ from the labels of y_data. Align both, for "
        "instance with xarray.align(..., join='inner').",
    ),
    "what arrays are: other dimensions": (
        dict(x=xr.DataArray(X, dims="s"), y=NAMED_Y),
        nd.DataError,
        "x_data has shape (1, 4000) and y_data has shape (4000,): they do not match. "
        "Dimensions are matched by name. x_data has the dimensions ('s',) and y_data has ('t',): "
        "rename the dimensions of x_data.",
    ),
    "what arrays are: a covariance as sigma": (
        dict(sigma=np.ones((N, N), np.int8)),
        nd.DataError,
        "sigma has shape (4000, 4000) and y_data (4000,): a covariance matrix of the data is "
        "not supported. Pass one standard deviation per observation, such as "
        "np.sqrt(np.diag(sigma)), which neglects correlations.",
    ),
    "what arrays are: sigma of another length": (
        dict(sigma=np.ones(5)),
        nd.DataError,
        "sigma has shape (5,) and y_data has shape (4000,): they do not match. Pass "
        "one number, or an array that broadcasts against y_data.",
    ),
    "what arrays are: the order of arguments": (
        dict(x=Y, y=("lat", "lon")),
        nd.DataError,
        "y_data must be one array; got a tuple of length 2. Only x_data may be several arrays; the "
        "order of arguments is fit(model, x_data, y_data, p0).",
    ),
    "what arrays are: sigma by name": (
        dict(sigma="error"),
        nd.DataError,
        "sigma must be an array; got the string 'error'. Pass the array itself, such as "
        "dataset['error'].",
    ),
    "what arrays are: which dimension of squares": (
        dict(x=X[:5], y=np.ones((5, 5))),
        nd.DataError,
        "x_data has shape (5,), which is ambiguous: it matches several dimensions of y_data "
        "with shape (5, 5). "
        "Pass x_data[:, None] for dimension 0 or x_data[None, :] for dimension 1.",
    ),
    "what arrays are: which dimension for sigma": (
        dict(
            x=xr.DataArray(X[:5], dims="t"),
            y=xr.DataArray(np.ones((5, 5)), dims=("t", "u")),
            sigma=X[:5],
        ),
        nd.DataError,
        "sigma has shape (5,), which is ambiguous: it matches several dimensions of y_data "
        "with shape (5, 5). "
        "Pass sigma[:, None] for dimension 0 or sigma[None, :] for dimension 1.",
    ),
    "what arrays are: the first of two dimensions": (
        dict(x=X[:5], y=np.ones((5, 4))),
        nd.DataError,
        "x_data has shape (5,) and y_data has shape (5, 4): they do not match. Pass "
        "x_data[:, None] for dimension 0 of y_data.",
    ),
    "what arrays are: the first of two dimensions, of Zarr": (
        dict(x=zarr_group()["t"], y=np.ones((3, 4))),
        nd.DataError,
        "x_data has shape (3,) and y_data has shape (3, 4): they do not match (chunks ((3,),) and "
        "((3,), (4,))). Pass x_data[:][:, None] for dimension 0 of y_data.",
    ),
    "what arrays are: a dimension of size 1": (
        dict(y=Y[:, None]),
        nd.DataError,
        "x_data has shape (4000,) and y_data has shape (4000, 1): they do not match. y_data has a "
        "dimension of size 1: pass y_data[:, 0].",
    ),
    # --- what is in them
    "what is in them: NaN in y": (
        dict(y=changed(Y, [1234, 1235, 3999], np.nan)),
        nd.NonFiniteDataError,
        "3 of 4,000 rows hold NaN or infinity in y_data, x_data or sigma; the first of them "
        "are in block (0,) of the grid (1,), beginning with y_data[1234]. Use "
        "nan_policy='omit' to omit these rows.",
    ),
    "what is in them: infinity in a chunk of x": (
        dict(x=da.from_array(changed(X, 777, np.inf), chunks=500), y=LAZY_Y),
        nd.NonFiniteDataError,
        "1 of 4,000 rows hold NaN or infinity in y_data, x_data or sigma; the first of them "
        "are in block (1,) of the grid (8,), beginning with x_data at y_data[777]. Use "
        "nan_policy='omit' to omit these rows.",
    ),
    "what is in them: NaN in a column of x": (
        dict(model=lambda x, a: a * x[:, 1], x=np.c_[X, changed(X, 9, np.nan)]),
        nd.NonFiniteDataError,
        "1 of 4,000 rows hold NaN or infinity in y_data, x_data or sigma; the first of them "
        "are in block (0,) of the grid (1,), beginning with x_data at y_data[9], column 1. "
        "Use nan_policy='omit' to omit these rows.",
    ),
    "what is in them: a chunk of NaN in a store": (
        dict(y=stored(changed(Y, slice(1500, 2000), np.nan))),
        nd.NonFiniteDataError,
        "500 of 4,000 rows hold NaN or infinity in y_data, x_data or sigma; the first of them"
        " are in block (3,) of the grid (8,), beginning with y_data[1500], in chunk c/3 of "
        "memory://.../here. Use nan_policy='omit' to omit these rows.",
    ),
    "what is in them: NaN in sigma": (
        dict(sigma=changed(np.ones(N), 0, np.nan)),
        nd.NonFiniteDataError,
        "1 of 4,000 rows hold NaN or infinity in y_data, x_data or sigma; the first of them "
        "are in block (0,) of the grid (1,), beginning with sigma at y_data[0]. Use "
        "nan_policy='omit' to omit these rows.",
    ),
    "what is in them: sigma of zero": (
        dict(sigma=changed(np.ones(N), 0, 0.0)),
        nd.DataError,
        "sigma is zero or negative at 1 of 4,000 rows; it must be positive. To omit rows, set "
        "their y_data to NaN and use nan_policy='omit'.",
    ),
    "what is in them: sigma below zero": (
        dict(sigma=-1.0),
        nd.DataError,
        "sigma is zero or negative at 4,000 of 4,000 rows; it must be positive. To omit rows,"
        " set their y_data to NaN and use nan_policy='omit'.",
    ),
    "what is in them: nothing but NaN": (
        dict(y=np.full(N, np.nan), nan_policy="omit"),
        nd.DataError,
        "none of the 4,000 rows can be used: each is masked, or holds NaN or infinity in y_data, "
        "x_data or sigma. Check these arrays and the mask one by one: an array without finite "
        "values, or an inverted mask, excludes all rows.",
    ),
    "what is in them: all masked": (
        dict(y=np.ma.masked_all(N)),
        nd.DataError,
        "none of the 4,000 rows can be used: each is masked, or holds NaN or infinity in y_data, "
        "x_data or sigma. Check these arrays and the mask one by one: an array without finite "
        "values, or an inverted mask, excludes all rows.",
    ),
    "what is in them: huge numbers": (
        dict(y=Y * 1e200),
        nd.DataError,
        "y_data divided by sigma has magnitude 3e+200; its squares cannot be summed in "
        "float64, which requires magnitudes between 1e-140 and 1e+140. Use other units.",
    ),
    "what is in them: another dtype than Dask says": (
        dict(y=lying(lambda block: block, "i8")),
        nd.DataError,
        "y_data has shape (500,) and dtype float64 in block (3,) of the grid (8,), but its Dask "
        "array declares (500,) and int64. Pass the actual shape and dtype to map_blocks or "
        "from_delayed.",
    ),
    "what is in them: integers that do not fit the dtype that Dask says": (
        dict(y=lying(lambda block: np.full(500, 40_000), "i2")),
        nd.DataError,
        "y_data has dtype int64 in block (3,) of the grid (8,), but its Dask array declares int16, "
        "which changes values: 40000 becomes -25536. Pass dtype='int64' to map_blocks or "
        "from_delayed; for an existing Dask array, use array.map_blocks(np.asarray, "
        "dtype='int64').",
    ),
    "what is in them: digits that do not fit the dtype that Dask says": (
        dict(y=lying(lambda block: 0 * block + 0.1, "f4")),
        nd.DataError,
        "y_data has dtype float64 in block (3,) of the grid (8,), but its Dask array declares "
        "float32, which changes values: 0.1 becomes 0.10000000149011612.",
    ),
    "what is in them: a mask that Dask does not know of": (
        dict(y=lying(lambda block: np.ma.masked_array(block, np.arange(500) < 9), "f8")),
        nd.DataError,
        "y_data masks 9 of 500 elements in block (3,) of the grid (8,), but its Dask array does "
        "not declare masked arrays. Pass meta=np.ma.empty(0) to map_blocks or from_delayed; for an "
        "existing Dask array, use array.map_blocks(np.ma.asarray, meta=np.ma.empty(0)).",
    ),
    "what is in them: another shape than Dask says": (
        dict(y=lying(lambda block: block[:5], "f8")),
        nd.DataError,
        "y_data has shape (5,) and dtype float64 in block (3,) of the grid (8,), but its Dask "
        "array declares (500,) and float64. Pass the actual shape and dtype to map_blocks or "
        "from_delayed.",
    ),
}


# What the values of the data or the model alone can tell, which a plan does not look at.
BY_VALUES = ("what is in them", "the model: running sum", "the model: mean of the rows")


@pytest.mark.parametrize("case", [name for name in TABLE if not name.startswith(BY_VALUES)])
def test_a_plan_says_the_same(case: str) -> None:
    given, error, sentence = TABLE[case]
    with pytest.raises(error) as caught:
        plan(**given)
    assert str(caught.value).startswith(sentence)


WITH_OPTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        dict(enable_group_variance_regularization=True, group_variance_indices=[(1, 4)]),
        {},
        "group_variance_indices has the range (1, 4), but the model has 3 parameters",
    ),
    (
        dict(normalization_strategy="bounds"),
        dict(bounds=(0, [1, 2, np.inf])),
        "strategy 'bounds' needs finite lower and upper bounds for every parameter",
    ),
    (
        dict(enable_multistart=True, center_on_p0=False),
        {},
        "center_on_p0=False draws starts around the middle of the bounds, but no parameter has",
    ),
    (
        dict(cg_param_threshold=3, cov_type="HC0"),
        {},
        "cov_type='HC0' cannot be combined with conjugate gradients, which are used for 3 ",
    ),
]


@pytest.mark.parametrize("call", ["fit", "plan"])
@pytest.mark.parametrize(("options", "given", "sentence"), WITH_OPTIONS)
def test_options_that_do_not_go_with_the_arguments(
    call: str, options: dict[str, Any], given: dict[str, Any], sentence: str
) -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer(nd.HybridStreamingConfig(verbose=0, **options))
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        getattr(optimizer, call)(exponential, X, Y, **given)


def test_numpy_numbers_and_flags_are_taken_as_pythons(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = nd.AdaptiveHybridStreamingOptimizer()
    result = optimizer.fit(exponential, X, Y, verbose=np.int64(0), absolute_sigma=np.True_)
    assert result.absolute_sigma is True
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="verbose must be an integer >= 0; got True"):
        optimizer.fit(exponential, X, Y, verbose=True)


@pytest.mark.parametrize("case", TABLE)
def test_the_sentence(case: str) -> None:
    given, error, sentence = TABLE[case]
    with pytest.raises(error) as caught:
        fit(**given)
    said = re.sub(r"memory://\d+", "memory://...", str(caught.value))
    assert said.startswith(sentence)  # what libraries have to add may follow
