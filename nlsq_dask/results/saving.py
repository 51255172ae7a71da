"""A result as a file: data alone, with the checksum of its contents; the model is not in it."""

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
from nlsq_dask.model.model import Model
from nlsq_dask.model.prediction import PredictionKernel
from nlsq_dask.model.program import TRACED_BY
from nlsq_dask.rows.rows import Layout
from nlsq_dask.storage import codec
from nlsq_dask.storage.envelope import seal, unseal
from nlsq_dask.storage.folders import normalized, open_folder

if TYPE_CHECKING:
    from nlsq_dask.results.result import FitResult

_KIND = "result"
_MOST_TEXT = 2**26  # characters in an array of it
_SAME = 1e-5  # relative to the largest value; a model may be in float32


class NoModel:
    """Stands for the model of a result that was loaded without it.

    Attributes
    ----------
    name : str
        Of the model.
    fingerprint : str
        Of what it computes, by ``versions`` of the packages that trace it.
    versions : dict of str to str
    """

    def __init__(self, name: str, fingerprint: str, versions: Mapping[str, str]) -> None:
        self.__name__ = name
        self.fingerprint = fingerprint
        self.versions = dict(versions)

    def __call__(self, *args: Any) -> NoReturn:
        """Say how the model can be had."""
        raise ValueError(
            f"this result was loaded without its model, {self.__name__!r}. To use that, load it "
            f"with FitResult.load(path, model=...)."
        )


def save(result: FitResult, path: str | os.PathLike[str]) -> None:
    """Write a result; see ``FitResult.save``."""
    values = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "_model"}
    model = result._model
    function = model.function if isinstance(model.function, NoModel) else _described(model)
    record = {
        "values": values,
        "model": {
            "name": function.__name__,
            "fingerprint": function.fingerprint,
            "versions": function.versions,
            "n_params": model.n_params,
            "dtype": model.dtype,
            "layout": asdict(model.layout),
        },
    }
    folder, name = _split(path)
    _check_target(path)
    try:
        open_folder(folder).write(name, seal(_KIND, codec.encode(_tagged(record))))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{os.fspath(path)!r} cannot be written: there is no folder {folder!r}."
        ) from error


def load(
    kind: type[FitResult], path: str | os.PathLike[str], model: Callable[..., Any] | None
) -> FitResult:
    """Read a result; see ``FitResult.load``."""
    folder, name = _split(path)
    try:
        record = _untagged(codec.decode(unseal(_KIND, open_folder(folder).read(name)), Any))
        about = record["model"]
        function = NoModel(about["name"], about["fingerprint"], about["versions"])
        layout = Layout(**about["layout"])
        known = Model(function, about["n_params"], layout, about["dtype"])
        result = kind(**record["values"], _model=known)
    except RecordError as error:
        raise ResultFileError(f"{os.fspath(path)!r} cannot be used: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
        # A record, but not of a result.
        raise ResultFileError(
            f"{os.fspath(path)!r} cannot be used: it does not hold what a result is made of."
        ) from error
    return result if model is None else _with_model(result, function, model)


def _with_model(result: FitResult, known: NoModel, model: Callable[..., Any]) -> FitResult:
    """Return the result with its model, or raise a ValueError if it is another one."""
    given = replace(result._model, function=model)
    advice = "Leave it out to have the result without."
    try:
        now = _described(given)
    except (ModelError, TypeError) as error:  # of the function itself, when it is called
        raise ValueError(
            f"model={given.name} cannot be that of this result, {known.__name__!r}: {error}. "
            f"{advice}"
        ) from error
    if now.versions == known.versions:
        is_same = now.fingerprint == known.fingerprint
    else:  # the same model may be traced to another text
        is_same = _agrees(replace(result, _model=given))
    if not is_same:
        raise ValueError(
            f"model={now.__name__} computes something else than {known.__name__!r}, the model of "
            f"this result. {advice}"
        )
    return replace(result, _model=given)


def _agrees(result: FitResult) -> bool:
    """Whether the model gives what was kept of its values, at some rows of the data."""
    if result.sample is None:
        warn_caller(
            "This result keeps no rows, and was saved with other versions of the libraries: "
            "whether the model is its own cannot be checked."
        )
        return True
    kept = [v for v in result.sample.variables.values() if "position" in v.attrs]
    leaves = [v.to_numpy() for v in sorted(kept, key=lambda v: v.attrs["position"])]
    values = result.predict(result._model.layout.assemble(leaves))
    fitted = result.sample["fitted"].to_numpy()
    size = float(np.abs(fitted).max(initial=0.0))
    return bool(np.allclose(values, fitted, rtol=_SAME, atol=_SAME * size))


def _described(model: Model) -> NoModel:
    kernel = PredictionKernel.trace(model)
    versions = {package: version_of(package) for package in TRACED_BY}
    return NoModel(model.name, kernel.program.fingerprint, versions)


def _check_target(path: str | os.PathLike[str]) -> None:
    """Raise an OSError if something stands at a path that a file must not take the place of."""
    where = Path(normalized(path))
    if not os.fspath(path) or where.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder; add the name of a file.")
    if where.exists() and not where.is_file():
        raise FileExistsError(f"{os.fspath(path)!r} is not a file, and will not be replaced.")


def _split(path: str | os.PathLike[str]) -> tuple[str, str]:
    text = normalized(path)
    if "://" not in text:  # what a link leads to is written, not the link
        text = os.path.realpath(text)
    folder, slash, name = text.rpartition("/")
    return folder or slash, name


def _tagged(value: Any) -> Any:
    """Return a value with all containers as lists that begin with what they are."""
    match value:
        case dict():
            return ["dict", *([_tagged(key), _tagged(entry)] for key, entry in value.items())]
        case list() | tuple():
            return [type(value).__name__, *map(_tagged, value)]
        case xr.Dataset():
            variables = {
                name: (variable.dims, variable.to_numpy(), variable.attrs)
                for name, variable in value.variables.items()
            }
            return [
                "Dataset",
                _tagged(variables),
                _tagged(list(value.coords)),
                _tagged(value.attrs),
            ]
        case np.ndarray() if value.dtype.kind == "U":
            return ["text", _tagged(value.tolist())]
    return value


def _text(words: list[str]) -> NDArray[np.str_]:
    """Return an array of text, in which each word takes as much memory as the longest."""
    longest = max(map(len, words), default=0)
    if len(words) * longest > _MOST_TEXT:
        raise ValueError(f"{len(words):,} words of up to {longest:,} characters")
    return np.array(words, dtype=str)


def _untagged(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *parts = value
    match kind:
        case "dict":
            return {_untagged(key): _untagged(entry) for key, entry in parts}
        case "list":
            return list(map(_untagged, parts))
        case "tuple":
            return tuple(map(_untagged, parts))
        case "text":
            return _text(_untagged(parts[0]))
        case "Dataset":
            variables, coords, attrs = map(_untagged, parts)
            found = {name: xr.Variable(*variable) for name, variable in variables.items()}
            return xr.Dataset(
                {name: variable for name, variable in found.items() if name not in coords},
                {name: found[name] for name in coords},
                attrs,
            )
    raise ValueError(f"unknown kind {kind!r}")
