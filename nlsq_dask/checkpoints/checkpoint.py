"""``Checkpoint``: the whole state of a fit as one file.

One record, see ``storage.codec``. Nothing in it is executed when it is read.
"""

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
# Grows where a record changes its meaning. A field that an older file does not have counts as its
# default, and one that is no longer known is ignored.
_VERSION = 2
_FIT_NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")
T = TypeVar("T")


def decode(data: bytes, kind: type[T]) -> T:
    """Return a record that is part of a checkpoint, or raise a CheckpointError."""
    try:
        return codec.decode(data, kind)
    except RecordError as error:
        raise CheckpointError(str(error)) from error


@dataclass(frozen=True)
class Checkpoint:
    """The state of a fit.

    Attributes
    ----------
    fit : str
        Name of the fit, the same through all its resumes.
    number : int
        Of the checkpoint, from 1.
    fingerprint : FitFingerprint
        Of what is fitted.
    phase_seconds : float
        That the phase has taken in which it was written.
    entries : dict of str to bytes
        What steps of the fit have found, encoded, by their names.
    events : list of (str, bytes)
        What has happened, as types and encoded records.
    """

    fit: str
    number: int
    fingerprint: FitFingerprint
    phase_seconds: float
    entries: dict[str, bytes]
    events: list[tuple[str, bytes]]

    def to_bytes(self) -> bytes:
        """Return the contents of a file."""
        return seal(_KIND, codec.encode(self), _VERSION)

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Return what a file holds.

        Raises
        ------
        CheckpointError
            If it is no checkpoint, of another version, or damaged.
        """
        try:
            body = unseal(_KIND, data, _VERSION)
        except RecordError as error:
            raise CheckpointError(str(error)) from error
        found = decode(body, cls)
        # It becomes part of the names of files.
        if not _FIT_NAME.fullmatch(found.fit) or found.number < 1:
            raise CheckpointError(f"its fit has the invalid name {found.fit!r}.")
        return found


def new_fit_name() -> str:
    """Return a name for a fit, later ones after earlier ones in alphabetical order."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
