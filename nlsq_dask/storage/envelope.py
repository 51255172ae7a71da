"""Header and checksum of a record in a file.

A file is a line of text with the format and its version, the SHA-256 of the body, and the body.
"""

from __future__ import annotations

import hashlib

from nlsq_dask.errors import RecordError

_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_LINE_LENGTH = 64


def _magic(kind: str) -> bytes:
    return f"nlsq_dask {kind}, version ".encode()


def seal(kind: str, body: bytes, version: int = 1) -> bytes:
    """Return the contents of a file: a header with its kind and version, checksum, and body."""
    digest = hashlib.sha256(body).digest()
    return b"".join([_magic(kind), str(version).encode(), b"\n", digest, body])


def unseal(kind: str, data: bytes, version: int = 1) -> bytes:
    """Return the body of a file, given its contents; ``kind`` and ``version`` must be as written.

    Raises
    ------
    RecordError
        If the file is damaged, or has another kind or format version.
    """
    head, newline, _ = data[:_MAX_LINE_LENGTH].partition(b"\n")
    magic = _magic(kind)
    if not head.startswith(magic) or not newline:
        raise RecordError(f"the file is not a {kind} of nlsq_dask, or its header is damaged.")
    written = head.removeprefix(magic).decode(errors="replace")
    if written != str(version):
        raise RecordError(
            f"the file has format version {written}; this version of nlsq_dask reads version "
            f"{version}."
        )
    start = len(head) + 1
    digest, body = data[start : start + _DIGEST_BYTES], data[start + _DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != digest:
        raise RecordError("the file is damaged: its checksum does not match its contents.")
    return body
