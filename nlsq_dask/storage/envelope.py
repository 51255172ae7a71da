"""What surrounds a record in a file: what it is, its version and a checksum.

A line of text that names the format and its version, the SHA-256 of the rest, and the rest.
"""

from __future__ import annotations

import hashlib

from nlsq_dask.errors import RecordError

_DIGEST_BYTES = hashlib.sha256().digest_size
_LONGEST_LINE = 64


def _magic(kind: str) -> bytes:
    return f"nlsq_dask {kind}, version ".encode()


def seal(kind: str, body: bytes, version: int = 1) -> bytes:
    """Return the contents of a file of some kind, such as "checkpoint"."""
    digest = hashlib.sha256(body).digest()
    return b"".join([_magic(kind), str(version).encode(), b"\n", digest, body])


def unseal(kind: str, data: bytes, version: int = 1) -> bytes:
    """Return the body of a file of that kind.

    Raises
    ------
    RecordError
        If it is another kind of file, of another version, or damaged.
    """
    head, newline, _ = data[:_LONGEST_LINE].partition(b"\n")
    magic = _magic(kind)
    if not head.startswith(magic) or not newline:
        raise RecordError(f"it is not a {kind} of nlsq_dask, or its start is damaged.")
    written = head.removeprefix(magic).decode(errors="replace")
    if written != str(version):
        raise RecordError(
            f"its format has version {written}; this version of nlsq_dask reads {version}."
        )
    start = len(head) + 1
    digest, body = data[start : start + _DIGEST_BYTES], data[start + _DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != digest:
        raise RecordError("it is damaged: its checksum does not agree with its contents.")
    return body
