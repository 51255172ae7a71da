"""``FitFingerprint``: model, data and options of a fit, which must be equal to resume it."""

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
    """Texts that describe what a fit computes; they are compared when the fit is resumed."""

    model: str  # digest of the model as JAX compiles it
    data: dict[str, str]  # shape, dtype and chunks of arrays, with metadata of Zarr arrays
    arguments: dict[str, str]  # start, bounds, loss, ...
    options: dict[str, str]  # options that change the result
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
        arguments : mapping of str to value
            Arguments of the fit that change its result, such as p0 and bounds.
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
        """Compare this fingerprint, of a checkpoint, with that of the fit that resumes it, ``now``.

        Returns
        -------
        list of str
            A text for each package whose version differs, which does not prevent resuming.

        Raises
        ------
        CheckpointError
            If model, data, arguments or options differ.
        """
        # Options and arguments newer than the checkpoint had their defaults when it was written.
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
                f"The checkpoint is of a different fit: {'; '.join(differences)}. Pass the same "
                f"values as before, or omit resume_from_checkpoint to start a new fit."
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
    """Return a value as text, which is equal for a list, tuple and array of equal elements."""
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
