"""Saving and loading of results; a file holds data and a checksum, but no model and no code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from nlsq_dask._version import version_of
from nlsq_dask.errors import ModelError, RecordError, ResultFileError, warn_caller
from nlsq_dask.model.model import Mode, Model
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.model.program import TRACED_BY
from nlsq_dask.rows.rows import Layout
from nlsq_dask.storage import codec
from nlsq_dask.storage.backends import normalize_path, open_folder
from nlsq_dask.storage.envelope import seal, unseal

if TYPE_CHECKING:
    from nlsq_dask.results.result import FitResult

_KIND = "result"
_MAX_TEXT = 2**26  # characters in an array of text
_TOLERANCE = 1e-5  # relative difference of values of one model, which may be in float32


class MissingModel:
    """Placeholder for the model of a result that was loaded without its model.

    Parameters
    ----------
    name : str
        Name of the model.
    fingerprint : str
        Hash of the operations that the model computes.
    versions : dict of str to str
        Versions of the packages that determine the fingerprint.
    """

    def __init__(self, name: str, fingerprint: str, versions: Mapping[str, str]) -> None:
        self.__name__ = name
        self.fingerprint = fingerprint
        self.versions = dict(versions)

    def __call__(self, *args: Any) -> NoReturn:
        """Raise a ValueError that says how to load the model."""
        raise ValueError(
            f"this result was loaded without its model {self.__name__!r}. Load it with "
            f"FitResult.load(path, model=...)."
        )


def save(result: FitResult, path: str | os.PathLike[str]) -> None:
    """Write a result to a file; see ``FitResult.save``."""
    values = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "_model"}
    model = result._model
    function = (
        model.function if isinstance(model.function, MissingModel) else _describe_model(model)
    )
    record = {
        "values": values,
        "model": {
            "name": function.__name__,
            "fingerprint": function.fingerprint,
            "versions": function.versions,
            "n_params": model.n_params,
            "dtype": model.dtype,
            "mode": None if model.mode is None else model.mode.value,
            "layout": asdict(model.layout),
        },
    }
    folder, name = _split(path)
    _check_target(path)
    try:
        open_folder(folder).write(name, seal(_KIND, codec.encode(_tag(record))))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{os.fspath(path)!r} cannot be written: the folder {folder!r} does not exist."
        ) from error


def load(
    kind: type[FitResult], path: str | os.PathLike[str], model: Callable[..., Any] | None
) -> FitResult:
    """Read a result from a file; see ``FitResult.load``. ``kind`` is the class ``FitResult``."""
    folder, name = _split(path)
    try:
        record = _untag(codec.decode(unseal(_KIND, open_folder(folder).read(name)), Any))
        info = record["model"]
        function = MissingModel(info["name"], info["fingerprint"], info["versions"])
        layout = Layout(**info["layout"])
        mode = info.get("mode")  # older files have none
        saved_model = Model(
            function, info["n_params"], layout, info["dtype"], None if mode is None else Mode(mode)
        )
        values = record["values"]
        fixed = values.get("_fixed", ())  # older files have none
        saved_model = saved_model.with_fixed(values["param_names"], values["x"], fixed)
        result = kind(**values, _model=saved_model)
    except RecordError as error:
        raise ResultFileError(f"{os.fspath(path)!r} cannot be used: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
        # The file is intact, but its content is not a result.
        raise ResultFileError(
            f"{os.fspath(path)!r} cannot be used: it does not contain a valid result."
        ) from error
    return result if model is None else _with_model(result, function, model)


def _with_model(result: FitResult, missing: MissingModel, model: Callable[..., Any]) -> FitResult:
    """Return the result with ``model``; raise a ValueError if it is not the fitted model."""
    candidate = replace(result._model, function=model)
    advice = "Omit the argument model to load the result without its model."
    try:
        described = _describe_model(candidate)
    except (ModelError, TypeError) as error:  # raised by the function when it is called
        raise ValueError(
            f"model={candidate.name} cannot be the model of this result, {missing.__name__!r}: "
            f"{error}. {advice}"
        ) from error
    if described.versions == missing.versions:
        is_same = described.fingerprint == missing.fingerprint
    else:  # other versions may trace the same model to another text
        is_same = _reproduces_sample(replace(result, _model=candidate))
    if not is_same:
        raise ValueError(
            f"model={described.__name__} differs from {missing.__name__!r}, the model of this "
            f"result. {advice}"
        )
    return replace(result, _model=candidate)


def _reproduces_sample(result: FitResult) -> bool:
    """Return whether the model of the result gives the fitted values in ``FitResult.sample``."""
    if result.sample is None:
        warn_caller(
            "The model is used without a check that it is the fitted one: this result holds no "
            "rows to compare, and was saved with other versions of the libraries."
        )
        return True
    x_arrays = [v for v in result.sample.variables.values() if "position" in v.attrs]
    leaves = [v.to_numpy() for v in sorted(x_arrays, key=lambda v: v.attrs["position"])]
    values = result.predict(result._model.layout.assemble(leaves))
    fitted = result.sample["fitted"].to_numpy()
    size = float(np.abs(fitted).max(initial=0.0))
    return bool(np.allclose(values, fitted, rtol=_TOLERANCE, atol=_TOLERANCE * size))


def _describe_model(model: Model) -> MissingModel:
    """Return what is saved of a model: name, fingerprint and versions."""
    kernel = PredictionKernel.trace(model)
    versions = {package: version_of(package) for package in TRACED_BY}
    return MissingModel(model.name, kernel.program.fingerprint, versions)


def _check_target(path: str | os.PathLike[str]) -> None:
    """Raise an OSError if the path is a folder or another thing that is not a regular file."""
    where = Path(normalize_path(path))
    if not os.fspath(path) or where.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder. Add the name of a file.")
    if where.exists() and not where.is_file():
        raise FileExistsError(f"{os.fspath(path)!r} is not a regular file and is not replaced.")


def _split(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the folder and the file name of a path or URL."""
    text = normalize_path(path)
    if "://" not in text:  # write the target of a link, not the link
        text = os.path.realpath(text)
    folder, slash, name = text.rpartition("/")
    return folder or slash, name


def _tag(value: Any) -> Any:
    """Convert containers to lists that begin with the type, such as ``["tuple", 1, 2]``."""
    match value:
        case dict():
            return ["dict", *([_tag(key), _tag(entry)] for key, entry in value.items())]
        case list() | tuple():
            return [type(value).__name__, *map(_tag, value)]
        case xr.Dataset():
            variables = {
                name: (variable.dims, variable.to_numpy(), variable.attrs)
                for name, variable in value.variables.items()
            }
            return ["Dataset", *map(_tag, (variables, list(value.coords), value.attrs))]
        case np.ndarray() if value.dtype.kind == "U":
            return ["text", _tag(value.tolist())]
    return value


def _text_array(words: list[str]) -> NDArray[np.str_]:
    """Return an array of text; raise a ValueError if it would be very large.

    Each word takes the memory of the longest one, so a damaged file could ask for any size.
    """
    longest = max(map(len, words), default=0)
    if len(words) * longest > _MAX_TEXT:
        raise ValueError(
            f"an array of {len(words):,} words of up to {longest:,} characters is too large"
        )
    return np.array(words, dtype=str)


def _untag(value: Any) -> Any:
    """Convert lists made by ``_tag`` to the original containers."""
    if not isinstance(value, list):
        return value
    kind, *parts = value
    match kind:
        case "dict":
            return {_untag(key): _untag(entry) for key, entry in parts}
        case "list":
            return list(map(_untag, parts))
        case "tuple":
            return tuple(map(_untag, parts))
        case "text":
            return _text_array(_untag(parts[0]))
        case "Dataset":
            variables, coords, attrs = map(_untag, parts)
            named = {name: xr.Variable(*variable) for name, variable in variables.items()}
            return xr.Dataset(
                {name: variable for name, variable in named.items() if name not in coords},
                {name: named[name] for name in coords},
                attrs,
            )
    raise ValueError(f"unknown kind {kind!r}")
