"""URLs: one spelling each, no secrets, and errors that name the next step."""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ckptmgr.errors import UsageError
from ckptmgr.store import registry
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.memory import MemoryStore
from ckptmgr.store.registry import normalise_url, open_store, path_of_file_url

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/data/run7", "file:///data/run7"),
        ("/data//run7/", "file:///data/run7"),
        ("//data/run7", "file:///data/run7"),
        ("/data/../x", "file:///x"),
        ("file:///data/run7/", "file:///data/run7"),
        ("FILE:///data", "file:///data"),
        ("file://localhost/data", "file:///data"),
        ("file:///a%20b", "file:///a%20b"),
        ("/a b?c#d", "file:///a%20b%3Fc%23d"),
        ("memory://x/", "memory://x"),
        ("s3://bucket/run7/?region=eu", "s3://bucket/run7/?region=eu"),
        ("S3://bucket/Run7/", "s3://bucket/Run7"),
    ],
)
def test_every_url_has_one_spelling(given: str, expected: str) -> None:
    assert normalise_url(given) == expected
    assert normalise_url(expected) == expected


@pytest.mark.parametrize("given", ["./run7", "run7", "a/../run7"])
def test_a_relative_path_starts_in_the_working_directory(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalise_url(given) == (tmp_path / "run7").as_uri()


def test_a_strange_path_comes_back_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "a b%?#ü")
    assert path_of_file_url(normalise_url(path)) == path


@pytest.mark.parametrize(
    "given",
    [
        *("", "file://data/run7", "file://", "memory://", "s3:/bucket/run7", "s3://", "http://[x"),
        *("file:///x?y=1", "file:///x#y", "://x", "a\0b", "7z://x"),
    ],
)
def test_what_is_not_a_place_is_refused(given: str) -> None:
    with pytest.raises(UsageError):
        normalise_url(given)


@pytest.mark.parametrize(
    "given",
    [
        f"s3://key:{SECRET}@bucket/run7",
        f"s3://{SECRET}@bucket/run7",
        f"s3://key:{SECRET}/more@bucket/run7",
        f"s3://key:[{SECRET}@bucket/run7",
        f"s3:/key:{SECRET}@bucket/run7",
        f"file://user:{SECRET}@host/run7",
        f"az://box/run7?sv=1&sig={SECRET}",
        f"s3://bucket/run7?aws_secret_access_key={SECRET}",
        f"s3://bucket/run7?X-Amz-Signature={SECRET}",
        f"gs://bucket/run7?access_token={SECRET}",
    ],
)
def test_credentials_are_refused_and_never_shown(given: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(given)
    shown = f"{caught.value}{caught.value!r}{caught.value.__cause__!r}"
    assert SECRET not in shown


def test_a_parameter_that_is_no_secret_passes() -> None:
    assert normalise_url("s3://b/x?design=1&region=eu") == "s3://b/x?design=1&region=eu"


def test_built_in_schemes(tmp_path: Path) -> None:
    local = open_store(str(tmp_path / "x"))
    assert isinstance(local, LocalStore)
    assert local.url == (tmp_path / "x").as_uri()
    assert isinstance(open_store("memory://x"), MemoryStore)
    asyncio.run(local.aclose())


def test_opening_makes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(str(tmp_path / "x"))
        assert await store.list("") == []
        await store.aclose()

    asyncio.run(main())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("scheme", "plugin"),
    [
        ("s3", "ckptmgr-objectstore"),
        ("gs", "ckptmgr-objectstore"),
        ("az", "ckptmgr-objectstore"),
        ("hf3fs", "ckptmgr-hf3fs"),
    ],
)
def test_a_missing_plugin_is_named(
    scheme: str, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    with pytest.raises(UsageError, match=f"pip install {plugin}"):
        open_store(f"{scheme}://bucket/run7")


def test_an_unknown_scheme_names_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("zz", "ckptmgr.store.memory:MemoryStore", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(UsageError, match="file, memory, zz"):
        open_store("ftp://host/run7")


def test_a_plugin_is_called_with_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("zz", "ckptmgr.store.memory:MemoryStore", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert open_store("zz://place/").url == "memory://zz://place"


def test_a_plugin_can_not_take_a_built_in_scheme(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    points = [EntryPoint("file", "ckptmgr.store.memory:MemoryStore", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert isinstance(open_store(str(tmp_path)), LocalStore)


def test_a_plugin_that_fails_is_an_error_of_its_store_and_tells_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(url: str) -> Store:
        raise LookupError(f"token 1234 is refused for {url}")

    monkeypatch.setattr(MemoryStore, "opened", failing, raising=False)
    value = "ckptmgr.store.memory:MemoryStore.opened"
    points = [EntryPoint("zz", value, registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(UsageError, match="fails to open the store: LookupError") as caught:
        open_store("zz://place")
    assert "1234" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("value", ["ckptmgr_no_such_thing:open", "ckptmgr.store.memory:Nothing"])
def test_a_broken_plugin_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    points = [EntryPoint("zz", value, registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(UsageError, match="can not be imported"):
        open_store("zz://place")
