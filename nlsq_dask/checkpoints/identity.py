"""``FitFingerprint``: model, data and options of a fit, which must be equal to resume it."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from nlsq_dask._text import join_first
from nlsq_dask._version import version_of
from nlsq_dask.config import HybridStreamingConfig
from nlsq_dask.config.validation import default_of
from nlsq_dask.data.alignment import RowBlocks
from nlsq_dask.data.fingerprints import describe_array, digest
from nlsq_dask.errors import CheckpointError
from nlsq_dask.model.program import TRACED_BY

_PACKAGES = (*TRACED_BY, "numpy", "scipy", "optax")
_MAX_DIFFERENCES = 5  # in a message
_MAX_TEXT = 200  # characters of a value in a message
_FIT_OPTIONS = tuple(o.name for o in fields(HybridStreamingConfig) if o.metadata["changes_fit"])


@dataclass(frozen=True)
class FitFingerprint:
    """Texts that describe what a fit computes; they are compared when the fit is resumed."""

    model: str  # digest of the model as JAX compiles it, and of other functions of the caller
    data: dict[str, str]  # shape, dtype and chunks of arrays, with metadata of Zarr arrays
    arguments: dict[str, str]  # start, bounds, loss, ...
    options: dict[str, str]  # options that change the result
    versions: dict[str, str]  # packages and processor
    # Summaries of the values of some blocks. Only those that two fingerprints both have are
    # compared, because a block may be unreadable at one time.
    values: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: str,
        blocks: RowBlocks,
        arguments: Mapping[str, Any],
        config: HybridStreamingConfig,
        options: Collection[str] = _FIT_OPTIONS,
    ) -> Self:
        """Compute the fingerprint of a fit.

        Parameters
        ----------
        model : str
            Fingerprint of the model; with ``guess``, both separated by a space.
        blocks : RowBlocks
        arguments : mapping of str to value
            Arguments of the fit that change its result, such as p0 and bounds.
        config : HybridStreamingConfig
        options : collection of str
            Names of the options that change the result.
        """
        named_arrays = zip(blocks.layout.array_names, blocks.arrays, strict=True)
        return cls(
            model=model,
            data={name: describe_array(array) for name, array in named_arrays},
            arguments={name: _text(value) for name, value in arguments.items()},
            options={name: _text(getattr(config, name)) for name in options},
            versions={name: version_of(name) for name in _PACKAGES} | {"processor": _processor()},
        )

    def check(
        self,
        now: Self,
        subject: str = "The checkpoint",
        remedy: str = "omit resume_from_checkpoint",
    ) -> list[str]:
        """Compare this fingerprint, of a checkpoint, with that of the fit that resumes it, ``now``.

        Parameters
        ----------
        now : FitFingerprint
        subject, remedy : str
            Words of the message: what has this fingerprint, and how to start a new fit instead.

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
        common = self.values.keys() & now.values.keys()
        then_read, now_read = ({name: d.values[name] for name in common} for d in (self, now))
        differences = [
            *_differences("argument", self.arguments, now.arguments, unknown=repr(None)),
            *_differences("option", {**options, **self.options}, {**options, **now.options}),
        ]
        traced_alike = all(self.versions.get(name) == now.versions.get(name) for name in TRACED_BY)
        if traced_alike:
            # Without guess, there is one digest; whether there is a guess is an argument.
            pairs = zip(self.model.split(), now.model.split(), strict=False)
            differences += [
                f"{what} computes a different function"
                for what, (one, other) in zip(("the model", "guess"), pairs, strict=False)
                if one != other
            ]
        differences += _differences("data", self.data, now.data)
        differences += list(_differences("values of", then_read, now_read))[:1]
        if differences:
            listed = join_first(differences, _MAX_DIFFERENCES, "; ", "differences")
            raise CheckpointError(
                f"{subject} is of a different fit: {listed}. Pass the same values "
                f"as before, or {remedy} to start a new fit."
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
            layout, found, values = other.partition(", values ")  # of an array
            if found and one.startswith(f"{layout}{found}"):
                other = f"the same with values {values}"
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
