"""From a URL and the environment to a client of one bucket."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from ckptmgr.config import STORE_TIMEOUT_SECONDS
from ckptmgr.errors import StorePermissionError, UsageError
from ckptmgr.store.retry import BYTES_PER_SECOND_MIN
from ckptmgr_objectstore.failures import harmless
from ckptmgr_objectstore.store import SINGLE_PUT_BYTES_MAX, ObjectStore

if TYPE_CHECKING:
    from obstore.store import RetryConfig

REQUEST_SECONDS_MAX = STORE_TIMEOUT_SECONDS + SINGLE_PUT_BYTES_MAX / BYTES_PER_SECOND_MIN
"""Bound of one request with its whole body: enough for the largest at the lowest rate. Whoever
calls has a deadline by the number of bytes (`RetryingStore`); this one is for those who have none,
and the client's own 30 s would cut a pack on a slow link."""

CONFIG = {"timeout": f"{REQUEST_SECONDS_MAX:.0f}s", "connect_timeout": "10s"}
"""Given as configuration, not as `client_options`: those would hide what the environment says."""

NO_RETRIES: RetryConfig = {"max_retries": 0}
"""`RetryingStore` repeats, and must count every try: a conditional put whose first answer was lost
is refused the second time, because of itself."""

T = TypeVar("T")

_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_GS_ENDPOINTS = ("GOOGLE_BASE_URL",)
_AZ_ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")

_S3_HOSTS = (".amazonaws.com", ".amazonaws.com.cn")
_GS_HOSTS = (".googleapis.com",)
_AZ_HOSTS = (
    ".blob.core.windows.net",
    ".blob.core.usgovcloudapi.net",
    ".blob.core.chinacloudapi.cn",
)


def open_store(url: str) -> ObjectStore:
    """The store of an s3://, gs:// or az:// URL; it connects to nothing yet.

    Raises:
        UsageError: not such a URL, or an environment that the client does not understand.
    """
    scheme, _, place = url.partition("://")
    if "?" in url or "#" in url:
        raise UsageError(
            f"{scheme} URLs have no '?' and no '#'",
            subject=repr(url.partition("?")[0]),
            hint="Give options by the environment, as docs/object-stores.md lists them.",
        )
    bucket, slash, prefix = place.partition("/")
    if slash and {"", ".", ".."} & set(prefix.split("/")):
        raise UsageError("has a path with an empty part, '.' or '..'", subject=repr(url))
    client, exclusive = _OPENERS[scheme](bucket, prefix)
    return ObjectStore(url, client, exclusive=exclusive)


def _s3(bucket: str, prefix: str) -> tuple[S3Store, bool | None]:
    # One object, one DELETE: not every server has the call that deletes many, and none is faster.
    options = _options(prefix, disable_bulk_delete=True)
    if "AWS_PROFILE" in os.environ and "AWS_ACCESS_KEY_ID" not in os.environ:
        options["credential_provider"] = _profile()
    return _made(lambda: S3Store(bucket, **options)), _exclusive(_S3_ENDPOINTS, _S3_HOSTS)


def _gs(bucket: str, prefix: str) -> tuple[GCSStore, bool | None]:
    options = _options(prefix)
    return _made(lambda: GCSStore(bucket, **options)), _exclusive(_GS_ENDPOINTS, _GS_HOSTS)


def _az(container: str, prefix: str) -> tuple[AzureStore, bool | None]:
    options = _options(prefix)
    exclusive = _exclusive(_AZ_ENDPOINTS, _AZ_HOSTS)
    if os.environ.get("AZURE_STORAGE_USE_EMULATOR", "false").lower() not in ("", "0", "false"):
        exclusive = None
    return _made(lambda: AzureStore(container, **options)), exclusive


_OPENERS: dict[str, Callable[[str, str], tuple[Any, bool | None]]] = {
    "s3": _s3,
    "gs": _gs,
    "az": _az,
}


def _options(prefix: str, **more: Any) -> dict[str, Any]:
    return {
        "prefix": prefix or None,
        "config": CONFIG,
        "retry_config": NO_RETRIES,
        **more,
    }


def _made(make: Callable[[], T]) -> T:
    try:
        return make()
    except (BaseError, ValueError) as error:
        raise UsageError(
            f"the client refuses its settings: {harmless(error)}",
            hint="Look at the AWS_, GOOGLE_ or AZURE_ variables in the environment.",
        ) from None


def _exclusive(variables: tuple[str, ...], hosts: tuple[str, ...]) -> bool | None:
    """True where the provider documents that one conditional put wins: without an endpoint of
    the user's own, or with one of the provider's hosts. What others do is not known here.
    """
    for name in variables:
        endpoint = os.environ.get(name)
        if endpoint:
            host = urlsplit(endpoint).hostname or ""
            return True if f".{host}".endswith(hosts) else None
    return True


def _profile() -> Any:
    """The credentials of AWS_PROFILE, which the client itself does not read.

    Raises:
        UsageError: there is no such profile, or nobody to read it.
        StorePermissionError: it gives no credentials, perhaps for now.
    """
    try:
        from botocore import exceptions as botocore  # type: ignore[import-untyped]
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise UsageError(
            "needs boto3",
            subject="AWS_PROFILE",
            hint="Run `pip install ckptmgr-objectstore[profile]`, or set AWS_ACCESS_KEY_ID.",
        ) from None
    try:
        return Boto3CredentialProvider()
    except botocore.ProfileNotFound:
        raise UsageError(
            "names no profile in ~/.aws",
            subject="AWS_PROFILE",
            hint="Make it, or correct the name.",
        ) from None
    except (botocore.BotoCoreError, botocore.ClientError, OSError, ValueError) as error:
        # The words of a command, a vault or a server: they may hold a secret.
        raise StorePermissionError(
            f"credentials can not be had: {type(error).__name__}",
            subject="AWS_PROFILE",
            hint="Try `aws sts get-caller-identity` as the user of the daemon.",
        ) from None
