"""What a failure of the client is to a store: typed, with the object's name, without a secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import (
    BaseError,
    InvalidPathError,
)

from ckptmgr.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
)

NO_PLACE = {"NoSuchBucket", "ContainerNotFound", "AccountNotFound"}
"""Codes of a place that is not there; of GCS too, which answers as S3 does."""

FULL = {"QuotaExceeded", "StorageFull", "XMinioStorageFull", "InsufficientStorage"}

HOPELESS = {"AuthorizationHeaderMalformed", "InvalidBucketName", "EntityTooLarge"}
HOPELESS_STATUS = {301, 405, 413, 501}
"""Redirects to another region, and what the server does not offer: a retry gets the same."""

_CREDENTIALS = re.compile(
    r"/latest/(api/token|meta-data)|/metadata/identity|metadata\.google|computeMetadata"
    r"|sts\.[\w.-]*amazonaws|AssumeRoleWithWebIdentity|oauth2|/v2/credentials|\bPyErr\b"
)
"""Where the client asks for credentials, so that a failure is not of the store; it calls Python for
nothing else than those of a profile."""

_NO_RANGE = re.compile(r"\b(StartTooLarge|ParseContentRange)\b")
"""The client's words for an answer that has no such range but says 206: Azure's emulator."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,80})</Code>")
_KIND = re.compile(r"\bkind: (Connect|Timeout|Interrupted|Decode|Request)\b")
_CAUSE = re.compile(r"\bsource: ([A-Z][A-Za-z]{1,60})\b")
_SAID = {
    "Connect": "no connection",
    "Timeout": "no answer in time",
    "Interrupted": "the connection broke",
    "Decode": "the answer can not be read",
    "Request": "the request can not be sent",
}


class RangeRefusedError(StoreUnreachableError):
    """The server has no byte in the range; how long the object is, only it knows."""


@contextmanager
def typed(key: str) -> Iterator[None]:
    """Raise the client's errors as ours."""
    try:
        yield
    except (BaseError, OSError, ValueError, NotImplementedError) as error:
        raise error_of(error, key) from None  # its text may show a signed URL


def error_of(error: Exception, key: str) -> StoreError:
    """The error of ours that says the same about `key`."""
    text = str(error)
    status, code = _first(_STATUS, text), _first(_CODE, text)
    message = harmless(error)
    if code in NO_PLACE:
        return no_place(key)
    if "BadScheme" in text:
        return StoreError(
            "the endpoint is http, which is not allowed",
            subject=key,
            hint="Give an https endpoint, or set AWS_ALLOW_HTTP=true (AZURE_, GOOGLE_).",
        )
    if isinstance(error, NotImplementedError):
        return StoreError(
            "the client's settings switch off what this needs",
            subject=key,
            hint="Leave AWS_CONDITIONAL_PUT away: a put must not overwrite what is there.",
        )
    if isinstance(error, FileNotFoundError):
        return ObjectNotFoundError("does not exist", subject=key)
    if code in FULL or status == "507":
        return StoreFullError(message, subject=key)
    if _CREDENTIALS.search(text):
        return StorePermissionError(
            f"credentials can not be had: {message}",
            subject=key,
            hint="Set them in the environment of the daemon, or give its host a role.",
        )
    if status in ("401", "403"):  # of a list, the client knows no type
        return StorePermissionError(message, subject=key)
    if status == "416" or _NO_RANGE.search(text):
        return RangeRefusedError(message, subject=key)
    hopeless = code in HOPELESS or (status and int(status) in HOPELESS_STATUS)
    if hopeless or isinstance(error, InvalidPathError):
        return StoreError(message, subject=key)
    return StoreUnreachableError(message, subject=key)


def no_place(key: str) -> StoreError:
    """The bucket or container of `key` does not exist, which no retry changes."""
    return StoreError(
        "the bucket does not exist",
        subject=key,
        hint="Make it, or correct the URL and the endpoint.",
    )


def harmless(error: Exception) -> str:
    """What the client tells, by words that can not carry a secret.

    Its own text holds URLs, which may be signed, and the server's answer, which may repeat what was
    sent; of these only a status, an error code, a kind and names of causes
    are taken over.
    """
    text = str(error)
    status, code, kind = (_first(pattern, text) for pattern in (_STATUS, _CODE, _KIND))
    if status:
        return f"the server answered {status}" + (f" {code}" if code else "")
    if kind:
        return _SAID[kind]
    causes = _CAUSE.findall(text)[:4] or [type(error).__name__]
    return f"the client failed ({', '.join(causes)})"


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""
