"""What surrounds a record in a file: what it is, its version and a checksum.

A line of text that names the format and its version, the SHA-256 of the rest, and the rest.
"""

from __future__ import annotations

import hashlib

from nlsq_dask.errors import RecordError

_VERSION = 1
_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_LINE_LENGTH = 64


def _magic(kind: str) -> bytes:
    return f"nlsq_dask {kind}, version ".encode()


def seal(kind: str, body: bytes) -> bytes:
    """Return the contents of a file of some kind, such as "checkpoint"."""
    digest = hashlib.sha256(body).digest()
    return b"".join([_magic(kind), str(_VERSION).encode(), b"\n", digest, body])


def unseal(kind: str, data: bytes) -> bytes:
    """Return the body of a file of that kind.

    Raises
    ------
    RecordError
        If it is another kind of file, of another version, or damaged.
    """
    head, newline, _ = data[:_MAX_LINE_LENGTH].partition(b"\n")
    magic = _magic(kind)
    if not head.startswith(magic) or not newline:
        raise RecordError(f"it is not a {kind} of nlsq_dask, or its start is damaged.")
    version = head.removeprefix(magic).decode(errors="replace")
    if version != str(_VERSION):
        raise RecordError(
            f"its format has version {version}; this version of nlsq_dask reads {_VERSION}."
        )
    start = len(head) + 1
    digest, body = data[start : start + _DIGEST_BYTES], data[start + _DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != digest:
        raise RecordError("it is damaged: its checksum does not agree with its contents.")
    return body
