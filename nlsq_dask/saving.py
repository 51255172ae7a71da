"""A result as a file: data alone, with the checksum of its contents; the model is not in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import xarray as xr

from nlsq_dask.core.model import Model
from nlsq_dask.core.prediction import PredictionKernel
from nlsq_dask.core.rows import Layout
from nlsq_dask.errors import RecordError, ResultFileError
from nlsq_dask.storage import codec
from nlsq_dask.storage.envelope import seal, unseal
from nlsq_dask.storage.folders import normalized, open_folder

if TYPE_CHECKING:
    from nlsq_dask.result import FitResult

_KIND = "result"
_TRACING = ("nlsq-dask", "jax", "jaxlib")  # with other ones a model may be traced to another text


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
    except (LookupError, TypeError, ValueError) as error:  # a record, but not of a result
        raise ResultFileError(
            f"{os.fspath(path)!r} cannot be used: it does not hold what a result is made of."
        ) from error
    return result if model is None else _with_model(result, function, model)


def _with_model(result: FitResult, known: NoModel, model: Callable[..., Any]) -> FitResult:
    """Return the result with its model, or raise a ValueError if it is another one."""
    given = replace(result._model, function=model)
    now = _described(given)
    if now.versions == known.versions and now.fingerprint != known.fingerprint:
        raise ValueError(
            f"model={now.__name__} computes something else than {known.__name__!r}, the model of "
            f"this result. Leave it out to have the result without."
        )
    return replace(result, _model=given)


def _described(model: Model) -> NoModel:
    kernel = PredictionKernel.trace(model)
    versions = {package: version(package) for package in _TRACING}
    return NoModel(model.name, kernel.program.fingerprint, versions)


def _split(path: str | os.PathLike[str]) -> tuple[str, str]:
    folder, slash, name = normalized(path).rpartition("/")
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
            return np.array(_untagged(parts[0]), dtype=str)
        case "Dataset":
            variables, coords, attrs = map(_untagged, parts)
            found = {name: xr.Variable(*variable) for name, variable in variables.items()}
            return xr.Dataset(
                {name: variable for name, variable in found.items() if name not in coords},
                {name: found[name] for name in coords},
                attrs,
            )
    raise ValueError(f"unknown kind {kind!r}")
