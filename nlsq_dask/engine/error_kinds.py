"""``ErrorKind``: the kind of an error that a read or write raised, which decides about retries.

Each library of a store has exceptions of its own. They are recognized by the names of their classes
and by their attributes, so that no such library is imported.
"""

from __future__ import annotations

import errno
import re
import ssl
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

# Errors of a program, not of a store: a retry does not help, and skipping rows would hide them.
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)

_OUTAGE_ERRNOS = {
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,  # a server of NFS was restarted
    errno.ETIMEDOUT,
}
# Names of classes; an error of a subclass is of the same kind.
_OUTAGE_NAMES = {
    "TimeoutError",  # built-in: also of asyncio, fsspec and sockets
    "ConnectionError",  # built-in, botocore, requests
    "gaierror",  # no answer from a name server
    "SSLEOFError",
    "IncompleteRead",  # http.client, urllib3
    "IncompleteReadError",  # asyncio, botocore, Azure
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "HTTPClientError",  # botocore
    "ConnectTimeoutError",  # urllib3
    "NewConnectionError",
    "ProtocolError",
    "ReadTimeoutError",
    "Timeout",  # requests
    "ChunkedEncodingError",
    "TransportError",  # httpx, Google
    "ServiceRequestError",  # Azure
    "ServiceResponseError",
}
_DENIED_NAMES = {
    "PermissionError",  # built-in, also raised by s3fs
    "PermissionDeniedError",  # obstore
    "UnauthenticatedError",
    "NoCredentialsError",  # botocore
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "DefaultCredentialsError",  # Google
    "RefreshError",
    "ClientAuthenticationError",  # Azure
}
_MISSING_NAMES = {"FileNotFoundError", "KeyError", "NotFoundError"}
# Codes of S3 whose HTTP status, 400, says nothing.
_S3_CODES = {"ExpiredToken": 401, "InvalidToken": 401, "RequestTimeout": 408}

# Libraries written in Rust, whose errors say in their text alone what happened.
_TEXT_LIBRARIES = {"obstore", "pyo3_object_store", "icechunk"}
_STATUS_IN_TEXT = re.compile(r"\bstatus(?: code)?: (\d{3})\b")
_S3_CODE_IN_TEXT = re.compile(r"<Code>(\w+)</Code>")
_NO_CREDENTIALS_IN_TEXT = re.compile(r"169\.254\.169\.254|metadata\.google|credentials", re.I)
_OUTAGE_IN_TEXT = re.compile(
    r"error sending request|response body|timed out|\btimeout|dispatch failure"
    r"|connection (?:refused|reset|closed|error)",
    re.I,
)
_MAX_TEXT = 500  # characters of an error that are quoted


class ErrorKind(Enum):
    """Kind of an error that a read or write raised."""

    OUTAGE = "outage"  # of a network or server, which may end: retried for ``retry_seconds``
    DENIED = "denied"  # credentials are missing or insufficient: not retried
    MISSING = "missing"  # not in the store: not retried
    PROGRAM = "program"  # of the caller's code or a library: not retried, never skipped
    OTHER = "other"  # retried ``max_retries_per_batch`` times


def classify(error: BaseException) -> ErrorKind:
    """Return the kind of an error; the errors that caused it count, too.

    Parameters
    ----------
    error : BaseException
    """
    if isinstance(error, _PROGRAM_ERRORS):
        return ErrorKind.PROGRAM
    kinds = [
        kind
        for each, is_stated in _causes(error)
        if (kind := _own_kind(each)) is not None
        # A KeyError that a library handled, as of a cache, is no reason.
        and (is_stated or kind is not ErrorKind.MISSING)
    ]
    first = kinds[0] if kinds else ErrorKind.OTHER
    # fsspec reports any failure of a web server, and an unreachable reference, as a missing file.
    if first is ErrorKind.MISSING and ErrorKind.OUTAGE in kinds:
        return ErrorKind.OUTAGE
    return first


def describe(error: BaseException) -> str:
    """Return class and message of an error in one line.

    The message ends at the first empty line.
    """
    text = _first_paragraph(error).rstrip(".")
    return f"{type(error).__name__}: {text[:_MAX_TEXT]}" if text else type(error).__name__


def _first_paragraph(error: BaseException) -> str:
    """Return the first paragraph of a message in one line; obstore dumps its source after it."""
    return " ".join(str(error).strip().partition("\n\n")[0].split())


def _causes(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """Yield an error, then the error that caused it, and so on.

    Each comes with whether the cause is stated; otherwise, the error was raised while it was
    handled.
    """
    seen: set[int] = set()
    pending: list[tuple[Any, bool]] = [(error, True)]
    while pending:
        each, is_stated = pending.pop()
        if not isinstance(each, BaseException) or id(each) in seen:
            continue
        seen.add(id(each))
        yield each, is_stated
        if each.__cause__ is not None:
            pending.append((each.__cause__, is_stated))
        elif not each.__suppress_context__:
            pending.append((each.__context__, False))
        pending.append((_attribute(each, "reason"), is_stated))  # urllib, urllib3


def _own_kind(error: BaseException) -> ErrorKind | None:
    """Return the kind of an error by itself; None if it may be any."""
    names = {each.__name__ for each in type(error).__mro__}
    if isinstance(error, ssl.SSLCertVerificationError):
        return ErrorKind.OTHER
    is_text = type(error).__module__.partition(".")[0] in _TEXT_LIBRARIES
    text = _first_paragraph(error) if is_text else ""
    status = _http_status(error) or _status_in(text)
    if status in (401, 403, 407) or names & _DENIED_NAMES:
        return ErrorKind.DENIED
    if status in (404, 410) or names & _MISSING_NAMES:
        return ErrorKind.MISSING
    if status is not None and (status in (408, 429) or status >= 500):
        return ErrorKind.OUTAGE
    if names & _OUTAGE_NAMES or (isinstance(error, OSError) and error.errno in _OUTAGE_ERRNOS):
        return ErrorKind.OUTAGE
    if _NO_CREDENTIALS_IN_TEXT.search(text):
        return ErrorKind.DENIED
    is_outage = status is None and _OUTAGE_IN_TEXT.search(text)
    return ErrorKind.OUTAGE if is_outage else None


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries; None if there is none."""
    response = _attribute(error, "response")
    if isinstance(response, Mapping):  # botocore
        by_code = _S3_CODES.get(str(_item(response, "Error", "Code")))
        return by_code or _as_status(_item(response, "ResponseMetadata", "HTTPStatusCode"))
    for owner in (error, response):
        for name in ("status", "status_code", "code"):
            if (status := _as_status(_attribute(owner, name))) is not None:
                return status
    return None


def _status_in(text: str) -> int | None:
    """Return the HTTP status that the message of a library in Rust quotes."""
    code, status = _S3_CODE_IN_TEXT.search(text), _STATUS_IN_TEXT.search(text)
    if code is not None and code[1] in _S3_CODES:
        return _S3_CODES[code[1]]
    return None if status is None else int(status[1])


def _as_status(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return int(value) if isinstance(value, int) and 100 <= value < 600 else None


def _item(mapping: Mapping[str, Any], outer: str, inner: str) -> Any:
    within = mapping.get(outer)
    return within.get(inner) if isinstance(within, Mapping) else None


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception:  # properties run code of any library
        return None
