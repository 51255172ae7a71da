"""``Checkpoint``: the state of a fit, which is stored as one file."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from nlsq_dask.checkpoints.identity import FitFingerprint
from nlsq_dask.errors import CheckpointError, RecordError
from nlsq_dask.storage import codec
from nlsq_dask.storage.envelope import seal, unseal

_KIND = "checkpoint"
# Incremented when the meaning of a stored field changes. When a file is read, missing fields have
# their defaults, and unknown fields are ignored.
_VERSION = 2
_FIT_NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")
T = TypeVar("T")


def decode(data: bytes, kind: type[T]) -> T:
    """Decode a value of type ``kind`` in a checkpoint, or raise a CheckpointError."""
    try:
        return codec.decode(data, kind)
    except RecordError as error:
        raise CheckpointError(str(error)) from error


@dataclass(frozen=True)
class Checkpoint:
    """State of a fit, from which it can be resumed."""

    fit: str  # name, unchanged when the fit is resumed
    number: int  # from 1; 0 for the start of a fit, which is not written
    fingerprint: FitFingerprint
    phase_seconds: float  # duration of the current phase
    entries: dict[
        str, bytes
    ]  # values of steps and states of loops, encoded, by path in ``Journal``
    events: list[tuple[str, bytes]]  # of the fit so far: name of the class, encoded event

    @classmethod
    def of_new_fit(cls, fingerprint: FitFingerprint) -> Checkpoint:
        """Return the state of a fit that has not begun."""
        return cls(new_fit_name(), 0, fingerprint, phase_seconds=0.0, entries={}, events=[])

    def to_bytes(self) -> bytes:
        """Return the contents of the file of the checkpoint."""
        return seal(_KIND, codec.encode(self), _VERSION)

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Return the checkpoint, given the contents of its file.

        Raises
        ------
        CheckpointError
            If the file is not a checkpoint, has another format version, or is damaged.
        """
        try:
            body = unseal(_KIND, data, _VERSION)
        except RecordError as error:
            raise CheckpointError(str(error)) from error
        checkpoint = decode(body, cls)
        # The name becomes part of file names.
        if not _FIT_NAME.fullmatch(checkpoint.fit) or checkpoint.number < 1:
            raise CheckpointError(
                f"the file contains an invalid name of a fit, {checkpoint.fit!r}."
            )
        return checkpoint


def new_fit_name() -> str:
    """Return a unique name for a fit; sorted names are in order of time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
