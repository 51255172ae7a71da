"""``Checkpoint``: the whole state of a fit as one file.

A line of text that names the format and its version, the SHA-256 of the rest, and the rest: one
record, see ``codec``. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from nlsq_dask.checkpoints.codec import decode, encode
from nlsq_dask.checkpoints.identity import Identity
from nlsq_dask.errors import CheckpointError

_VERSION = 1
_MAGIC = b"nlsq_dask checkpoint, version "
_FIT_NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """The state of a fit.

    Attributes
    ----------
    fit : str
        Name of the fit, the same through all its resumes.
    number : int
        Of the checkpoint, from 1.
    identity : Identity
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
    identity: Identity
    phase_seconds: float
    entries: dict[str, bytes]
    events: list[tuple[str, bytes]]

    def to_bytes(self) -> bytes:
        """Return the contents of a file."""
        body = encode(self)
        digest = hashlib.sha256(body).digest()
        return b"".join([_MAGIC, str(_VERSION).encode(), b"\n", digest, body])

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Return what a file holds.

        Raises
        ------
        CheckpointError
            If it is no checkpoint, of another version, or damaged.
        """
        head, newline, _ = data[:64].partition(b"\n")
        if not head.startswith(_MAGIC) or not newline:
            raise CheckpointError("it is not a checkpoint of nlsq_dask, or its start is damaged.")
        version = head.removeprefix(_MAGIC).decode(errors="replace")
        if version != str(_VERSION):
            raise CheckpointError(
                f"its format has version {version}; this version of nlsq_dask reads {_VERSION}."
            )
        start = len(head) + 1
        digest, body = data[start : start + _DIGEST_BYTES], data[start + _DIGEST_BYTES :]
        if hashlib.sha256(body).digest() != digest:
            raise CheckpointError("it is damaged: its checksum does not agree with its contents.")
        found = decode(body, cls)
        # It becomes part of the names of files.
        if not _FIT_NAME.fullmatch(found.fit) or found.number < 1:
            raise CheckpointError(f"it is of a fit named {found.fit!r}, which no fit is.")
        return found


def new_fit_name() -> str:
    """Return a name for a fit, later ones after earlier ones in alphabetical order."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
