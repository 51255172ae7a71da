"""Which errors of stores are outages, denied access or missing keys, and how they are quoted."""

from __future__ import annotations

import asyncio
import errno
import http.client
import io
import socket
import ssl
import urllib.error
from email.message import Message
from typing import Any

import pytest
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.reference import ReferenceNotReachable

from nlsq_dask.engine.error_kinds import ErrorKind, classify, describe

OUTAGE, DENIED, MISSING = ErrorKind.OUTAGE, ErrorKind.DENIED, ErrorKind.MISSING
PROGRAM, OTHER = ErrorKind.PROGRAM, ErrorKind.OTHER


def make(
    name: str, *bases: type[Exception], module: str = "library", text: str = "", **attributes: Any
) -> Exception:
    """Return an exception of a new class, as libraries have them that are not installed here."""
    new = type(name, bases or (Exception,), {"__module__": module})
    error = new(text)
    for attribute, value in attributes.items():
        setattr(error, attribute, value)
    return error


def caused(error: Exception, cause: Exception, stated: bool = True) -> Exception:
    """Return an error with another one as its cause, or raised while the other was handled."""
    if stated:
        error.__cause__ = cause
    else:
        error.__context__ = cause
    return error


def boto(status: int, code: str) -> Exception:
    response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}
    return make("ClientError", module="botocore.exceptions", response=response)


def obstore(text: str, name: str = "GenericError") -> Exception:
    return make(name, module="obstore.exceptions", text=text)


def url_error(status: int) -> Exception:
    return urllib.error.HTTPError("http://host", status, "", Message(), io.BytesIO())


class Response:
    """The response of requests, which is false if the status is an error."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code

    def __bool__(self) -> bool:
        return False


class DeprecatedCodeError(Exception):
    """An error with a property that cannot be read."""

    @property
    def code(self) -> int:
        raise DeprecationWarning("code")


HTTP = "Generic S3 error: Error performing GET http://host/b/y/c/0 in 4s, after 10 retries"
DUMP = f"""{HTTP}, max_retries: 10, retry_timeout: 180s - HTTP error: error sending request

Debug source:
Generic {{
    store: "S3",
}}"""
OLD_DUMP = """Generic {
    store: "S3",
    source: RetryError(
        Status {
            status: 503,
        },
    ),
}"""
S3_503 = f"{HTTP} - Server returned non-2xx status code: 503 Service Unavailable: "
S3_400 = f"{HTTP} - Server returned non-2xx status code: 400 Bad Request:"
NO_ROLE = (
    "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 4s, after "
    "10 retries - HTTP error: error sending request"
)

CASES: list[tuple[Exception, ErrorKind]] = [
    # Python
    (ConnectionError("refused"), OUTAGE),
    (ConnectionResetError(errno.ECONNRESET, "reset"), OUTAGE),
    (BrokenPipeError(), OUTAGE),
    (TimeoutError(), OUTAGE),
    (socket.gaierror(-3, "Temporary failure in name resolution"), OUTAGE),
    (asyncio.IncompleteReadError(b"", 10), OUTAGE),
    (http.client.IncompleteRead(b""), OUTAGE),
    (http.client.RemoteDisconnected(), OUTAGE),
    (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), OUTAGE),
    (ssl.SSLCertVerificationError(1, "certificate verify failed"), OTHER),
    (urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "refused")), OUTAGE),
    (url_error(503), OUTAGE),
    (url_error(403), DENIED),
    (url_error(404), MISSING),
    (url_error(416), OTHER),
    *[
        (OSError(number, "of the network"), OUTAGE)
        for number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.ESTALE)
    ],
    (OSError(errno.EIO, "of a disk"), OTHER),
    (OSError("Can't synchronously read data"), OTHER),
    (PermissionError(errno.EACCES, "denied"), DENIED),
    (FileNotFoundError(), MISSING),
    (KeyError("c/0"), MISSING),
    (EOFError("of a codec"), OTHER),
    (RuntimeError("Zstd decompression error"), OTHER),
    (TypeError(), PROGRAM),
    (AttributeError(), PROGRAM),
    (NotImplementedError(), PROGRAM),
    # fsspec
    (FSTimeoutError(), OUTAGE),
    (caused(ReferenceNotReachable("c/0", "s3://b/file"), boto(503, "SlowDown")), OUTAGE),
    (caused(FileNotFoundError("http://host"), ConnectionRefusedError()), OUTAGE),
    (caused(KeyError("c/0"), FileNotFoundError()), MISSING),
    # s3fs, which raises an OSError from that of botocore
    (
        caused(OSError(errno.EBUSY, "Please reduce your request rate."), boto(503, "SlowDown")),
        OUTAGE,
    ),
    (caused(PermissionError(errno.EACCES, "Access Denied."), boto(403, "AccessDenied")), DENIED),
    (boto(500, "InternalError"), OUTAGE),
    (boto(400, "RequestTimeout"), OUTAGE),
    (boto(400, "ExpiredToken"), DENIED),
    (boto(404, "NoSuchKey"), MISSING),
    (boto(400, "InvalidRequest"), OTHER),
    (make("ClientError", response={}), OTHER),
    (make("ClientError", response={"Error": None}), OTHER),
    (make("NoCredentialsError"), DENIED),
    (make("EndpointConnectionError", type(make("ConnectionError"))), OUTAGE),
    (make("ReadTimeoutError", type(make("HTTPClientError"))), OUTAGE),
    # aiohttp
    (make("ClientConnectorError", type(make("ClientConnectionError", OSError))), OUTAGE),
    (make("ServerDisconnectedError", type(make("ClientConnectionError"))), OUTAGE),
    (make("ClientPayloadError"), OUTAGE),
    (make("ClientResponseError", status=502), OUTAGE),
    (make("ClientResponseError", status=429), OUTAGE),
    (make("ClientResponseError", status=401), DENIED),
    (make("ClientResponseError", status=400), OTHER),
    # requests, urllib3, httpx
    (make("HTTPError", OSError, response=Response(504)), OUTAGE),
    (make("HTTPError", OSError, response=Response(403)), DENIED),
    (make("ChunkedEncodingError"), OUTAGE),
    (make("MaxRetryError", reason=make("NewConnectionError")), OUTAGE),
    (make("ReadTimeout", type(make("TransportError"))), OUTAGE),
    # Google and Azure
    (make("HttpError", code=503), OUTAGE),
    (make("HttpError", code="404"), MISSING),
    (make("RefreshError"), DENIED),
    (make("ServiceRequestError"), OUTAGE),
    (make("HttpResponseError", status_code=403), DENIED),
    # obstore and Icechunk
    (obstore(DUMP), OUTAGE),
    (obstore(OLD_DUMP), OUTAGE),
    (obstore(S3_503), OUTAGE),
    (obstore("Generic HTTP error: HTTP error: request or response body error"), OUTAGE),
    (obstore(f"{S3_400}\n\nDebug source:\nretry_timeout: 180s"), OTHER),
    (obstore(f"{S3_400} <Error><Code>ExpiredToken</Code></Error>"), DENIED),
    (obstore(f"{S3_400} <Error><Code>RequestTimeout</Code></Error>"), OUTAGE),
    (obstore("operation timed out"), OUTAGE),
    (obstore(NO_ROLE), DENIED),
    (obstore("Object at location y/c/0 not found: status code: 404", "NotFoundError"), MISSING),
    (obstore("lacked the necessary privileges", "PermissionDeniedError"), DENIED),
    (obstore("of another kind"), OTHER),
    (make("IcechunkError", module="icechunk._python", text="dispatch failure: timeout"), OUTAGE),
    (RuntimeError("HTTP error: timeout"), OTHER),  # of no such library
    # Others
    (caused(RuntimeError("cannot read"), TimeoutError(), stated=False), OUTAGE),
    (caused(RuntimeError("Zstd"), KeyError("of a cache"), stated=False), OTHER),
    (caused(ConnectionError(), KeyError("of a cache"), stated=False), OUTAGE),
    (caused(TypeError(), TimeoutError()), PROGRAM),
    (DeprecatedCodeError(), OTHER),
]


@pytest.mark.parametrize(("error", "kind"), CASES, ids=lambda value: repr(value)[:60])
def test_the_kind_of_an_error(error: Exception, kind: ErrorKind) -> None:
    assert classify(error) is kind


def test_errors_that_cause_each_other() -> None:
    one, other = RuntimeError(), RuntimeError()
    caused(one, caused(other, one))
    assert classify(one) is OTHER


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (obstore(DUMP), f"GenericError: {DUMP.splitlines()[0]}"),
        (obstore("\n  two\n  lines.\n\nDebug"), "GenericError: two lines"),
        (KeyError("c/0"), "KeyError: 'c/0'"),
        (TimeoutError(), "TimeoutError"),
        (OSError("x" * 900), "OSError: " + "x" * 500),
    ],
)
def test_an_error_is_quoted_in_one_line(error: Exception, text: str) -> None:
    assert describe(error) == text
