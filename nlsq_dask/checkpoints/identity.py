"""``FitFingerprint``: model, data and options of a fit, compared when it is resumed."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from nlsq_dask._version import version_of
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.config.validation import default_of
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.fingerprints import describe_array, digest
from nlsq_dask.errors import CheckpointError
from nlsq_dask.model.program import TRACED_BY

_PACKAGES = (*TRACED_BY, "numpy", "scipy", "optax")
_MAX_TEXT = 200  # characters of a value in a message


@dataclass(frozen=True)
class FitFingerprint:
    """What a fit computes, as text by name."""

    model: str  # fingerprint of the computed function
    data: dict[str, str]  # shape, dtype and chunks of arrays, with metadata of Zarr arrays
    arguments: dict[str, str]  # start, bounds, loss, ...
    options: dict[str, str]  # those that change the result
    versions: dict[str, str]  # packages and processor

    @classmethod
    def of(
        cls,
        model: str,
        blocks: RowBlocks,
        arguments: Mapping[str, Any],
        config: HybridStreamingConfig,
    ) -> Self:
        """Compute the fingerprint of a fit.

        Parameters
        ----------
        model : str
            Fingerprint of the model.
        blocks : RowBlocks
        arguments : mapping of str to values
        config : HybridStreamingConfig
        """
        named_arrays = zip(blocks.layout.array_names, blocks.arrays, strict=True)
        return cls(
            model=model,
            data={name: describe_array(array) for name, array in named_arrays},
            arguments={name: _text(value) for name, value in arguments.items()},
            options={
                option.name: _text(getattr(config, option.name))
                for option in fields(config)
                if option.metadata["changes_fit"]
            },
            versions={name: version_of(name) for name in _PACKAGES} | {"processor": _processor()},
        )

    def check(self, now: Self) -> list[str]:
        """Compare the fingerprint of a checkpoint with that of the resumed fit.

        Returns
        -------
        list of str
            Notes on different versions.

        Raises
        ------
        CheckpointError
            If anything else differs.
        """
        # Arguments and options newer than the checkpoint have their defaults.
        options = {o.name: _text(default_of(o)) for o in fields(HybridStreamingConfig)}
        differences = [
            *_differences("data", self.data, now.data),
            *_differences("argument", self.arguments, now.arguments, unknown=repr(None)),
            *_differences("option", {**options, **self.options}, {**options, **now.options}),
        ]
        traced_alike = all(self.versions.get(name) == now.versions.get(name) for name in TRACED_BY)
        if traced_alike and self.model != now.model:
            differences.append("the model computes a different function")
        if differences:
            raise CheckpointError(
                f"the checkpoint is of a different fit: {'; '.join(differences)}. Restore these, "
                f"or omit resume_from_checkpoint to start a new fit."
            )
        return [
            f"{text}: the result may differ in its last digits"
            for text in _differences("version", self.versions, now.versions)
        ]


def _differences(
    what: str, then: Mapping[str, str], now: Mapping[str, str], unknown: str = "not given"
) -> Iterable[str]:
    for name in sorted({*then, *now}):
        one, other = then.get(name, unknown), now.get(name, unknown)
        if one != other:
            yield f"{what} {name} was {one} and is {other}"


def _text(value: Any) -> str:
    """Return a value as text, the same for a list, tuple or array."""
    if isinstance(value, str | bool | None):
        return repr(value)
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "to_numpy"):
        return _text(np.asarray(value).tolist())
    if isinstance(value, Iterable):
        text = f"[{', '.join(map(_text, value))}]"
        return text if len(text) < _MAX_TEXT else f"{text[:_MAX_TEXT]}... {digest(text)}"
    return repr(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
