"""From URLs and the environment to a client; and what is told of one that fails, never a secret."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any, cast

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError

from ckptmgr.errors import (
    CkptmgrError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
    UsageError,
)
from ckptmgr.store.base import PutResult
from ckptmgr.store.registry import open_store
from ckptmgr_objectstore.failures import error_of
from ckptmgr_objectstore.store import PAGE_KEYS, ObjectStore
from servers.buckets import Bucket
from servers.ceph import KEY, free_port
from servers.ceph import SECRET as KEY_SECRET

SECRET = "c2VjcmV0" + secrets.token_hex(8)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks for credentials anywhere but here."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")


@pytest.mark.parametrize("url", ["s3://bucket/a/run", "gs://bucket/a/run", "az://container/a/run"])
async def test_the_registry_opens_each_scheme(url: str) -> None:
    store = open_store(url + "/")
    assert isinstance(store, ObjectStore)
    assert store.url == url
    assert store.exclusive is True, "what the provider documents"
    assert store.durable_on_return
    assert store._client.prefix == "a/run"
    await store.aclose()


@pytest.mark.parametrize(
    ("url", "variable", "endpoint", "exclusive"),
    [
        ("s3://b", "AWS_ENDPOINT_URL", "https://s3.eu-west-1.amazonaws.com", True),
        ("s3://b", "AWS_ENDPOINT_URL", "https://s3.cn-north-1.amazonaws.com.cn", True),
        ("s3://b", "AWS_ENDPOINT_URL", "http://127.0.0.1:8080", None),
        ("s3://b", "AWS_ENDPOINT", "https://ceph.example.org", None),
        ("s3://b", "AWS_ENDPOINT_URL_S3", "https://amazonaws.com.example.org", None),
        ("s3://b", "AWS_ENDPOINT_URL_S3", "https://notamazonaws.com", None),
        ("gs://b", "GOOGLE_BASE_URL", "http://127.0.0.1:4443", None),
        ("gs://b", "GOOGLE_BASE_URL", "https://storage.googleapis.com", True),
        ("az://c", "AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:10000/account", None),
        ("az://c", "AZURE_STORAGE_ENDPOINT", "https://account.blob.core.windows.net", True),
        ("az://c", "AZURE_STORAGE_USE_EMULATOR", "true", None),
    ],
)
def test_only_a_provider_that_documents_it_is_exclusive(
    url: str, variable: str, endpoint: str, exclusive: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, endpoint)
    assert open_store(url).exclusive is exclusive


def test_what_a_url_can_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no '\\?'"):
        open_store("s3://bucket/run?region=x")
    with pytest.raises(UsageError, match="carries credentials"):
        open_store(f"s3://key:{SECRET}@bucket/run")
    for path in ("a//run", "a/../run", "./run"):
        with pytest.raises(UsageError, match="an empty part"):
            open_store(f"s3://bucket/{path}")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(UsageError, match=r"refuses its settings: .*MissingAccount"):
        open_store("az://container/run")


def test_a_profile_needs_the_package_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "training")
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    with pytest.raises(UsageError, match="AWS_PROFILE: needs boto3"):
        open_store("s3://bucket/run")
    aws(monkeypatch)
    assert open_store("s3://bucket/run").exclusive is True


async def test_a_profile_is_read_by_the_package(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text(
        f"[training]\naws_access_key_id={KEY}\naws_secret_access_key={KEY_SECRET}\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_PROFILE", "training")
    store = open_store(f"s3://{bucket.name}/run")
    assert await store.put_new("a", [memoryview(b"x")]) is PutResult.OK
    assert bucket.read("run/a") == b"x"


async def test_a_long_listing_comes_in_pages() -> None:
    client = obstore.store.MemoryStore()
    names = [f"a/{number:04d}" for number in range(2 * PAGE_KEYS + 1)]
    for name in names:
        obstore.put(client, name, b"")
    store = ObjectStore("s3://bucket", cast("Any", client), exclusive=True)
    pages = [len(page) async for page in store.list_pages("a/")]
    assert pages == [PAGE_KEYS, PAGE_KEYS, 1]
    assert await store.list("a/") == names


PROFILES = f"""
[profile nothing]
region = us-east-1
[profile refused]
credential_process = sh -c "echo {SECRET} >&2; exit 1"
[profile rubbish]
credential_process = echo {SECRET}
[profile gone]
credential_process = /nowhere/{SECRET}
"""


@pytest.mark.parametrize(
    ("profile", "kind", "said"),
    [
        ("missing", UsageError, "names no profile"),
        ("nothing", StorePermissionError, "credentials can not be had"),
        ("refused", StorePermissionError, "credentials can not be had"),
        ("rubbish", StorePermissionError, "credentials can not be had"),
        ("gone", StorePermissionError, "credentials can not be had"),
    ],
)
def test_a_profile_without_credentials_says_so(
    profile: str, kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(PROFILES)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "nothing"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(kind, match=said) as caught:
        open_store("s3://bucket/run")
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__, "a traceback would show what others said"


async def test_a_profile_whose_credentials_end_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vault gives some that end in a second, and none any more."""
    once, used = tmp_path / "once", tmp_path / "used"
    given = (
        '{"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "B", "SessionToken": "C", '
        '"Expiration": "2020-01-01T00:00:00Z"}'
    )
    refused = f"{{ echo {SECRET} >&2; exit 1; }}"
    once.write_text(f"#!/bin/sh\nmkdir {used} || {refused}\necho '{given}'\n")
    once.chmod(0o700)
    (tmp_path / "config").write_text(f"[profile vault]\ncredential_process = {once}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "vault")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for error in await errors_of("s3://bucket/run"):
        assert type(error) is StorePermissionError, error
        assert "credentials can not be had" in str(error)
        assert SECRET not in str(error)


# ---- failures -----------------------------------------------------------------


async def test_a_client_that_may_not_put_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(StoreError, match="Leave AWS_CONDITIONAL_PUT away") as caught:
        await open_store("s3://bucket/run").put_new("a/b", [memoryview(b"x")])
    assert type(caught.value) is StoreError, "which nobody tries again"


async def errors_of(url: str) -> list[CkptmgrError]:
    """What each operation on a store that can not work raises."""
    store = open_store(url)
    calls = (
        store.put_new("a/b", [memoryview(b"x")]),
        store.get("a/b"),
        store.get("a/b", 0, 1),
        store.list("a/"),
        store.delete("a/b"),
    )
    found = []
    for call in calls:
        with pytest.raises(CkptmgrError) as caught:
            await call
        found.append(caught.value)
    return found


def aws(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    given = {"AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "KEY", **settings}
    for name, value in {"AWS_SECRET_ACCESS_KEY": SECRET, **given}.items():
        monkeypatch.setenv(name, value)


async def test_an_endpoint_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    for error in await errors_of("s3://bucket/run"):
        assert type(error) is StoreUnreachableError
        assert str(error).startswith("a/")
        assert "no connection" in str(error)


async def test_plain_http_is_allowed_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    aws(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}", AWS_ALLOW_HTTP="false")
    for error in await errors_of("s3://bucket/run"):
        assert type(error) is StoreError
        assert "AWS_ALLOW_HTTP" in str(error)


async def test_without_credentials_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain ends at the host's metadata service: here, one that does not listen."""
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    for error in await errors_of("s3://bucket/run"):
        assert type(error) is StorePermissionError
        assert "credentials can not be had" in str(error)


async def test_a_bucket_that_does_not_exist(bucket: Bucket) -> None:
    put, get, part, listing, delete = await errors_of(f"s3://{bucket.name}-missing/run")
    for error in (put, get, part, listing, delete):
        assert type(error) is StoreError, error
        assert "bucket does not exist" in str(error)


async def test_a_wrong_secret_is_refused_and_not_told(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for error in await errors_of(f"s3://{bucket.name}/run"):
        assert type(error) is StorePermissionError
        assert SECRET not in str(error)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    for error in await errors_of(f"s3://{bucket.name}/run"):
        assert SECRET not in str(error)


async def test_signed_urls_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Azure SAS token travels in the URL, and the client's errors hold the URL."""
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"sv=2022&sig={SECRET}")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    for error in await errors_of("az://container/run"):
        assert type(error) is StoreUnreachableError
        shown = f"{error}{error.__cause__}"
        assert SECRET not in shown
        assert error.__suppress_context__, "a traceback would show the client's text"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            FileNotFoundError("status code: 404 Not Found: <Code>NoSuchKey</Code>"),
            ObjectNotFoundError,
        ),
        (FileNotFoundError("status code: 404 Not Found: <Code>NoSuchBucket</Code>"), StoreError),
        (PermissionDeniedError("status code: 403 F: <Code>QuotaExceeded</Code>"), StoreFullError),
        (
            PermissionDeniedError("status code: 403 F: <Code>AccessDenied</Code>"),
            StorePermissionError,
        ),
        (GenericError("status code: 301 Moved: <Code>PermanentRedirect</Code>"), StoreError),
        (GenericError("status code: 400 B: <Code>AuthorizationHeaderMalformed</Code>"), StoreError),
        (GenericError("status code: 400 B: <Code>RequestTimeout</Code>"), StoreUnreachableError),
        (GenericError("status code: 503 S: <Code>SlowDown</Code>"), StoreUnreachableError),
        (AlreadyExistsError("status code: 409 Conflict"), StoreUnreachableError),
        (GenericError("HTTP error\nkind: Timeout"), StoreUnreachableError),
        (GenericError("anything else"), StoreUnreachableError),
    ],
)
def test_every_answer_has_a_type(error: Exception, kind: type[StoreError]) -> None:
    found = error_of(error, "a/b")
    assert type(found) is kind
    assert found.subject == "a/b"
